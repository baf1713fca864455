"""Small corpora on the disk and configurations that read them."""

from pathlib import Path
from typing import Any

from dstrain.data.config import DataConfig

WORDS = ["the", "old", "new", "red", "dog", "cat", "house", "tree", "sees", "finds", "under", "near", "and", "often", "runs"]


def sentences(number: int, *, suffix: str = "") -> list[str]:
    """Different sentences of two to nine words."""
    return [
        " ".join(WORDS[(row * 7 + place * (row % 5 + 1)) % len(WORDS)] + suffix for place in range(2 + row % 8))
        for row in range(number)
    ]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return path


def parallel(folder: Path, name: str, source: list[str], target: list[str]) -> dict[str, str]:
    """Write two sides; returns the recipe's entry."""
    sides = [write_lines(folder / f"{name}.{side}", lines) for side, lines in (("en", source), ("de", target))]
    return {"kind": "parallel", "source": str(sides[0]), "target": str(sides[1])}


def data_config(folder: Path, number: int = 300, **changes: Any) -> DataConfig:
    """`number` training pairs, five validation pairs, a tokenizer of 60 entries."""
    content: dict[str, Any] = {
        "train": [parallel(folder, "train", sentences(number), sentences(number, suffix="en"))],
        "valid": [parallel(folder, "valid", sentences(5), sentences(5, suffix="en"))],
        "tokenizer": {"kind": "sentencepiece", "vocab_size": 60},
    }
    return DataConfig.model_validate({**content, **changes})


def tree(directory: Path) -> dict[str, bytes]:
    """Content of all files under a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}

"""Writes what fairseq-preprocess writes, from the description of the formats only: bytes by `struct`, nothing of dstrain's."""

import struct
from collections.abc import Sequence
from pathlib import Path

CODES = {"H": 8, "I": 9, "i": 4, "q": 5, "B": 1, "h": 3}
"""fairseq's type codes by struct's letters."""


def write_mmap(prefix: Path, rows: Sequence[Sequence[int]], letter: str = "H") -> None:
    """PREFIX.bin and PREFIX.idx as the mmap implementation has them."""
    size = struct.calcsize(letter)
    ids = [token for row in rows for token in row]
    offsets = [size * sum(map(len, rows[:number])) for number in range(len(rows))]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    _file(prefix, "bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, CODES[letter], len(rows))
    _file(prefix, "idx").write_bytes(
        head + struct.pack(f"<{len(rows)}i", *map(len, rows)) + struct.pack(f"<{len(rows)}q", *offsets)
    )


def write_legacy(prefix: Path, rows: Sequence[Sequence[int]], letter: str = "i") -> None:
    """The same as the lazy and cached implementations have it."""
    ids = [token + 1 for row in rows for token in row]
    starts = [sum(map(len, rows[:number])) for number in range(len(rows) + 1)]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    _file(prefix, "bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    head = b"TNTIDX\0\0" + struct.pack("<QQQQQ", 1, CODES[letter], struct.calcsize(letter), len(rows), len(rows))
    longs = [*range(len(rows) + 1), *starts, *map(len, rows)]
    _file(prefix, "idx").write_bytes(head + struct.pack(f"<{len(longs)}q", *longs))


def write_pairs(
    directory: Path,
    piece: str,
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    *,
    pair: str = "en-de",
    write: object = write_mmap,
) -> None:
    """One piece of a split, English to German."""
    assert callable(write)
    write(directory / f"{piece}.{pair}.en", source)
    write(directory / f"{piece}.{pair}.de", target)


def write_dictionary(path: Path, words: Sequence[str]) -> None:
    """A dict.txt of these words."""
    path.write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")


def _file(prefix: Path, ending: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{ending}")

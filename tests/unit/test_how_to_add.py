"""Every list of files under "How to add" in dstrain/README.md is true: a toy variant touches these files and no other."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.support import environment
from tests.paths import ROOT
from tests.unit.toy_variants import PROGRAM, RECIPE, TOYS, Edit

MAP = (ROOT / "dstrain" / "README.md").read_text(encoding="utf-8")


def lists_of_files() -> dict[str, set[str]]:
    """Heading -> files of the list below it; NAME stands for the variant's name."""
    chapter = MAP.split("\n## How to add\n")[1].split("\n## ")[0]
    sections = re.split(r"^### ", chapter, flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0]: {name.replace("NAME", "toy") for name in re.findall(r"^- `([^`]+)`", section, re.MULTILINE)}
        for section in sections
    }


def apply(edits: dict[str, Edit], root: Path) -> None:
    for name, edit in edits.items():
        path = root / name
        if isinstance(edit, str):
            assert not path.exists(), f"{name} is not new"
            path.write_text(edit, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        for anchor, replacement in edit:
            assert text.count(anchor) == 1, f"{name} holds {text.count(anchor)} times: {anchor}"
            text = text.replace(anchor, replacement)
        path.write_text(text, encoding="utf-8")


def test_every_kind_has_a_list_and_a_toy() -> None:
    assert lists_of_files().keys() == TOYS.keys()


@pytest.mark.parametrize("heading", TOYS)
def test_a_toy_touches_the_listed_files(heading: str) -> None:
    assert set(TOYS[heading]) == lists_of_files()[heading]


def test_the_toys_work(tmp_path: Path) -> None:
    for directory in ("dstrain", "ds_configs"):
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("__pycache__"))
    for edits in TOYS.values():
        apply(edits, tmp_path)
    rng = random.Random(1)
    sides = [["".join(rng.choices("abcdefgh", k=3)) for _ in range(5)] for _ in range(400)]
    lines = [f"{' '.join(words)} ||| {' '.join(reversed(words))}\n" for words in sides]
    (tmp_path / "pairs.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(RECIPE, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment({"PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert Path(found["package"]).is_relative_to(tmp_path)
    assert found["torch_free"]
    shown = yaml.safe_load(found["show"])
    assert (shown["model"]["norm"], shown["model"]["activation"], shown["objective"]) == ({"kind": "toy"}, "toy", {"kind": "toy"})
    assert shown["data"]["train"] == [{"name": None, "kind": "toy", "path": "pairs.txt"}]
    assert found["verb"] == "the word is swordfish\n"
    assert found["kernels"] == "no_such_package is not installed"
    assert found["forced"] == ["toy_argmax", [[1]]]
    assert found["difference"] < 1e-12
    assert found["task"] == [[5, 6], [4, 5]]
    without, with_option = (yaml.safe_load(recipe)["model"]["embedding"] for recipe in found["imported"])
    assert with_option == {**without, "norm": True}
    assert found["exported"] == "run/bundles/last is a toy in exported\n"
    assert "encoder.layers.0.self_attention_norm.weight" in (tmp_path / "exported" / "toy.txt").read_text(encoding="utf-8")
    assert [event["step"] for event in found["steps"]] == [1, 2]
    for event in found["steps"]:  # the loss of the toy objective, not that of cross-entropy
        assert event["loss"] > 1.5 * event["nll"]
    model = yaml.safe_load((tmp_path / "run/bundles/last/model.yaml").read_text(encoding="utf-8"))["model"]
    assert (model["norm"], model["activation"]) == ({"kind": "toy"}, "toy")

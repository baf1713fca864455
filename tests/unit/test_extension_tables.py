"""The tables of context extension keep what was measured, and measure one thing in a row."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.paths import ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("extension")


def test_a_table_goes_on_where_it_ended(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[int] = []

    def figure(column: int) -> float:
        if column == 4 and not taken[2:]:
            taken.append(column)
            raise KeyboardInterrupt
        taken.append(column)
        return column / 2

    def table(steps: int = 3) -> None:
        made = tool.Table(tmp_path / "table.json", "extension", (1, 2, 4, 2000), {"steps": steps})
        made.row("linear", 4, figure)

    with pytest.raises(KeyboardInterrupt):
        table()
    for _ in range(2):
        capsys.readouterr()
        table()
        assert capsys.readouterr().out == (
            "| extension | 1 | 2 | 4 | 2,000 |\n|---|---|---|---|---|\n| linear | 0.5 | 1.0 | 2.0 |  |\n"
        )
    assert taken == [1, 2, 4, 4]
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == {"linear": {"1": 0.5, "2": 1.0, "4": 2.0}}
    with pytest.raises(SystemExit, match=r"is a table of other sizes, \{.steps.: 3\}; give the same, or name"):
        table(steps=4)


def test_neighboring_lines_are_one_input(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTRAIN_DATA", "nowhere")
    concatenated = importlib.import_module("extension_table_translation").concatenated
    lines = ["a b", "c", "d", "e", "f"]
    assert [concatenated(lines, pairs) for pairs in (1, 2, 4, 8)] == [lines, ["a b c", "d e"], ["a b c d e"], []]

"""What the pages name exists: files, links, modules, functions, layers. Their tables fit a screen."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dstrain import __version__
from tests.paths import ROOT
from tests.test_architecture import FILES, LAYERS, package_of

FOLDERS = ("", "dstrain", "dstrain/interop/fairseq", "dstrain/recipes", "tests", "tools", "slurm", "ds_configs")
PAGES = [
    *(ROOT / folder / "README.md" for folder in FOLDERS),
    ROOT / ".github" / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]
MAP = (ROOT / "dstrain" / "README.md").read_text(encoding="utf-8")


def test_every_page_is_here() -> None:
    """Besides what a build leaves in a checkout."""
    inside = {path: path.relative_to(ROOT).parts for path in ROOT.rglob("README.md")}
    found = {path for path, parts in inside.items() if parts[0] != "build" and not any(part.startswith(".") for part in parts)}
    assert found == {page for page in PAGES if page.name == "README.md"}


def test_the_readme_ends_at_the_map() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[-1].endswith("[dstrain/README.md](dstrain/README.md).")


def test_the_version_is_in_the_changelog() -> None:
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_row_of_a_table_is_long(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if line.startswith("|") and len(line) > 160] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_file_in_the_table_of_tests_exists() -> None:
    """A name without a directory is in the directory of the name before it, on the same row."""
    missing = []
    for line in (ROOT / "tests" / "README.md").read_text(encoding="utf-8").splitlines():
        directory = ROOT / "tests"
        for name in re.findall(r"`([\w/]+\.(?:py|sh)|[\w/]+/)`", line):
            path = directory / name
            if "/" in name or not path.exists():
                path = next((root / name for root in (ROOT / "tests", ROOT) if (root / name).exists()), path)
            directory = path.parent
            if not path.exists():
                missing.append(f"{name} in: {line}")
    assert not missing, "\n".join(missing)


def test_the_map_has_the_layers_of_the_law() -> None:
    listed: dict[str, int] = {}
    for layer, names in re.findall(r"^\| (\d) \*? ?\| ([^|]+) \|", MAP, re.MULTILINE):
        listed |= {name.removesuffix("/").removesuffix(".py"): int(layer) for name in re.findall(r"`([^`]+)`", names)}
    present = {package_of(path) for path in FILES}
    expected = {name: layer for layer, names in enumerate(LAYERS) for name in names & present}
    assert listed == {name: layer for name, layer in expected.items() if name != "__main__"}


def test_the_map_names_modules_and_what_they_define() -> None:
    wrong = []
    for file, name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`(?::\s+`([A-Za-z_.]+)`)?", MAP):
        path = next((root / file for root in (ROOT / "dstrain", ROOT) if (root / file).is_file()), None)
        defined = set()
        if path is not None:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if path is None or (name and not set(name.split(".")) <= defined):
            wrong.append(f"{file}: {name}")
    assert not wrong, "\n".join(wrong)

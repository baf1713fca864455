"""What is imported is declared, and a package that only one verb needs is asked for by the name of its extra."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from dstrain.cli.main import main
from dstrain.errors import ExtraError
from dstrain.extras import import_extra
from tests.paths import ROOT
from tests.test_architecture import TREES, imported_names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: requirements for name, requirements in PROJECT["optional-dependencies"].items() if name != "test"}
EVERYTHING = [*PROJECT["dependencies"], *(requirement for requirements in EXTRAS.values() for requirement in requirements)]
NOT_IMPORTED = {"tensorboard", "safetensors"}
"""torch imports the first; the second reads for others what dstrain writes, and is how the tests check it."""
IMPORTED_AS = {"pyyaml": "yaml", "liger-kernel": "liger_kernel"}
COMES_WITH_TORCH = {"triton"}
"""With its builds for GPUs; the table of kernels asks whether it is there."""


def modules(requirements: list[str]) -> set[str]:
    """The modules that requirements install, by their names."""
    names = [re.split(r"[<>=;\[ ]", requirement)[0] for requirement in requirements]
    return {IMPORTED_AS.get(name, name) for name in names}


def third_party(nodes: list[ast.stmt]) -> set[str]:
    """What statements import from neither dstrain nor Python itself."""
    names = {name.split(".")[0] for node in nodes for name, _ in imported_names(node)}
    return names - set(sys.stdlib_module_names) - COMES_WITH_TORCH - {"dstrain"}


def test_a_module_needs_only_what_every_user_installs() -> None:
    """The other imports stand in functions."""
    top = [node for tree in TREES.values() for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert third_party(top) <= modules(PROJECT["dependencies"])


def test_what_is_declared_is_what_is_imported() -> None:
    """Tests and tools import more; they have an extra of their own."""
    imported = third_party([node for tree in TREES.values() for node in tree.body])
    calls = {call for tree in TREES.values() for call in extras_asked_for(tree)}
    assert imported | {module for module, _ in calls} == modules(EVERYTHING) - NOT_IMPORTED
    assert {extra for _, extra in calls} == set(EXTRAS)


def extras_asked_for(tree: ast.AST) -> set[tuple[str, str]]:
    """The package and the extra of each call of `import_extra`."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "import_extra"]
    words = [(call.args[0], *(keyword.value for keyword in call.keywords if keyword.arg == "extra")) for call in found]
    module_and_extra = [tuple(ast.literal_eval(word) for word in pair) for pair in words]
    return {(module.split(".")[0], extra) for module, extra in module_and_extra}


def test_every_range_has_an_upper_bound_and_every_tested_version_lies_in_it() -> None:
    pins = dict(line.split("==") for line in (ROOT / "tools" / "constraints.txt").read_text().lower().splitlines())
    for requirement in EVERYTHING:
        name, low, high = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        tested, at_least, below = ([int(part) for part in version.split(".")] for version in (pins[name], low, high))
        assert at_least <= tested < below, requirement


def test_a_missing_package_is_one_message_that_names_its_extra() -> None:
    with pytest.raises(ExtraError, match=r'^a picture needs a package that cannot be imported .*pip install "dstrain\[plots\]"$'):
        import_extra("no_such_package", extra="plots", purpose="a picture")


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left behind by the attempt."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "events.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0, "time": 1.0}\n')
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "pictures")]) == 1
    message = capsys.readouterr().err
    assert 'pip install "dstrain[plots]"' in message
    assert "Traceback" not in message
    assert not (tmp_path / "pictures").exists()

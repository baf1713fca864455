"""The law of the layers: imports go down only, one door to each heavy library, small files, small functions."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dstrain"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"errors", "config_base", "batch", "model_output", "protocols", "log", "seeding"},
    {"parallel", "ops", "storage"},
    {"nn", "data"},
    {"models", "adapters"},
    {"objectives", "generation"},
    {"engine", "checkpoint", "distillation"},
    {"training", "evaluation", "estimate", "launch"},
    {"recipe", "recipe_file", "recipe_reference"},
    {"api", "build", "interop"},
    {"cli", "serving", "__main__"},
]
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
MAY_LOOK_LEFT = {0, 1, 7, 8, 9}


def package_of(path: Path) -> str:
    """The package that a file belongs to: its directory directly under dstrain, or its own name there."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def own_imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Full names of dstrain modules that a file imports, with their lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "dstrain"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            if node.module and node.module.split(".")[0] == "dstrain":
                found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def target_package(name: str) -> str | None:
    """`dstrain.nn.cache.Cache` -> `nn`; None for the package itself (its version)."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else None


def imported_packages(tree: ast.AST) -> set[str]:
    """Every dotted name that a file imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def source(request: pytest.FixtureRequest) -> tuple[Path, ast.AST]:
    return request.param, ast.parse(request.param.read_text())


def test_every_package_is_in_a_layer() -> None:
    packages = {package_of(path) for path in FILES} - {"__init__"}
    assert packages <= set(LAYER_OF), f"packages in no layer: {packages - set(LAYER_OF)}"


def test_imports_go_down_only(source: tuple[Path, ast.AST]) -> None:
    path, tree = source
    package = package_of(path)
    if package == "__init__":
        assert own_imports(tree) == []
        return
    for name, line in own_imports(tree):
        other = target_package(name)
        if other is None or other == package:
            continue
        here, there = LAYER_OF[package], LAYER_OF[other]
        allowed = there < here or (there == here and here in MAY_LOOK_LEFT)
        assert allowed, f"{path.name}:{line} {package} (layer {here}) imports {name} (layer {there})"


def test_own_imports_stand_at_the_top(source: tuple[Path, ast.AST]) -> None:
    """A function-local import hides a cycle; only the verbs in cli/ load lazily, so that --help answers at once."""
    path, tree = source
    if package_of(path) == "cli":
        return
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hidden = own_imports(function)
            assert not hidden, f"{path.name}: {function.name} imports {hidden}"


def test_deepspeed_has_one_door(source: tuple[Path, ast.AST]) -> None:
    path, tree = source
    if package_of(path) != "engine":
        assert not any(name.split(".")[0] == "deepspeed" for name in imported_packages(tree)), path


def test_torch_distributed_stays_in_two_packages(source: tuple[Path, ast.AST]) -> None:
    path, tree = source
    if package_of(path) not in {"parallel", "engine"}:
        assert not any(name.startswith("torch.distributed") for name in imported_packages(tree)), path


def test_configs_and_recipe_are_torch_free(source: tuple[Path, ast.AST]) -> None:
    path, tree = source
    if path.name in {"config.py", "recipe.py", "config_base.py", "errors.py"}:
        heavy = {name for name in imported_packages(tree) if name.split(".")[0] in {"torch", "deepspeed", "numpy"}}
        assert not heavy, f"{path}: {heavy}"
    if path.name == "recipe.py":
        for name, line in own_imports(tree):
            assert ".config." in name or target_package(name) in {"errors", "config_base", None}, f"line {line}: {name}"


def test_the_recipe_door_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import dstrain.recipe, dstrain.cli.main, sys; print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"


def test_no_import_cycles() -> None:
    modules = {".".join(("dstrain", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        targets = set()
        for imported, _ in own_imports(ast.parse(path.read_text())):
            parent = imported.rpartition(".")[0]
            targets |= {candidate for candidate in (imported, parent) if candidate in modules and candidate != name}
        graph[name] = targets
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*trail, name))
            done.add(name)

    for name in graph:
        if not name.startswith("dstrain.cli"):
            walk(name, ())


def test_files_and_functions_are_small(source: tuple[Path, ast.AST]) -> None:
    path, tree = source
    assert len(path.read_text().splitlines()) <= 400, f"{path}: over 400 lines"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"
        if isinstance(node, ast.ClassDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 300, f"{path}:{node.lineno} class {node.name} has {length} lines"


def test_verbs_are_short(source: tuple[Path, ast.AST]) -> None:
    path, _ = source
    if package_of(path) == "cli":
        assert len(path.read_text().splitlines()) <= 80, f"{path}: a verb has at most 80 lines; move the work down"


def test_protocols_hold_protocols_only() -> None:
    path = PACKAGE / "protocols.py"
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert len(path.read_text().splitlines()) <= 200
    assert all([ast.unparse(base) for base in node.bases] == ["Protocol"] for node in classes)

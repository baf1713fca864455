"""The law of the layers: imports go down only, one door to each heavy library, small files, small functions.

Every test looks at all modules and fails with the list of what breaks its rule; each module is parsed once.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "dstrain"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

LAYERS = [
    {
        "errors",
        "config_base",
        "batch",
        "fragment",
        "model_output",
        "protocols",
        "log",
        "progress",
        "seeding",
        "extras",
        "arguments",
        "wire",
    },
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
DOORS = {
    "deepspeed": {"engine"},
    "torch.distributed": {"parallel"},
    "triton": {"ops"},
    "liger_kernel": {"ops"},
    "transformers": {"interop"},
    "ctranslate2": {"interop"},
    "fsspec": {"storage"},
}
"""A library -> the packages that may import it."""
NO_TERM = {
    "num_types best_types": "vocab_size, top-k token ids",
    "place places find_place": "index, position, target, tap",
    "portable": "canonical names",
    "stranger strangers": "unmatched keys; reference implementation",
    "company": "other rows of the batch",
    "lesson lessons": "teacher source",
    "survey surveys surveyed surveying facts": "scan, statistics, summary",
    "settle settles settled claim claims claimed": "update_queue, lock_output",
    "adopt adopts adopted publish publishes published": "load_fp32, sync_to_model",
    "walk walks walked walking": "chunked_forward",
    "wide cool spread": "accum_dtype, tempered_log_probs, smoothing_per_token",
    "found taught given wanted told": "the thing itself: matches, results, requested",
    "turn turns spectrum amplitude reach": "cos_sin, inv_freq, attention_scaling, end_position",
    "same_until": "max_static_length",
    "renewed": "upgrade_config",
    "look looks watch": "poll, check, hook",
    "slope slopes pull gap": "grad, logits_grad, difference",
    "room rooms floor floors house": "capacity; package, layer",
    "joined apart": "concatenated, sequence",
}
"""Words of no field -> the terms to use instead, for every identifier of the package."""
FIELD_TERMS = {"alibi_slopes": "ALiBi's own term", "head_slopes": "ALiBi's own term"}
"""Identifiers with such a word that are the field's own -> the reason."""
VERB = {"add_arguments", "run"}
"""The interface of a verb: every module in cli/ has it."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def package_of(path: Path) -> str:
    """The package that a file belongs to: its directory directly under dstrain, or its own name there."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    """`dstrain/nn/cache.py` -> `nn/cache.py`, as messages name it."""
    return str(path.relative_to(PACKAGE))


def imported_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name that a file imports, with its line: for `from a import b` it is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Those of them that are dstrain's."""
    return [(name, line) for name, line in imported_names(tree) if name.split(".")[0] == "dstrain"]


def target_package(name: str) -> str | None:
    """`dstrain.nn.cache.Cache` -> `nn`; None for the package itself (its version)."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else None


def lines_of(node: Function | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_every_package_is_in_a_layer() -> None:
    packages = {package_of(path) for path in FILES} - {"__init__"}
    assert packages <= set(LAYER_OF), f"packages in no layer: {packages - set(LAYER_OF)}"


def test_imports_go_down_only() -> None:
    wrong = []
    for path, tree in TREES.items():
        package = package_of(path)
        for name, line in own_imports(tree):
            other = target_package(name)
            if package == "__init__":
                wrong.append(f"{name_of(path)}:{line} imports {name}")
            elif other is not None and other != package:
                here, there = LAYER_OF[package], LAYER_OF[other]
                if there > here or (there == here and here not in MAY_LOOK_LEFT):
                    wrong.append(f"{name_of(path)}:{line} (layer {here}) imports {name} (layer {there})")
    assert not wrong, "\n".join(wrong)


def test_own_imports_stand_at_the_top() -> None:
    """A function-local import hides a cycle; only the verbs in cli/ load lazily, so that --help answers at once."""
    hidden = [
        f"{name_of(path)}:{line} {function.name} imports {name}"
        for path, tree in TREES.items()
        if package_of(path) != "cli"
        for function in ast.walk(tree)
        if isinstance(function, Function)
        for name, line in own_imports(function)
    ]
    assert not hidden, "\n".join(hidden)


def test_each_heavy_library_has_its_doors() -> None:
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path, tree in TREES.items()
        for name, line in imported_names(tree)
        for library, doors in DOORS.items()
        if f"{name}.".startswith(f"{library}.") and package_of(path) not in doors
    ]
    assert not wrong, "\n".join(wrong)


def test_triton_is_loaded_only_by_what_asks_for_it() -> None:
    """Its modules are named in the table of kernels, which imports one when its kernel first runs."""
    inside = PACKAGE / "ops" / "triton"
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path, tree in TREES.items()
        for name, line in imported_names(tree)
        if inside not in path.parents and re.match(r"(dstrain\.ops\.)?triton\b", name)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_parallel_knows_the_world() -> None:
    """Everything else asks a group of the mesh, by which it says which ranks it means."""
    variables = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID"}
    wrong = []
    for path, tree in TREES.items():
        if package_of(path) == "parallel":
            continue
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.arg if isinstance(node, ast.arg) else None
            name = node.id if isinstance(node, ast.Name) else name
            constant = isinstance(node, ast.Constant) and node.value in variables
            if constant or name in {"get_rank", "get_world_size"} or (isinstance(node, ast.arg) and name == "world_size"):
                wrong.append(f"{name_of(path)}:{node.lineno} reads a global rank or size")
    assert not wrong, "\n".join(wrong)


def test_configs_and_recipe_are_torch_free() -> None:
    wrong = []
    for path, tree in TREES.items():
        if path.name in {"config.py", "recipe.py", "config_base.py", "errors.py"}:
            heavy = [name for name, _ in imported_names(tree) if name.split(".")[0] in {"torch", "deepspeed", "numpy"}]
            wrong += [f"{name_of(path)} imports {name}" for name in heavy]
        if path.name == "recipe.py":
            light = {"errors", "config_base", None}
            others = [name for name, _ in own_imports(tree) if ".config." not in name and target_package(name) not in light]
            wrong += [f"{name_of(path)} imports {name}, which is no config" for name in others]
    assert not wrong, "\n".join(wrong)


def test_recipe_and_command_line_load_no_torch() -> None:
    code = "import dstrain.recipe, dstrain.cli.main, sys; print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"


def test_no_import_cycles() -> None:
    modules = {".".join(("dstrain", *path.relative_to(PACKAGE).with_suffix("").parts)): tree for path, tree in TREES.items()}
    graph = {}
    for name, tree in modules.items():
        targets = set()
        for imported, _ in own_imports(tree):
            parent = imported.rpartition(".")[0]
            targets |= {candidate for candidate in (imported, parent) if candidate in modules and candidate != name}
        graph[name] = targets
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        if not name.startswith("dstrain.cli"):
            visit(name, ())


def test_files_classes_and_functions_are_small() -> None:
    long = []
    for path, tree in TREES.items():
        limit = 80 if package_of(path) == "cli" else 200 if path.name == "protocols.py" else 400
        lines = len(path.read_text().splitlines())
        if lines > limit:
            long.append(f"{name_of(path)} has {lines} lines, {limit} at most: move work down")
        for node in ast.walk(tree):
            if isinstance(node, Function) and lines_of(node) > 60:
                long.append(f"{name_of(path)}:{node.lineno} {node.name} has {lines_of(node)} lines, 60 at most")
            if isinstance(node, ast.ClassDef) and lines_of(node) > 300:
                long.append(f"{name_of(path)}:{node.lineno} {node.name} has {lines_of(node)} lines, 300 at most")
    assert not long, "\n".join(long)


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file defines: functions, classes, arguments, variables and attributes, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def snake_case(name: str) -> str:
    """`TokenStatistics` -> `_token_statistics_`; the underscores at both ends let whole words be looked for."""
    words = re.sub("([a-z0-9])([A-Z])", r"\1_\2", name)
    return f"_{words.lower().strip('_')}_"


def test_identifiers_use_the_terms_of_the_field() -> None:
    terms = {word: term for words, term in NO_TERM.items() for word in words.split()}
    wrong = [
        f"{name_of(path)}:{line} {name}: instead of {word!r} write {term}"
        for path, tree in TREES.items()
        for name, line in identifiers(tree)
        for word, term in terms.items()
        if f"_{word}_" in snake_case(name) and name not in FIELD_TERMS
    ]
    assert not wrong, "\n".join(wrong)


def test_a_public_name_is_defined_in_one_module() -> None:
    modules: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        for statement in tree.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement]
            for name in {name for target in targets for name in top_level_names(target)}:
                if not name.startswith("_") and not (package_of(path) == "cli" and name in VERB):
                    modules.setdefault(name, set()).add(name_of(path))
    twice = [f"{name} is defined in {', '.join(sorted(paths))}" for name, paths in sorted(modules.items()) if len(paths) > 1]
    assert not twice, "\n".join(twice)


def top_level_names(node: ast.AST) -> Iterator[str]:
    """The names that a statement at the top of a module, or a target of an assignment, defines."""
    if isinstance(node, Function | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.AnnAssign):
        yield from top_level_names(node.target)
    elif isinstance(node, ast.Tuple):
        yield from (name for element in node.elts for name in top_level_names(element))
    elif isinstance(node, ast.Name):
        yield node.id

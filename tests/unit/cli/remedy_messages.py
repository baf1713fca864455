"""Every text of the package that tells a user what to do in dstrain's own words: a verb, an option or a key of the recipe."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.paths import ROOT

SECTIONS = "data|batching|model|adapter|objective|optimizer|schedule|engine|training|validation|checkpoint|reporting|generation"
NAMES = re.compile(
    rf"(?<![\w-])--[a-z]|`dstrain|\b(?:{SECTIONS})\.[a-z_]+|\b(?:prepare|dump|run|start)\b[^;]* again|"
    r"\b[a-z_]+: (?:\{kind|[a-z_]+\b$|[a-z_]+(?:[,;)]| or ))"
)
TELLS = re.compile(
    r"\b(?:add|allow|ask|change|check|choose|correct|dump|extend|give|join|leave|let|lower|make|name|pass|prepare|put|raise|"
    r"relax|remove|rename|resume|run|scale|set|start|train|undo|use|write)\b"
)
NO_MESSAGES = {
    "cli/generation_options.py": "help of options",
    "cli/main.py": "help of verbs",
    "interop/fairseq/command_line/flags.py": "comments in a recipe",
    "interop/fairseq/command_line/notes.py": "comments in a recipe",
    "recipe_reference.py": "the reference",
}
DOTTED = re.compile(r"\w+(\.\w+)+")  # the name of a module or a key is no message


def remedies() -> dict[str, str]:
    """Text -> where it is; `{}` stands for a value in it."""
    package = ROOT / "dstrain"
    files = (path for path in sorted(package.rglob("*.py")) if str(path.relative_to(package)) not in NO_MESSAGES)
    return {
        text: f"{path.relative_to(package)}:{line}"
        for path in files
        for line, text in _texts(ast.parse(path.read_text()))
        if NAMES.search(text) and TELLS.search(text) and not DOTTED.fullmatch(text)
    }


def pattern(message: str) -> re.Pattern[str]:
    """A part of such a text as it is printed."""
    return re.compile(re.sub(r"\\\{\w*\\\}", ".*", re.escape(message)), re.DOTALL)


def _texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts of a tree but for docstrings, help of options and descriptions of keys."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.keyword) and node.arg in {"help", "description", "epilog", "metavar"}:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)

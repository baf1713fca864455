"""The settings of a checkpoint as plain values, whichever of fairseq's containers they were saved in.

fairseq 0.6 to 0.9 saved one flat `argparse.Namespace`; later versions save groups, as dictionaries, namespaces or objects of
omegaconf. Those are read from what omegaconf pickles of itself: `_content` of a container, `_val` of a value. A value such as
`${optimization.lr}` stands for another setting.
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.safe_pickle import StandIn

MISSING = "???"
"""omegaconf's sign of a mandatory value that was never given."""
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
MAX_NESTING = 40


def plain_settings(settings: Any) -> dict[str, Any]:
    """A tree of dictionaries, lists and values. ImportFormatError: it is no mapping, or nested without end."""
    tree = _plain(settings, MAX_NESTING)
    if not isinstance(tree, dict):
        raise ImportFormatError(f"the checkpoint's settings are a {type(settings).__name__}, not a mapping; it is damaged")
    return {name: _resolved(value, tree, MAX_NESTING) for name, value in tree.items()}


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ImportFormatError("the checkpoint's settings are nested without end; it is damaged")
    match value:
        case StandIn(state={"_content": content}) | StandIn(state={"_val": content}):
            return _plain(content, depth - 1)
        case StandIn(args=(*_, str() | int() | float() as content)):  # an enumeration is pickled by its value or its name
            return content
        case dict() | Namespace():
            items = {
                name: _plain(item, depth - 1) for name, item in (vars(value) if isinstance(value, Namespace) else value).items()
            }
            return {str(name): item for name, item in items.items() if not (isinstance(item, str) and item == MISSING)}
        case list() | tuple():
            return [_plain(item, depth - 1) for item in value]
        case _:
            return value


def _resolved(value: Any, root: dict[str, Any], depth: int) -> Any:
    if depth == 0:
        raise ImportFormatError("the checkpoint's settings refer to one another without end; it is damaged")
    match value:
        case dict():
            return {name: _resolved(item, root, depth - 1) for name, item in value.items()}
        case list():
            return [_resolved(item, root, depth - 1) for item in value]
        case str() if reference := REFERENCE.fullmatch(value):
            target: Any = root
            for key in reference[1].split("."):
                target = target.get(key) if isinstance(target, dict) else None
            return _resolved(target, root, depth - 1)
        case _:
            return value

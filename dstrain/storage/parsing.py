"""JSON and YAML as plain values, within bounds: text that is wrong or hostile costs a message, not time or memory.

Bounds: the size of the file, the number of values (YAML aliases count each time they are used, so that a few lines cannot expand
to billions), the depth of nesting, and the length of a number. Also refused: a duplicate key, a key that is not text; values
that are neither text, number, boolean nor null.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from dstrain.storage.file_format import HEAD_BYTES, foreign_format

MAX_JSON_VALUES = 150_000
BYTES_PER_JSON_VALUE = 64
MAX_YAML_BYTES = 1 << 18
MAX_YAML_VALUES = 10_000
MAX_DEPTH = 64
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
MAX_DIGITS = 64
NOT_CLOSED = "a bracket or a quote that is not closed"
YAML_PROBLEMS = {
    "<stream end>": NOT_CLOSED,
    "end of stream": NOT_CLOSED,
    "expected ',' or": "a comma or a closing bracket is missing before this",
    "'\\t' that cannot start any token": "a tab; indent with spaces",
    "mapping values are not allowed here": "a colon too many; put text with ': ' in quotes, or indent rightly",
    "expected <block end>": "the indentation fits no line above",
    "2002:merge": "`<<`, which is not read; write the keys of that mapping out",
    "could not determine a constructor": "a tag (!...) that is not read; leave it out",
}
"""Part of a complaint of PyYAML -> what it means."""


def read_tree(path: Path, max_json_values: int = MAX_JSON_VALUES) -> Any:
    """The values in a `.json` or YAML file. Raises OSError if it cannot be read, ValueError if it is not such a file."""
    if path.suffix == ".json":
        return parse_json(read_text(path, max_json_values * BYTES_PER_JSON_VALUE), max_json_values)
    return parse_yaml(read_text(path, MAX_YAML_BYTES))


def read_text(path: Path, max_bytes: int) -> str:
    """A UTF-8 file of bounded size, without its byte order mark.

    Raises OSError or ValueError; a pipe or a device is refused, as it may never end.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ValueError("a directory, not a file")
    if not stat.S_ISREG(mode):
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    if not content.strip():
        raise ValueError("the file is empty")
    if words := foreign_format(content[:HEAD_BYTES]):
        raise ValueError(words)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: invalid UTF-8 (byte 0x{content[error.start]:02x})") from error


def parse_json(text: str, max_values: int = MAX_JSON_VALUES) -> Any:
    """The values of a JSON text. Raises ValueError with the mistake."""
    if sum(map(text.count, "{[,")) > max_values:
        raise ValueError(f"more than {max_values:,} values")
    try:
        tree = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant, parse_int=_integer, parse_float=_real)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    _check_depth(tree)
    return tree


def parse_yaml(text: str, max_values: int = MAX_YAML_VALUES) -> Any:
    """The values of a YAML text. Raises ValueError with the mistake, and the line if it is known."""
    try:
        return _BoundedLoader(text, max_values).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ValueError(_yaml_problem(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: a character that YAML does not have (number {error.character}); delete it") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's complaint with its position, in a user's words where it is a frequent one."""
    mark, problem = error.problem_mark or error.context_mark, error.problem or ""
    meaning = next((meaning for words, meaning in YAML_PROBLEMS.items() if words in problem), None)
    if meaning == NOT_CLOSED:
        mark = error.context_mark or mark
    position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return position + (meaning or ", ".join(filter(None, (error.context, problem))))


def dump_yaml(tree: Any, *, width: int = 80) -> str:
    """YAML that `parse_yaml` reads back, keys in their order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=width)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads`. Raises ValueError if a key is given twice, of which one would be lost."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return tree


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _integer(digits: str) -> int:
    return int(_short(digits))


def _real(digits: str) -> float:
    return float(_short(digits))


def _short(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:12]}... has {len(digits)} digits, more than {MAX_DIGITS}")
    return digits


def _check_depth(tree: Any) -> None:
    level, depth = [tree], 0
    while level := [item for value in level if isinstance(value, dict | list) for item in _items(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)


def _items(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's loader with the bounds of this module. They are checked while nodes are composed, before any value is made."""

    def __init__(self, text: str, max_values: int) -> None:
        super().__init__(text)
        self._max_values = max_values
        self._depth = 0
        self._values = 0
        self._values_under: dict[int, int] = {}  # by id of a finished node; the composer keeps all nodes alive

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # the scanner reads 1,024 characters ahead and looks at every open bracket for each of them
        if self.flow_level >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=event.start_mark)
        self._count(1, event)
        is_alias = isinstance(event, yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._values_under:
                raise yaml.MarkedYAMLError(problem="an alias to what contains it", problem_mark=event.start_mark)
            self._count(self._values_under[id(node)], event)
        else:
            self._values_under[id(node)] = self._values - before
        self._depth -= 1
        return node

    def _count(self, values: int, event: Any) -> None:
        self._values += values
        if self._values > self._max_values:
            problem = f"more than {self._max_values:,} values, aliases expanded"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping with keys of text; whole numbers become text, as in JSON."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, bool) or not isinstance(key, str | int):
                raw = key_node.value if isinstance(key_node, yaml.ScalarNode) else key
                raise yaml.MarkedYAMLError(
                    problem=f"the key {raw} is not text in YAML; quote it", problem_mark=key_node.start_mark
                )
            if str(key) != str(key).strip():
                problem = f"the key {key!r} begins or ends with a space; if it is an indent, write it with plain spaces"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if str(key) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(str(key))
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}

    def construct_number(self, node: Any) -> int | float:
        """An integer or a float of bounded length; not what YAML 1.1 alone reads otherwise, such as 010 (8) and 1:30 (90)."""
        try:
            if ":" in _short(node.value) or re.match(r"[-+]?0[0-9_]+$", node.value):
                raise ValueError(
                    f"{node.value} is a number of base {60 if ':' in node.value else 8} in YAML; write it in base 10 or in quotes"
                )
            is_float = node.tag == "tag:yaml.org,2002:float"
            return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error

    def construct_date(self, node: Any) -> str:
        """A date as the text that it is."""
        return str(self.construct_scalar(node))

    def refuse(self, node: Any) -> Any:
        """A tag that no document of dstrain has."""
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag!r} is not read", problem_mark=node.start_mark)


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


for _name in ("int", "float"):
    _BoundedLoader.add_constructor(_tag(_name), _BoundedLoader.construct_number)
for _name in ("binary", "omap", "pairs", "set"):
    _BoundedLoader.add_constructor(_tag(_name), _BoundedLoader.refuse)
_BoundedLoader.add_constructor(_tag("timestamp"), _BoundedLoader.construct_date)

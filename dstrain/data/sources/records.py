"""Examples that are records with named fields: JSON lines, rows of tables.

A path of fields leads to the text of each side: `translation.en` is a field inside a field, `target.0` the first item of a list.
A field whose own name has the dots is found, too. A list of strings is one text only if the recipe says what joins it: its items
may as well be alternatives, such as several references, of which `target.0` takes the first; `references` names them all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from dstrain.data.config import HuggingFaceDataset, RecordSource
from dstrain.data.sources.text import TextBlock, decode_lines, expand_path
from dstrain.errors import DataError
from dstrain.storage.parsing import unique_keys

UNUSABLE = re.compile("[\0\ud800-\udfff]")
JSON_TYPES = {
    "NoneType": "null",
    "dict": "an object",
    "int": "a number",
    "float": "a number",
    "bool": "a boolean",
    "str": "a string",
}
"""Python's name of a value's type -> JSON's; others keep theirs."""

Record = dict[str, Any]


class RecordBlock(NamedTuple):
    """Consecutive records of one corpus. first: number of the first, from 0."""

    first: int
    num_lines: int
    records: list[Record]


class RecordReader:
    """The records of a table. batches: lists of them, from record `start` on. name: of the table, for errors."""

    def __init__(self, batches: Iterator[list[Record]], start: int, name: str) -> None:
        self._batches = batches
        self._pending: list[Record] = []
        self._next = start
        self._name = name

    def read(self, max_lines: int) -> RecordBlock:
        """The next records, at most `max_lines`. Raises DataError if the table ends before."""
        while not self._pending:
            batch = next(self._batches, None)
            if batch is None:
                raise DataError(f"{self._name} has become shorter since preparation began; run again with --overwrite")
            self._pending = batch
        records, self._pending = self._pending[:max_lines], self._pending[max_lines:]
        block = RecordBlock(self._next, len(records), records)
        self._next += len(records)
        return block

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def record_name(source: RecordSource) -> str:
    """The name of a corpus in messages: its file, or its data set with configuration and split."""
    if isinstance(source, HuggingFaceDataset):
        return " ".join(filter(None, (source.dataset, source.config, source.split)))
    return str(expand_path(source.path))


def record_texts(source: RecordSource, block: TextBlock | RecordBlock) -> tuple[list[str], list[str]]:
    """The texts of both sides; sources are empty if the recipe names no field of them.

    Raises DataError naming corpus and number of a record that lacks a field.
    """
    name = record_name(source)
    records: Iterable[Record] = block.records if isinstance(block, RecordBlock) else _parse_json(block, name)
    sides: tuple[list[str], list[str]] = ([], [])
    for number, record in enumerate(records, block.first + 1):
        for side, path in zip(sides, (source.source, source.target), strict=True):
            side.append("" if path is None else _text(record, path, f"{name}:{number}", source.join))
    return sides


def record_references(source: RecordSource, path: str, block: TextBlock | RecordBlock) -> list[list[str]]:
    """The list of strings at `path` of each record. Raises DataError naming corpus and number of a record without a reference."""
    name = record_name(source)
    records: Iterable[Record] = block.records if isinstance(block, RecordBlock) else _parse_json(block, name)
    return [_references(record, path, f"{name}:{number}") for number, record in enumerate(records, block.first + 1)]


def _references(record: Record, path: str, where: str) -> list[str]:
    items = _value(record, path, where)
    if not isinstance(items, list):
        raise DataError(f"{where}: field {path!r} holds {_type(items)}, not a list of references; name another field")
    texts = [_text({path: text}, path, where, None) for text in items]
    if not texts or not all(map(str.strip, texts)):
        raise DataError(f"{where}: field {path!r} lacks a reference or holds a blank one; fix the file, or leave the line out")
    return texts


def _parse_json(block: TextBlock, name: str) -> Iterator[Record]:
    for number, line in enumerate(decode_lines(block, 0), block.first + 1):
        try:
            record = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{number}: not valid JSON ({error}); every line must hold one object") from error
        if not isinstance(record, dict):
            raise DataError(f"{name}:{number}: a JSON {type(record).__name__}, not an object; every line must hold one object")
        yield record


def _text(record: Record, path: str, where: str, join: str | None) -> str:
    text = _value(record, path, where)
    if isinstance(text, list) and join is not None and all(isinstance(item, str) for item in text):
        text = join.join(text)
    if isinstance(text, list):
        fault = "a list, not a string" if join is None else "a list of other things than strings"
        remedy = f"join its sentences (join: ' '), or name one item ({path}.0)"
        raise DataError(f"{where}: field {path!r} holds {fault}; {remedy}")
    if not isinstance(text, str):
        raise DataError(f"{where}: field {path!r} holds {_type(text)}, not a string; name another field or fix the file")
    if UNUSABLE.search(text):
        raise DataError(f"{where}: field {path!r} holds a NUL or half of a surrogate pair; remove it from the text")
    return text


def _value(record: Record, path: str, where: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    steps = path.split(".")
    for depth, step in enumerate(steps):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise DataError(f"{where}: no field {path!r}; {_present(value, steps[:depth])}")
    return value


def _present(value: Any, steps: Sequence[str]) -> str:
    """What the record has at a path that leads no further."""
    if isinstance(value, dict):
        owner = f" of {'.'.join(steps)!r}" if steps else ""
        return f"the fields{owner} are {', '.join(map(repr, value)) or 'none'}"
    items = f"a list of {len(value)}, counted from 0" if isinstance(value, list) else _type(value)
    return f"{'.'.join(steps)!r} holds {items}"


def _type(value: Any) -> str:
    name = type(value).__name__
    return JSON_TYPES.get(name, f"a {name}")

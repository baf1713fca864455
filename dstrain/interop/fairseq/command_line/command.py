"""A `fairseq-train` command line as the values of its options, and the words that are none of them."""

from __future__ import annotations

import ast
import difflib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.flags import ALIASES, MAY_BE_BARE, SWITCHES, WITHOUT
from dstrain.interop.fairseq.options import OPTIONS, Kind, dashed

PROGRAMS = {"fairseq-train", "train.py"}
OPTION = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True)
class Command:
    """The options of a command line.

    values: by option, of its kind, True for a bare one. words: the values as written. data: the directories. before: the words in
    front of the program's name.
    """

    values: Mapping[str, Any]
    words: Mapping[str, str]
    data: tuple[str, ...]
    unknown: list[str]
    before: list[str]


def parse_command(line: str) -> Command:
    """Split a command line as a shell does; the program's name and the words before it may be left out.

    Raises ImportFormatError if a quote is open, an option has no value or one of another kind, or there is no data directory.
    """
    words, before = _words(line)
    words_by_name: dict[str, str] = {}  # an option without a value has an empty one
    data: list[str] = []
    unknown: list[str] = []
    while words:
        word = words.pop(0)
        if not OPTION.match(word):
            data.append(word)
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        name = ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
        if name not in OPTIONS and name not in WITHOUT:
            unknown.append(" ".join([word, *_values(words)]) + _hint(name))
        elif name in SWITCHES:
            words_by_name[name] = ""
        elif has_value:
            words_by_name[name] = value
        elif name in MAY_BE_BARE:
            words_by_name[name] = words.pop(0) if words and not OPTION.match(words[0]) else ""
        elif words:
            words_by_name[name] = words.pop(0)
        else:
            raise ImportFormatError(f"{word} is the last word and has no value; give the whole command line")
    if len(data) != 1:
        directories = ", ".join(data) or "none"
        raise ImportFormatError(f"the command line names one data directory (several joined by ':'), found {directories}; fix it")
    values = {name: _value(name, word) for name, word in words_by_name.items()}
    return Command(values, words_by_name, tuple(data[0].split(":")), unknown, before)


def _value(name: str, word: str) -> Any:
    """The value of an option, of its kind. ImportFormatError if the word is none such."""
    if name in SWITCHES or (name in MAY_BE_BARE and not word):
        return True
    if name not in OPTIONS:
        return word
    convert, kind = _KINDS[OPTIONS[name].kind]
    try:
        return convert(word)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ImportFormatError(f"{dashed(name)} {word}: not {kind} ({error}); fix the command line") from error


def read_value(name: str, value: Any) -> Any:
    """The value of an option as a checkpoint has it, in words or as a value. ImportFormatError if it is none such."""
    kind = OPTIONS[name].kind
    if kind is bool:
        return bool(value)
    if kind in (int, float) and isinstance(value, int | float):
        return kind(value)
    if kind is list and not isinstance(value, str):
        return [float(part) for part in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, dict) else _value(name, str(value))


def _words(line: str) -> tuple[list[str], list[str]]:
    """The words after the program's name, and those before it."""
    try:
        words = shlex.split(line.replace("\\\n", " "))
    except ValueError as error:
        raise ImportFormatError(f"the command line cannot be split into words ({error}); quote it as a whole") from error
    names = [PurePath(word).name for word in words]
    if "fairseq-hydra-train" in names:
        raise ImportFormatError("fairseq-hydra-train reads a YAML tree, not options; give the fairseq-train command line")
    start = next((number + 1 for number, name in enumerate(names) if name in PROGRAMS), 0)
    return words[start:], words[: max(0, start - 1)]


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, [*OPTIONS, *WITHOUT], n=1, cutoff=0.8)
    return f" (did you mean {dashed(close[0])}?)" if close else ""


def _values(words: list[str]) -> Iterator[str]:
    """Take the words up to the next option."""
    while words and not OPTION.match(words[0]):
        yield words.pop(0)


def _numbers(text: str) -> list[float]:
    parts = ast.literal_eval(text) if text[:1] in "([" else text.split(",")
    return [float(part) for part in parts]


def _json_object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise TypeError(f"it is a {type(content).__name__}")
    return content


_KINDS: Mapping[Kind, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a word"),
    list: (_numbers, "a list of numbers"),
    dict: (_json_object, "a JSON object in one pair of quotes"),
}

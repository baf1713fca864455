"""A `fairseq-train` command line as the values of its options, and what is to be said about them.

Nothing is dropped: an option that no part of the conversion asks for is reported when the recipe is written.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.flags import ALIASES, MAPPED, MAY_BE_BARE, SWITCHES, WITHOUT
from dstrain.interop.fairseq.command_line.remarks import DIFFERS, LACKING, READ

PROGRAMS = {"fairseq-train", "train.py"}
T = TypeVar("T")

OPTION = re.compile(r"--?[A-Za-z]")


@dataclass
class Notes:
    """What the reader of the recipe must know, in the order of finding.

    read: how options were read. differs: what fairseq did otherwise than the option says, and what dstrain does. lacking: options
    without a counterpart. unknown: words that are no option of fairseq's that dstrain knows.
    """

    read: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def ignored(self, option: str, given: Mapping[str, Any], known: set[str]) -> None:
        """Name the keys of a JSON value that fairseq did not read."""
        self.unknown += [f"--{option}: key {key!r}" for key in given if key not in known]

    def reads(self, option: str, remark: str, **values: object) -> None:
        """Say how an option was read. remark: a key of remarks.READ."""
        self.read.append(f"{option}: {READ[remark].format(**values)}")

    def differ(self, option: str, remark: str, **values: object) -> None:
        """Say what fairseq did otherwise. remark: a key of remarks.DIFFERS."""
        self.differs.append(f"{option}: {DIFFERS[remark].format(**values)}")

    def lack(self, option: str, remark: str, **values: object) -> None:
        """Say what a recipe cannot. remark: a key of remarks.LACKING."""
        self.lacking.append(f"{option}: {LACKING[remark].format(**values)}")


class Command:
    """The options of a command line. data: its directories. before: what stood in front of the program's name."""

    def __init__(self, given: dict[str, str | None], data: tuple[str, ...], unknown: list[str], before: list[str]) -> None:
        self.data = data
        self.unknown = unknown
        self.before = before
        self._given = given
        self._asked: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the option is there."""
        self._asked.add(name)
        return name in self._given

    def text(self, name: str) -> str | None:
        """Its value; None where it is not there or bare."""
        self._asked.add(name)
        return self._given.get(name)

    def shown(self, name: str) -> str:
        """The option as a user writes it."""
        value = self._given.get(name)
        return f"--{name}" if value is None else f"--{name} {value}"

    def integer(self, name: str) -> int | None:
        """A whole number. ImportFormatError where it is none."""
        return self._converted(name, int, "a whole number")

    def number(self, name: str) -> float | None:
        """A number. ImportFormatError where it is none."""
        return self._converted(name, float, "a number")

    def numbers(self, name: str) -> list[float] | None:
        """A list of numbers: `0.1,0.05`, `(0.9, 0.98)` or `[4, 2]`."""
        return self._converted(name, _numbers, "a list of numbers")

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object. ImportFormatError where it is none."""
        return self._converted(name, _json_object, "a JSON object in one pair of quotes")

    def rest(self) -> Iterator[str]:
        """Options that nothing has asked for."""
        return (name for name in self._given if name not in self._asked)

    def _converted(self, name: str, convert: Callable[[str], T], what: str) -> T | None:
        value = self.text(name)
        if value is None:
            return None
        try:
            return convert(value)
        except (ValueError, SyntaxError, TypeError) as error:
            raise ImportFormatError(f"--{name} {value}: not {what} ({error}); mend the command line") from error


def parse_command(line: str) -> Command:
    """Split a command line as a shell does; the program's name, and what stands before it, may be left out.

    Raises ImportFormatError where a quote is open, an option lacks its value, or there is no data directory.
    """
    words, before = _words(line)
    given: dict[str, str | None] = {}
    data: list[str] = []
    unknown: list[str] = []
    while words:
        word = words.pop(0)
        if not OPTION.match(word):
            data.append(word)
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        name = ALIASES.get(name.replace("_", "-"), name.replace("_", "-"))
        if name not in MAPPED and name not in WITHOUT:
            unknown.append(" ".join([word, *_values(words)]) + _hint(name))
        elif name in SWITCHES:
            given[name] = None
        elif has_value:
            given[name] = value
        elif name in MAY_BE_BARE:
            given[name] = words.pop(0) if words and not OPTION.match(words[0]) else None
        elif words:
            given[name] = words.pop(0)
        else:
            raise ImportFormatError(f"{word} stands at the end without its value; give the whole command line")
    if len(data) != 1:
        found = ", ".join(data) or "none"
        raise ImportFormatError(f"the command line names one data directory (several joined by ':'), found {found}; mend it")
    return Command(given, tuple(data[0].split(":")), unknown, before)


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
    close = difflib.get_close_matches(name, [*MAPPED, *WITHOUT], n=1, cutoff=0.8)
    return f" (did you mean --{close[0]}?)" if close else ""


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

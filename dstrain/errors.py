"""Errors that a user can cause and fix.

Every message names the field or file, its value and the remedy. The command line prints
only the message; anything that is not a `DstrainError` is a defect of dstrain and keeps its stack trace.
"""

import difflib
import re
from collections.abc import Iterable


class DstrainError(Exception):
    """A mistake outside dstrain: the message names the field or file, the value and the remedy.

    on_all_ranks: every rank raises the same, so one of them is enough to print it.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class ArgumentError(DstrainError):
    """An argument of a Python call has another type or value than it should."""


class RecipeError(DstrainError):
    """A recipe, an override or a DeepSpeed JSON file is not valid."""


class StorageError(DstrainError):
    """A file cannot be written: the disk is full, the directory is not writable, or another process is writing it."""


class DataError(DstrainError):
    """Text, a tokenizer or prepared data cannot be used."""


class BundleError(DstrainError):
    """A bundle is missing, incomplete or of another kind."""


class CheckpointError(DstrainError):
    """No checkpoint can be resumed, or it belongs to another run."""


class ImportFormatError(DstrainError):
    """A foreign checkpoint or data file cannot be read safely."""


class ExportError(DstrainError):
    """A bundle cannot be written in a foreign format."""


class TrainingError(DstrainError):
    """Training had to stop: a non-finite step, a lost rank, a full disk."""


class ExtraError(DstrainError):
    """A package that an extra installs is missing or broken."""


def close_to(word: str, valid: Iterable[str]) -> list[str]:
    """The valid word, if any, that is near to another one; case does not count."""
    by_case = {name.lower(): name for name in valid}
    return [by_case[name] for name in difflib.get_close_matches(word.lower(), by_case, n=1)]


def nearest(key: str, valid: Iterable[str]) -> str:
    """The end of an unknown-key message: the nearest valid key if there is one, else all of them.

    A valid key that the last words of `key` are, or some in its middle, comes first: `big` for `transformer_big`.
    """
    valid = sorted(valid)
    inner = [name for name in valid if re.search(rf"[\W_]{re.escape(name)}(?![^\W_])", key)]
    close = sorted(inner, key=len)[-1:] or close_to(key, valid)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(valid)}"

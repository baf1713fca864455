"""Foreign `.pt` files, read without running any code in them.

A pickle may call any importable function. Torch's restricted unpickler builds tensors and plain containers only; to these we
add two more classes of fairseq checkpoints: `argparse.Namespace` and numpy arrays. Every other class becomes a `StandIn`, which
keeps what was pickled with it and runs nothing; no module is imported for it. A file that calls a function is refused by name.
"""

from __future__ import annotations

import _codecs
import argparse
import builtins
import pickle
import pickletools
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch

from dstrain.data.sources.opening import require_file
from dstrain.errors import ImportFormatError
from dstrain.storage.file_format import HEAD_BYTES, foreign_format

_reconstruct = np.empty(0).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]
_DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "U1",
    "S1",
)
ALLOWED: list[Any] = [
    argparse.Namespace,
    _codecs.encode,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(name)) for name in _DTYPES},
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath", "Path")),
]
_READ = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in ALLOWED}
_DATA_MODULES = {"collections", "copyreg", "datetime", "decimal", "enum", "fractions", "pathlib", "types", "typing", "uuid"}
"""Modules of the standard library whose classes are values. Those of others, such as subprocess.Popen, may run code when made."""
_INERT_CALLS = {
    *("builtins.getattr", "operator.getitem", "_operator.getitem", "copyreg._reconstructor"),
    *("collections.deque", "collections.defaultdict"),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
}
"""Enumerations, annotations and plain values are pickled as calls of these."""
_PICKLES_OF_OLD_FILES = 4
"""Before torch 1.6 a file was not zipped: magic number, version, system and content, one pickle each, then the storages."""


class StandIn:
    """An object of a class that is not read. args: of its construction; state: as it was pickled."""

    qualified_name = ""

    def __new__(cls, *args: Any) -> Any:
        """An inert object. UnpicklingError for a function, which only code calls."""
        if not _is_value(cls.qualified_name):
            raise pickle.UnpicklingError(f"GLOBAL {cls.qualified_name}")
        if cls.qualified_name.lower().endswith("dict"):
            return OrderedDict()  # torch's unpickler fills plain dictionaries only
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"GLOBAL {self.qualified_name}"  # as in torch's messages, if a pickle calls it


def _is_value(name: str) -> bool:
    """Whether a name is that of a class, by the convention of upper case, or of a harmless call."""
    module, _, attribute = name.rpartition(".")
    built_in = getattr(builtins, attribute, len) if module == "builtins" else len
    if name in _INERT_CALLS or isinstance(built_in, type) or not callable(built_in):  # types, and constants such as Ellipsis
        return True
    is_data = module.partition(".")[0] not in sys.stdlib_module_names or module in _DATA_MODULES
    return is_data and attribute.lstrip("_")[:1].isupper()


def load_pickled(path: Path) -> Any:
    """The content of a `.pt` file, tensors on the CPU, objects of other classes as `StandIn`.

    ImportFormatError: no such file, truncated or no torch file, or a pickled call of a function, named. DataError: a pipe.
    """
    try:
        file = require_file(path).open("rb")
    except OSError as error:
        raise ImportFormatError(f"{path} cannot be read: {error.strerror}; check the path") from error
    with file:
        head = file.read(HEAD_BYTES)
        if (words := foreign_format(head)) and not head.startswith(b"PK"):  # torch's own files are zipped
            raise ImportFormatError(f"{path}: {words}")
        file.seek(0)
        try:
            stand_ins = [(_stand_in(name), name) for name in set(_globals(file)) - _READ]
            file.seek(0)
            with torch.serialization.safe_globals([*ALLOWED, *stand_ins]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ImportFormatError(_refusal(path, str(error))) from error
        except (OSError, RuntimeError, EOFError, LookupError, ValueError, zipfile.BadZipFile) as error:
            raise ImportFormatError(
                f"{path} is truncated or no torch checkpoint ({error!r:.100}); copy the file again"
            ) from error


def _globals(file: IO[bytes]) -> Iterator[str]:
    """The names that the pickles of a file refer to, as Python calls them today."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(_PICKLES_OF_OLD_FILES):
            yield from _pickled_globals(file)
        return
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                with archive.open(name) as content:
                    yield from _pickled_globals(content)


def _pickled_globals(file: IO[bytes]) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"


def _stand_in(name: str) -> type[StandIn]:
    """The class for a name. UnpicklingError if it is of the standard library and not a value."""
    if name.partition(".")[0] in sys.stdlib_module_names and not _is_value(name):
        raise pickle.UnpicklingError(f"GLOBAL {name}")
    return type(name.rpartition(".")[2], (StandIn,), {"qualified_name": name})


def _refusal(path: Path, message: str) -> str:
    match = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", message)
    if match is None and "Unsupported operand" in message:
        return f"{path} is pickled in another way than torch.save does by default (protocol 2); save the checkpoint again with it"
    if match is None:
        return f"{path} is truncated or no torch checkpoint ({message.rpartition('error: ')[2]:.100}); copy the file again"
    return (
        f"{path} holds a pickled {match[1] or match[2]}, which could run code when read and is refused; save the checkpoint "
        "again as a plain dict of tensors and settings"
    )

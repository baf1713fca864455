"""Foreign `.pt` files, read without running any code in them.

A pickle may call any importable function. Torch's restricted unpickler builds tensors and plain containers only; to these we
add two more classes of fairseq checkpoints: `argparse.Namespace` and numpy arrays. Everything else is refused by name.
"""

from __future__ import annotations

import _codecs
import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstrain.errors import ImportFormatError

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
]


def load_pickled(path: Path) -> Any:
    """The content of a `.pt` file, tensors on the CPU.

    ImportFormatError: no such file, truncated or no torch file, or a pickled class that is not allowed, named.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImportFormatError(f"{path} cannot be read: {error.strerror}; check the path") from error
    with file, torch.serialization.safe_globals(ALLOWED):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ImportFormatError(_refusal(path, str(error))) from error
        except (OSError, RuntimeError, EOFError, LookupError, ValueError) as error:
            raise ImportFormatError(
                f"{path} is truncated or no torch checkpoint ({error!r:.100}); copy the file again"
            ) from error


def _refusal(path: Path, message: str) -> str:
    match = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", message)
    if match is None:
        return f"{path} is truncated or no torch checkpoint; copy the file again"
    return (
        f"{path} holds a pickled {match[1] or match[2]}, which could run code when read and is refused; save the checkpoint "
        "again as a plain dict of tensors and settings"
    )

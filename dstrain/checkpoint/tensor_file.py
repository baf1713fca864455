"""safetensors files written and read in a stream: one tensor in memory at a time, hashed on the way to the disk.

The bytes are those of `safetensors.torch.save_file`: 8 bytes with the length of the header, the header as JSON padded with
spaces to a multiple of 8, and the tensors in the header's order. Reading uses plain reads, not mapped memory, so that pages of
the file do not count as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstrain.errors import CheckpointError
from dstrain.progress import with_progress
from dstrain.storage.hashing import HashingWriter

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
}
"""By their names in the file, in the order of tensors there: so all are aligned."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses longer ones too."""


class TensorInfo(NamedTuple):
    """Dtype, as safetensors names it, and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


def info_of(tensor: Tensor) -> TensorInfo:
    """Dtype and shape of a tensor."""
    return TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape))


def file_order(infos: Mapping[str, TensorInfo]) -> list[str]:
    """The order of tensors in a file: by dtype, then by name."""
    order = list(DTYPES)
    return sorted(infos, key=lambda name: (order.index(infos[name].dtype), name))


def write_tensors(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[Tensor]) -> tuple[int, str]:
    """Write a file; returns its size and SHA-256.

    tensors: CPU tensors in `file_order`, or their pieces one after another. Raises OSError if the disk is full. The caller syncs
    the file.
    """
    header, offset = {}, 0
    for name in file_order(infos):
        info = infos[name]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, offset + info.size]}
        offset += info.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + offset
    with path.open("wb") as file:
        writer = HashingWriter(file)
        writer.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            writer.write(_bytes_of(tensor))
    if writer.size != size:
        raise ValueError(f"{path} holds {writer.size} bytes, not the {size} of its header")
    return size, writer.sha256


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, show_progress: bool = False) -> tuple[int, str]:
    """`write_tensors` of whole tensors by name, on any device."""
    infos = {name: info_of(tensor) for name, tensor in tensors.items()}
    names = with_progress(file_order(infos), "writing", "tensors", shown=show_progress)
    return write_tensors(path, infos, (tensors[name].cpu() for name in names))


FileVersion = tuple[int, ...]
"""Changes if a file is replaced, even by one that gets its inode."""


def file_version(path: Path) -> FileVersion:
    """Of the file that is there now."""
    return _version(path.stat())


def _version(stat: os.stat_result) -> FileVersion:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class TensorFile:
    """A safetensors file, read inside `with` blocks. CheckpointError if its header is none of safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > LARGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                self.infos[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]))
                self._starts[name] = 8 + length + entry["data_offsets"][0]
                if self.infos[name].size != entry["data_offsets"][1] - entry["data_offsets"][0]:
                    raise ValueError(f"{name} has other offsets than its {self.infos[name]} takes")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error

    def __enter__(self) -> TensorFile:
        self._file = self.path.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def version(self) -> FileVersion:
        """Of the file that this `with` block reads, wherever its name leads meanwhile."""
        return _version(os.fstat(self._file.fileno()))

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor. Raises CheckpointError if there is none of that name."""
        if name not in self.infos:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self.infos[name]

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        info = self.info(name)
        values = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        self.read_into(name, 0, values)
        return values

    def read_into(self, name: str, start: int, values: Tensor) -> None:
        """Fill `values`, a contiguous CPU tensor, with the elements of a flattened tensor from `start` on."""
        info = self.info(name)
        itemsize = DTYPES[info.dtype].itemsize
        content = _bytes_of(values)
        if values.dtype != DTYPES[info.dtype] or start < 0 or start * itemsize + len(content) > info.size:
            raise CheckpointError(f"{self.path}: {name} holds {info}, which {info_of(values)} from {start} on does not fit")
        self._file.seek(self._starts[name] + start * itemsize)
        if self._file.readinto(content) != len(content):
            raise CheckpointError(f"{self.path} is truncated in {name}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)

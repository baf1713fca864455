"""safetensors files written and read in a stream: one tensor in memory at a time, hashed on the way to the disk.

The bytes are those of `safetensors.torch.save_file`: 8 bytes with the length of the header, the header as JSON padded with
spaces to a multiple of 8, and the tensors in the header's order. Reading uses plain reads, not mapped memory, so that pages of
the file do not count as memory of the process.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from dstrain.errors import CheckpointError

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
COPY_BLOCK = 1 << 22
"""Bytes that are written and hashed at a time."""
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
    digest, size = hashlib.sha256(), 8 + len(text) + offset
    with path.open("wb") as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for content in chain([head], map(_bytes_of, tensors)):
            for start in range(0, len(content), COPY_BLOCK):
                block = content[start : start + COPY_BLOCK]
                write_block(file, block)
                digest.update(block)
        if file.tell() != size:
            raise ValueError(f"{path} holds {file.tell()} bytes, not the {size} of its header")
    return size, digest.hexdigest()


def write_block(file: IO[bytes], block: memoryview) -> None:
    """Append a block to a file."""
    file.write(block)


class TensorFile:
    """An open safetensors file. Raises CheckpointError if its header is no safetensors header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        try:
            length = int.from_bytes(self._file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            for name, entry in json.loads(self._file.read(length)).items():
                if name != "__metadata__":
                    self._infos[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]))
                    self._starts[name] = 8 + length + entry["data_offsets"][0]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            self._file.close()
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor. Raises CheckpointError if there is none of that name."""
        if name not in self._infos:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self._infos[name]

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

"""How kernels are launched: sizes by plain rules, never by measuring, so that results are the same on every start."""

from torch import Tensor

LARGEST_BLOCK = 2048
"""Elements that a program holds at one time, unless it needs a whole row."""


def whole_block(size: int) -> int:
    """The power of two that so many elements fit in."""
    return 1 << max(size - 1, 0).bit_length()


def block_for(size: int) -> int:
    """Elements that a program holds at one time, of so many."""
    return min(whole_block(size), LARGEST_BLOCK)


def warps_for(block: int) -> int:
    """Warps of a program that holds so many elements."""
    return 1 if block <= 256 else 4 if block <= 2048 else 8 if block <= 8192 else 16


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (n, D), each row without gaps; a view if it can be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()

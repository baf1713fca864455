"""Collectives that carry gradients, as custom ops, so that `torch.compile` keeps them.

A collective inside an `autograd.Function` may be traced into a graph whose gradient is silently zero; an op with a registered
gradient is opaque to the tracer. With one rank each function returns its argument.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dstrain.parallel.group import Group

_GROUPS: dict[str, Group] = {}
"""Groups by torch's name of their process group, because an op takes no objects of ours."""


def reduce_from(tensor: Tensor, group: Group) -> Tensor:
    """Forward: the sum over the ranks. Backward: the gradient as it is.

    For partial sums that every rank then uses alike, so that each rank already has the whole gradient.
    """
    return tensor if group.size == 1 else _all_reduce(tensor, _name(group))


def copy_to(tensor: Tensor, group: Group) -> Tensor:
    """Forward: the tensor as it is, in a copy. Backward: the sum of the gradients over the ranks.

    For a tensor that is equal on every rank and of which each rank uses a slice or a share.
    """
    return tensor if group.size == 1 else _identity(tensor, _name(group))


def all_to_all(parts: Tensor, group: Group) -> Tensor:
    """Part r goes to rank r, as does its gradient on the way back. (size, ...) -> (size, ...), in the order of ranks"""
    return parts if group.size == 1 else _all_to_all(parts, _name(group))


def _name(group: Group) -> str:
    assert group.process_group is not None, "a group of several ranks has a process group"
    name: str = group.process_group.group_name
    _GROUPS[name] = group
    return name


@torch.library.custom_op("dstrain::all_reduce", mutates_args=())
def _all_reduce(tensor: Tensor, group: str) -> Tensor:
    return _GROUPS[group].all_reduce(tensor.clone(memory_format=torch.contiguous_format))


@torch.library.custom_op("dstrain::all_to_all", mutates_args=())
def _all_to_all(parts: Tensor, group: str) -> Tensor:
    return _GROUPS[group].all_to_all(parts)


@torch.library.custom_op("dstrain::identity", mutates_args=())
def _identity(tensor: Tensor, group: str) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)  # an op must not return its argument


def _fake(tensor: Tensor, group: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _remember_group(ctx: FunctionCtx, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]  # type: ignore[attr-defined]


def _backward_of_all_reduce(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    return _identity(grad, ctx.group), None  # type: ignore[attr-defined]


def _backward_of_identity(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    return _all_reduce(grad, ctx.group), None  # type: ignore[attr-defined]


def _backward_of_all_to_all(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    return _all_to_all(grad, ctx.group), None  # type: ignore[attr-defined]


for _op, _backward in (
    (_all_reduce, _backward_of_all_reduce),
    (_identity, _backward_of_identity),
    (_all_to_all, _backward_of_all_to_all),
):
    _op.register_fake(_fake)
    _op.register_autograd(_backward, setup_context=_remember_group)

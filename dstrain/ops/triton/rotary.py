"""Rotary positions: one read and one write of queries or keys, in both layouts; the backward pass is the opposite rotation."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.ops.rotary import CosSin, RotaryLayout
from dstrain.ops.triton.launch import warps_for, whole_block


def triton_rotary(x: Tensor, cos_sin: CosSin, layout: RotaryLayout) -> Tensor:
    """See `apply_rotary`."""
    rotated: Tensor = _Rotary.apply(x, *cos_sin, layout)
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layout: RotaryLayout) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _rotated(x, CosSin(cos, sin), layout, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(grad, CosSin(*ctx.saved_tensors), ctx.layout, direction=-1), None, None, None


def _rotated(x: Tensor, cos_sin: CosSin, layout: RotaryLayout, *, direction: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x)
    heads = x if x.ndim == 4 else x.unsqueeze(0)  # (B, H, T, K)
    out_heads = out if x.ndim == 4 else out.unsqueeze(0)
    batch, num_heads, length, head_dim = heads.shape
    cos, sin = (part.contiguous().expand(batch, 1, length, part.shape[-1]) for part in cos_sin)  # stride 0 where it is the same
    block_heads, block_dim = whole_block(num_heads), whole_block(head_dim)
    if x.numel():
        _rotary_kernel[(length, batch)](
            heads,
            cos,
            sin,
            out_heads,
            *heads.stride()[:3],
            *out_heads.stride()[:3],
            cos.stride(0),
            cos.stride(2),
            num_heads,
            head_dim,
            cos.shape[-1],
            float(direction),
            INTERLEAVED=layout == "interleaved",
            HEADS=block_heads,
            BLOCK=block_dim,
            num_warps=warps_for(block_heads * block_dim),
        )
    return out


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    out,
    x_batch,
    x_head,
    x_token,
    out_batch,
    out_head,
    out_token,
    angle_batch,
    angle_token,
    num_heads,
    head_dim,
    pairs,
    direction,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All heads of one token. A feature is multiplied by its cosine, and its partner's by sine with its sign added."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, feature = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, BLOCK)
    inside, is_rotated = (head < num_heads) & (feature < head_dim)[None, :], feature < 2 * pairs
    if INTERLEAVED:
        pair, partner, is_first = feature // 2, feature ^ 1, feature % 2 == 0
    else:
        is_first = feature < pairs
        pair, partner = tl.where(is_first, feature, feature - pairs), tl.where(is_first, feature + pairs, feature - pairs)
    angle = batch * angle_batch + token * angle_token + pair
    cosine = tl.load(cos + angle, mask=is_rotated, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=is_rotated, other=0.0).to(tl.float32) * tl.where(is_first, -direction, direction)
    row = x + batch * x_batch + token * x_token + head * x_head
    own = tl.load(row + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=inside & is_rotated[None, :], other=0.0).to(tl.float32)
    rotated = own * cosine[None, :] + other * sine[None, :]
    out_row = out + batch * out_batch + token * out_token + head * out_head
    tl.store(out_row + feature[None, :], rotated.to(out.dtype.element_ty), mask=inside)

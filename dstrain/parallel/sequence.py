"""Sequence parallelism: a rank of the sequence group computes its part of a batch's packed tokens, and in attention all tokens of
its part of the heads (Jacobs et al. 2023, "DeepSpeed Ulysses").

Everything but attention is done token by token. Around attention the ranks exchange heads for tokens: one all-to-all for queries,
keys and values together, and one for what attention gives; as many in the backward pass. To ZeRO and to losses sequence ranks are
data ranks: each has its own tokens, and gradients add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstrain.parallel.collectives import all_to_all
from dstrain.parallel.group import Group


def tokens_to_heads(parts: Sequence[Tensor], group: Group | None) -> Sequence[Tensor]:
    """All tokens of this rank's heads from its own tokens of all heads; the parts may differ in heads and tokens.

    (H, n, K) each -> (H / size, n * size, K). Of fewer heads than ranks each goes to several ranks, those whose query heads
    read it. Nothing changes for group None.
    """
    if group is None:
        return parts
    blocks = [_by_rank(part, group.size) for part in parts]
    received = all_to_all(torch.cat([block.flatten(1) for block in blocks], 1), group)
    split = torch.split(received, [block[0].numel() for block in blocks], 1)
    return [part.view(block.shape).transpose(0, 1).flatten(1, 2) for part, block in zip(split, blocks, strict=True)]


def heads_to_tokens(heads: Tensor, group: Group | None) -> Tensor:
    """The way back: this rank's tokens of all heads from all tokens of its own. (h, N, K) -> (h * size, N / size, K)"""
    if group is None:
        return heads
    count, tokens, dim = heads.shape
    parts = heads.reshape(count, group.size, tokens // group.size, dim).transpose(0, 1)  # (size, h, n, K)
    return all_to_all(parts, group).flatten(0, 1)


def _by_rank(part: Tensor, size: int) -> Tensor:
    """(H, n, K) -> (size, H / size, n, K)"""
    if len(part) < size:
        part = part.repeat_interleave(size // len(part), dim=0)
    return part.reshape(size, -1, *part.shape[1:])

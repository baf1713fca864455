"""Self- and cross-attention as parts: heads, grouped keys, the cache, beams as queries, rotations."""

import math

import pytest
import torch

from dstrain.batch import Sequences
from dstrain.models.position_config import RotaryPosition
from dstrain.models.rotary import build_rotary
from dstrain.nn.attention import CrossAttention, SelfAttention
from dstrain.nn.attention_bias import AttentionBias, AttentionContext
from dstrain.nn.cache import KeyValueCache
from dstrain.nn.linear import FusedLinear, Linear
from dstrain.ops.bias import padding_bias

DIM, HEAD = 12, 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Weights of standard deviation 1 make results up to 50, whose rounding exceeds 1e-5 for one seed in 200."""
    torch.manual_seed(0)


def fill(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module.eval()


def self_attention(key_heads: int = 3) -> SelfAttention:
    qkv = FusedLinear(DIM, {"q_proj": DIM, "k_proj": key_heads * HEAD, "v_proj": key_heads * HEAD})
    return fill(SelfAttention(qkv=qkv, out_proj=Linear(DIM, DIM), head_dim=HEAD, dropout=0.0))


def cross_attention(key_heads: int = 3) -> CrossAttention:
    kv = FusedLinear(DIM, {"k_proj": key_heads * HEAD, "v_proj": key_heads * HEAD})
    return fill(CrossAttention(q_proj=Linear(DIM, DIM), kv=kv, out_proj=Linear(DIM, DIM), head_dim=HEAD, dropout=0.0))


@pytest.mark.parametrize("key_heads", [3, 1])
def test_heads_are_blocks_of_features(key_heads: int) -> None:
    part = self_attention(key_heads)
    x = torch.randn(2, 5, DIM)
    query, key, value = part.qkv(x)
    heads = []
    for head in range(3):
        own = slice(head * HEAD, (head + 1) * HEAD)
        shared = slice(head * key_heads // 3 * HEAD, (head * key_heads // 3 + 1) * HEAD)
        weights = (query[..., own] @ key[..., shared].transpose(1, 2) / math.sqrt(HEAD)).softmax(-1)
        heads.append(weights @ value[..., shared])
    expected = part.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(part(x, context=AttentionContext()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [None, RotaryPosition()], ids=["none", "rotary"])
@pytest.mark.parametrize("key_heads", [3, 1])
def test_step_by_step_equals_at_once(key_heads: int, position: RotaryPosition | None) -> None:
    part = self_attention(key_heads)
    view = AttentionBias(causal=True, rotary=build_rotary(position, HEAD) if position else None)
    x = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(7))
    cache = KeyValueCache(depth=1, num_rows=2, num_heads=key_heads, max_length=6, head_dim=HEAD, like=x)
    whole = part(x, context=view.for_sequences(Sequences(torch.zeros(2, 6), torch.tensor([6, 6])), x))
    for place in range(6):
        step = part(x[:, place : place + 1], context=view.for_decoding(place, 0, place + 1, None, x), cache=cache.at(0))
        cache.advance(1)
        expected = whole[:, place : place + 1]
        torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", [3, 1])
def test_beams_attend_as_queries_of_one_source(key_heads: int) -> None:
    part = cross_attention(key_heads)
    memory = torch.randn(2, 7, DIM)
    bias = padding_bias(torch.tensor([7, 3]), 7, torch.float32)
    x = torch.randn(2 * 5, 3, DIM)  # five beams a sentence, three positions each
    key, value = part.project_memory(memory)
    mixed = part(x, key, value, context=AttentionContext(bias=bias))
    copied_key, copied_value = part.project_memory(memory.repeat_interleave(5, dim=0))
    copied = part(x, copied_key, copied_value, context=AttentionContext(bias=bias.repeat_interleave(5, dim=0)))
    torch.testing.assert_close(mixed, copied, rtol=1e-5, atol=1e-5)


def test_attention_dropout_is_for_training() -> None:
    part = self_attention()
    part.dropout = 0.5
    x, context = torch.randn(2, 5, DIM), AttentionContext()
    assert torch.equal(part(x, context=context), part(x, context=context))
    part.train()
    assert not torch.equal(part(x, context=context), part(x, context=context))

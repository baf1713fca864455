"""Attention of packed sequences against the written-out form, one sequence at a time; every kernel on the same sequences."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention import varlen as torch_varlen

from dstrain.batch import Packing, Sequences
from dstrain.data.batching.collate import Collator, PackedSize
from dstrain.data.ragged import Ragged
from dstrain.ops.attention import attention, attention_reference, mean_probabilities, packed_attention, packed_mean_probabilities
from dstrain.ops.bias import Alibi
from dstrain.ops.packed_attention import PackedPair, _compiled_flex, flex, padded_rows, varlen

LENGTHS, SOURCES = [5, 1, 123, 7], [4, 1, 9, 60]  # one key for 123 queries: rounding alone adds up to 2e-5
SLOPES = (0.5, 0.125, 0.25, 0.0625)
DIM = 8


def packed(lengths: list[int]) -> tuple[Packing, Tensor]:
    collator = Collator("decoder_only", pad_id=1, eos_id=2, packed=PackedSize(multiple=16))
    one = Ragged(np.full(len(lengths), 2), np.ones(len(lengths), np.int64))
    sequences: Sequences = collator.read(one, Ragged(np.full(sum(lengths), 5), np.array(lengths))).target
    assert sequences.packing is not None
    return sequences.packing, sequences.lengths


def pair_of(masking: str) -> PackedPair:
    """masking: `self`, `causal`, `alibi` (causal or not), or `cross`."""
    like = torch.zeros(1)
    queries, lengths = packed(LENGTHS)
    if masking == "cross":
        return PackedPair(queries, *packed(SOURCES), like)
    alibi = Alibi(SLOPES, lead=0.0 if masking == "causal alibi" else 0.5) if "alibi" in masking else None
    return PackedPair(queries, queries, lengths, like, causal="causal" in masking, alibi=alibi)


def heads_of(pair: PackedPair, key_heads: int) -> list[Tensor]:
    """(H, N, K), as a map of (N, D) gives them."""
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (len(side.positions), count, DIM) for side, count in ((pair.queries, 4), (pair.keys, key_heads), (pair.keys, key_heads))
    ]
    return [torch.randn(shape, generator=generator).transpose(0, 1).requires_grad_() for shape in shapes]


def one_by_one(parts: list[Tensor], pair: PackedPair, compute: Any = attention_reference) -> Iterator[tuple[slice, Tensor]]:
    """The queries of each sequence, and what they get."""
    for number in range(len(LENGTHS)):
        own, seen = (slice(*side.starts[number : number + 2].tolist()) for side in (pair.queries, pair.keys))
        bias = None
        if pair.alibi is not None:
            positions = torch.arange(own.stop - own.start)
            bias = pair.alibi.bias(positions, positions, torch.float32)
            bias = bias.masked_fill(positions > positions[:, None], -torch.inf) if pair.causal else bias
        causal = pair.causal and bias is None
        yield own, compute(parts[0][None, :, own], *(part[None, :, seen] for part in parts[1:]), bias=bias, causal=causal)[0]


def results(function: Any, pair: PackedPair, key_heads: int) -> list[Tensor]:
    """Values and gradients; what is at padding gets no gradient."""
    parts = heads_of(pair, key_heads)
    mixed = function(*parts, pair)
    real = mixed[:, : pair.queries.num_tokens]
    real.square().sum().backward()
    return [real.detach(), *(part.grad for part in parts if part.grad is not None)]


def reference(query: Tensor, key: Tensor, value: Tensor, pair: PackedPair) -> Tensor:
    return torch.cat([mixed for _, mixed in one_by_one([query, key, value], pair)], 1)


MASKINGS = ["self", "causal", "alibi", "causal alibi", "cross"]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("masking", MASKINGS)
def test_values_and_gradients(masking: str, key_heads: int) -> None:
    pair = pair_of(masking)
    torch.testing.assert_close(
        results(packed_attention, pair, key_heads), results(reference, pair, key_heads), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("masking", MASKINGS)
def test_padding_gets_zeros_and_gives_no_gradient(masking: str) -> None:
    pair = pair_of(masking)
    parts = heads_of(pair, 4)
    mixed = padded_rows(*parts, pair, attention)
    mixed.square().sum().backward()
    assert len(pair.queries.positions) > pair.queries.num_tokens
    assert mixed[:, pair.queries.num_tokens :].eq(0).all()
    for part, side in zip(parts, (pair.queries, pair.keys, pair.keys), strict=True):
        assert part.grad is not None and part.grad[:, side.num_tokens :].eq(0).all()


@pytest.mark.parametrize("masking", ["self", "causal", "cross"])
def test_mean_probabilities_stand_at_the_keys_positions(masking: str) -> None:
    pair = pair_of(masking)
    query, key, _ = heads_of(pair, 2)
    found = packed_mean_probabilities(query, key, pair)
    assert found.shape == (len(pair.queries.positions), pair.keys.longest)

    def mean(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        return mean_probabilities(query, key, **how)

    for own, expected in one_by_one([query, key, key], pair, mean):
        torch.testing.assert_close(found[own, : expected.shape[1]], expected, rtol=1e-5, atol=1e-6)
        assert found[own, expected.shape[1] :].eq(0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("masking", ["alibi", "causal alibi"])
def test_flex_attention_computes_the_same(masking: str) -> None:
    """In torch's slow form for CPUs, which holds all scores."""
    pair = pair_of(masking)
    mixed = flex(*(part.detach() for part in heads_of(pair, 2)), pair, attention)[:, : pair.queries.num_tokens]
    torch.testing.assert_close(mixed, reference(*heads_of(pair, 2), pair), rtol=1e-5, atol=1e-5)


def test_flex_attention_is_compiled_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond one block of 128 tokens."""
    counter = CompileCounter()
    compiled = _compiled_flex(counter)
    monkeypatch.setattr(flex_module, "flex_attention", compiled)
    torch._dynamo.reset()
    for lengths in ([5, 1, 123, 7], [200, 60], [300]):
        queries, own = packed(lengths)
        pair = PackedPair(queries, queries, own, torch.zeros(1), causal=True, alibi=Alibi(SLOPES, lead=0.0))
        parts = [torch.randn(len(queries.positions), 4, DIM).transpose(0, 1) for _ in range(3)]
        found, expected = flex(*parts, pair, attention), padded_rows(*parts, pair, attention)
        torch.testing.assert_close(found[:, : queries.num_tokens], expected[:, : queries.num_tokens], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("masking", ["self", "causal", "cross"])
def test_what_flash_attention_is_called_with(masking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernel itself a CPU has nothing: the arguments are read here as its documentation says."""

    def by_documentation(*arguments: Any, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k = arguments
        assert query.shape[1:] == (4, DIM) and key.shape[1:] == value.shape[1:] == (2, DIM)
        assert enable_gqa and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key)), "padding is a sequence too"
        assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        sequences = []
        for (start, end), (first, last) in zip(pairwise(cu_seq_q), pairwise(cu_seq_k), strict=True):
            parts = (query[start:end], key[first:last], value[first:last])
            sequences.append(attention_reference(*(part.transpose(0, 1)[None] for part in parts), causal=causal)[0])
        return torch.cat(sequences, 1).transpose(0, 1)

    monkeypatch.setattr(torch_varlen, "varlen_attn", by_documentation)
    pair = pair_of(masking)
    mixed = varlen(*heads_of(pair, 2), pair, attention)
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed[:, : pair.queries.num_tokens], reference(*heads_of(pair, 2), pair), rtol=1e-5, atol=1e-5)


def test_dropout_takes_padded_rows() -> None:
    pair = pair_of("causal")
    parts = heads_of(pair, 4)
    torch.manual_seed(1)
    found = packed_attention(*parts, pair, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(found, packed_attention(*parts, pair, dropout=0.5))
    assert not torch.allclose(found, packed_attention(*parts, pair))

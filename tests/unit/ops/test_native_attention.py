"""Attention in C++ beside its formula in float64, and where its gradients lie."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.nn.attention import merge_heads, split_heads
from dstrain.nn.linear import FusedLinear
from dstrain.ops.attention import attention, attention_reference
from dstrain.ops.bias import padding_bias
from dstrain.ops.cpu.native import problem
from dstrain.ops.cpu.native_attention import native_attention

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))

LENGTHS = (1, 5, 17, 123)
B, H = 2, 3


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def heads(queries: int, keys: int, dim: int, *, strided: bool = True) -> list[Tensor]:
    """Of query, key and value. strided: as projections give them."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(B, length, H, dim, generator=generator).transpose(1, 2) for length in (queries, keys, keys)]
    return parts if strided else [part.contiguous() for part in parts]


def outcome(
    function: Callable[..., Tensor], parts: list[Tensor], bias: Tensor | None, causal: bool, dtype: torch.dtype
) -> list[Tensor]:
    """The output, and the gradients of all that learns."""
    leaves = [part.to(dtype).detach().requires_grad_() for part in parts]
    own = None if bias is None else bias.to(dtype).detach().requires_grad_(bias.requires_grad)
    mixed = function(*leaves, bias=own, causal=causal)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    learned = leaves if own is None or not own.requires_grad else [*leaves, own]
    return [each.detach() for each in (mixed, *torch.autograd.grad(mixed, learned, weights))]


def exact(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """`attention_reference` computes its softmax in float32."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def assert_exact(parts: list[Tensor], bias: Tensor | None = None, causal: bool = False) -> None:
    own = outcome(native_attention, parts, bias, causal, torch.float32)
    expected = outcome(exact, parts, bias, causal, torch.float64)
    torch.testing.assert_close([each.double() for each in own], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 6, 16, 32, 64])
@pytest.mark.parametrize(("queries", "keys"), product(LENGTHS, LENGTHS))
def test_values_and_gradients_of_any_size(queries: int, keys: int, dim: int) -> None:
    for causal in (False, True):
        assert_exact(heads(queries, keys, dim), causal=causal)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "shape", [(17, 123), (1, 1, 1, 123), (B, 1, 1, 123), (1, H, 17, 123), (B, H, 17, 123), (1, H, 17, 1), (B, 1, 17, 123)]
)
def test_biases_of_any_shape(shape: tuple[int, ...], learned: bool) -> None:
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3), requires_grad=learned)
    assert_exact(heads(17, 123, 6), bias)


def test_a_transposed_bias() -> None:
    bias = torch.randn(H, 20, 9, generator=torch.Generator().manual_seed(3)).transpose(1, 2)[None]
    assert_exact(heads(9, 20, 32), bias)


@pytest.mark.parametrize("learned", [False, True])
def test_of_masked_keys_alone_it_is_the_average(learned: bool) -> None:
    bias = padding_bias(torch.tensor([0, 3]), 5, torch.float32).requires_grad_(learned)
    parts = heads(4, 5, 8)
    mixed = native_attention(*parts, bias, False)
    torch.testing.assert_close(mixed[0], parts[2][0].mean(1, keepdim=True).expand(H, 4, 8), rtol=1e-6, atol=1e-6)
    own, expected = (
        outcome(function, parts, bias, False, torch.float32) for function in (native_attention, attention_reference_of)
    )
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def attention_reference_of(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    return attention_reference(query, key, value, bias=bias, causal=causal)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = heads(5, 17, 16)
    mixed = native_attention(100 * query, 100 * key, value, None, False)
    torch.testing.assert_close(mixed.double(), exact(100 * query.double(), 100 * key.double(), value.double(), None, False))


def test_what_is_not_a_number_stays_so() -> None:
    query, key, value = heads(5, 17, 16)
    query[0, 0, 2, 3] = torch.nan
    mixed = native_attention(query, key, value, None, False)
    assert mixed[0, 0, 2].isnan().all()
    assert mixed.isnan().sum() == 16


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [6, 32])
def test_neither_threads_nor_strides_change_a_bit(causal: bool, dim: int, threads: Callable[[int], None]) -> None:
    outcomes = []
    for count, strided in product((1, 2), (True, False)):
        threads(count)
        outcomes.append(outcome(native_attention, heads(17, 20, dim, strided=strided), None, causal, torch.float32))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_strides_of_the_last_dimension_too() -> None:
    parts = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in heads(5, 17, 6)]
    assert_exact(parts)
    leaves = [part.requires_grad_() for part in parts]
    mixed = native_attention(*leaves, None, False)
    mixed.sum().backward()  # a gradient of one number
    expected = torch.autograd.grad(exact(*leaves, None, False).sum(), leaves)
    torch.testing.assert_close([part.grad for part in leaves], list(expected), rtol=1e-5, atol=1e-5)


def test_merging_the_heads_copies_nothing() -> None:
    mixed = native_attention(*heads(5, 17, 6), None, False)
    assert merge_heads(mixed).data_ptr() == mixed.data_ptr()


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_of_pieces_lie_as_the_pieces(length: int, batch: int) -> None:
    """Of queries, keys and values of one projection; or of keys and values beside queries of another."""
    qkv = torch.randn(batch, length, 3 * H * 8).split(H * 8, -1)
    kv = torch.randn(batch, length, 2 * H * 8).split(H * 8, -1)
    query = torch.randn(batch, length, H * 8)
    for parts, first in ((qkv, 0), ((query, *kv), 1)):
        leaves = [split_heads(part, 8).requires_grad_() for part in parts]
        mixed = native_attention(*leaves, None, False)
        grads = torch.autograd.grad(mixed, leaves, torch.randn(mixed.shape))
        starts = [grad.data_ptr() for grad in grads[first:]]
        assert starts == [starts[0] + 4 * H * 8 * index for index in range(len(starts))]
        assert len({grad.untyped_storage().data_ptr() for grad in grads}) == first + 1


@pytest.mark.parametrize("cross", [False, True])
def test_projections_and_attention_beside_torchs_in_float64(cross: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    names = ("k_proj", "v_proj") if cross else ("q_proj", "k_proj", "v_proj")
    fused = FusedLinear(10, dict.fromkeys(names, H * 8))
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x, query = torch.randn(B, 9, 10, generator=generator), torch.randn(B, 5, H * 8, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        fused, own_x, own_query = fused.to(dtype), *(each.to(dtype).requires_grad_() for each in (x, query))
        plain = dtype == torch.float64
        pieces = torch.split(F.linear(own_x, fused.weight, fused.bias), H * 8, -1) if plain else fused(own_x)
        parts = [split_heads(part, 8) for part in ((own_query, *pieces) if cross else pieces)]
        mixed = exact(*parts, None, False) if plain else attention(*parts)
        weighted = merge_heads(mixed).sin().sum() + parts[-1].square().sum()  # values serve twice
        leaves = [own_x, *fused.parameters(), *([own_query] if cross else [])]
        results.append([each.double() for each in (mixed, *torch.autograd.grad(weighted, leaves))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_nothing_to_attend_to() -> None:
    mixed = native_attention(*(part.requires_grad_() for part in heads(0, 5, 8)), None, False)
    mixed.sum().backward()
    assert mixed.shape == (B, H, 0, 8)


def test_a_compiled_graph_holds_another_kernel() -> None:
    torch._dynamo.reset()
    parts = [part.requires_grad_() for part in heads(5, 5, 8)]
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*parts), native_attention(*parts, None, False), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()

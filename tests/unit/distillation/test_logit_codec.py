"""What is kept of a distribution, and what is read back: unbiased samples, top-k tokens with their tail, all entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.distillation.store.codec import Codec, TokenKeys, build_codec, uniform_draws
from dstrain.distillation.store.manifest import DenseMethod, Method, SampleMethod, TopKMethod
from dstrain.ops.teacher_signal import KeptSignal, LogProbsSignal, SparseSignal


def keys(num_tokens: int, example: int = 7) -> TokenKeys:
    return TokenKeys(np.full(num_tokens, example), np.arange(num_tokens))


def through(method: SampleMethod | TopKMethod, logits: Tensor, tokens: TokenKeys | None = None) -> SparseSignal:
    """What comes out of a store of some entries for these logits."""
    signal = kept(method, logits, tokens)
    assert isinstance(signal, SparseSignal)
    return signal


def kept(method: Method, logits: Tensor, tokens: TokenKeys | None = None) -> KeptSignal:
    codec = build_codec(method, logits.shape[1])
    columns = packed(codec, logits, tokens or keys(len(logits)))
    return codec.unpack({name: [values] for name, values in columns.items()}, len(logits))


def packed(codec: Codec, logits: Tensor, tokens: TokenKeys) -> dict[str, np.ndarray]:
    selected: Sequence[Tensor] = codec.select(logits.clone(), tokens)
    columns = codec.pack([tensor.numpy() for tensor in selected])
    for name, column in columns.items():
        assert column.values.dtype == codec.columns[name]
        assert len(column.values) == column.widths.sum()
    return {name: column.values for name, column in columns.items()}


def dense(signal: SparseSignal, vocab_size: int) -> Tensor:
    """(n, V) masses of the entries that are kept."""
    result = torch.zeros(len(signal.ids), vocab_size)
    return result.scatter_add_(1, signal.ids.clamp_min(0), signal.probs)


def random_logits(num_tokens: int, vocab_size: int, scale: float = 2.0) -> Tensor:
    return torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("vocab_size", [1, 5, 123])
@pytest.mark.parametrize("draws", [1, 50, 300])
def test_samples_are_the_systematic_draws_of_a_plain_loop(vocab_size: int, draws: int) -> None:
    logits, tokens = random_logits(9, vocab_size), keys(9)
    found = dense(through(SampleMethod(draws=draws), logits, tokens), vocab_size)
    offsets = uniform_draws(1, tokens)
    for row, probs in enumerate(torch.softmax(logits.double(), 1).tolist()):
        counts = [0] * vocab_size
        for draw in range(draws):
            point, type_ = (draw + offsets[row]) / draws, 0
            while point > sum(probs[: type_ + 1]) and type_ < vocab_size - 1:
                type_ += 1
            counts[type_] += 1
        assert found[row].mul(draws).round().tolist() == counts


def test_samples_are_unbiased_and_vary_less_than_independent_draws() -> None:
    logits = random_logits(1, 30)
    probs = torch.softmax(logits, 1)[0]
    many = TokenKeys(np.arange(20_000), np.full(20_000, 3))
    found = dense(through(SampleMethod(draws=12), logits.expand(20_000, -1), many), 30)
    independent = probs * (1 - probs) / 12
    assert ((found.mean(0) - probs).abs() < 5 * (independent / 20_000).sqrt()).all()
    common = probs > 0.01
    assert (found.var(0) <= 1.02 * independent)[common].all()
    assert found.var(0).sum() < 0.7 * independent.sum()
    assert torch.equal(found.sum(1).round(decimals=4), torch.ones(20_000))


def test_offsets_are_uniform_and_independent_of_other_rows() -> None:
    rows, positions = np.meshgrid(np.arange(300), np.arange(100), indexing="ij")
    everything = uniform_draws(1, TokenKeys(rows.ravel(), positions.ravel()))
    assert everything.min() > 0
    assert everything.max() <= 1
    counts, _ = np.histogram(everything, 100, (0, 1))
    assert ((counts - 300) ** 2 / 300).sum() < 150  # chi-square with 99 degrees of freedom: p < 1e-3 above 149
    grid = everything.reshape(300, 100)
    for neighbor in (grid[1:], grid[:, 1:]):
        here = grid[: len(neighbor), : neighbor.shape[1]]
        assert abs(np.corrcoef(here.ravel(), neighbor.ravel())[0, 1]) < 0.03
    assert uniform_draws(1, TokenKeys(np.array([17]), np.array([5])))[0] == grid[17, 5]
    assert uniform_draws(2, TokenKeys(np.array([17]), np.array([5])))[0] != grid[17, 5]


def test_a_type_without_mass_is_never_drawn() -> None:
    logits = torch.full((4, 6), -torch.inf)
    logits[:, [2, 4]] = 0.0
    signal = through(SampleMethod(draws=7), logits)
    assert set(signal.ids.flatten().tolist()) <= {2, 4, -1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize(("vocab_size", "k"), [(5, 5), (123, 1), (123, 12), (123, 123)])
def test_the_top_k_tokens_keep_their_mass(vocab_size: int, k: int, dtype: str) -> None:
    logits = random_logits(11, vocab_size)
    probs = torch.softmax(logits, 1)
    signal = through(TopKMethod(k=k, dtype=dtype), logits)
    best, ids = probs.topk(k, 1)
    assert torch.equal(signal.ids, ids)
    tolerance = {"float32": 1e-5, "float16": 4e-3, "uint8": 0.06}[dtype]
    torch.testing.assert_close(signal.probs, best, rtol=tolerance, atol=1e-9)
    torch.testing.assert_close(signal.tail, 1 - best.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(signal.probs.sum(1) + signal.tail, torch.ones(11), rtol=1e-6, atol=1e-6)
    if k == vocab_size:
        assert not signal.tail.any()


def test_the_code_of_8_bits_errs_as_little_as_it_says() -> None:
    """Relative error of a mass over the mass that stands at that distance; at a span of 8 nats."""
    logits = torch.cat([torch.linspace(0, -8, 64), torch.full((200,), -30.0)])[None]
    signal = through(TopKMethod(k=64), logits)
    exact = torch.softmax(logits, 1)[0, :64]
    error = (signal.probs[0] / exact - 1).abs()
    assert error.max() < 0.04
    assert (error * exact).sum() < 0.008


def test_extreme_distributions_survive() -> None:
    logits = torch.zeros(3, 40)
    logits[1, 5], logits[2, 7] = 80.0, 3e4
    for method in (TopKMethod(k=8), TopKMethod(k=40), TopKMethod(k=8, dtype="float16"), SampleMethod()):
        signal = through(method, logits)
        assert torch.isfinite(signal.probs).all()
        assert (signal.probs >= 0).all()
        torch.testing.assert_close(signal.probs.sum(1) + signal.tail, torch.ones(3), rtol=1e-4, atol=1e-4)
        assert dense(signal, 40)[1, 5] > 0.999


@pytest.mark.parametrize(
    "method", [SampleMethod(), SampleMethod(draws=300), TopKMethod(k=8), TopKMethod(k=40), TopKMethod(k=40, dtype="float16")]
)
def test_a_signal_knows_whether_its_masses_are_those_of_all_entries(method: Method) -> None:
    signal = through(method, random_logits(11, 40))
    assert signal.with_tail == isinstance(method, TopKMethod)
    torch.testing.assert_close(signal.probs.sum(1) + signal.tail, torch.ones(11), rtol=1e-6, atol=0)


def test_a_tail_is_0_only_if_there_are_no_other_entries() -> None:
    """Row 1 has 80 nats between its best token and all others, whose mass float32 loses beside 1."""
    logits = torch.zeros(2, 40)
    logits[1, 5] = 80.0
    assert (through(TopKMethod(k=40), logits).tail == 0).all()
    assert through(TopKMethod(k=8), logits).tail.tolist() == [pytest.approx(32 / 40), 2.0**-24]


@pytest.mark.parametrize("method", [SampleMethod(), SampleMethod(draws=1), TopKMethod(k=1), TopKMethod(k=40), DenseMethod()])
def test_a_token_without_a_distribution_is_distinguished_from_kept_ones(method: Method) -> None:
    """Rows 1 to 5 have none; in rows 6 and 7 some entries have no mass."""
    logits = random_logits(9, 40)
    logits[1, 3], logits[2, 39], logits[3, 0] = torch.nan, torch.nan, torch.inf
    logits[4], logits[5] = -torch.inf, torch.nan
    logits[6, 0], logits[7, 1:] = -torch.inf, -1e30
    codec = build_codec(method, 40)
    selected = [tensor.numpy() for tensor in codec.select(logits, keys(9))]
    assert codec.is_whole(selected).tolist() == [True, *[False] * 5, True, True, True]


def test_dense_keeps_everything() -> None:
    logits = random_logits(7, 123)
    signal = kept(DenseMethod(temperature=2.0), logits)
    assert isinstance(signal, LogProbsSignal)
    assert signal.temperature == 2.0
    found = torch.from_numpy(np.concatenate(signal.log_probs))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), torch.log_softmax(logits, 1), rtol=5e-4, atol=0)
    logits[3, 5] = 1e5
    signal = kept(DenseMethod(), logits)
    assert isinstance(signal, LogProbsSignal)
    assert np.isfinite(signal.log_probs[0]).all()


def test_dense_is_handed_down_as_it_lies() -> None:
    """Pieces of mapped files are read only, and no copy of them is made; their parts are pieces of these."""
    codec = build_codec(DenseMethod(), 6)
    values = np.arange(30, dtype=np.float16)
    values.flags.writeable = False
    signal = codec.unpack({"log_probs": [values[:12], values[12:18], values[18:]]}, 5)
    assert isinstance(signal, LogProbsSignal)
    assert [len(piece) for piece in signal.log_probs] == [2, 1, 2]
    for start, stop, lengths in [(0, 2, [2]), (1, 4, [1, 1, 1]), (3, 99, [2]), (2, 3, [1])]:
        part = signal[slice(start, stop)].log_probs
        assert [len(piece) for piece in part] == lengths
        assert all(np.shares_memory(piece, values) for piece in part)
        assert np.array_equal(np.concatenate(part), values.reshape(5, 6)[start:stop])


@pytest.mark.parametrize("method", [SampleMethod(), TopKMethod(k=3)])
def test_no_tokens_give_an_empty_signal(method: Method) -> None:
    codec = build_codec(method, 5)
    signal = codec.unpack({name: [] for name in codec.columns}, 0)
    assert isinstance(signal, SparseSignal)
    assert signal.ids.shape == signal.probs.shape
    assert len(signal.ids) == len(signal.tail) == 0
    assert signal.ids.dtype == torch.int64
    assert signal.probs.dtype == signal.tail.dtype == torch.float32

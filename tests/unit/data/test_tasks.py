"""Tasks: on written-out examples, in their lengths and statistics, and the numbers they draw."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dstrain.data.ragged import Ragged
from dstrain.data.tasks.build import build_task
from dstrain.data.tasks.config import (
    Denoising,
    Mass,
    PrefixLanguageModeling,
    SpanCorruption,
    TextTask,
)
from dstrain.data.tasks.draws import Draws
from dstrain.data.tasks.mass import MassDraw
from dstrain.data.tasks.span_corruption import SpanDraw
from dstrain.errors import DataError
from dstrain.seeding import derive_seed
from tests.unit.data.task_texts import KEY, PIECES, TOKENIZER, apply, dictionary, draws, make, random_texts, read

T5 = SpanCorruption(sentinels="<{}>")
DENSE = SpanCorruption(sentinels="<{}>", noise_density=0.6, mean_span_length=1)
TASKS: list[TextTask] = [
    PrefixLanguageModeling(),
    Denoising(insert=0.3, rotate=0.5),
    Denoising(mask=0.9, poisson_lambda=1, unit="token"),
    T5,
    DENSE,
    Mass(),
    Mass(share=0.9),
]


def test_a_prefix_is_the_source() -> None:
    texts = read("_a _b _c _d", "_e", "_f _g")
    source, target = apply(PrefixLanguageModeling(), texts, {0: [0.4, 0.4, 0.9]})
    assert (source, target) == (["_a _b", "", "_f"], ["_c _d", "_e", "_g"])


def test_spans_become_sentinels() -> None:
    # 10 * 0.4 = 4 tokens in 4 / 2 = 2 spans, 6 stay in 3 runs, of which the first and the last may be empty.
    # The second part of a total begins at the smallest key but the first: 4 = 3 + 1; 6 + 2 = 1 + 5 + 2, less 1 at both ends.
    config = SpanCorruption(sentinels="<{}>", noise_density=0.4, mean_span_length=2)
    numbers = {SpanDraw.SPANS: [0.9, 0.5, 0.6, 0.1], SpanDraw.STAYS: [0.9, 0.1, 0.5, 0.5, 0.5, 0.5, 0.2, 0.5, 0.9, 0.9, 0.9]}
    source, target = apply(config, read("_a _b _c _d _e _f _g _h _i _j", "_k"), numbers)
    assert source == ["<0> _d _e _f _g _h <1> _j", "_k"]
    assert target == ["<0> _a _b _c <1> _i", ""]


def test_a_fragment_is_masked() -> None:
    config = Mass(share=0.6, random=0.3, unchanged=0.3)
    numbers = {MassDraw.START: [0.7, 0.0], MassDraw.CHANGE: [0.1, 0.5, 0.9], MassDraw.TOKEN: [0.0, 0.0, 0.0]}
    source, target = apply(config, read("_a _b _c _d _e", "_f"), numbers)
    assert (source, target) == (["_a _b _a <mask> _e", "_f"], ["_c _d _e", ""])


@pytest.mark.parametrize("config", TASKS, ids=lambda config: config.kind)
def test_lengths_are_known_before_any_text_is_read(config: TextTask) -> None:
    task, texts = make(config), random_texts(2000, 60)
    source, target = task(texts, draws(2000))
    source_lengths, target_lengths = task.lengths(texts.lengths, draws(2000))
    assert target_lengths.tolist() == target.lengths.tolist()
    if isinstance(config, Denoising):
        assert (source.lengths <= source_lengths).all()
    else:
        assert source_lengths.tolist() == source.lengths.tolist()
    for length in (1, 2, 17, 60):
        those = texts.lengths <= length
        most = task.longest(length)
        both = source_lengths + target_lengths
        assert (source_lengths[those].max(), target_lengths[those].max(), both[those].max()) <= most
        assert source_lengths[those].max() <= most.source
        assert target_lengths[those].max() <= most.target
        assert both[those].max() <= most.both


@pytest.mark.parametrize("config", [T5, DENSE], ids=["t5", "dense"])
def test_the_spans_fit_into_the_source(config: SpanCorruption) -> None:
    texts = random_texts(1000, 60)
    source, target = make(config)(texts, draws(1000))
    sentinels = {TOKENIZER.encode([f"<{number}>"])[0][0]: number for number in range(40)}
    for text, corrupted, spans in zip(texts.rows(), source.rows(), target.rows(), strict=True):
        pieces: list[list[int]] = []
        for token in spans.tolist():
            if token in sentinels:
                assert sentinels[token] == len(pieces)
                pieces.append([])
            else:
                pieces[-1].append(token)
        assert all(pieces)
        assert [sentinels[token] for token in corrupted.tolist() if token in sentinels] == list(range(len(pieces)))
        rebuilt = [part for token in corrupted.tolist() for part in (pieces[sentinels[token]] if token in sentinels else [token])]
        assert rebuilt == text.tolist()
        assert any(token not in sentinels for token in corrupted.tolist()), "a text is never masked as a whole"


def test_spans_of_all_divisions_and_places_are_equally_likely() -> None:
    # 2 of 5 tokens in one span: at 4 places; 3 of 5 tokens in 2 spans, 2 stay: 2 divisions, and 0+2+0, 1+1+0, 0+1+1.
    number = 12_000
    texts = Ragged.of([read("_a _b _c _d _e").tokens] * number)
    for density, mean, outcomes in [(0.4, 2.0, 4), (0.6, 1.5, 6)]:
        task = make(SpanCorruption(sentinels="<{}>", noise_density=density, mean_span_length=mean))
        sides = np.column_stack([side.tokens.reshape(number, -1) for side in task(texts, draws(number))])
        counts = np.unique(sides, axis=0, return_counts=True)[1]
        assert len(counts) == outcomes
        share = number / outcomes
        assert np.abs(counts - share).max() < 4 * math.sqrt(share * (1 - 1 / outcomes))


def test_every_cut_and_fragment_is_equally_likely() -> None:
    number = 9000
    texts = Ragged.of([read("_a _b _c _d").tokens] * number)
    cuts = np.bincount(make(PrefixLanguageModeling())(texts, draws(number))[0].lengths, minlength=4)
    fragments = make(Mass())(texts, draws(number))[1].tokens.reshape(number, 2)[:, 0]
    for counts in (cuts[1:], np.unique(fragments, return_counts=True)[1]):
        assert len(counts) == 3
        assert np.abs(counts - 3000).max() < 4 * math.sqrt(number * 2 / 9)


def test_shares_of_random_and_unchanged_masks() -> None:
    texts = random_texts(3000, 60)
    source, target = make(Mass(random=0.2, unchanged=0.3))(texts, draws(3000))
    mask = TOKENIZER.encode(["<mask>"])[0][0]
    changed = source.tokens != texts.tokens
    number = int(target.lengths.sum())
    for share, expected in [
        ((source.tokens == mask).sum() / number, 0.5),
        ((changed & (source.tokens != mask)).sum() / number, 0.2),
    ]:
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / number) + 0.2 / len(PIECES)


def plain_draw(seed: int, epoch: int, example: int, purpose: int, index: int) -> float:
    """One number by SplitMix64 in Python's integers."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        return word ^ word >> 31

    key = mix(derive_seed(seed, "noise", epoch) + gamma * (example + 1) & mask)
    return (mix(mix(key ^ purpose) + gamma * (index + 1) & mask) >> 11) / 2**53


def test_draws_depend_on_seed_epoch_example_and_purpose_alone() -> None:
    counts = np.array([2, 0, 3])
    numbers = Draws(1, 2, np.array([5, 6, 7])).uniform(0, counts)
    assert numbers.tolist() == [plain_draw(1, 2, row, 0, index) for row, index in [(5, 0), (5, 1), (7, 0), (7, 1), (7, 2)]]
    alone = [Draws(1, 2, np.array([row])).uniform(0, counts[[index]]) for index, row in enumerate((5, 6, 7))]
    assert np.concatenate(alone).tolist() == numbers.tolist()
    assert Draws(1, 2, np.array([5, 7])).one(0).tolist() == [numbers[0], numbers[2]]
    others = [
        Draws(seed, epoch, np.array([row])).one(purpose)[0]
        for seed, epoch, row, purpose in [(1, 2, 5, 0), (2, 2, 5, 0), (1, 3, 5, 0), (1, 2, 6, 0), (1, 2, 5, 1)]
    ]
    assert len(set(others)) == 5


def test_draws_are_uniform_and_independent() -> None:
    numbers = np.stack([draws(1000).uniform(purpose, np.full(1000, 40)).reshape(1000, 40) for purpose in range(3)])
    count = numbers.size
    assert abs(numbers.mean() - 0.5) < 4 / math.sqrt(12 * count)
    histogram = np.histogram(numbers, bins=16, range=(0, 1))[0]
    assert ((histogram - count / 16) ** 2).sum() / (count / 16) < 45  # chi square of 15 degrees: P = 1e-4
    flat = numbers.transpose(1, 0, 2).reshape(1000, -1)
    correlations = np.corrcoef(flat.T)[np.triu_indices(120, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(1000)


def test_a_text_with_more_spans_than_sentinels() -> None:
    task = build_task(SpanCorruption(sentinels="<{}>"), dictionary([*PIECES[:30], "<0>", "<1>", "<3>"]), KEY)
    assert task.longest(40).target == 8
    with pytest.raises(
        DataError, match=r"a text of 100 tokens has 5 spans, but the tokenizer only 2 sentinels: name them up to <4>"
    ):
        task.longest(100)


@pytest.mark.parametrize(
    ("config", "symbol"),
    [(Mass(mask_token="[M]"), r"\[M\]"), (SpanCorruption(), "<extra_id_0>"), (Denoising(mask_token="mask"), "mask")],
)
def test_a_symbol_that_the_tokenizer_lacks(config: TextTask, symbol: str) -> None:
    with pytest.raises(DataError, match=f"data.train.0.task needs the symbol '{symbol}', which the tokenizer lacks"):
        make(config)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SpanCorruption, {"sentinels": "<extra>"}, r"has no number; write \{\} in its place"),
        (Mass, {"random": 0.6, "unchanged": 0.5}, "random = 0.6 and unchanged = 0.5 are together more than 1"),
    ],
)
def test_options_without_meaning(kind: type[TextTask], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.model_validate(options)  # type: ignore[union-attr]

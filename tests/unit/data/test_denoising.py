"""The noises of denoising: on written-out examples, in their statistics, and in what they never do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dstrain.data.ragged import Ragged, sums
from dstrain.data.tasks.build import build_task
from dstrain.data.tasks.config import Denoising
from dstrain.data.tasks.denoising import NoiseDraw, poisson_cdf, poisson_spans
from dstrain.data.tasks.draws import Draws
from dstrain.data.tasks.symbols import Symbols
from dstrain.errors import DataError
from tests.unit.data.task_texts import KEY, PIECES, TOKENIZER, apply, dictionary, draws, make, random_texts, read, spelled

QUIET = {"permute_sentences": 0.0, "mask": 0.0}
TEXTS = read("_a b _c _d e f _g", "_h _i j")


def noised(texts: Ragged, seed: int = 1, **options: object) -> Ragged:
    task = make(Denoising.model_validate({**QUIET, **options}))
    return task(texts, draws(len(texts.lengths), seed=seed))[0]


def test_single_words_are_masked_as_one() -> None:
    # 4 words * 0.4 + 0.5 = 2.1 -> 2 of them; 2 words * 0.4 + 0.1 = 0.9 -> none. The two smallest of the four places are masked.
    config = Denoising(permute_sentences=0, mask=0.4, poisson_lambda=None)
    source, target = apply(config, TEXTS, {NoiseDraw.MASKED: [0.5, 0.1], NoiseDraw.POSITIONS: [0.2, 0.9, 0.1, 0.7, 0.5, 0.6]})
    assert source == ["<mask> _c <mask> _g", "_h _i j"]
    assert target == ["_a b _c _d e f _g", "_h _i j"]


def test_spans_have_poisson_lengths_and_the_last_is_cut() -> None:
    # 0.75 * 4 = 3 words in spans of a Poisson(3.5) length: P(0) = 0.03, P(<= 1) = 0.14, P(<= 4) = 0.73. So 0, 1, then 5 cut to 2.
    # Runs: 4 - 3 words that stay and 3 spans; the spans are at places 0, 2, 3.
    numbers = {NoiseDraw.MASKED: [0.0], NoiseDraw.SPANS: [0.02, 0.1, 0.8], NoiseDraw.POSITIONS: [0.1, 0.9, 0.2, 0.3]}
    texts = read("_a b _c _d e f _g")
    assert apply(Denoising(permute_sentences=0, mask=0.75), texts, numbers)[0] == ["<mask> _a b <mask> <mask>"]
    assert apply(Denoising(permute_sentences=0, mask=0.75, replace="token"), texts, numbers)[0] == [
        "_a b <mask> <mask> <mask> <mask> <mask>"
    ]
    assert apply(Denoising(permute_sentences=0, mask=0.75, replace="nothing"), texts, numbers)[0] == ["_a b"]


def test_tokens_are_masked_one_by_one() -> None:
    config = Denoising(permute_sentences=0, mask=0.5, unit="token", poisson_lambda=None, random=0.5)
    numbers = {
        NoiseDraw.MASKED: [0.0],
        NoiseDraw.POSITIONS: [0.9, 0.1, 0.8, 0.2],
        NoiseDraw.RANDOM: [0.4, 0.6],
        NoiseDraw.TOKEN: [0.0, 0.9],
    }
    assert apply(config, read("_a b _c d"), numbers)[0] == ["_a _a _c <mask>"]


def test_masks_are_inserted() -> None:
    config = Denoising(**QUIET, insert=0.25, random=0.5)
    numbers = {
        NoiseDraw.INSERTED: [0.3, 0.0],  # 7 * 0.25 + 0.3 = 2.05; 3 * 0.25 = 0.75
        NoiseDraw.INSERTIONS: [0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.2, 0.3],
        NoiseDraw.INSERTED_RANDOM: [0.9, 0.1],
        NoiseDraw.INSERTED_TOKEN: [0.0, 0.0],
    }
    assert apply(config, TEXTS, numbers)[0] == ["_a <mask> b _c _d e f _g _a", "_h _i j"]


def test_sentences_change_places() -> None:
    texts = read("_a . _b ! . _c _d", "_e .", "_f . _g .")
    # all three sentences of the first text move: order by 0.9, 0.1, 0.5 -> second, third, first
    numbers = {NoiseDraw.MOVED: [0.5] * 6, NoiseDraw.ORDER: [0.9, 0.1, 0.5, 0.3, 0.8, 0.2]}
    config = Denoising(mask=0, permute_sentences=1)
    assert apply(config, texts, numbers)[0] == ["_b ! . _c _d _a .", "_e .", "_g . _f ."]
    # half of three, rounded up, is two: the first and the third
    numbers = {NoiseDraw.MOVED: [0.1, 0.5, 0.2, 0.0, 0.0, 0.1], NoiseDraw.ORDER: [0.9, 0.1, 0.5, 0.3, 0.2, 0.8]}
    config = Denoising(mask=0, permute_sentences=0.5)
    assert apply(config, texts, numbers)[0] == ["_c _d _b ! . _a .", "_e .", "_f . _g ."]


def test_a_text_is_rotated() -> None:
    # 0.4 is less than 0.5, 0.6 is not; 1 + 0.5 * 6 = 4 tokens go to the end
    source, _ = apply(Denoising(**QUIET, rotate=0.5), TEXTS, {NoiseDraw.ROTATED: [0.4, 0.6], NoiseDraw.OFFSET: [0.5, 0.5]})
    assert source == ["e f _g _a b _c _d", "_h _i j"]


@pytest.mark.parametrize("unit", ["word", "token"])
@pytest.mark.parametrize("poisson_lambda", [None, 1.0, 3.5])
def test_the_share_of_masked_units_is_exact_in_the_mean(unit: str, poisson_lambda: float | None) -> None:
    number = 4000
    texts = random_texts(number, 60)
    task = make(Denoising(permute_sentences=0, mask=0.3, unit=unit, poisson_lambda=poisson_lambda, replace="nothing"))
    source, _ = task(texts, draws(number))
    units, kept = texts.lengths, source.lengths
    if unit == "word":
        units, kept = (sums(Symbols(TOKENIZER, KEY).word_starts(each), each.lengths) for each in (texts, source))
    excess = (units - kept) - 0.3 * units
    excess = excess[units > 1]  # a lone word is never masked
    assert abs(excess.mean()) < 4 * excess.std() / math.sqrt(len(excess))
    assert np.abs(excess).max() < 1 + 1e-9


def test_span_lengths_are_poisson() -> None:
    spans = poisson_spans(np.full(20, 5000), poisson_cdf(3.5), draws(20))
    assert [row.sum() for row in spans.rows()] == [5000] * 20
    lengths = np.concatenate([row[:-1] for row in spans.rows()])  # the last one is cut
    assert abs(lengths.mean() - 3.5) < 4 * math.sqrt(3.5 / len(lengths))
    shares = np.bincount(lengths, minlength=4)[:4] / len(lengths)
    expected = [math.exp(-3.5) * 3.5**k / math.factorial(k) for k in range(4)]
    for share, probability in zip(shares, expected, strict=True):
        assert abs(share - probability) < 4 * math.sqrt(probability / len(lengths))


@pytest.mark.parametrize("mean", [1.0, 2.0, 8.0])
def test_spans_always_sum_to_the_masked_words(mean: float) -> None:
    masked = np.random.default_rng(3).integers(0, 12, 3000)
    spans = poisson_spans(masked, poisson_cdf(mean), draws(3000))
    assert [int(row.sum()) for row in spans.rows()] == masked.tolist()
    assert (spans.lengths <= masked).all()
    assert ((spans.lengths > 0) == (masked > 0)).all()


def test_every_order_of_sentences_is_equally_likely() -> None:
    number = 6000
    texts = Ragged.of([read("_a . _b . _c .").tokens] * number)
    orders = np.unique(noised(texts, permute_sentences=1.0).tokens.reshape(number, 6), axis=0, return_counts=True)[1]
    assert len(orders) == 6
    assert np.abs(orders - number / 6).max() < 4 * math.sqrt(number * 5 / 36)


def test_rotations_are_uniform() -> None:
    number = 7000
    texts = Ragged.of([read("_a _b _c _d _e _f _g _h").tokens] * number)
    first = noised(texts, rotate=1.0).tokens.reshape(number, 8)[:, 0]
    counts = np.bincount(first - first.min(), minlength=7)
    assert len(counts) == 7  # never the first token
    assert np.abs(counts - 1000).max() < 4 * math.sqrt(number * 6 / 49)


@pytest.mark.parametrize("replace", ["span", "token", "nothing"])
def test_what_is_not_masked_stays_in_order(replace: str) -> None:
    texts = random_texts(500, 40)
    mask = TOKENIZER.encode(["<mask>"])[0][0]
    for before, after in zip(texts.rows(), noised(texts, mask=0.5, replace=replace).rows(), strict=True):
        rest = iter(before.tolist())
        assert all(token in rest for token in after[after != mask].tolist())
        assert (after != mask).any(), "a text is never masked as a whole"
        assert len(after) <= len(before)
        assert replace != "token" or len(after) == len(before)


def test_the_same_noise_alone_and_in_any_batch() -> None:
    texts = random_texts(50, 30)
    config = {"mask": 0.3, "permute_sentences": 1.0, "insert": 0.1, "random": 0.2, "rotate": 0.5}
    together = spelled(noised(texts, **config))
    task = make(Denoising.model_validate(config))
    for number, row in enumerate(texts.rows()):
        alone = task(Ragged.of([row]), Draws(1, 1, np.array([number])))[0]
        assert spelled(alone) == [together[number]]


def test_words_of_any_tokenizer() -> None:
    starts = [
        (["▁a", "b", "<mask>"], "▁a b ▁a", [True, False, True]),
        (["a@@", "b", "<mask>"], "a@@ b b", [True, False, True]),
        (["a", "b", "<mask>"], "a b b", [True, True, True]),
    ]
    for pieces, text, expected in starts:
        tokenizer = dictionary(pieces)
        symbols = Symbols(tokenizer, KEY)
        assert symbols.word_starts(Ragged.of(tokenizer.encode([text]))).tolist() == expected


def test_what_the_tokenizer_lacks() -> None:
    without = dictionary([piece for piece in PIECES if piece not in {"<mask>", ".", "!"}])
    with pytest.raises(
        DataError, match=r"data.train.0.task needs the symbol '<mask>', .* data.tokenizer.user_symbols .* '<mask> 0'"
    ):
        build_task(Denoising(permute_sentences=0), without, KEY)
    with pytest.raises(DataError, match=r"the tokenizer has none of the tokens \., !, \?, .* or set permute_sentences: 0"):
        build_task(Denoising(mask=0), without, KEY)
    build_task(Denoising(permute_sentences=0, replace="nothing"), without, KEY)  # deletion needs no mask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**QUIET}, "mask, insert, rotate and permute_sentences are all 0"),
        ({"random": 0.1, "replace": "nothing"}, "random is a share of the masks, and there are none"),
        ({"mask": 1.0}, "less than 1"),
        ({"poisson_lambda": 0.5}, "greater than or equal to 1"),
    ],
)
def test_options_without_meaning(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising.model_validate(options)

"""Validation figures are sums divided once and whole-corpus scores, the same for every number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dstrain.batch import Batch, Metrics, Size
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import evaluation_loader
from dstrain.data.lengths import StoredLengths
from dstrain.errors import DataError
from dstrain.evaluation import validator
from dstrain.evaluation.validator import Validator, WholeModel, check_split
from dstrain.models.config import EncoderDecoderConfig
from dstrain.objectives.objective import LossOutput
from dstrain.protocols import Ranks
from tests.batches import EOS, PAD, collate
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.training.fakes import ONE_PROCESS


class Examples:
    """Rows of several lengths; a row's target ids are its length, so that losses differ between rows."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = StoredLengths(np.array(lengths), np.array(lengths))

    def read(self, epoch: int, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.full(length, length),) * 2 for length in self.lengths.target[rows]]


class Engine:
    """The loss of a label is its value, its nll half of that; times 100 under the moving average."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.evaluated = 0

    def evaluate(self, batch: Batch) -> LossOutput:
        self.evaluated += 1
        total = batch.targets.labels.sum().double() * self.factor
        return LossOutput(total, batch.size, Metrics.over(batch.num_targets, {"nll": total / 2}))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        self.factor = 100.0
        yield
        self.factor = 1.0

    def generation_model(self, averaged: bool) -> nullcontext[float]:
        return nullcontext(self.factor)


class Texts:
    """Translates row n to `text n`; the score is how many stand in their place."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[range] = []

    def __len__(self) -> int:
        return self.size

    def translate(self, model: object, rows: range, progress: Callable[[int], object]) -> list[str]:
        progress(len(rows))
        self.calls.append(rows)
        return [f"text {row} of model {model}" for row in rows]

    def score(self, hypotheses: Sequence[str]) -> dict[str, float]:
        expected = [f"text {row} of model 1.0" for row in range(self.size)]
        return {"bleu": sum(map(str.__eq__, hypotheses, expected)) / len(hypotheses), "chrf": float(len(hypotheses))}


COLLATOR = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS)
TOKENS = attrgetter("num_targets")
LENGTHS = [5, 1, 3, 2, 2, 5, 4]
LOSS = sum(length * length for length in LENGTHS) / sum(LENGTHS)


def batches_of(ranks: Ranks, lengths: Sequence[int] = LENGTHS) -> Callable[[], Iterator[Batch]]:
    return lambda: evaluation_loader(Examples(lengths), 6, COLLATOR, data_rank=ranks.rank, data_size=ranks.size)


def on(ranks: Ranks, engine: Engine | None = None, **options: Any) -> Validator:
    """A validator of this rank's share."""
    return Validator(engine or Engine(), replicas=ranks, data=ranks, batches=batches_of(ranks), **options)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_losses_are_sums_divided_once_whatever_the_number_of_ranks(world_size: int) -> None:
    results = on_ranks(world_size, lambda ranks: on(ranks, denominator=TOKENS)())
    for scores in results:
        assert scores == {
            "loss": pytest.approx(LOSS, rel=1e-12),
            "nll": pytest.approx(LOSS / 2, rel=1e-12),
            "perplexity": pytest.approx(math.exp(LOSS / 2), rel=1e-12),
            "num_targets": sum(LENGTHS),
        }
    assert len({tuple(scores.items()) for scores in results}) == 1


class Mixed(Engine):
    """Every second batch reports a further sum."""

    def evaluate(self, batch: Batch) -> LossOutput:
        output = super().evaluate(batch)
        metrics = {**output.metrics.sums, **({"kl": output.loss_sum / 4} if self.evaluated % 2 else {})}
        return output._replace(metrics=Metrics.over(batch.num_targets, metrics))


def test_batches_that_report_different_names_are_scored_by_name() -> None:
    expected: dict[str, list[float]] = {"nll": [0, 0], "kl": [0, 0]}
    for number, batch in enumerate(batches_of(ONE_PROCESS)()):
        total = float(batch.targets.labels.sum())
        for name, value in (("nll", total / 2), ("kl", total / 4))[: 2 - number % 2]:
            expected[name] = [expected[name][0] + value, expected[name][1] + batch.num_targets]
    scores = on(ONE_PROCESS, Mixed(), denominator=TOKENS)()
    assert expected["kl"][1] < expected["nll"][1]
    assert {name: scores[name] for name in expected} == {name: total / count for name, (total, count) in expected.items()}


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_a_loss_per_sentence_is_divided_by_sentences_and_the_rest_by_tokens(world_size: int) -> None:
    """Ranks without a share hold an empty micro-batch, whose one row is no sentence."""
    sentences = attrgetter("num_sentences")
    results = on_ranks(world_size, lambda ranks: on(ranks, denominator=sentences)())
    for scores in results:
        assert scores is not None
        assert scores["loss"] == pytest.approx(LOSS * sum(LENGTHS) / len(LENGTHS), rel=1e-12)
        assert scores["nll"] == pytest.approx(LOSS / 2, rel=1e-12)
        assert scores["perplexity"] == pytest.approx(math.exp(LOSS / 2), rel=1e-12)


def test_with_a_moving_average_it_is_the_average_that_is_scored() -> None:
    engine = Engine()
    scores = on(ONE_PROCESS, engine, denominator=TOKENS, averaged=True, translation=Texts(3))()
    assert scores["loss"] == pytest.approx(100 * LOSS)
    assert scores["bleu"] == 0.0, "the texts must come from the averaged model, too"
    assert engine.factor == 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 23])
def test_texts_of_all_ranks_are_scored_in_order(monkeypatch: pytest.MonkeyPatch, world_size: int, size: int) -> None:
    monkeypatch.setattr(validator, "TRANSLATION_CHUNK", 4)
    tasks = [Texts(size) for _ in range(world_size)]
    results = on_ranks(
        world_size,
        lambda ranks: on(ranks, denominator=TOKENS, translation=tasks[ranks.rank])(),
    )
    assert [(scores["bleu"], scores["chrf"]) for scores in results] == [(1.0, size)] * world_size
    assert sorted(row for task in tasks for rows in task.calls for row in rows) == list(range(size))


@pytest.mark.parametrize("look", range(1, 6))
def test_an_interruption_ends_it_on_all_ranks_at_the_same_batch(monkeypatch: pytest.MonkeyPatch, look: int) -> None:
    monkeypatch.setattr(validator, "TRANSLATION_CHUNK", 2)
    monkeypatch.setattr(validator, "BATCHES_PER_CHECK", 2)

    def run(ranks: ThreadRanks) -> tuple[object, int]:
        looks = 0

        def interrupted() -> bool:
            nonlocal looks
            looks += 1
            return not ranks.all_true(not (looks == look and ranks.rank == 1))

        scores = on(ranks, denominator=TOKENS, translation=Texts(11))(interrupted)
        return scores, looks

    assert on_ranks(2, run) == [(None, look)] * 2


def test_a_split_without_targets_is_refused() -> None:
    empty = collate([])
    with pytest.raises(DataError, match="the split holds no target token; give it at least one"):
        Validator(Engine(), replicas=ONE_PROCESS, data=ONE_PROCESS, batches=lambda: [empty], denominator=TOKENS)()


MODEL = EncoderDecoderConfig(
    model_dim=8,
    encoder={"depth": 1, "num_heads": 1, "ffn_dim": 8},
    decoder={"depth": 1, "num_heads": 1, "ffn_dim": 8},
    max_source_length=10,
    max_target_length=20,
)


def test_a_split_is_checked_before_training() -> None:
    check_split("valid", StoredLengths(np.array([10, 3]), np.array([20, 1])), MODEL)
    with pytest.raises(DataError, match="the split 'valid' is empty; give it at least one sentence pair"):
        check_split("valid", StoredLengths(np.array([]), np.array([])), MODEL)
    with pytest.raises(
        DataError, match=r"pair 2 of the split 'valid' has 100,000 source tokens, more than model.max_source_length = 10"
    ):
        check_split("valid", StoredLengths(np.array([3, 100_000]), np.array([3, 3])), MODEL)
    with pytest.raises(
        DataError, match=r"pair 1 of the split 'train' has 21 target tokens, more than model.max_target_length = 20"
    ):
        check_split("train", StoredLengths(np.array([3, 3]), np.array([21, 3])), MODEL)


def test_a_whole_model_is_scored_in_evaluation_mode_without_gradients() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, batch: Batch) -> LossOutput:
            return LossOutput(self.weight * 3, Size(1, 1), Metrics.over(1, {"training": torch.tensor(float(self.training))}))

    whole = WholeModel(Module(), nn.Identity(), torch.device("cpu"))
    output = whole.evaluate(collate([]))
    assert not output.loss_sum.requires_grad
    assert float(output.metrics.sums["training"]) == 0.0

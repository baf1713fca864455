"""Scores of the present weights on the valid split: loss and perplexity from the labels, BLEU and chrF from generated text.

Every rank scores its share. Losses are added up as sums and divided once; texts are gathered on rank 0 and scored there
together, so no score is a mean of parts. With a moving average the averaged weights are scored, as
bundles hold them. The cost is one forward pass over the split and, with generation, one search per sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import nn

from dstrain.batch import Batch, Size
from dstrain.data.lengths import ExampleLengths, Side
from dstrain.engine.loss_totals import LossReducer, LossTotals
from dstrain.errors import DataError
from dstrain.models.config import ModelConfig
from dstrain.objectives.objective import LossOutput
from dstrain.objectives.train_module import TrainModule
from dstrain.progress import Progress
from dstrain.protocols import Generative, Ranks

TRANSLATION_CHUNK = 512
"""Sentences per rank that are translated between two checks for a signal."""
BATCHES_PER_CHECK = 8


class Evaluates(Protocol):
    """An engine as the validator sees it."""

    def evaluate(self, batch: Batch) -> LossOutput:
        """The loss of one batch in evaluation mode; collective."""
        ...

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The moving average instead of the weights; collective."""
        ...

    def generation_model(self, averaged: bool) -> AbstractContextManager[Generative]:
        """The whole model on this rank; collective."""
        ...


class Translates(Protocol):
    """A split as the validator translates it (`translation.Translation`)."""

    def __len__(self) -> int:
        """Rows of the split."""
        ...

    def translate(self, model: Generative, rows: range, progress: Callable[[int], object]) -> list[str]:
        """A text for each row. progress: called with the number of rows that have become ready."""
        ...

    def score(self, hypotheses: Sequence[str]) -> Mapping[str, Any]:
        """Scores by name of the texts of all rows, and their signatures."""
        ...


class WholeModel:
    """A model that is whole on this one process instead of an engine: what `dstrain validate` scores."""

    def __init__(self, module: TrainModule, model: nn.Module, device: torch.device) -> None:
        self._module = module.to(device).eval()
        self._model = cast("Generative", model)
        self._device = device

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossOutput:
        """The loss of one batch."""
        output: LossOutput = self._module(batch.to(self._device))
        return output

    def averaged_weights(self) -> AbstractContextManager[None]:
        """A bundle already holds the averaged weights."""
        return nullcontext()

    def generation_model(self, averaged: bool) -> AbstractContextManager[Generative]:
        """The model itself."""
        return nullcontext(self._model)


def check_split(name: str, lengths: ExampleLengths, model: ModelConfig) -> None:
    """Raise DataError, before anything is trained, if a split is empty or a sentence exceeds the model's limits."""
    if not len(lengths):
        raise DataError(f"the split {name!r} is empty; give it at least one sentence pair in the recipe's data section")
    limits = model.limits
    sides: list[tuple[Side, int]] = [("source", limits.source), ("target", limits.target)]
    if limits.joint:
        sides = [("source and target", limits.target)]
    for side, limit in sides:
        row, tokens = lengths.longest(side)
        if tokens > limit:
            key = "source" if side == "source" else "target"
            cut = "; data.filter.long_sources: truncate cuts sources in every split" if side == "source" else ""
            raise DataError(
                f"pair {row + 1} of the split {name!r} has {tokens:,} {side} tokens, more than model.max_{key}_length = "
                f"{limit}: raise that limit, or leave such pairs out and prepare again (data.filter does it for train){cut}"
            )


class Validator:
    """Scores one split; every rank calls it with the same weights.

    replicas: the ranks over which losses are summed and sentences to translate are shared out. data: those of the batches.
    batches: this rank's share of the split, equally many on every rank, new ones at each call. denominator: the objective's.
    averaged: score the moving average. num_examples: of the split; without it the progress has no end. beat: called with a phase
    before anything long.
    """

    def __init__(
        self,
        engine: Evaluates,
        *,
        replicas: Ranks,
        data: Ranks,
        batches: Callable[[], Iterable[Batch]],
        denominator: Callable[[Size], int],
        averaged: bool = False,
        translation: Translates | None = None,
        num_examples: int | None = None,
        beat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.engine = engine
        self.replicas = replicas
        self.averaged = averaged
        self.translation = translation
        self._batches = batches
        self._denominator = denominator
        self._num_examples = num_examples
        self._data = data
        self._beat = beat
        self._reduce = LossReducer(replicas)

    def __call__(self, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """loss as the objective averages it, perplexity and further sums per target token, and `Translates.score`.

        The same on every rank. interrupted: collective, polled at intervals; once true, the result is None. Raises DataError
        if the split holds no target token.
        """
        with self.engine.averaged_weights() if self.averaged else nullcontext():
            scores = self._losses(interrupted)
            if scores is None or self.translation is None:
                return scores
            generated = self._translate(self.translation, interrupted)
            return None if generated is None else {**scores, **generated}

    def _losses(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        totals = LossTotals()
        with self._progress("scoring", self._data) as progress:
            for number, batch in enumerate(self._batches()):
                if number % BATCHES_PER_CHECK == 0 and interrupted():
                    return None
                self._beat(f"validation batch {number}")
                totals.add(self.engine.evaluate(batch))
                progress.advance(batch.size.num_sentences)
        loss_sum, size, metrics = self._reduce(totals.read()[0])
        if size.num_targets == 0:
            raise DataError("the split holds no target token; give it at least one sentence pair and prepare the data again")
        loss, means = loss_sum / self._denominator(size), metrics.means()
        return {"loss": loss, **means, "perplexity": math.exp(min(means["nll"], 700.0)), "num_targets": size.num_targets}

    def _progress(self, doing: str, ranks: Ranks) -> Progress:
        share = None if self._num_examples is None else math.ceil(self._num_examples / ranks.size)
        return Progress(doing, share, "examples", shown=self.replicas.rank == 0)

    def _translate(self, task: Translates, interrupted: Callable[[], bool]) -> Mapping[str, Any] | None:
        texts: list[tuple[int, list[str]]] = []
        chunk = min(TRANSLATION_CHUNK, math.ceil(len(task) / self.replicas.size))
        with self.engine.generation_model(averaged=False) as model, self._progress("translating", self.replicas) as progress:
            for start in range(0, len(task), chunk * self.replicas.size):
                if interrupted():
                    return None
                self._beat(f"translating the valid split from sentence {start}")
                first = start + chunk * self.replicas.rank
                rows = range(first, min(first + chunk, len(task)))
                if rows:
                    texts.append((first, task.translate(model, rows, progress.advance)))
        gathered = self.replicas.gather_objects(texts)
        scores: Mapping[str, Any] = {}
        if self.replicas.rank == 0:
            ordered = sorted(piece for share in gathered for piece in share)
            scores = task.score([text for _, piece in ordered for text in piece])
        return self.replicas.broadcast_object(scores)

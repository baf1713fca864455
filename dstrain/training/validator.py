"""Scores of the present weights on the valid split: loss and perplexity from the labels, BLEU and chrF from generated text.

Every rank scores its share. Losses are added up as sums and divided once; texts are gathered on rank 0 and scored there
together, so no score is a mean of parts. With a moving average it is the averaged weights that are scored, as it is these
that bundles hold. The cost is one forward pass over the split and, with generation, one search per sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from dstrain.batch import Batch
from dstrain.errors import DataError
from dstrain.protocols import Generative, LossOutput, Ranks

CHUNK = 256
"""Sentences per rank that are translated between two looks at the signals."""
BATCHES_BETWEEN_LOOKS = 8


class Evaluates(Protocol):
    """An engine as the validator sees it."""

    def evaluate(self, batch: Batch) -> LossOutput:
        """The loss of one batch in evaluation mode; collective."""
        ...

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The moving average in the place of the weights; collective."""
        ...

    def generation_model(self, averaged: bool) -> AbstractContextManager[Generative]:
        """The whole model on this rank; collective."""
        ...


@dataclass(frozen=True)
class Translation:
    """How a split is translated and scored.

    order: rows of the split, those of similar length together. translate: texts for some rows. references: the raw target
    text of every row. score: (hypotheses, references) -> scores by name.
    """

    order: Sequence[int]
    translate: Callable[[Generative, Sequence[int]], list[str]]
    references: Sequence[str]
    score: Callable[[Sequence[str], Sequence[str]], Mapping[str, float]]


class Validator:
    """Scores one split; every rank calls it with the same weights.

    batches: this rank's share of the split, equally many on every rank, anew at each call. averaged: score the moving average.
    beat: called with a phase before anything long.
    """

    def __init__(
        self,
        engine: Evaluates,
        ranks: Ranks,
        *,
        batches: Callable[[], Iterable[Batch]],
        averaged: bool = False,
        translation: Translation | None = None,
        beat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.engine = engine
        self.ranks = ranks
        self.averaged = averaged
        self.translation = translation
        self._batches = batches
        self._beat = beat

    def __call__(self, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """loss and perplexity per target token, further sums, and the scores of the translation; the same on every rank.

        interrupted: collective; asked now and then, and where it says yes the result is None. Raises DataError where the split
        holds no target token.
        """
        with self.engine.averaged_weights() if self.averaged else nullcontext():
            scores = self._losses(interrupted)
            if scores is None or self.translation is None:
                return scores
            generated = self._translate(self.translation, interrupted)
            return None if generated is None else {**scores, **generated}

    def _losses(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        num_targets, loss_sum, sums = 0, 0.0, {"nll": 0.0}
        for number, batch in enumerate(self._batches()):
            if number % BATCHES_BETWEEN_LOOKS == 0 and interrupted():
                return None
            self._beat(f"validation batch {number}")
            output = self.engine.evaluate(batch)
            num_targets += output.num_targets
            loss_sum += float(output.loss_sum)
            for name, value in output.sums.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        total, loss_sum, *rest = self.ranks.all_reduce_sums([num_targets, loss_sum, *sums.values()])
        if total == 0:
            raise DataError("the valid split holds no target token; give data.valid at least one sentence pair")
        means = {name: value / total for name, value in zip(sums, rest, strict=True)}
        return {"loss": loss_sum / total, **means, "perplexity": math.exp(min(means["nll"], 700.0)), "num_targets": total}

    def _translate(self, task: Translation, interrupted: Callable[[], bool]) -> Mapping[str, float] | None:
        world_size, rank = self.ranks.world_size, self.ranks.rank
        texts: dict[int, str] = {}
        with self.engine.generation_model(averaged=False) as model:
            for start in range(0, len(task.order), CHUNK * world_size):
                if interrupted():
                    return None
                self._beat(f"translating the valid split from sentence {start}")
                rows = task.order[start : start + CHUNK * world_size][rank::world_size]
                if rows:
                    texts.update(zip(rows, task.translate(model, rows), strict=True))
        gathered = self.ranks.gather_objects(texts)
        scores: Mapping[str, float] = {}
        if rank == 0:
            merged = {row: text for share in gathered for row, text in share.items()}
            scores = task.score([merged[row] for row in range(len(task.references))], task.references)
        return self.ranks.broadcast_object(scores)

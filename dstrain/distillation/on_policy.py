"""Steps on the student's own samples, which replace the targets that were planned.

On-policy distillation after Agarwal et al., ICLR 2024, "On-Policy Distillation of Language Models". The loss of such a
step is defined in `objective.py`; this module makes its batches:

- Whether a step is on-policy depends on (seed, epoch, index in the epoch) only, so every rank and every resume knows it.
- The student samples with its present weights, not their moving average, in evaluation mode and without gradient. The sample of
  an example depends on the seed, the step and the example; other rows and the number of ranks enter only through the rounding of
  the logits.
- A sample that has not ended at its length limit is cut there. All its tokens are scored, and no EOS follows them.
- Each rank keeps its examples and divides them into new micro-batches, of at most `max_tokens` tokens like any others. If
  samples are longer than targets there are more micro-batches, not larger ones: on every rank as many as on the one that needs
  most, so that all make the same collective calls.

Cost: one decoding pass of the batch, and under ZeRO-3 the whole model in each rank's memory meanwhile. The keys and values of a
decoding pass take at most `max_tokens` positions of source and target together, or those of one example that has more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from dstrain.batch import Batch, Sequences
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import Steps
from dstrain.data.batching.permutation import IntArray
from dstrain.data.batching.plan import PlannedStep, batches_by_length, micro_batches
from dstrain.data.prepared.dataset import Example
from dstrain.generation.config import SamplingConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.padding import pad
from dstrain.generation.sampling import sample
from dstrain.models.config import LengthLimits
from dstrain.objectives.config import OnPolicyConfig
from dstrain.protocols import Generative, Ranks
from dstrain.seeding import derive_seed

GenerationModel = Callable[[], AbstractContextManager[Generative]]
"""The whole student as it is now; collective on both ends (`TrainEngine.generation_model`)."""


class Source(NamedTuple):
    """The source of a target to be sampled.

    example: row of the data set; start: what the decoder reads first; limit: tokens after which the target is cut.
    """

    example: int
    tokens: list[int]
    start: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class OwnSamples:
    """Samples the targets of on-policy steps.

    max_length: tokens of a sample with its EOS, as `max_sample_length` computes it. collator: of the planned batches. max_tokens:
    padded tokens of a micro-batch. seed: of the run. beat: called before each decoding pass. ranks: those with other examples.
    sequence: those with the same ones, which share out the decoding.
    """

    config: OnPolicyConfig
    student: GenerationModel
    ranks: Ranks
    sequence: Ranks
    ids: SpecialIds
    max_length: int
    collator: Collator
    max_tokens: int
    seed: int
    device: torch.device
    beat: Callable[[str], None]

    def is_due(self, planned: PlannedStep) -> bool:
        """Whether the step is on-policy, drawn from the seed."""
        return derive_seed(self.seed, "on-policy step", planned.epoch, planned.index) < self.config.fraction * 2**63

    def __call__(self, planned: PlannedStep, batches: Sequence[Batch]) -> tuple[PlannedStep, list[Batch]]:
        """The step and this rank's micro-batches of it with the student's samples for targets. Collective.

        The plan then holds the number of sampled tokens of all ranks.
        """
        sources = self._sources(batches)
        targets = self._write(planned, sources)
        read, written = np.array([len(source.tokens) for source in sources]), np.array([len(target) for target in targets])
        groups: list[IntArray] = []
        if sources:
            packed = self.collator.packed is not None
            groups = micro_batches(
                np.arange(len(sources)), read, written, self.max_tokens, 1, kind=self.collator.kind, packed=packed
            )
        shares = self.ranks.gather_objects((len(groups), sum(map(len, targets))))
        groups += [np.arange(0)] * (max(count for count, _ in shares) - len(groups))
        made = [self._batch([sources[row] for row in group], [targets[row] for row in group]) for group in groups]
        return replace(planned, num_targets=sum(count for _, count in shares)), made

    def _sources(self, batches: Sequence[Batch]) -> list[Source]:
        """Of all examples."""
        sources = []
        for batch in batches:
            tokens, examples, targets = batch.reading.tokens.flatten().tolist(), batch.examples, batch.targets
            firsts = batch.target.tokens.flatten()[targets.index[targets.position == 0]]  # read before the first target
            spans = zip(
                *(part.tolist() for part in (examples.ids, examples.source_start, examples.source_length, firsts)), strict=True
            )
            sources += [
                Source(number, tokens[start : start + length], first, self._limit(length))
                for number, start, length, first in spans
            ]
        return sources

    def _limit(self, source_length: int) -> int:
        """Tokens after which a sample is cut; one is left for the EOS that the sampler appends."""
        limit = int(self.config.max_length_ratio * source_length) + self.config.max_length_offset
        return min(limit, self.max_length - 1)

    def _write(self, planned: PlannedStep, sources: Sequence[Source]) -> list[list[int]]:
        """A sample for each source, with its EOS if it has ended. Collective."""
        group = self.sequence
        shares = group.gather_objects(self._sample(planned, sources[group.rank :: group.size]))
        return [shares[row % group.size][row // group.size] for row in range(len(sources))]

    def _sample(self, planned: PlannedStep, sources: Sequence[Source]) -> list[list[int]]:
        """Samples of some sources; collective, as the student may be."""
        config = SamplingConfig(
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            min_length=0,
            seed=derive_seed(self.seed, "on-policy samples", planned.epoch, planned.index),
        )
        targets: list[list[int]] = [[] for _ in sources]
        costs = [len(source.tokens) + source.limit for source in sources]
        with self.student() as model:
            for rows in batches_by_length(costs, range(len(sources)), self.max_tokens):
                self.beat(f"sampling targets of epoch {planned.epoch}, step {planned.index} of it")
                chosen = [sources[row] for row in rows]
                samples = sample(
                    model,
                    Sequences(*pad([source.tokens for source in chosen], self.ids.pad)).to(self.device),
                    config=config,
                    ids=self.ids,
                    max_lengths=[source.limit for source in chosen],
                    sentences=[source.example for source in chosen],
                    prefix=torch.tensor([self.ids.before] * len(chosen)) if self.ids.before else None,
                    starts=[source.start for source in chosen],
                )
                for row, source, hypotheses in zip(rows, chosen, samples, strict=True):
                    # without a finite hypothesis the model is broken, which the engine finds out on all ranks together
                    tokens = hypotheses[0].tokens if hypotheses else [self.ids.eos]
                    targets[row] = tokens[: max(source.limit, 1)]  # if nothing fits, the first state is scored
        return targets

    def _batch(self, sources: Sequence[Source], targets: Sequence[Sequence[int]]) -> Batch:
        examples = [
            Example(np.array(source.tokens), np.array(target), source.start)
            for source, target in zip(sources, targets, strict=True)
        ]
        numbers = np.array([source.example for source in sources], np.int64)
        return self.collator(examples, numbers, sampled=True)


def max_sample_length(limits: Sequence[LengthLimits], *, longest_source: int, max_tokens: int) -> int:
    """The longest target that every model reads after any source, and that a micro-batch holds beside it; at least 1.

    limits: of the student, then of its teachers. A model that reads both as one sequence gets the longest source and the longest
    target of a micro-batch, which may be of different examples.
    """
    micro_batch = LengthLimits(max_tokens, max_tokens, joint=limits[0].joint)
    return max(1, min(each.target_after(longest_source) for each in (*limits, micro_batch)))


class OnPolicySteps:
    """Implements `trainer.Steps`: those of `steps`, some of them with targets that the student samples when they are due."""

    def __init__(self, steps: Steps, own_samples: OwnSamples) -> None:
        self._steps = steps
        self._own_samples = own_samples

    def __iter__(self) -> Iterator[tuple[PlannedStep, Sequence[Batch]]]:
        for planned, batches in self._steps:
            yield self._own_samples(planned, batches) if self._own_samples.is_due(planned) else (planned, batches)

    def close(self) -> None:
        """Stop reading ahead."""
        self._steps.close()

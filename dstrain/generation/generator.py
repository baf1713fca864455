"""Texts or ids in, hypotheses out, in the order of the input: every line gives a line.

Sentences of similar length, prefixes counted, share a batch of at most `max_tokens` = hypotheses x length, so that padding costs
little; the longest come first, so that a lack of memory shows at once. A sentence's length limit follows from its own length,
never from its batch. Empty lines, and those without a token, are answered by an empty hypothesis without asking the model, unless
they have a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dstrain.batch import Sequences
from dstrain.data.batching.plan import batches_by_length
from dstrain.errors import DataError
from dstrain.generation.beam_search import beam_search
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.hypothesis import Hypothesis
from dstrain.generation.padding import pad
from dstrain.generation.sampling import sample
from dstrain.log import logger
from dstrain.models.config import LengthLimits
from dstrain.protocols import Generative, TextTokenizer


@dataclass(frozen=True)
class TextHypothesis(Hypothesis):
    """A hypothesis with its text."""

    text: str


def ignore_progress(finished: int) -> None:
    """A progress report that does nothing."""


@dataclass(frozen=True)
class Generator:
    """Generates from one model in evaluation mode, by the weights that it has at first.

    limits: of the model. truncate_source: cut longer sources instead of refusing them; each call says how many.
    """

    model: Generative
    config: BeamSearchConfig | SamplingConfig
    ids: SpecialIds
    limits: LengthLimits
    device: torch.device | str = "cpu"
    truncate_source: bool = False

    def translate_ids(
        self,
        sources: Sequence[Sequence[int]],
        *,
        prefixes: Sequence[Sequence[int]] | None = None,
        starts: Sequence[int | None] | None = None,
        first_line: int = 1,
        progress: Callable[[int], object] = ignore_progress,
    ) -> list[list[Hypothesis]]:
        """The `num_best` hypotheses of each source, best first; at least one each.

        sources: ids ending in EOS. prefixes: first target tokens, forced, without EOS; none where empty; None = what the target
        tokenizer puts in front of every text. starts: of sources whose decoder reads another token first than `ids.first`.
        first_line: number of the first source, for messages and the draws of sampling.
        progress: called with the finished sentences of each batch.
        DataError names the line of a source or prefix that is longer than the model allows.
        """
        limits = [self.limits.source] * len(sources)
        sources = fitting(sources, limits, truncate=self.truncate_source, first_line=first_line)
        forced: list[Sequence[int]]
        results: list[list[Hypothesis]] = [[Hypothesis([self.ids.eos], 0.0, [0.0])] for _ in sources]
        forced = [self.ids.before if len(source) > 1 else () for source in sources]
        if prefixes is not None:
            forced = self._forced(prefixes, sources, first_line)
        asked = [row for row, source in enumerate(sources) if len(source) > 1 or forced[row]]
        progress(len(sources) - len(asked))
        hypotheses = self.config.beam_size if isinstance(self.config, BeamSearchConfig) else self.config.num_best
        failed = 0
        costs = [(len(source) + len(prefix)) * hypotheses for source, prefix in zip(sources, forced, strict=True)]
        for rows in batches_by_length(costs, asked, self.config.max_tokens):
            batch, prefix = [sources[row] for row in rows], [forced[row] for row in rows]
            first = None if starts is None else [starts[row] for row in rows]
            answers = self._generate(batch, [first_line + row for row in rows], prefix, first)
            for row, answer in zip(rows, answers, strict=True):
                failed += not answer
                results[row] = answer or [Hypothesis([self.ids.eos], -torch.inf, [-torch.inf])]
            progress(len(rows))
        if failed:
            logger.warning(
                "%d of %d sentences have no hypothesis of finite score and stay empty: the model's output is not a number, or "
                "the constraints (no_repeat_ngram, min_length) allow nothing",
                failed,
                len(sources),
            )
        return results

    def translate(
        self,
        lines: Sequence[str],
        source: TextTokenizer,
        target: TextTokenizer,
        *,
        tags: Sequence[int] = (),
        prefixes: Sequence[str] | None = None,
        first_line: int = 1,
        progress: Callable[[int], object] = ignore_progress,
    ) -> list[list[TextHypothesis]]:
        """Texts in and out, as `translate_ids`. tags: ids in front of every source that is not empty."""
        ids = source_ids(lines, source, tags)
        forced = None
        if prefixes is not None:
            firsts = target.encode_prefixes(prefixes)
            forced = [first if text or len(row) > 1 else [] for first, text, row in zip(firsts, prefixes, ids, strict=True)]
        results = self.translate_ids(ids, prefixes=forced, first_line=first_line, progress=progress)
        texts = iter(target.decode([hypothesis.tokens for hypotheses in results for hypothesis in hypotheses]))
        return [[TextHypothesis(h.tokens, h.score, h.token_scores, next(texts)) for h in hypotheses] for hypotheses in results]

    def max_length(self, source_length: int, prefix_length: int = 0) -> int:
        """The most tokens before EOS, never fewer than the prefix has; a hypothesis of so many is cut, its EOS is forced.

        source_length: with EOS. The model reads the start token in front of them.
        """
        base_length = source_length if source_length > 1 else prefix_length + 1
        limit = int(self.config.max_length_ratio * base_length) + self.config.max_length_offset
        return min(max(limit, prefix_length), self.limits.target_after(source_length) - 1)

    @cached_property
    def _prepared(self) -> Generative:
        return self.model.prepared()

    def _generate(
        self,
        sources: Sequence[Sequence[int]],
        lines: Sequence[int],
        prefixes: Sequence[Sequence[int]],
        starts: Sequence[int | None] | None,
    ) -> list[list[Hypothesis]]:
        """One batch. lines: the number of each source."""
        device = torch.device(self.device)
        batch = Sequences(*pad(sources, self.ids.pad)).to(device)
        prefix = pad(prefixes, self.ids.pad)[0].to(device) if any(prefixes) else None
        limits = [self.max_length(len(source), len(first)) for source, first in zip(sources, prefixes, strict=True)]
        match self.config:
            case BeamSearchConfig() as config:
                return beam_search(
                    self._prepared, batch, config=config, ids=self.ids, max_lengths=limits, prefix=prefix, starts=starts
                )
            case SamplingConfig() as config:
                return sample(
                    self._prepared,
                    batch,
                    config=config,
                    ids=self.ids,
                    max_lengths=limits,
                    sentences=lines,
                    prefix=prefix,
                    starts=starts,
                )

    def _forced(
        self, prefixes: Sequence[Sequence[int]], sources: Sequence[Sequence[int]], first_line: int
    ) -> list[Sequence[int]]:
        """The prefixes, each cut to leave a position for EOS."""
        ended = [[*prefix, self.ids.eos] for prefix in prefixes]
        limits = [self.limits.target_after(len(source)) for source in sources]
        kept = fitting(ended, limits, truncate=self.truncate_source, first_line=first_line, what="prefix")
        return [prefix[:-1] for prefix in kept]


def source_ids(lines: Sequence[str], tokenizer: TextTokenizer, tags: Sequence[int] = ()) -> list[list[int]]:
    """Each line with EOS, and with tags in front unless it is empty."""
    return [[*(tags if row else ()), *row, tokenizer.eos_id] for row in tokenizer.encode(lines)]


def fitting(
    sources: Sequence[Sequence[int]], limits: Sequence[int], *, truncate: bool, first_line: int = 1, what: str = "source"
) -> list[Sequence[int]]:
    """The rows, none longer than its limit: longer ones are cut before their EOS with `truncate`, and a DataError without."""
    long = [row for row, (source, limit) in enumerate(zip(sources, limits, strict=True)) if len(source) > limit]
    if long and not truncate:
        raise DataError(
            f"{what} line {first_line + long[0]} has {len(sources[long[0]])} tokens (EOS counted), the model reads at most "
            f"{limits[long[0]]}; split the line, or cut long lines with --truncate (truncate_source=True)"
        )
    if long:
        logger.warning("%d of %d %s lines cut to the model's %d tokens", len(long), len(sources), what, limits[long[0]])
    return [
        source if len(source) <= limit else [*source[: limit - 1], source[-1]]
        for source, limit in zip(sources, limits, strict=True)
    ]

"""A split as something to translate: source ids in, texts out, scored against the raw text of its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from dstrain.config_base import RougeWords
from dstrain.data.prepared.corpora import NamedCorpora
from dstrain.data.prepared.dataset import Dataset
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.evaluation.metrics.corpus import MetricName, ReferenceSet, Score, corpus_scores, doubtful_scores, reference_sets
from dstrain.evaluation.metrics.rouge import build_rouge
from dstrain.evaluation.metrics.tokenization import choose_tokenization
from dstrain.generation.config import GenerationConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator, ignore_progress
from dstrain.log import logger
from dstrain.models.config import ModelConfig
from dstrain.parallel.mesh import Mesh
from dstrain.protocols import Generative


@dataclass(frozen=True)
class References:
    """The references of one corpus. rows: of the split. texts: raw, one or more a row. tokenize: BLEU's, not `auto`."""

    rows: Sequence[int]
    texts: Sequence[Sequence[str]]
    tokenize: str


@dataclass(frozen=True)
class Translation:
    """How one evaluation split is translated and scored.

    references: of each corpus by its name; one without a name if there is nothing to tell apart. lowercase: BLEU and chrF ignore
    case. rouge: the words that ROUGE compares; None = without ROUGE.
    """

    config: GenerationConfig
    model_config: ModelConfig
    dataset: Dataset
    tokenizers: TokenizerPair
    references: Mapping[str, References]
    device: torch.device
    lowercase: bool
    rouge: RougeWords | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def translate(self, model: Generative, rows: range, progress: Callable[[int], object] = ignore_progress) -> list[str]:
        """The best hypothesis of each row; sampling of a row depends only on its number. progress: as in `Generator`."""
        generator = Generator(
            model,
            self.config,
            SpecialIds.of(self.tokenizers.target),
            limits=self.model_config.limits,
            device=self.device,
        )
        examples = [self.dataset[row] for row in rows]
        sources, starts = [example.source.tolist() for example in examples], [example.start for example in examples]
        ranked = generator.translate_ids(sources, starts=starts, first_line=rows.start + 1, progress=progress)
        return self.tokenizers.target.decode([hypotheses[0].tokens for hypotheses in ranked])

    def score(self, hypotheses: Sequence[str]) -> Mapping[str, Any]:
        """BLEU, chrF, the rate of repetition and ROUGE of the whole split, in percent, and the `signatures` of all.

        Of several corpora each is scored by itself, as `bleu/NAME`, and `bleu` is the mean of these scores.
        """
        scores = [
            self._scores([hypotheses[row] for row in own.rows], reference_sets(own.texts), own.tokenize)
            for own in self.references.values()
        ]
        means = {each[0].name: sum(score.value for score in each) / len(each) for each in zip(*scores, strict=True)}
        return {**means, **self._by_corpus(scores), "signatures": self._signatures(scores)}

    def signatures(self) -> dict[str, str]:
        """Every setting that decides a score, by the name of the score."""
        scores = []
        for own in self.references.values():
            rows = [min(own.texts, key=len), max(own.texts, key=len)]  # the number of references is a setting
            scores.append(self._scores(["a", "a"], reference_sets(rows), own.tokenize))
        return self._signatures(scores)

    def _scores(self, hypotheses: Sequence[str], references: Sequence[ReferenceSet], tokenize: str) -> list[Score]:
        metrics: tuple[MetricName, ...] = ("bleu", "chrf", "repetition")
        return corpus_scores(
            hypotheses, *references, metrics=metrics, lowercase=self.lowercase, tokenize=tokenize, rouge=self.rouge
        )

    def _by_corpus(self, scores: Sequence[Sequence[Score]]) -> dict[str, float]:
        if len(scores) == 1:
            return {}
        return {f"{score.name}/{name}": score.value for name, own in zip(self.references, scores, strict=True) for score in own}

    def _signatures(self, scores: Sequence[Sequence[Score]]) -> dict[str, str]:
        """One a score; of several corpora those that are not alike stand one after another."""
        mean = "" if len(scores) == 1 else f"mean of {len(scores)} corpora: "
        distinct = {each[0].name: dict.fromkeys(score.signature for score in each) for each in zip(*scores, strict=True)}
        return {name: mean + ", ".join(signatures) for name, signatures in distinct.items()}


def build_translation(
    config: GenerationConfig | None,
    model_config: ModelConfig,
    dataset: Dataset,
    tokenizers: TokenizerPair,
    mesh: Mesh,
    *,
    corpora: NamedCorpora | None = None,
    tokenize: str = "auto",
    lowercase: bool = False,
    rouge: RougeWords | None = None,
) -> Translation | None:
    """None if nothing is to be generated. corpora: scored apart; None = one is all there is. tokenize, lowercase: of BLEU and
    chrF. rouge: the words that ROUGE compares; None = without ROUGE.

    Rank 0 warns if BLEU or ROUGE would not find the words of the split.

    Raises DataError if the split keeps no raw text to compare with, or BLEU cannot be tokenized so; ExtraError if the package of
    ROUGE is missing.
    """
    if config is None:
        return None
    if rouge is not None:
        build_rouge(rouge)  # a missing package is known before anything is translated
    parts = {"": [range(len(dataset))]} if corpora is None else {name: corpora.rows(name) for name in corpora.names}
    references = {}
    for name, ranges in parts.items():
        rows = [row for part in ranges for row in part]
        by_row = [dataset.references(row) for row in rows]
        texts = list(chain(*by_row))
        references[name] = References(rows, by_row, choose_tokenization(tokenize, texts))
        doubts = doubtful_scores(texts, tokenize=references[name].tokenize, rouge=rouge)
        for doubt in doubts if mesh.world.rank == 0 else ():
            logger.warning("%s", f"{name}: {doubt}" if name else doubt)
    return Translation(config, model_config, dataset, tokenizers, references, mesh.device, lowercase, rouge)

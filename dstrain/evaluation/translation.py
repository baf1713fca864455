"""A split as something to translate: source ids in, texts out, scored against the raw text of its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.data.prepared.dataset import Dataset
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.evaluation.metrics.corpus import MetricName, Score, corpus_scores
from dstrain.evaluation.metrics.tokenization import choose_tokenization, doubtful_tokenization
from dstrain.generation.config import GenerationConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator, ignore_progress
from dstrain.log import logger
from dstrain.models.config import ModelConfig
from dstrain.parallel.mesh import Mesh
from dstrain.protocols import Generative


@dataclass(frozen=True)
class Translation:
    """How one evaluation split is translated and scored.

    references: the raw text of its targets, in the order of the rows. tokenize: BLEU's, not `auto`. lowercase: BLEU and chrF
    ignore case.
    """

    config: GenerationConfig
    model_config: ModelConfig
    dataset: Dataset
    tokenizers: TokenizerPair
    references: Sequence[str]
    device: torch.device
    tokenize: str
    lowercase: bool

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
        sources = [self.dataset[row].source.tolist() for row in rows]
        ranked = generator.translate_ids(sources, first_line=rows.start + 1, progress=progress)
        return self.tokenizers.target.decode([hypotheses[0].tokens for hypotheses in ranked])

    def score(self, hypotheses: Sequence[str]) -> Mapping[str, Any]:
        """BLEU, chrF and the rate of repetition of the whole split, in percent, and the `signatures` of the three."""
        scores = self._scores(hypotheses, self.references)
        return {**{score.name: score.value for score in scores}, "signatures": _signatures(scores)}

    def signatures(self) -> dict[str, str]:
        """Every setting that decides a score, by the name of the score."""
        return _signatures(self._scores(["a"], ["a"]))

    def _scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[Score]:
        metrics: tuple[MetricName, ...] = ("bleu", "chrf", "repetition")
        return corpus_scores(hypotheses, references, metrics=metrics, lowercase=self.lowercase, tokenize=self.tokenize)


def _signatures(scores: Sequence[Score]) -> dict[str, str]:
    return {score.name: score.signature for score in scores}


def build_translation(
    config: GenerationConfig | None,
    model_config: ModelConfig,
    dataset: Dataset,
    tokenizers: TokenizerPair,
    mesh: Mesh,
    *,
    tokenize: str = "auto",
    lowercase: bool = False,
) -> Translation | None:
    """None if nothing is to be generated. Rank 0 warns if BLEU would not find the words of the split.

    Raises DataError if the split keeps no raw text to compare with, or BLEU cannot be tokenized so.
    """
    if config is None:
        return None
    references = [dataset.target_text(row) for row in range(len(dataset))]
    tokenize = choose_tokenization(tokenize, references)
    if mesh.world.rank == 0 and (doubt := doubtful_tokenization(tokenize, references)) is not None:
        logger.warning("%s", doubt)
    return Translation(config, model_config, dataset, tokenizers, references, mesh.device, tokenize, lowercase)

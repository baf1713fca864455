"""How good a corpus of hypotheses is: BLEU, chrF and TER as sacreBLEU computes them, and how much the text repeats itself.

Choice: sacreBLEU's defaults throughout, TER's disregard of case included; only `lowercase` and BLEU's `tokenize` may be set.
Every score carries the signature that makes it comparable. Cost: about a second per 1,000 sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU, BLEUScore
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from dstrain import __version__
from dstrain.errors import DataError
from dstrain.evaluation.metrics.tokenization import build_bleu

MetricName = Literal["bleu", "chrf", "ter", "repetition"]


@dataclass(frozen=True)
class Score:
    """value: percent. signature: every setting that decides it. detail: an explanation for people; may be empty."""

    name: MetricName
    value: float
    signature: str
    detail: str = ""


def corpus_scores(
    hypotheses: Sequence[str],
    *references: Sequence[str],
    metrics: Sequence[MetricName] = ("bleu", "chrf", "ter"),
    lowercase: bool = False,
    tokenize: str = "13a",
) -> list[Score]:
    """Score detokenized lines against one or more sets of references, each as long as `hypotheses`.

    Raises `DataError` if numbers of lines differ, there are none, or sacreBLEU cannot tokenize as asked.
    """
    if not hypotheses:
        raise DataError("there is nothing to score: the hypotheses hold no line")
    for number, lines in enumerate(references, start=1):
        if len(lines) != len(hypotheses):
            raise DataError(f"{len(hypotheses)} hypotheses cannot be compared with the {len(lines)} lines of reference {number}")
    bleu = build_bleu(tokenize, lowercase=lowercase)
    scores = []
    for name in metrics:
        if name == "repetition":
            scores.append(_repetition(hypotheses, references, bleu))
        else:
            metric: Metric = {"bleu": bleu, "chrf": CHRF(lowercase=lowercase), "ter": TER()}[name]
            result = metric.corpus_score(hypotheses, references)
            detail = _bleu_detail(result) if isinstance(result, BLEUScore) else ""
            scores.append(Score(name, result.score, str(metric.get_signature()), detail))
    return scores


def repetition_rate(lines: Sequence[Sequence[str]]) -> float:
    """Percent of tokens that repeat: equal to the token before, or the end of a bigram that the line held before.

    lines: the tokens of each. 0 if there is no token. After the repetition measures of Welleck et al., "Neural Text Generation
    with Unlikelihood Training" (2020), which count only n-grams and so miss a doubled word. Ordinary text has about 0.5.
    """
    repeated = 0
    for tokens in lines:
        seen: set[tuple[str, str]] = set()
        for pair in pairwise(tokens):
            repeated += pair[0] == pair[1] or pair in seen
            seen.add(pair)
    return 100 * repeated / max(sum(map(len, lines)), 1)


def _repetition(hypotheses: Sequence[str], references: Sequence[Sequence[str]], bleu: BLEU) -> Score:
    """The rate of the hypotheses, lower-cased and tokenized as for BLEU; beside it that of the references."""

    def rate(texts: Iterable[str]) -> float:
        return repetition_rate([bleu.tokenizer(text.lower()).split() for text in texts])

    signature = f"tokens:doubled+bigram|case:lc|tok:{bleu.tokenizer.signature()}|version:dstrain-{__version__}"
    return Score("repetition", rate(hypotheses), signature, f"references {rate(chain(*references)):.2f}")


def _bleu_detail(score: BLEUScore) -> str:
    precisions = "/".join(f"{precision:.1f}" for precision in score.precisions)
    return f"{precisions}, brevity penalty {score.bp:.3f}, length ratio {score.ratio:.3f}"

"""How good a corpus of hypotheses is: BLEU, chrF and TER as sacreBLEU computes them, ROUGE as rouge-score does, and how much the
text repeats itself.

Choice: sacreBLEU's defaults throughout, TER's disregard of case included; only `lowercase` and BLEU's `tokenize` may be set.
Every score carries the signature that makes it comparable. Cost: about a second per 1,000 sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from typing import Literal, cast

from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU, BLEUScore
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from dstrain import __version__
from dstrain.config_base import RougeWords
from dstrain.errors import DataError
from dstrain.evaluation.metrics.rouge import RougeName, doubtful_rouge, rouge_scores, rouge_signature
from dstrain.evaluation.metrics.tokenization import build_bleu, doubtful_tokenization

MetricName = Literal["bleu", "chrf", "ter", "repetition"]
ReferenceSet = Sequence[str | None]
"""One reference of every line; None for a line that has fewer than others."""


@dataclass(frozen=True)
class Score:
    """value: percent. signature: every setting that decides it. detail: an explanation for people; may be empty."""

    name: MetricName | RougeName
    value: float
    signature: str
    detail: str = ""


def corpus_scores(
    hypotheses: Sequence[str],
    *references: ReferenceSet,
    metrics: Sequence[MetricName] = ("bleu", "chrf", "ter"),
    lowercase: bool = False,
    tokenize: str = "13a",
    rouge: RougeWords | None = None,
) -> list[Score]:
    """Score detokenized lines against one or more sets of references, each as long as `hypotheses`.

    rouge: the words of ROUGE-1, 2 and L, which follow the other scores; None = without ROUGE.
    Raises DataError if numbers of lines differ, there are none, a line has no reference, or sacreBLEU cannot tokenize as asked;
    ExtraError if ROUGE is asked for without its package.
    """
    if not hypotheses:
        raise DataError("there is nothing to score: the hypotheses hold no line")
    for number, lines in enumerate(references, start=1):
        if len(lines) != len(hypotheses):
            raise DataError(f"{len(hypotheses)} hypotheses cannot be compared with the {len(lines)} lines of reference {number}")
    by_line = [[text for text in own if text is not None] for own in zip(*references, strict=True)]
    if [] in by_line:
        raise DataError(f"line {by_line.index([]) + 1} has no reference; give it one, or leave the line out everywhere")
    bleu = build_bleu(tokenize, lowercase=lowercase)
    scores = []
    for name in metrics:
        if name == "repetition":
            scores.append(_repetition(hypotheses, chain(*by_line), bleu))
        else:
            metric: Metric = {"bleu": bleu, "chrf": CHRF(lowercase=lowercase), "ter": TER()}[name]
            result = metric.corpus_score(
                hypotheses, cast("Sequence[Sequence[str]]", references)
            )  # None is allowed, "" would count
            detail = _bleu_detail(result) if isinstance(result, BLEUScore) else ""
            scores.append(Score(name, result.score, str(metric.get_signature()), detail))
    if rouge is not None:
        signature = rouge_signature(by_line, rouge)
        scores += [Score(name, value, signature) for name, value in rouge_scores(hypotheses, by_line, rouge).items()]
    return scores


def doubtful_scores(references: Sequence[str], *, tokenize: str, rouge: RougeWords | None) -> list[str]:
    """Warnings if BLEU by this tokenization, or ROUGE, would not find the words of the references."""
    doubts = [doubtful_tokenization(tokenize, references), doubtful_rouge(references) if rouge is not None else None]
    return [doubt for doubt in doubts if doubt is not None]


def reference_sets(by_line: Iterable[Sequence[str]]) -> list[tuple[str | None, ...]]:
    """The references of each line -> sets of one reference of every line, as `corpus_scores` takes them."""
    return list(zip_longest(*by_line))


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


def _repetition(hypotheses: Sequence[str], references: Iterable[str], bleu: BLEU) -> Score:
    """The rate of the hypotheses, lower-cased and tokenized as for BLEU; beside it that of the references."""

    def rate(texts: Iterable[str]) -> float:
        return repetition_rate([bleu.tokenizer(text.lower()).split() for text in texts])

    signature = f"tokens:doubled+bigram|case:lc|tok:{bleu.tokenizer.signature()}|version:dstrain-{__version__}"
    return Score("repetition", rate(hypotheses), signature, f"references {rate(references):.2f}")


def _bleu_detail(score: BLEUScore) -> str:
    precisions = "/".join(f"{precision:.1f}" for precision in score.precisions)
    return f"{precisions}, brevity penalty {score.bp:.3f}, length ratio {score.ratio:.3f}"

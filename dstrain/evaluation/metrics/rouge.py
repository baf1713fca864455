"""ROUGE-1, 2 and L as the package rouge-score computes them (Lin, "ROUGE: A Package for Automatic Evaluation...", 2004).

Choice: F1 of each line, the highest over its references for each score by itself, and the mean over the lines. SciTLDR is scored
by the maximum, too (Cachola et al. 2020). ROUGE-L is of the whole text, not by sentence (rouge-score's rougeL, not rougeLsum).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, Literal

from dstrain.config_base import RougeWords
from dstrain.extras import import_extra

RougeName = Literal["rouge_1", "rouge_2", "rouge_l"]
ROUGE_TYPES: dict[RougeName, str] = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""Our names -> rouge-score's."""


def rouge_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]], words: RougeWords) -> dict[RougeName, float]:
    """The mean F1 over the lines, in percent. references: of each line, one or more.

    Raises ExtraError if rouge-score is missing.
    """
    scorer = build_rouge(words)
    best = [scorer.score_multi(own, hypothesis) for own, hypothesis in zip(references, hypotheses, strict=True)]
    return {name: 100 * sum(line[key].fmeasure for line in best) / len(best) for name, key in ROUGE_TYPES.items()}


def rouge_signature(references: Sequence[Sequence[str]], words: RougeWords) -> str:
    """Every setting that decides a score, in the manner of sacreBLEU's signatures."""
    counts = {len(own) for own in references}
    number = str(*counts) if len(counts) == 1 else "var"
    stemmer = "porter" if words == "stemmed" else "no"
    return (
        f"nrefs:{number}|refs:max|score:f1|avg:lines|case:lc|stemmer:{stemmer}|tok:a-z0-9|version:rouge_score-"
        f"{version('rouge_score')}"
    )


def build_rouge(words: RougeWords) -> Any:
    """rouge-score's scorer. Raises ExtraError if the package is missing."""
    scorer = import_extra("rouge_score.rouge_scorer", extra="rouge", purpose="ROUGE")
    return scorer.RougeScorer(list(ROUGE_TYPES.values()), use_stemmer=words == "stemmed")


def doubtful_rouge(references: Iterable[str]) -> str | None:
    """A warning if most letters are none of a-z: rouge-score reads every other letter as a space."""
    letters = [letter for text in references for letter in text if letter.isalpha()]
    if sum(map(str.isascii, letters)) * 2 >= len(letters):
        return None
    return (
        "ROUGE finds words of a-z and 0-9 only, and most letters of the references are others, so its scores say nothing here; "
        "leave rouge out, and read chrF"
    )

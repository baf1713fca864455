"""How answers are written: plain text, JSON lines, or fairseq's S-/T-/H-/D-/P- lines.

Numbers are natural logarithms, but for fairseq's, which are in base 2. A line break inside a text becomes a space, so that it
stays one line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dstrain.errors import DataError, RecipeError

if TYPE_CHECKING:  # so that the command line lists the formats without loading torch
    from dstrain.generation.generator import TextHypothesis
    from dstrain.protocols import TextTokenizer

Format = Literal["text", "jsonl", "fairseq"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Answer:
    """The hypotheses of one input line. line: from 1. reference: a human translation, if known."""

    line: int
    source: str
    hypotheses: Sequence[TextHypothesis]
    reference: str | None = None


def require_sentences(lines: Sequence[str], name: str) -> None:
    """Raise DataError if lines are answers in another format than text, which are not to be scored as they are."""
    if any(re.match(r"[STHDP]-\d+\t", line) for line in lines):
        raise DataError(f"{name} has fairseq's lines; score its sentences: grep ^D- FILE | sort -V | cut -f3")
    if lines and lines[0].startswith('{"line": '):
        raise DataError(f"{name} has JSON lines; score its sentences: jq -r '.hypotheses[0].text' FILE")


def formatter(name: Format, target: TextTokenizer, *, num_best: int, score_only: bool = False) -> Callable[[Answer], str]:
    """Turns an answer into its lines, each ending in a line break. RecipeError if plain text would need several lines.

    score_only: the one hypothesis is a given text, of which plain text then writes the score.
    """
    if name == "text" and score_only:
        return as_score
    if name == "text" and num_best > 1:
        raise RecipeError(f"format text has one line per input, but num_best = {num_best}; choose --format jsonl or fairseq")
    match name:
        case "text":
            return as_text
        case "jsonl":
            return lambda answer: as_json(answer, target)
        case "fairseq":
            return lambda answer: as_fairseq(answer, target)


def as_text(answer: Answer) -> str:
    """The best hypothesis."""
    return one_line(answer.hypotheses[0].text) + "\n"


def as_score(answer: Answer) -> str:
    """The score of the best hypothesis."""
    return f"{answer.hypotheses[0].score}\n"


def as_json(answer: Answer, target: TextTokenizer) -> str:
    """One object: line, source, reference if there is one, hypotheses with text, score, tokens and token_scores, best first.

    A score that is not finite is null.
    """
    content: dict[str, object] = {"line": answer.line, "source": answer.source}
    if answer.reference is not None:
        content["reference"] = answer.reference
    content["hypotheses"] = [
        {
            "text": hypothesis.text,
            "score": finite(hypothesis.score),
            "tokens": target.tokens(hypothesis.tokens),
            "token_scores": [finite(score) for score in hypothesis.token_scores],
        }
        for hypothesis in answer.hypotheses
    ]
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def as_fairseq(answer: Answer, target: TextTokenizer) -> str:
    """S- source, T- reference, and per hypothesis H- score and tokens, D- score and text, P- scores of the tokens and EOS.

    Lines are numbered from 0, in base 2, as fairseq does.
    """
    number = answer.line - 1
    lines = [f"S-{number}\t{one_line(answer.source)}"]
    if answer.reference is not None:
        lines.append(f"T-{number}\t{one_line(answer.reference)}")
    for hypothesis in answer.hypotheses:
        score = hypothesis.score / math.log(2)
        pieces = one_line(" ".join(target.tokens(hypothesis.tokens[:-1])))
        token_scores = " ".join(f"{value / math.log(2):.4f}" for value in hypothesis.token_scores)
        lines += [f"H-{number}\t{score}\t{pieces}", f"D-{number}\t{score}\t{one_line(hypothesis.text)}"]
        lines.append(f"P-{number}\t{token_scores}")
    return "\n".join(lines) + "\n"


def one_line(text: str) -> str:
    """The text with line breaks as spaces, so that a format of lines may hold it."""
    return text.replace("\n", " ").replace("\r", " ")


def finite(value: float) -> float | None:
    """The value, None for one that JSON cannot hold."""
    return value if math.isfinite(value) else None

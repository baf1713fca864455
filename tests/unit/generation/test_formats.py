"""What stands in the output."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from dstrain.errors import RecipeError
from dstrain.generation.formats import Answer, formatter
from dstrain.generation.generator import TextHypothesis
from tests.paths import ROOT
from tests.unit.generation.small_bundle import WORDS, dictionary

TARGET = dictionary(WORDS)
BEST = TextHypothesis([4, 6, 2], -0.5, [-0.25, -0.75, -0.5], "eins drei")
SECOND = TextHypothesis([5, 2], -2.0, [-3.0, -1.0], "zwei")


def test_text_is_the_best_hypothesis_on_one_line() -> None:
    render = formatter("text", TARGET, num_best=1)
    assert render(Answer(3, "one three", [BEST])) == "eins drei\n"
    broken = TextHypothesis([4, 2], -1.0, [-0.5, -0.5], "a\nb\r\nc")
    assert render(Answer(3, "one", [broken])) == "a b  c\n"


def test_no_text_breaks_a_line_of_fairseqs_format() -> None:
    broken = TextHypothesis([4, 2], -1.0, [-0.5, -0.5], "a\nb")
    lines = formatter("fairseq", TARGET, num_best=1)(Answer(1, "o\rn\ne", [broken], "ei\r\nns")).splitlines()
    assert [line.split("\t")[0] for line in lines] == ["S-0", "T-0", "H-0", "D-0", "P-0"]
    assert lines[:2] == ["S-0\to n e", "T-0\tei  ns"]


def test_text_refuses_several_hypotheses() -> None:
    with pytest.raises(RecipeError, match="one line per input, but num_best = 2; choose --format jsonl or fairseq"):
        formatter("text", TARGET, num_best=2)


def test_text_of_a_scored_line_is_its_score() -> None:
    render = formatter("text", TARGET, num_best=5, score_only=True)
    assert render(Answer(3, "one three", [BEST])) == "-0.5\n"


def test_formats_are_listed_without_torch() -> None:
    code = "import sys; from dstrain.generation.formats import FORMATS; print(*FORMATS, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == ["text", "jsonl", "fairseq", "False"]


def test_json_lines() -> None:
    render = formatter("jsonl", TARGET, num_best=2)
    line = render(Answer(7, "fünf", [BEST, SECOND], "ref"))
    assert line.endswith("}\n")
    assert "fünf" in line
    assert json.loads(line) == {
        "line": 7,
        "source": "fünf",
        "reference": "ref",
        "hypotheses": [
            {"text": "eins drei", "score": -0.5, "tokens": ["eins", "drei", "</s>"], "token_scores": [-0.25, -0.75, -0.5]},
            {"text": "zwei", "score": -2.0, "tokens": ["zwei", "</s>"], "token_scores": [-3.0, -1.0]},
        ],
    }
    assert "reference" not in json.loads(render(Answer(7, "x", [BEST])))


def test_json_has_null_for_a_score_that_is_not_finite() -> None:
    failed = TextHypothesis([2], -math.inf, [-math.inf], "")
    (hypothesis,) = json.loads(formatter("jsonl", TARGET, num_best=1)(Answer(1, "x", [failed])))["hypotheses"]
    assert (hypothesis["score"], hypothesis["token_scores"]) == (None, [None])


def test_fairseq_lines_count_from_zero_in_base_two() -> None:
    render = formatter("fairseq", TARGET, num_best=2)
    first, second = -0.5 / math.log(2), -2.0 / math.log(2)
    assert render(Answer(8, "one three", [BEST, SECOND], "eins")).splitlines() == [
        "S-7\tone three",
        "T-7\teins",
        f"H-7\t{first}\teins drei",
        f"D-7\t{first}\teins drei",
        "P-7\t-0.3607 -1.0820 -0.7213",
        f"H-7\t{second}\tzwei",
        f"D-7\t{second}\tzwei",
        "P-7\t-4.3281 -1.4427",
    ]
    assert not any(line.startswith("T-") for line in render(Answer(8, "one", [BEST])).splitlines())

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.errors import DataError
from dstrain.evaluation.metrics.corpus import corpus_scores, repetition_rate

LINE = "Ein kleiner Hund läuft , über die Straße . » nicht « 3,5 km/h don't 我们 去 — U.S. &quot; Ö"
WORDS = LINE.split()


def made_up(seed: int, num_lines: int = 150) -> list[str]:
    """Lines with capitals, punctuation, digits, another script, doubled spaces and nothing at all."""
    rng = random.Random(seed)
    return ["  ".join(rng.choices(WORDS, k=rng.randrange(12))) for _ in range(num_lines)]


def altered(lines: list[str], seed: int) -> list[str]:
    """A translator's attempt at `lines`: words lost, doubled and exchanged."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice((word, word, word, word.upper(), f"{word} {word}", "")) for word in line.split()) for line in lines
    ]


@pytest.mark.parametrize(
    ("num_references", "lowercase", "tokenize"),
    [(1, False, "13a"), (1, True, "13a"), (2, False, "intl"), (3, True, "zh"), (1, False, "none"), (1, False, "char")],
)
def test_scores_equal_the_sacrebleu_command(tmp_path: Path, num_references: int, lowercase: bool, tokenize: str) -> None:
    references = [made_up(0), *(altered(made_up(0), seed) for seed in range(1, num_references))]
    hypotheses = altered(references[0], 99)
    files = []
    for number, lines in enumerate([hypotheses, *references]):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text("".join(line + "\n" for line in lines))
    command = [sys.executable, "-m", "sacrebleu", *files[1:], "-i", files[0], "-m", "bleu", "chrf", "ter", "-w", "12"]
    command += ["--tokenize", tokenize, *(["--lowercase", "--chrf-lowercase"] if lowercase else [])]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    ours = corpus_scores(hypotheses, *references, lowercase=lowercase, tokenize=tokenize)
    assert [score.name for score in ours] == ["bleu", "chrf", "ter"]
    for score, their in zip(ours, theirs, strict=True):
        assert score.value == pytest.approx(their["score"], abs=1e-9)
        assert score.signature == their["signature"]
        assert 0 < score.value < 200


def test_bleu_tells_its_parts() -> None:
    (score,) = corpus_scores(["a b c d e"], ["a b c d e f"], metrics=("bleu",))
    assert score.detail == "100.0/100.0/100.0/100.0, brevity penalty 0.819, length ratio 0.833"


@pytest.mark.parametrize(
    ("line", "repeated"),
    [
        ("", 0),
        ("das", 0),
        ("das ist das", 0),  # a word again, elsewhere
        ("das das", 1),  # doubled
        ("das das das das", 3),
        ("ein Hund und ein Hund", 1),  # the second "ein Hund"
        ("ein Hund ein Hund ein Hund", 3),  # "ein Hund", "Hund ein", "ein Hund"
    ],
)
def test_repetition_by_hand(line: str, repeated: int) -> None:
    tokens = line.split()
    assert repetition_rate([tokens]) == pytest.approx(100 * repeated / max(len(tokens), 1))


def test_repetition_is_pooled_over_the_corpus() -> None:
    assert repetition_rate([["a", "a"], ["b", "c", "d"], []]) == pytest.approx(100 * 1 / 5)
    assert repetition_rate([]) == 0


def test_repetition_among_the_scores() -> None:
    (score,) = corpus_scores(["Das das!", "ein Hund"], ["das Tier!", "ein Hund"], ["Tier tier!", "x"], metrics=("repetition",))
    assert score.value == pytest.approx(100 * 1 / 5)  # das das ! ein Hund
    assert score.detail == f"references {100 * 1 / 9:.2f}"
    assert score.signature.startswith("tokens:doubled+bigram|case:lc|tok:13a|version:dstrain-")


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="there is nothing to score: the hypotheses hold no line"):
        corpus_scores([], [])


def test_unequal_numbers_of_lines() -> None:
    with pytest.raises(DataError, match="3 hypotheses cannot be compared with the 2 lines of reference 2"):
        corpus_scores(["a"] * 3, ["a"] * 3, ["a"] * 2)

"""ROUGE equals rouge-score's own figures, line by line; several references, and what has none."""

from __future__ import annotations

import random
import sys
from importlib.metadata import version

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dstrain.errors import DataError, ExtraError
from dstrain.evaluation.metrics.corpus import corpus_scores, reference_sets
from dstrain.evaluation.metrics.rouge import doubtful_rouge, rouge_scores
from tests.unit.evaluation.test_corpus import altered, made_up

TEXT = "we propose a network that learns summaries of papers quickly and running experiments show it , in 3.5 h"


def made_up_summaries(seed: int, number: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(TEXT.split(), k=rng.randrange(1, 12))) for _ in range(number)]


@pytest.mark.parametrize("words", ["stemmed", "plain"])
def test_scores_are_the_mean_of_the_best_reference_of_every_line(words: str) -> None:
    hypotheses, rng = made_up_summaries(0), random.Random(1)
    references = [[made_up_summaries(seed)[row] for seed in range(1, 2 + rng.randrange(4))] for row in range(len(hypotheses))]
    scores = corpus_scores(hypotheses, *reference_sets(references), metrics=(), rouge=words)  # type: ignore[arg-type]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=words == "stemmed")
    assert [score.name for score in scores] == ["rouge_1", "rouge_2", "rouge_l"]
    for score, key in zip(scores, ("rouge1", "rouge2", "rougeL"), strict=True):
        best = [
            max(scorer.score(text, hypothesis)[key].fmeasure for text in own)
            for own, hypothesis in zip(references, hypotheses, strict=True)
        ]
        assert score.value == pytest.approx(100 * sum(best) / len(best), abs=1e-9)
        assert 0 < score.value < 100


def test_by_hand() -> None:
    # the cat | the cat of 3 and 4 words; one of 2 and 3 bigrams
    assert rouge_scores(["the cat sat"], [["the cat ran home"]], "plain") == pytest.approx(
        {"rouge_1": 400 / 7, "rouge_2": 40, "rouge_l": 400 / 7}
    )
    # each score takes its own best reference: all words in another order, or two of four in the same order
    assert rouge_scores(["a b c d"], [["d c b a", "a b"]], "plain") == pytest.approx(
        {"rouge_1": 100, "rouge_2": 50, "rouge_l": 200 / 3}
    )


def test_the_stemmer_is_a_choice_that_the_signature_names() -> None:
    scores = {
        words: corpus_scores(["Cats running!"], ["cat runs"], metrics=(), rouge=words)[0]  # type: ignore[arg-type]
        for words in ("stemmed", "plain")
    }
    assert (scores["stemmed"].value, scores["plain"].value) == (100, 0)
    tail = f"tok:a-z0-9|version:rouge_score-{version('rouge_score')}"
    assert scores["stemmed"].signature == f"nrefs:1|refs:max|score:f1|avg:lines|case:lc|stemmer:porter|{tail}"
    assert scores["plain"].signature == f"nrefs:1|refs:max|score:f1|avg:lines|case:lc|stemmer:no|{tail}"


def test_a_line_may_have_fewer_references_than_others() -> None:
    """For every score this is as if one of its references were there twice."""
    first, second = made_up(1), altered(made_up(1), 2)
    hypotheses = altered(made_up(1), 3)
    fewer = [text if row % 3 else None for row, text in enumerate(second)]
    twice = [text or first[row] if row % 3 else first[row] for row, text in enumerate(second)]
    fewer = [text if text else None for text in fewer]
    some, all_there = (
        corpus_scores(hypotheses, first, own, metrics=("bleu", "chrf", "ter"), rouge="plain") for own in (fewer, twice)
    )
    assert [score.value for score in some] == pytest.approx([score.value for score in all_there])
    assert all("nrefs:var|" in score.signature for score in some)
    assert all("nrefs:2|" in score.signature for score in all_there)


def test_a_line_without_a_reference_is_named() -> None:
    with pytest.raises(DataError, match="line 2 has no reference; give it one, or leave the line out everywhere"):
        corpus_scores(["a", "b"], ["a", None], rouge="plain")


def test_references_of_another_script_are_doubtful() -> None:
    assert "most letters of the references are others" in str(doubtful_rouge(["他看见一座红房子。", "BLEU"]))
    assert doubtful_rouge(["Größe, 3,5 km", "他"]) is None


def test_the_package_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ExtraError, match=r'^ROUGE needs a package .*pip install "dstrain\[rouge\]"$'):
        corpus_scores(["a"], ["a"], rouge="plain")

import re
from itertools import islice

import pytest

from dstrain.data.sources import grammar
from dstrain.data.sources.grammar import GrammarReader, NounPhrase, Split, sentence_pairs
from dstrain.data.sources.lexicon import ADJECTIVES, LOCATIONS, PERSONS, STATES, THINGS, THOUGHTS, Case, Noun
from dstrain.data.sources.text import decode_lines
from dstrain.errors import DataError

NOUNS = {noun.singular: noun for noun in PERSONS + THINGS + LOCATIONS}


def pairs(split: Split, number: int, seed: int = 1) -> list[grammar.Pair]:
    return list(islice(sentence_pairs(split, seed), number))


@pytest.fixture(scope="module")
def train() -> list[grammar.Pair]:
    return pairs("train", 20_000)


def test_twenty_thousand_distinct_training_pairs_translate_one_way(train: list[grammar.Pair]) -> None:
    assert len({pair.english for pair in train}) == 20_000
    translations: dict[str, str] = {}
    for pair in [*train, *pairs("train", 3000, seed=2), *pairs("test", 1000)]:
        assert translations.setdefault(pair.english, pair.german) == pair.german


def test_the_seed_decides(train: list[grammar.Pair]) -> None:
    assert pairs("train", 50) == train[:50]
    assert pairs("train", 50, seed=2) != train[:50]
    assert train[0] == (
        "This red dog showed these big children two quiet trees.",
        "Dieser rote Hund hat diesen großen Kindern zwei ruhige Bäume gezeigt.",
    )


def test_splits_share_no_sentence_whatever_the_seed(train: list[grammar.Pair]) -> None:
    shown = {pair.english for pair in train}
    for split in ("valid", "test"):
        for seed in (1, 2):
            assert not shown & {pair.english for pair in pairs(split, 500, seed)}


def combinations(english: str) -> set[tuple[str, str]]:
    """Adjective with its noun, and each verb with the nouns after it, up to the next clause."""
    singular = {form: noun.singular for noun in NOUNS.values() for form in (noun.singular, noun.plural)}
    verbs = {
        form: verb.base
        for verb in grammar.ACTIONS + grammar.FAVORS + grammar.GIFTS
        for form in (verb.base, verb.third, verb.past)
    }
    breaks = {form for verb in STATES + THOUGHTS for form in (verb.base, verb.third, verb.past)} | {"that", "because"}
    found, verb, adjective = set(), "", ""
    for word in english.rstrip(".").lower().split():
        if word in singular:
            found |= {(first, singular[word]) for first in (verb, adjective) if first}
        adjective = word if word in dict(ADJECTIVES) else ""
        verb = verbs.get(word, "" if word in breaks else verb)
    return found


def test_test_sentences_hold_combinations_that_training_never_shows(train: list[grammar.Pair]) -> None:
    shown = set().union(*(combinations(pair.english) for pair in [*train, *pairs("valid", 500)]))
    for pair in pairs("test", 500):
        assert combinations(pair.english) - shown, pair.english


def test_every_word_of_the_test_is_trained(train: list[grammar.Pair]) -> None:
    for side in range(2):
        known = {word for pair in train for word in re.findall(r"\w+", pair[side].lower())}
        assert {word for pair in pairs("test", 500) for word in re.findall(r"\w+", pair[side].lower())} <= known


DECLENSION = {
    # determiner, noun, plural: nominative, accusative, dative of "<determiner> old <noun>", from a schoolbook's tables
    ("the", "man", False): ("der alte Mann", "den alten Mann", "dem alten Mann"),
    ("the", "woman", False): ("die alte Frau", "die alte Frau", "der alten Frau"),
    ("the", "child", False): ("das alte Kind", "das alte Kind", "dem alten Kind"),
    ("the", "child", True): ("die alten Kinder", "die alten Kinder", "den alten Kindern"),
    ("a", "man", False): ("ein alter Mann", "einen alten Mann", "einem alten Mann"),
    ("a", "woman", False): ("eine alte Frau", "eine alte Frau", "einer alten Frau"),
    ("a", "child", False): ("ein altes Kind", "ein altes Kind", "einem alten Kind"),
    ("my", "dog", False): ("mein alter Hund", "meinen alten Hund", "meinem alten Hund"),
    ("my", "lamp", True): ("meine alten Lampen", "meine alten Lampen", "meinen alten Lampen"),
    ("this", "car", False): ("dieses alte Auto", "dieses alte Auto", "diesem alten Auto"),
    ("this", "car", True): ("diese alten Autos", "diese alten Autos", "diesen alten Autos"),
    ("this", "boy", False): ("dieser alte Junge", "diesen alten Jungen", "diesem alten Jungen"),
    ("two", "apple", True): ("zwei alte Äpfel", "zwei alte Äpfel", "zwei alten Äpfeln"),
    ("two", "garden", True): ("zwei alte Gärten", "zwei alte Gärten", "zwei alten Gärten"),
}


@pytest.mark.parametrize(("key", "forms"), DECLENSION.items(), ids=str)
def test_declension(key: tuple[str, str, bool], forms: tuple[str, str, str]) -> None:
    determiner, noun, plural = key
    phrase = NounPhrase(determiner, ("old", "alt"), NOUNS[noun], plural)  # type: ignore[arg-type]
    cases: tuple[Case, ...] = ("nominative", "accusative", "dative")
    assert tuple(" ".join(phrase.german(case)) for case in cases) == forms


def test_english_articles() -> None:
    apple: Noun = NOUNS["apple"]
    assert NounPhrase("a", None, apple, False).english() == ["an", "apple"]
    assert NounPhrase("a", ("red", "rot"), apple, False).english() == ["a", "red", "apple"]
    assert NounPhrase("this", None, apple, True).english() == ["these", "apples"]


@pytest.mark.parametrize(
    ("english", "german"),
    [
        (r"^Today .* (must|can) (help|thank) ", r"^Heute (muss|müssen|kann|können) .* (helfen|danken)\.$"),
        (r"that .* (bought|found|saw) ", r", dass .* (gekauft|gefunden|gesehen) (hat|haben)\.$"),
        (r"because .* can (buy|find|see) ", r", weil .* (kaufen|finden|sehen) (kann|können)\.$"),
        (r"^The \w+ (gives|shows|sends) ", r"^(Der|Die|Das) \w+ (gibt|zeigt|schickt) .*\w\.$"),
        (r"^Often ", r"^Oft \w+ "),
    ],
)
def test_word_order(train: list[grammar.Pair], english: str, german: str) -> None:
    found = [pair for pair in train if re.search(english, pair.english)]
    assert len(found) > 20
    for pair in found:
        assert re.search(german, pair.german), pair


def test_the_reader_starts_anywhere() -> None:
    expected = pairs("valid", 40)
    with GrammarReader("valid", 40, 1, start=25) as reader:
        block, rest = reader.read(10), reader.read(100)
    assert [*zip(*(decode_lines(block, side) for side in range(2)), strict=True)] == expected[25:35]
    assert (block.first, rest.first, rest.num_lines) == (25, 35, 5)


def test_asking_for_too_many_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "PATIENCE", 3)
    with pytest.raises(DataError, match=r"the grammar has made \d+ different valid sentences and has no more; lower num_pairs"):
        pairs("valid", 100_000)

"""An endless small corpus: English sentences and their German translations, made by rule.

German needs more than a word-by-word translation: it has three genders, case and number in articles, adjectives and
nouns, the finite verb second in main clauses and last in subordinate ones, infinitives and participles at the end. Every English
sentence has exactly one translation, so a model can be right or wrong.

`test` sentences hold at least one combination (adjective with noun, verb with object) that no `train` or `valid` sentence holds;
a model that translates them has learned the rules. `train` and `valid` share no sentence. The same arguments always give the same
pairs; nothing but Python's own generator is used, about 25,000 pairs a second.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

from dstrain.data.sources.lexicon import (
    ACTIONS,
    ADJECTIVES,
    DEFINITE_ARTICLES,
    DETERMINER_ENDINGS,
    FAVORS,
    GIFTS,
    LOCATIONS,
    MODALS,
    PERSONS,
    PREPOSITIONS,
    STATES,
    THINGS,
    THOUGHTS,
    TIMES,
    Case,
    Determiner,
    Modal,
    Noun,
    Verb,
)
from dstrain.data.sources.text import MAX_BLOCK_LINES, TextBlock
from dstrain.errors import DataError

Split = Literal["train", "valid", "test"]
Tense = Literal["present", "past", "modal"]
_T = TypeVar("_T")

HELD_OUT_SHARE = 8
VALID_SHARE = 20
PATIENCE = 10_000


class Pair(NamedTuple):
    """A sentence and its translation."""

    english: str
    german: str


class NounPhrase(NamedTuple):
    """Determiner, perhaps an adjective, noun. Plural after `two`, singular after `a`."""

    determiner: Determiner
    adjective: tuple[str, str] | None
    noun: Noun
    plural: bool

    def english(self) -> list[str]:
        """Words, with `an` before a vowel."""
        words = [self.adjective[0]] if self.adjective else []
        words.append(self.noun.plural if self.plural else self.noun.singular)
        first: str = self.determiner
        if first == "this" and self.plural:
            first = "these"
        if first == "a" and words[0][0] in "aeiou":
            first = "an"
        return [first, *words]

    def german(self, case: Case) -> list[str]:
        """Words in `case`."""
        words = [_german_determiner(self, case)]
        if self.adjective:
            words.append(self.adjective[1] + _adjective_ending(self, case))
        return [*words, _german_noun(self, case)]


def _form(phrase: NounPhrase) -> str:
    return "plural" if phrase.plural else phrase.noun.gender


def _german_determiner(phrase: NounPhrase, case: Case) -> str:
    form = _form(phrase)
    match phrase.determiner:
        case "the":
            return DEFINITE_ARTICLES[case][form]
        case "two":
            return "zwei"
        case "this":
            return "dies" + DETERMINER_ENDINGS[case][form]
        case determiner:
            stem = "ein" if determiner == "a" else "mein"
            return stem if _bare(phrase, case) else stem + DETERMINER_ENDINGS[case][form]


def _bare(phrase: NounPhrase, case: Case) -> bool:
    """Whether `ein` and `mein` take no ending: the adjective then marks the gender."""
    return (_form(phrase), case) in {("m", "nominative"), ("n", "nominative"), ("n", "accusative")}


def _adjective_ending(phrase: NounPhrase, case: Case) -> str:
    form = _form(phrase)
    if phrase.determiner == "two" or (phrase.determiner in {"a", "my"} and _bare(phrase, case)):
        return DETERMINER_ENDINGS[case][form]
    return "e" if case != "dative" and (form in {"f", "n"} or (form == "m" and case == "nominative")) else "en"


def _german_noun(phrase: NounPhrase, case: Case) -> str:
    noun = phrase.noun
    if phrase.plural:
        return noun.german_plural + ("n" if case == "dative" and noun.german_plural[-1] not in "ns" else "")
    return noun.german_plural if noun.weak and case != "nominative" else noun.german


class Clause(NamedTuple):
    """One clause in parts: English in order; German's subject, finite verb, middle field and final verb apart."""

    english: list[str]
    subject: list[str]
    finite: str
    middle: list[str]
    final: list[str]
    held_out: bool

    def second(self, front: Sequence[str] = ()) -> list[str]:
        """German main clause: the finite verb is second, whatever comes first."""
        start = [*front, self.finite, *self.subject] if front else [*self.subject, self.finite]
        return [*start, *self.middle, *self.final]

    def last(self) -> list[str]:
        """German subordinate clause: the finite verb is last."""
        return [*self.subject, *self.middle, *self.final, self.finite]


class Rest(NamedTuple):
    """The words after the verb, in both languages; held_out: they hold a combination kept for the test."""

    english: list[str]
    german: list[str]
    held_out: bool


class _Speaker:
    """Draws sentences, kept-back combinations included."""

    def __init__(self, split: Split, seed: int) -> None:
        self._random = random.Random(f"{split} {seed}").random

    def sentence(self) -> tuple[Pair, bool]:
        """A pair, and whether it holds a combination kept for the test."""
        tenses: tuple[Tense, ...] = ("present", "present", "past", "modal")
        tense = self._pick(tenses)
        clause = self._clause(tense)
        kind = self._random()
        if kind < 0.5:
            return _finish(clause.english, clause.second()), clause.held_out
        if kind < 0.7:
            english, german = self._pick(TIMES[tense])
            return _finish([english, *clause.english], clause.second([german])), clause.held_out
        other = self._thought() if kind < 0.85 else self._intransitive("present", with_location=False)
        english, german = ("that", "dass") if kind < 0.85 else ("because", "weil")
        words = other.second()
        words[-1] += ","
        return _finish(
            [*other.english, english, *clause.english], [*words, german, *clause.last()]
        ), clause.held_out or other.held_out

    def _clause(self, tense: Tense) -> Clause:
        kind = self._random()
        if kind < 0.2:
            return self._intransitive(tense, with_location=True)
        subject = self._phrase(PERSONS)
        if kind < 0.6:
            verb = self._pick(ACTIONS)
            objects = [(self._phrase(PERSONS + THINGS), verb.case)]
        elif kind < 0.75:
            verb = self._pick(FAVORS)
            objects = [(self._phrase(PERSONS), verb.case)]
        else:
            verb = self._pick(GIFTS)
            objects = [(self._phrase(PERSONS), "dative"), (self._phrase(THINGS), "accusative")]
        english = [word for phrase, _ in objects for word in phrase.english()]
        german = [word for phrase, case in objects for word in phrase.german(case)]
        held_out = any(_kept_back(verb.base, phrase.noun.singular) or _rare(phrase) for phrase, _ in objects)
        return _conjugate(subject, verb, self._helper(tense), Rest(english, german, held_out))

    def _intransitive(self, tense: Tense, *, with_location: bool) -> Clause:
        subject, verb = self._phrase(PERSONS), self._pick(STATES)
        if not with_location:
            return _conjugate(subject, verb, self._helper(tense), Rest([], [], False))
        phrase = self._phrase(LOCATIONS)
        english, german = self._pick(PREPOSITIONS)
        words = _contract([german, *phrase.german("dative")])
        return _conjugate(subject, verb, self._helper(tense), Rest([english, *phrase.english()], words, _rare(phrase)))

    def _thought(self) -> Clause:
        return _conjugate(self._phrase(PERSONS), self._pick(THOUGHTS), "present", Rest([], [], False))

    def _phrase(self, nouns: Sequence[Noun]) -> NounPhrase:
        determiner: Determiner = self._pick(("the", "the", "a", "this", "my", "two"))
        plural = determiner == "two" or (determiner != "a" and self._random() < 0.3)
        adjective = self._pick(ADJECTIVES) if self._random() < 0.4 else None
        return NounPhrase(determiner, adjective, self._pick(nouns), plural)

    def _helper(self, tense: Tense) -> Modal | Literal["present", "past"]:
        return self._pick(MODALS) if tense == "modal" else tense

    def _pick(self, choices: Sequence[_T]) -> _T:
        return choices[int(self._random() * len(choices))]


def _conjugate(subject: NounPhrase, verb: Verb, tense: Modal | Literal["present", "past"], rest: Rest) -> Clause:
    """Add subject and verb to a rest. German's perfect translates the English past."""
    plural = subject.plural
    final: list[str] = []
    match tense:
        case Modal():
            spoken = f"{tense.plural if plural else tense.singular} {verb.base}"
            finite, final = tense.german_plural if plural else tense.german, [verb.infinitive]
        case "past":
            spoken = verb.past
            finite, final = "haben" if plural else "hat", [verb.participle]
        case "present":
            spoken = verb.base if plural else verb.third
            finite = verb.infinitive if plural else verb.german_third
    words = [*subject.english(), spoken, *rest.english]
    return Clause(words, subject.german("nominative"), finite, rest.german, final, rest.held_out or _rare(subject))


def _contract(words: list[str]) -> list[str]:
    """`in dem` is `im`, `bei dem` is `beim`."""
    short = {("in", "dem"): "im", ("bei", "dem"): "beim"}.get((words[0], words[1]))
    return [short, *words[2:]] if short else words


def _finish(english: Sequence[str], german: Sequence[str]) -> Pair:
    sides = [" ".join(words) + "." for words in (english, german)]
    return Pair(*(side[0].upper() + side[1:] for side in sides))


def _kept_back(*words: str) -> bool:
    """Whether a combination of words is kept for the test."""
    return zlib.crc32(" ".join(words).encode()) % HELD_OUT_SHARE == 0


def _rare(phrase: NounPhrase) -> bool:
    return phrase.adjective is not None and _kept_back(phrase.adjective[0], phrase.noun.singular)


def sentence_pairs(split: Split, seed: int) -> Iterator[Pair]:
    """Distinct pairs without end. Raises DataError when 10,000 draws in a row bring nothing new."""
    speaker, seen, misses = _Speaker(split, seed), set[str](), 0
    while misses < PATIENCE:
        pair, held_out = speaker.sentence()
        in_valid = zlib.crc32(pair.english.encode()) % VALID_SHARE == 0
        belongs = held_out if split == "test" else not held_out and in_valid == (split == "valid")
        if belongs and pair.english not in seen:
            seen.add(pair.english)
            misses = 0
            yield pair
        else:
            misses += 1
    raise DataError(
        f"the grammar has made {len(seen)} different {split} sentences and has no more; lower num_pairs in the recipe"
    )


class GrammarReader:
    """The grammar as a corpus of `num_pairs` pairs, from pair `start` on; blocks have a column a language."""

    def __init__(self, split: Split, num_pairs: int, seed: int, start: int = 0) -> None:
        self._pairs = islice(sentence_pairs(split, seed), start, num_pairs)
        self._next = start

    def read(self, max_lines: int) -> TextBlock:
        """The next pairs, at most `max_lines`."""
        pairs = list(islice(self._pairs, min(max_lines, MAX_BLOCK_LINES)))
        columns = tuple("".join(f"{pair[side]}\n" for pair in pairs).encode() for side in range(2))
        block = TextBlock(self._next, len(pairs), columns)
        self._next += len(pairs)
        return block

    def __enter__(self) -> GrammarReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._pairs

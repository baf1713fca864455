"""The data section of a recipe for directories that `fairseq-preprocess` wrote.

Pieces of the training text (train, train1, ...) of all directories become one training split; `valid` of the first directory is
the validation split; valid1, test, test1 and so on are test sets of these names. Files of `a-b` are found as `b-a`, too. Only
names are looked at here; reading the files checks them. Files without languages (train.idx) are text for a language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path

from dstrain.data.config import DataConfig, FairseqIds, FairseqText
from dstrain.data.tokenizers.config import FairseqDictionaries
from dstrain.errors import DataError

PAIR_FILE = re.compile(r"train\.([^.]+)-([^.]+)\.(\1|\2)\.idx")


def fairseq_data(
    directories: Sequence[Path],
    *,
    source: str | None = None,
    target: str | None = None,
    models: tuple[str, str] | None = None,
    tags: Sequence[str] = (),
) -> DataConfig:
    """The data section.

    source, target: languages; None = those of the first directory's file names. models: SentencePiece models in front of the
    dictionaries. tags: words that these do not split. Raises DataError if a directory, a split or a dictionary is missing, or
    holds other data than pairs.
    """
    for directory in directories:
        if not directory.is_dir():
            raise DataError(f"{directory} is no directory; give the --destdir of fairseq-preprocess")
    if source is None and target is None and (directories[0] / "train.idx").exists():
        return _text_data(directories, models, tags)
    source, target = _languages(directories[0], source, target)
    train = [piece for directory in directories for piece in _pieces(directory, "train", source, target).values()]
    if not train:
        raise DataError(f"{directories[0]} has no train.{source}-{target}.{source}.idx; check --source-lang and --target-lang")
    valid = _pieces(directories[0], "valid", source, target)
    if not valid:
        raise DataError(
            f"{directories[0]} has no valid.{source}-{target}.{source}.idx; binarize a validation set with --validpref, training "
            "needs one"
        )
    first, *further = valid.items()
    tests = {**dict(further), **_pieces(directories[0], "test", source, target)}
    dictionaries = [_dictionary(directories[0], language) for language in (source, target)]
    _require_same(dictionaries, directories[1:])
    return _section(train, first[1], tests, dictionaries, models=models, tags=tags)


def _text_data(directories: Sequence[Path], models: tuple[str, str] | None, tags: Sequence[str]) -> DataConfig:
    """The section of monolingual directories, whose files have no languages in their names: text for a language model."""
    valid = _text_pieces(directories[0], "valid")
    if not valid:
        raise DataError(f"{directories[0]} has no valid.idx; binarize a validation set with --validpref, training needs one")
    train = [piece for directory in directories for piece in _text_pieces(directory, "train").values()]
    first, *further = valid.items()
    tests = {**dict(further), **_text_pieces(directories[0], "test")}
    dictionary = _dictionary(directories[0], None)
    _require_same([dictionary], directories[1:])
    return _text_section(
        train,
        first[1],
        tests,
        FairseqDictionaries(source=str(dictionary), source_model=models[1] if models else None, tags=tuple(tags)),
    )


def fairseq_text_by_name(directories: Sequence[Path], *, model: str | None = None) -> DataConfig:
    """As `fairseq_data_by_name`, of monolingual directories."""
    train, valid = ([FairseqText(path=str(directory / split)) for directory in directories] for split in ("train", "valid"))
    return _text_section(train, valid[0], {}, FairseqDictionaries(source=str(directories[0] / "dict.txt"), source_model=model))


def _text_section(
    train: Sequence[FairseqText], valid: FairseqText, tests: Mapping[str, FairseqText], tokenizer: FairseqDictionaries
) -> DataConfig:
    return DataConfig(
        train=tuple(train),
        valid=(valid,),
        test={name: (corpus,) for name, corpus in tests.items()},
        tokenizer=tokenizer,
    )


def _text_pieces(directory: Path, split: str) -> dict[str, FairseqText]:
    names = takewhile(lambda name: (directory / f"{name}.idx").exists(), (f"{split}{number or ''}" for number in count()))
    return {name: FairseqText(path=str(directory / name)) for name in names}


def fairseq_data_by_name(
    directories: Sequence[Path], *, source: str, target: str, models: tuple[str, str] | None = None, tags: Sequence[str] = ()
) -> DataConfig:
    """The data section of directories that are elsewhere: the usual names, one piece a split."""
    first = directories[0]
    return _section(
        [_corpus(directory, "train", source, target) for directory in directories],
        _corpus(first, "valid", source, target),
        {},
        [first / f"dict.{language}.txt" for language in (source, target)],
        models=models,
        tags=tags,
    )


def _section(
    train: Sequence[FairseqIds],
    valid: FairseqIds,
    tests: Mapping[str, FairseqIds],
    dictionaries: Sequence[Path],
    *,
    models: tuple[str, str] | None,
    tags: Sequence[str],
) -> DataConfig:
    return DataConfig(
        train=tuple(train),
        valid=(valid,),
        test={name: (corpus,) for name, corpus in tests.items()},
        tokenizer=FairseqDictionaries(
            source=str(dictionaries[0]),
            target=str(dictionaries[1]),
            source_model=models[0] if models else None,
            target_model=models[1] if models else None,
            tags=tuple(tags),
        ),
    )


def _require_same(dictionaries: Sequence[Path], directories: Sequence[Path]) -> None:
    """Raise DataError if another directory has another dictionary."""
    for path in dictionaries:
        for other in (directory / path.name for directory in directories):
            if other.exists() and other.read_bytes() != path.read_bytes():
                raise DataError(
                    f"{other} differs from {path}: one id would be two words; binarize both with --srcdict and --tgtdict"
                )


def _corpus(directory: Path, piece: str, source: str, target: str, *, reverse: bool = False) -> FairseqIds:
    """The corpus that fairseq names `piece` in a directory. reverse: its files are called TARGET-SOURCE."""
    pair = f"{target}-{source}" if reverse else f"{source}-{target}"
    return FairseqIds(source=str(directory / f"{piece}.{pair}.{source}"), target=str(directory / f"{piece}.{pair}.{target}"))


def _pieces(directory: Path, split: str, source: str, target: str) -> dict[str, FairseqIds]:
    """`split`, `split`1, `split`2 and so on, as far as they go."""
    tests: dict[str, FairseqIds] = {}
    for number in count():
        name = f"{split}{number or ''}"
        both = [_corpus(directory, name, source, target, reverse=reverse) for reverse in (False, True)]
        there = next((corpus for corpus in both if Path(f"{corpus.source}.idx").exists()), None)
        if there is None:
            if any(Path(corpus.source).exists() for corpus in both):
                raise DataError(
                    f"{directory} holds {name} as text (--dataset-impl raw); name the text files in the recipe: kind: parallel"
                )
            return tests
        tests[name] = there
    raise AssertionError("pieces are counted until one is missing")


def _languages(directory: Path, source: str | None, target: str | None) -> tuple[str, str]:
    if source and target:
        return source, target
    pairs = {(match[1], match[2]) for path in directory.iterdir() if (match := PAIR_FILE.fullmatch(path.name))}
    fitting = sorted(pair for pair in pairs if source in {None, pair[0]} and target in {None, pair[1]})
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join("-".join(pair) for pair in sorted(pairs)) or "none"
    raise DataError(f"{directory} names no single language pair (found: {names}); give --source-lang and --target-lang")


def _dictionary(directory: Path, language: str | None) -> Path:
    """dict.LANGUAGE.txt, or dict.txt for both and for text without a language."""
    names = ["dict.txt"] if language is None else [f"dict.{language}.txt", "dict.txt"]
    for name in names:
        if (directory / name).exists():
            return directory / name
    raise DataError(f"{directory} has no {names[0]}; copy the dictionary that fairseq-preprocess wrote beside the data")

"""What fairseq's multilingual tasks do when they load a dictionary and a text, which no file of theirs shows.

They append symbols to the dictionary, one for each of `langs` and mostly `<mask>`, so a model has more rows than dict.txt has
lines; and they put such symbols around every text. A bundle translates one direction, which decides these markers:

task                                       source                   decoder input    target
translation_multi_simple_epoch (M2M, NLLB) __de__ text </s>         </s> __en__ ...  __en__ text </s>
  with lang_tok_replacing_bos_eos          text __de__              __en__ ...       text </s>
multilingual_translation                   text __de__              __en__ ...       text </s>
translation_from_pretrained_bart (mBART)   text </s> [de_DE]        [en_XX] ...      text </s> [en_XX]
denoising (BART)                           <s> text </s>            </s> <s> ...     <s> text </s>
multilingual_denoising, add_lang_token     <s> text </s> [de_DE]    [en_XX] ...      <s> text </s> [en_XX]
language_modeling, add_bos_token                                    <s> ...          text </s>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.data.sources.text import read_lines
from dstrain.data.tokenizers.dictionary_file import Markers
from dstrain.errors import ImportFormatError

MASK, END, BEGIN = "<mask>", "</s>", "<s>"
DATA_SOURCES = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")
"""Appended for `add_data_source_prefix_tags`."""
_SUFFIXES = {"dae": "_dae", "mined": "_mined", "lm": "_lm"}
"""Of a language's token for one kind of data, by the end of that kind's name."""
ONE_PAIR = {"translation", "translation_with_kd", "seq2seq_lm_distillation", "language_modeling"}
"""Tasks that append nothing to a dictionary."""
APPENDING = {
    "translation_multi_simple_epoch",
    "translation_from_pretrained_bart",
    "multilingual_translation",
    "multilingual_denoising",
    "denoising",
}


@dataclass(frozen=True)
class LanguageTokens:
    """symbols: appended to the dictionaries, in order. source, target: what is around a text."""

    symbols: tuple[str, ...] = ()
    source: Markers = field(default_factory=Markers)
    target: Markers = field(default_factory=Markers)


def task_name(task: Mapping[str, Any]) -> str:
    """The name of a checkpoint's task; `translation` in files that are older than tasks."""
    names = (task.get("task"), task.get("_name"))  # in one flat namespace `_name` is the model's
    return next((name for name in names if isinstance(name, str) and name), "translation")


def choose_pair(task: Mapping[str, Any], pair: str | None, models: Sequence[str] = ()) -> tuple[Any, Any]:
    """Source and target language; None where the checkpoint names none.

    pair: as the user gives it, de-en. models: pairs that have a model of their own. ImportFormatError if it is none of those, or
    another direction than the only one.
    """
    named = task.get("source_lang"), task.get("target_lang")
    if pair is None:
        if len(models) == 1:
            pair = models[0]
        elif models and "-".join(map(str, named)) not in models:
            raise ImportFormatError(
                f"the checkpoint holds a model for each of {', '.join(models)}; choose one with --pair {models[0]}"
            )
        else:
            return named
    source, _, target = pair.partition("-")
    if not source or not target:
        raise ImportFormatError(f"--pair {pair} is not SOURCE-TARGET; give two languages, such as --pair de-en")
    if models and pair not in models:
        raise ImportFormatError(f"--pair {pair}: the checkpoint holds models for {', '.join(models)}; choose one of these")
    if not models and task_name(task) not in APPENDING and (source, target) != named:
        shown = "-".join(map(str, named))
        raise ImportFormatError(
            f"--pair {pair}: the checkpoint's task {task_name(task)} has one direction, {shown}; leave it out"
        )
    return source, target


def language_tokens(task: Mapping[str, Any], directory: Path) -> LanguageTokens:
    """What the task adds for the direction `source_lang` -> `target_lang`. directory: where a file of languages may be.

    ImportFormatError if the checkpoint does not name its languages, or the direction is open or not among them; DataError if the
    file of languages is no text.
    """
    match task_name(task):
        case "translation_multi_simple_epoch":
            return _multi_simple_epoch(task, directory)
        case "multilingual_translation" if task.get("encoder_langtok") or task.get("decoder_langtok"):
            languages = sorted({name for pair in _words(task.get("lang_pairs")) for name in pair.split("-")})
            source, target = _direction(task, languages)
            first = _token("__{}__", target) if task.get("decoder_langtok") else None
            end = _spoken(task.get("encoder_langtok"), "__{}__", source, target)
            symbols = tuple(_token("__{}__", name) for name in languages)
            return LanguageTokens(symbols, Markers(end=end or END), Markers(start=first))
        case "translation_from_pretrained_bart":
            return _mbart(task, directory, [BEGIN] if task.get("prepend_bos") else [])
        case "multilingual_denoising" if task.get("add_lang_token"):
            return _mbart(task, directory, [BEGIN])
        case "denoising" | "multilingual_denoising":
            markers = Markers(before=(BEGIN,))
            return LanguageTokens((MASK,), markers, markers)
        case name:
            markers = Markers(start=BEGIN if name == "language_modeling" and task.get("add_bos_token") else None)
            return LanguageTokens((), markers, markers)


def _multi_simple_epoch(task: Mapping[str, Any], directory: Path) -> LanguageTokens:
    languages = _languages(task, directory)
    source, target = _direction(task, languages)
    style = "[{}]" if task.get("lang_tok_style") == "mbart" else "__{}__"
    kinds = _words(task.get("langtoks_specs")) or ["main"]
    symbols = [_token(style, name, kind) for kind in kinds for name in languages]
    noise = any(kind in (task.get("extra_data") or ()) for kind in ("mono_dae", "mono_mixed_task"))
    if style == "[{}]" or noise:
        symbols += [MASK, "__dae__"] if task.get("add_ssl_task_tokens") else [MASK]
    if task.get("add_data_source_prefix_tags"):
        symbols += DATA_SOURCES
    markers = task.get("langtoks")
    main = markers.get("main") if isinstance(markers, dict) else None
    of_source, of_target = main or (task.get("encoder_langtok"), "tgt" if task.get("decoder_langtok") else None)
    first = _spoken(of_source, style, source, target)
    of_decoder = _token(style, target, of_target) if of_target else None
    if task.get("lang_tok_replacing_bos_eos"):
        return LanguageTokens(tuple(symbols), Markers(end=first or END), Markers(start=of_decoder))
    before, before_target = ((symbol,) if symbol else () for symbol in (first, of_decoder))
    return LanguageTokens(tuple(symbols), Markers(before=before), Markers(before=before_target))


def _mbart(task: Mapping[str, Any], directory: Path, before: Sequence[str]) -> LanguageTokens:
    """Every text ends in `</s>` and its language; the target's language is also what the decoder reads first."""
    languages = _languages(task, directory)
    markers = [
        Markers(before=tuple(before), after=(END,), end=_token("[{}]", language)) for language in _direction(task, languages)
    ]
    return LanguageTokens((*(_token("[{}]", name) for name in languages), MASK), *markers)


def _spoken(which: Any, style: str, source: str, target: str) -> str | None:
    """The token that an encoder reads, of `src` or `tgt`."""
    return _token(style, source if str(which).startswith("src") else target, str(which)) if which else None


def _token(style: str, language: str, kind: str = "main") -> str:
    suffix = next((suffix for end, suffix in _SUFFIXES.items() if kind.endswith(end)), "")
    return style.format(language + suffix)


def _languages(task: Mapping[str, Any], directory: Path) -> list[str]:
    """In the order of their tokens: as given, as in a file, or those of the pairs by name."""
    if task.get("langs"):
        return _words(task["langs"])
    if task.get("lang_dict"):
        named = Path(str(task["lang_dict"]))
        path = next((path for path in (directory / named.name, named) if path.is_file()), None)
        if path is None:
            raise ImportFormatError(
                f"the checkpoint's languages are in the file lang_dict = {named}, which is not here; copy it into {directory}"
            )
        return [line.strip() for line in read_lines(path) if line.strip()]
    languages = sorted({name for pair in _words(task.get("lang_pairs")) for name in pair.split("-")})
    if not languages:
        raise ImportFormatError(
            f"the checkpoint's task {task_name(task)} appends a token for each language to the dictionary, but it names neither "
            "langs nor lang_dict nor lang_pairs; save it again with the task's settings"
        )
    return languages


def _direction(task: Mapping[str, Any], languages: Sequence[str]) -> tuple[str, str]:
    source, target = task.get("source_lang"), task.get("target_lang")
    pairs = _words(task.get("lang_pairs"))
    shown = ", ".join(pairs or languages)
    if not source or not target:
        example = pairs[0] if pairs else "-".join([*languages, *languages][:2])
        raise ImportFormatError(
            f"the checkpoint's task {task_name(task)} has many directions ({shown}), and a bundle has one; choose with "
            f"--pair {example}"
        )
    for language in (source, target):
        if language not in languages:
            raise ImportFormatError(
                f"the checkpoint's task {task_name(task)} has no language {language}, only {', '.join(languages)}; choose two of "
                "them with --pair"
            )
    return str(source), str(target)


def _words(value: Any) -> list[str]:
    """A list, or words between commas."""
    return [str(word).strip() for word in (value.split(",") if isinstance(value, str) else value or ()) if str(word).strip()]

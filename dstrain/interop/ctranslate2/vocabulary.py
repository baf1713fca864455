"""The vocabulary as CTranslate2 knows it: a name for each entry, the special entries, and how a text becomes its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.checkpoint.task import BundleTask
from dstrain.data.directions import direction_ids, directions_of
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair
from dstrain.errors import ExportError
from dstrain.models.config import ModelConfig
from dstrain.protocols import TextTokenizer

UNKNOWN = "<unk>"
"""The name of the unknown entry, which CTranslate2 gives to every token that a vocabulary lacks."""


def entry_names(tokenizer: TextTokenizer, side: str) -> list[str]:
    """The names of all entries by id. ExportError if two of them are the same."""
    names = tokenizer.tokens(range(tokenizer.vocab_size))
    names[tokenizer.unk_id] = UNKNOWN
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        ids = [number for number, name in enumerate(names) if name == repeated[0]]
        raise ExportError(
            f"the {side} vocabulary has the entry {repeated[0]!r} twice, as ids {ids[0]} and {ids[1]}; CTranslate2 knows entries "
            "by their names only"
        )
    return names


def name_of(tokenizer: TextTokenizer, token_id: int) -> str:
    """Of one entry."""
    return tokenizer.tokens([token_id])[0]


def start_names(recipe: Mapping[str, Any] | None, tokenizers: TokenizerPair) -> dict[str, str]:
    """What the decoder reads first, by direction: nothing if all begin alike. recipe: of the bundle."""
    target, directions = tokenizers.target, directions_of(recipe)
    starts = {name: direction_ids(name, direction, tokenizers).start for name, direction in directions.items()}
    if not any(start is not None for start in starts.values()):
        return {}
    return {name: name_of(target, target.start_id if start is None else start) for name, start in starts.items()}


def register_vocabularies(spec: Any, tokenizers: TokenizerPair, starts: Mapping[str, str]) -> None:
    """Give a specification the entries of both sides, or of the only one, and the names of the special ones.

    starts: see `start_names`; with any, the caller of a translation gives the start token.
    """
    source, target = tokenizers.source, tokenizers.target
    config, names = spec.config, entry_names(target, "target")
    config.unk_token, config.eos_token = UNKNOWN, name_of(target, target.eos_id)
    if hasattr(spec, "register_vocabulary"):  # a language model
        spec.register_vocabulary(names)
        config.bos_token = name_of(target, target.start_id)
        return
    spec.register_source_vocabulary(names if tokenizers.shared else entry_names(source, "source"))
    spec.register_target_vocabulary(names)
    config.bos_token = name_of(target, target.bos_id)
    config.decoder_start_token = None if starts else name_of(target, target.start_id)
    config.add_source_bos, config.add_source_eos = False, same_end(tokenizers)


def same_end(tokenizers: TokenizerPair) -> bool:
    """Whether texts of both sides have one end, for CTranslate2 knows one."""
    source, target = tokenizers.source, tokenizers.target
    return name_of(source, source.eos_id) == name_of(target, target.eos_id)


def usage(tokenizers: TokenizerPair, model: ModelConfig, task: BundleTask, starts: Mapping[str, str]) -> Iterator[str]:
    """Lines on how a text becomes input. starts: see `start_names`."""
    source, target, limits = tokenizers.source, tokenizers.target, model.limits
    if model.kind == "decoder_only":
        start = "START" if starts else name_of(target, target.start_id)
        prompt = ["TOKENS", start] if task == "translation" else [start, "TOKENS"]
        yield f"ctranslate2.Generator: the prompt is {' '.join(prompt)}; include_prompt_in_result=False returns what follows it"
        yield f"the model reads {limits.target} tokens; max_length of a call is 512 unless it says otherwise"
    else:
        yield "ctranslate2.Translator: the source is TOKENS" + ("" if same_end(tokenizers) else " with its end")
        yield (
            f"the model reads {limits.source} source and {limits.target} target tokens; a call cuts them at "
            "max_input_length = 1024 and max_decoding_length = 256 unless it says otherwise"
        )
    if starts:
        where = "START" if model.kind == "decoder_only" else "target_prefix, [START] for each source,"
        yield f"{where} is by direction: {', '.join(f'{name} {start}' for name, start in starts.items())}"
    for side, tokenizer in (("source", source), ("target", target)):
        if isinstance(tokenizer, DictionaryTokenizer):
            before, after = tokenizer.markers.before, tokenizer.markers.after
            end = (tokenizer.markers.end,) if side == "source" and not same_end(tokenizers) else ()
            if before or after or end:
                where = "TOKENS" if side == "source" else "TOKENS (give the first ones as target_prefix)"
                yield f"{side}: {' '.join([*before, where, *after, *end])}"

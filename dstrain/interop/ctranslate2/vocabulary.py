"""The vocabulary as CTranslate2 knows it: a name for each entry, the special entries, and how a text becomes its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from dstrain.checkpoint.task import BundleTask
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


def register_vocabularies(spec: Any, tokenizers: TokenizerPair) -> None:
    """Give a specification the entries of both sides, or of the only one, and the names of the special ones."""
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
    config.decoder_start_token = name_of(target, target.start_id)
    config.add_source_bos, config.add_source_eos = False, same_end(tokenizers)


def same_end(tokenizers: TokenizerPair) -> bool:
    """Whether texts of both sides have one end, for CTranslate2 knows one."""
    source, target = tokenizers.source, tokenizers.target
    return name_of(source, source.eos_id) == name_of(target, target.eos_id)


def usage(tokenizers: TokenizerPair, model: ModelConfig, task: BundleTask) -> Iterator[str]:
    """Lines on how a text becomes input."""
    source, target, limits = tokenizers.source, tokenizers.target, model.limits
    if model.kind == "decoder_only":
        start = name_of(target, target.start_id)
        prompt = ["TOKENS", start] if task == "translation" else [start, "TOKENS"]
        yield f"ctranslate2.Generator: the prompt is {' '.join(prompt)}; include_prompt_in_result=False returns what follows it"
        yield f"the model reads {limits.target} tokens; max_length of a call is 512 unless it says otherwise"
    else:
        yield "ctranslate2.Translator: the source is TOKENS" + ("" if same_end(tokenizers) else " with its end")
        yield (
            f"the model reads {limits.source} source and {limits.target} target tokens; a call cuts them at "
            "max_input_length = 1024 and max_decoding_length = 256 unless it says otherwise"
        )
    for side, tokenizer in (("source", source), ("target", target)):
        if isinstance(tokenizer, DictionaryTokenizer):
            before, after = tokenizer.markers.before, tokenizer.markers.after
            end = (tokenizer.markers.end,) if side == "source" and not same_end(tokenizers) else ()
            if before or after or end:
                where = "TOKENS" if side == "source" else "TOKENS (give the first ones as target_prefix)"
                yield f"{side}: {' '.join([*before, where, *after, *end])}"

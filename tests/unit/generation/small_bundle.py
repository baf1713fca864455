"""A bundle of a random tiny model that reads and writes words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.checkpoint.bundle import save_bundle
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair
from dstrain.models.config import (
    DecoderOnlyConfig,
    DecoderOnlyStackConfig,
    DecoderStackConfig,
    EncoderDecoderConfig,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical

WORDS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"]
NAMES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]
SENTENCES = ["one two three", "", "four", "ten nine eight seven six five four three two one", "   ", "five five", "unheard words"]


def dictionary(words: list[str]) -> DictionaryTokenizer:
    return DictionaryTokenizer("".join(f"{word} 1\n" for word in words).encode())


def make_bundle(
    directory: Path, *, recipe: Mapping[str, Any] | None = None, with_tokenizers: bool = True, max_length: int = 16
) -> Path:
    """Source words are English numbers, target words German ones."""
    pair = TokenizerPair(dictionary(NAMES), dictionary(WORDS))
    vocabulary = VocabularySizes(source=pair.source.vocab_size, target=pair.target.vocab_size)
    stack: dict[str, Any] = {"depth": 2, "num_heads": 2, "ffn_dim": 32}
    config = EncoderDecoderConfig(
        model_dim=16,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack),
        norm_order="pre",
        max_source_length=max_length,
        max_target_length=max_length,
    )
    weights = to_canonical(build_model(config, vocabulary, seed=3))
    weights = {name: weight * 4 if "projection" in name else weight for name, weight in weights.items()}
    save_bundle(
        directory,
        model_config=config,
        vocabulary=vocabulary,
        weights=weights,
        tokenizers=pair if with_tokenizers else None,
        recipe=recipe,
    )
    return directory


def make_decoder_only_bundle(directory: Path, *, trained_on: str | None) -> Path:
    """One vocabulary of German numbers. trained_on: the kind of corpus that its recipe names; None for no recipe."""
    words = dictionary(WORDS)
    vocabulary = VocabularySizes(source=words.vocab_size, target=words.vocab_size)
    config = DecoderOnlyConfig(
        model_dim=16, decoder=DecoderOnlyStackConfig(depth=2, num_heads=2, ffn_dim=32), norm_order="pre", max_target_length=16
    )
    save_bundle(
        directory,
        model_config=config,
        vocabulary=vocabulary,
        weights=to_canonical(build_model(config, vocabulary, seed=3)),
        tokenizers=TokenizerPair(words, words),
        recipe=None if trained_on is None else {"data": {"train": [{"kind": trained_on}]}},
    )
    return directory

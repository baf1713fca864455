"""The shapes of `bench_gpu.py`, random data for them, and models of Transformers of the same shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator, PackedSize
from dstrain.models.config import ModelConfig, PlainEmbedding, VocabularySizes
from dstrain.models.presets import PRESETS

PAD, EOS, UNK = 1, 2, 3
Tying = Literal["all", "none"]


@dataclass(frozen=True)
class Shape:
    """What is trained on what. tokens: target tokens of a micro-batch. length: of a sentence on each side, or of a document."""

    model: ModelConfig
    tokens: int
    length: int
    vocab_size: int

    @property
    def sizes(self) -> VocabularySizes:
        """Of the vocabulary."""
        return VocabularySizes(source=self.vocab_size, target=self.vocab_size, pad_id=PAD, eos_id=EOS)

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.tokens // self.length

    @property
    def toy(self) -> Shape:
        """The same kinds of parts, small."""
        stack = {"depth": 1, "num_heads": 2, "ffn_dim": 32}
        sides = [side for side in ("encoder", "decoder") if hasattr(self.model, side)]
        stacks = {side: {**getattr(self.model, side).model_dump(), **stack} for side in sides}
        tree = {**self.model.model_dump(), "model_dim": 16, **stacks}
        return Shape(TypeAdapter(ModelConfig).validate_python(tree), 32, 8, 64)


def translation(preset: str, tokens: int, *, tie: Tying) -> Shape:
    """Of a preset, whose own dropout differs."""
    update = {"dropout": 0.1, "embedding": PlainEmbedding(tie=tie)}
    return Shape(PRESETS[preset].model_copy(update=update), tokens, 32, 32_768)


def language_model(depth: int, dim: int, heads: int, ffn_dim: int, tokens: int) -> Shape:
    """Llama's parts."""
    tree = {
        "kind": "decoder_only",
        "model_dim": dim,
        "norm_order": "pre",
        "norm": {"kind": "rms_norm"},
        "activation": "silu",
        "position": {"kind": "rotary"},
        "embedding": {"kind": "plain", "tie": "decoder"},
        "decoder": {"depth": depth, "num_heads": heads, "ffn_dim": ffn_dim, "feed_forward": "gated"},
        "dropout": 0.0,
        "max_target_length": 2048,
    }
    return Shape(TypeAdapter(ModelConfig).validate_python(tree), tokens, 2048, 50_304)


SHAPES: dict[str, Shape] = {
    "big_4k": translation("big", 4_096, tie="all"),
    "big_32k": translation("big", 32_768, tie="all"),
    "deep_16k": translation("transformer_18_18", 16_384, tie="none"),
    "lm_125m": language_model(12, 768, 12, 2_048, 32_768),
    "lm_1300m": language_model(24, 2_048, 16, 5_504, 16_384),
}


def random_ids(shape: Shape, rows: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """Sequences of `length` tokens, EOS included."""
    drawn = np.random.default_rng(seed).integers(4, shape.vocab_size, (rows, shape.length))
    drawn[:, -1] = EOS
    return list(drawn)


def random_batch(shape: Shape, collator: Collator, seed: int) -> Batch:
    """Pairs of full length; of a language model the source is a lone EOS."""
    targets = random_ids(shape, shape.rows, 2 * seed)
    sources = [np.array([EOS])] * shape.rows if collator.kind == "decoder_only" else random_ids(shape, shape.rows, 2 * seed + 1)
    return collator(list(zip(sources, targets, strict=True)), np.arange(shape.rows))


def uneven_batch(shape: Shape, collator: Collator, seed: int) -> Batch:
    """A quarter to all of the pairs, each side of one to all of the tokens: hardly two have the same shapes."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(max(1, shape.rows // 4), shape.rows + 1))
    lengths = random.integers(1, shape.length + 1, (2, rows))
    sides = [random_ids(shape, rows, 2 * seed + side) for side in (0, 1)]
    pairs = [[ids[-length:] for ids, length in zip(side, own, strict=True)] for side, own in zip(sides, lengths, strict=True)]
    return collator(list(zip(*pairs, strict=True)), np.arange(rows))


def collator_of(shape: Shape, *, teacher: Shape | None = None) -> Collator:
    """Packs, as training does on a GPU."""
    kinds = () if teacher is None else (teacher.model.kind,)
    return Collator(shape.model.kind, pad_id=PAD, eos_id=EOS, teacher_kinds=kinds, packed=PackedSize(64))


def library_model(shape: Shape) -> Any:
    """Marian or Llama of a shape."""
    from transformers import LlamaConfig, LlamaForCausalLM, MarianConfig, MarianMTModel

    model, decoder = shape.model, shape.model.decoder
    ids = {"vocab_size": shape.vocab_size, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 0}
    if model.kind == "decoder_only":
        sizes = {"hidden_size": model.model_dim, "num_hidden_layers": decoder.depth, "num_attention_heads": decoder.num_heads}
        more = {"intermediate_size": decoder.ffn_dim, "max_position_embeddings": shape.length, "tie_word_embeddings": True}
        return LlamaForCausalLM(LlamaConfig(**ids, **sizes, **more))
    layers = {"encoder_layers": model.encoder.depth, "decoder_layers": decoder.depth}
    heads = {f"{side}_attention_heads": decoder.num_heads for side in ("encoder", "decoder")}
    wide = {f"{side}_ffn_dim": decoder.ffn_dim for side in ("encoder", "decoder")}
    more = {
        "d_model": model.model_dim,
        "max_position_embeddings": 2 * shape.length,
        "decoder_start_token_id": EOS,
        "dropout": 0.1,
    }
    return MarianMTModel(MarianConfig(**ids, **layers, **heads, **wide, **more, forced_eos_token_id=None))

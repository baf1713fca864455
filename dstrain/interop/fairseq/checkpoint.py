"""Checkpoints of fairseq's transformers, and their dictionaries -> our configuration, weights and tokenizers.

Left padding, batch order and all else that is not the model stays behind. Half-precision weights become float32. A matrix that
fairseq stores under several names must be the same under all of them.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair
from dstrain.errors import BundleError, ImportFormatError
from dstrain.interop.fairseq.model_options import convert_config, convert_language_model_config
from dstrain.interop.fairseq.safe_pickle import load_pickled
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, check_canonical, parameter_layouts

PAD_ID, EOS_ID = 1, 2
POSITION_ROWS = 2
"""Rows of a learned position table before that of the first token."""

LAYER_PARTS = {
    "self_attn": "self_attention",
    "self_attn_layer_norm": "self_attention_norm",
    "encoder_attn": "cross_attention",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "fc1": "feed_forward.up_proj",
    "fc2": "feed_forward.down_proj",
    "glu": "feed_forward",
    "final_layer_norm": "feed_forward_norm",
}
SIDE_PARTS = {
    "encoder.embed_tokens": "source_embedding.tokens",
    "encoder.embed_tokens.emb": "source_embedding.tokens.table",
    "encoder.embed_tokens.m": "source_embedding.tokens.table",
    "encoder.embed_tokens.up": "source_embedding.tokens.up_proj",
    "encoder.embed_positions": "source_embedding.positions",
    "encoder.layernorm_embedding": "source_embedding.norm",
    "encoder.layer_norm": "encoder.final_norm",
    "decoder.embed_tokens": "target_embedding.tokens",
    "decoder.embed_tokens.emb": "target_embedding.tokens.table",
    "decoder.embed_tokens.m": "target_embedding.tokens.table",
    "decoder.embed_tokens.up": "target_embedding.tokens.up_proj",
    "decoder.embed_positions": "target_embedding.positions",
    "decoder.layernorm_embedding": "target_embedding.norm",
    "decoder.layer_norm": "decoder.final_norm",
    "decoder.output_projection": "projection",
}
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
FUSED_BLOCKS = {
    "in_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "up_gate_proj": ("up_proj", "gate_proj"),
}
OLD_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


@dataclass(frozen=True)
class FairseqCheckpoint:
    """model: its settings (`cfg["model"]`, or `args` in old files). task: data directory, languages. weights: by its names."""

    model: dict[str, Any]
    task: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder model, not a language model."""
        return any(name.startswith("encoder.") for name in self.weights)

    @property
    def data_directory(self) -> str:
        """The first of the data directories that it was trained from."""
        data = self.task.get("data") or "."
        return str(data[0] if isinstance(data, list) else data).partition(":")[0]


def read_fairseq_checkpoint(path: Path) -> FairseqCheckpoint:
    """Read a checkpoint file safely. ImportFormatError: see `load_pickled`; also if it is no fairseq checkpoint."""
    content = load_pickled(path)
    weights = content.get("model") if isinstance(content, dict) else None
    groups = (content.get("cfg") or content.get("args")) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or groups is None:
        raise ImportFormatError(
            f"{path} is no fairseq checkpoint: it lacks `model` and `cfg` or `args`; name a checkpoint*.pt file"
        )
    settings = _mapping(groups)
    model = _mapping(settings["model"]) if isinstance(settings.get("model"), dict | Namespace) else settings
    task = _mapping(settings["task"]) if isinstance(settings.get("task"), dict | Namespace) else settings
    if not any(name.startswith("decoder.") for name in weights):
        raise ImportFormatError(
            f"{path} holds no decoder (arch {model.get('arch')}); encoder-decoder and decoder-only models can be imported"
        )
    return FairseqCheckpoint(model, task, dict(weights))


def convert(
    checkpoint: FairseqCheckpoint, tokenizers: TokenizerPair | None = None
) -> tuple[ModelConfig, VocabularySizes, dict[str, Tensor]]:
    """Configuration, vocabulary sizes and portable weights.

    tokenizers: those that the model is to be used with, whose sizes must be the model's; BART's row for `<mask>`, which its
    dictionaries do not have, is cut off. ImportFormatError names settings that dstrain cannot represent, tied matrices and
    stacked layers that differ, names and sizes that do not fit.
    """
    config = _convert_config(checkpoint)
    weights = _modern_names(checkpoint.weights)
    if tokenizers is not None:
        _fit_vocabularies(weights, tokenizers, is_bart="bart" in str(checkpoint.model.get("arch")))
    stacks = (
        {"encoder": config.encoder, "decoder": config.decoder}
        if config.kind == "encoder_decoder"
        else {"decoder": config.decoder}
    )
    for side, stack in stacks.items():
        if stack.final_norm == "no":
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{side}.layer_norm.")}
        weights = unstack(weights, side, stack.schedule)
    _untie(weights, [name for name in TABLES if checkpoint.has_encoder or name.startswith("decoder")], config.embedding.tie)
    portable = {portable_name(name): tensor.float() for name, tensor in weights.items()}
    for name in ("source_embedding.positions.weight", "target_embedding.positions.weight"):
        if name in portable:
            portable[name] = portable[name][POSITION_ROWS:]
    sizes = {
        name.partition("_")[0]: len(tensor)
        for name, tensor in portable.items()
        if name.endswith(("tokens.weight", "table.weight"))
    }
    target = sizes.get("target", sizes.get("source", 0))
    vocabulary = VocabularySizes(source=sizes.get("source", target), target=target, pad_id=PAD_ID, eos_id=EOS_ID)
    model = build_model(config, vocabulary, seed=None)
    try:
        check_canonical(parameter_layouts(model), TensorSource(portable))
    except BundleError as error:
        raise ImportFormatError(f"the checkpoint is not the transformer that its settings describe: {error}") from error
    return config, vocabulary, portable


def _convert_config(checkpoint: FairseqCheckpoint) -> ModelConfig:
    keeps_final_norm = {side: _version(checkpoint.weights, side) >= oldest for side, oldest in (("encoder", 2), ("decoder", 3))}
    try:
        if checkpoint.has_encoder:
            return convert_config(checkpoint.model, keeps_final_norm=keeps_final_norm)
        return convert_language_model_config(checkpoint.model, keeps_final_norm=keeps_final_norm["decoder"])
    except ValidationError as error:
        raise ImportFormatError(f"the checkpoint's settings make no model: {error.errors()[0]['msg']}") from error


def read_dictionaries(
    directory: Path, checkpoint: FairseqCheckpoint, sentencepiece: tuple[Path, Path] | None = None
) -> TokenizerPair:
    """The tokenizers of both sides, from dict.SOURCE.txt and dict.TARGET.txt (or dict.txt for both) in `directory`.

    sentencepiece: models that make the dictionaries' symbols from source and target text; None where text is already split by
    spaces. ImportFormatError if a dictionary is missing, DataError if one is malformed.
    """
    sides = []
    for number, side in enumerate(("source", "target")):
        name = f"dict.{checkpoint.task.get(f'{side}_lang')}.txt"
        path = next((path for path in (directory / name, directory / "dict.txt") if path.exists()), None)
        if path is None:
            raise ImportFormatError(
                f"{directory} has no {name} and no dict.txt; give the directory of the model's dictionaries with --dictionary"
            )
        sides.append(DictionaryTokenizer.from_files(path, sentencepiece[number] if sentencepiece else None))
    return TokenizerPair(sides[0], sides[1])


def _fit_vocabularies(weights: dict[str, Tensor], tokenizers: TokenizerPair, *, is_bart: bool) -> None:
    """Check that each table has a row per dictionary entry, after cutting BART's further row."""
    sizes = {"encoder": tokenizers.source.vocab_size, "decoder": tokenizers.target.vocab_size}
    tables = (*TABLES, *(f"{side}.embed_tokens.{part}.weight" for side in sizes for part in ("emb", "m")))
    for name in tables:
        table, size = weights.get(name), sizes[name.partition(".")[0]]
        if table is not None and is_bart and len(table) == size + 1:
            weights[name] = table[:size]
        elif table is not None and len(table) != size:
            raise ImportFormatError(
                f"the checkpoint's {name} has {len(table)} rows, but the dictionary has {size} entries with the four specials; "
                "give the dictionaries that the model was trained with"
            )


def _mapping(settings: Any) -> dict[str, Any]:
    return vars(settings) if isinstance(settings, Namespace) else dict(settings)


def _version(weights: Mapping[str, Tensor], side: str) -> float:
    version = weights.get(f"{side}.version")
    return 1.0 if version is None else float(version.flatten()[0])


def _modern_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Today's fairseq names: old ones renamed, fused projections split, bookkeeping left out."""
    modern: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith((".version", "._float_tensor", "embed_positions.weights")):
            continue
        name = "decoder.output_projection.weight" if name == "decoder.embed_out" else name
        old_norm = re.fullmatch(r"((encoder|decoder)\.layers\.\d+)\.layer_norms\.(\d)\.(weight|bias)", name)
        if old_norm:
            name = f"{old_norm[1]}.{OLD_NORMS[old_norm[2]][int(old_norm[3])]}.{old_norm[4]}"
        fused = re.fullmatch(rf"(.*)\.({'|'.join(FUSED_BLOCKS)})[._](weight|bias)", name)
        if fused:
            blocks = FUSED_BLOCKS[fused[2]]
            for block, rows in zip(blocks, tensor.chunk(len(blocks)), strict=True):
                modern[f"{fused[1]}.{block}.{fused[3]}"] = rows
        else:
            modern[name] = tensor
    return modern


def unstack(weights: Mapping[str, Tensor], side: str, schedule: Sequence[int]) -> dict[str, Tensor]:
    """Layers that run at several depths once, after a look that they hold the same at each."""
    kept = {}
    for name, tensor in weights.items():
        layer = re.fullmatch(rf"{side}\.layers\.(\d+)\.(.+)", name)
        first = f"{side}.layers.{schedule[int(layer[1])]}.{layer[2]}" if layer and int(layer[1]) < len(schedule) else name
        if first == name:
            kept[name] = tensor
        elif first not in weights or not torch.equal(weights[first], tensor):
            raise ImportFormatError(f"{first} and {name} differ, but the checkpoint's settings say that they are one layer")
    return kept


def _untie(weights: dict[str, Tensor], tables: Sequence[str], tie: str) -> None:
    """Drop the further names of tied tables, after a look that they hold the same. Factorized tables are never tied there."""
    tied = {"all": tables, "decoder": tables[-2:], "none": tables[-1:]}[tie]
    factors = {f"{name.removesuffix('.weight')}.{part}.weight" for name in tables[:-1] for part in ("emb", "m", "up")}
    if factors & weights.keys():
        tables, tied = tables[-1:], tables[-1:]
    lacking = [name for name in tables if name not in weights and name not in tied[1:]]
    if lacking:
        raise ImportFormatError(f"the checkpoint lacks {', '.join(lacking)}; it is incomplete or of another kind of model")
    for name in tied[1:]:
        other = weights.pop(name, None)
        if other is not None and not torch.equal(other, weights[tied[0]]):
            raise ImportFormatError(f"{tied[0]} and {name} differ, but the checkpoint's settings say that they are one matrix")


def portable_name(name: str) -> str:
    """`decoder.layers.3.encoder_attn.k_proj.weight` -> `decoder.layers.3.cross_attention.k_proj.weight`; others as they are."""
    layer = re.fullmatch(r"((?:encoder|decoder)\.layers\.\d+)\.(\w+)\.(.+)", name)
    if layer and layer[2] in LAYER_PARTS:
        return f"{layer[1]}.{LAYER_PARTS[layer[2]]}.{layer[3]}"
    part, _, kind = name.rpartition(".")
    return f"{SIDE_PARTS.get(part, part)}.{kind}"

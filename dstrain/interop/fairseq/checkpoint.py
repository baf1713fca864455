"""Checkpoints of fairseq's transformers, and their dictionaries -> our configuration, weights and tokenizers.

Only the model is read: no padding side, no batch order. Half-precision weights become float32. A matrix that fairseq stores under
several names must be equal under all of them.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair
from dstrain.errors import BundleError, ImportFormatError
from dstrain.interop.fairseq.command_line.flags import WITHOUT
from dstrain.interop.fairseq.model import model_section
from dstrain.interop.fairseq.names import FUSED, TABLES, canonical_name, current_name
from dstrain.interop.fairseq.options import Settings, SettingsReader
from dstrain.interop.fairseq.safe_pickle import load_pickled
from dstrain.models.config import ModelConfig, StackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, canonical_shapes, check_canonical, parameter_layouts

PAD_ID, EOS_ID = 1, 2
POSITION_ROWS = 2
"""Rows of a learned position table before that of the first token."""
WITH_FINAL_NORM = {"encoder": 2.0, "decoder": 3.0}
"""The format version from which on a pre-norm stack has a final norm."""
UNSUPPORTED = (
    "adaptive_input",
    "adaptive_softmax_cutoff",
    "no_cross_attention",
    "cross_self_attention",
    "merge_src_tgt_embed",
    "encoder_layers_to_keep",
    "decoder_layers_to_keep",
    "base_layers",
    "scale_attn",
    "scale_fc",
    "scale_heads",
    "scale_resids",
)
"""Settings that change the model in a way that dstrain cannot represent; a checkpoint with one of them is refused."""


@dataclass(frozen=True)
class FairseqCheckpoint:
    """model: settings (`cfg["model"]`, or `args` in old files). task: data directory, languages. weights: by fairseq's names."""

    model: dict[str, Any]
    task: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder model, not a language model."""
        return any(name.startswith("encoder.") for name in self.weights)

    @property
    def data_directory(self) -> str:
        """The first of the data directories that it was trained on."""
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
    """Configuration, vocabulary sizes and weights by canonical name.

    tokenizers: those that the model is to be used with, whose sizes must be the model's; BART's row for `<mask>`, which its
    dictionaries do not have, is cut off. ImportFormatError names settings that dstrain cannot represent, tied matrices and
    stacked layers that differ, names and sizes that do not fit.
    """
    config = _checkpoint_config(checkpoint)
    weights = {
        current_name(name): tensor
        for name, tensor in checkpoint.weights.items()
        if not name.endswith((".version", "._float_tensor", "embed_positions.weights"))
    }
    if tokenizers is not None:
        _fit_vocabularies(weights, tokenizers, is_bart="bart" in str(checkpoint.model.get("arch")))
    for side, stack in _stacks(config).items():
        if stack.final_norm == "no":
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{side}.layer_norm.")}
        weights = unstack(weights, side, stack.schedule)
    _untie(weights, [name for name in TABLES if checkpoint.has_encoder or name.startswith("decoder")], config.embedding.tie)
    canonical = {canonical_name(name): tensor.float() for name, tensor in weights.items()}
    for side in ("source_embedding", "target_embedding"):
        if f"{side}.tokens.up_proj.weight" in canonical and f"{side}.tokens.weight" in canonical:
            canonical[f"{side}.tokens.table.weight"] = canonical.pop(f"{side}.tokens.weight")
        if f"{side}.positions.weight" in canonical:
            canonical[f"{side}.positions.weight"] = canonical[f"{side}.positions.weight"][POSITION_ROWS:]
    sizes = {
        name.partition("_")[0]: len(tensor)
        for name, tensor in canonical.items()
        if name.endswith(("tokens.weight", "table.weight"))
    }
    target = sizes.get("target", sizes.get("source", 0))
    vocabulary = VocabularySizes(source=sizes.get("source", target), target=target, pad_id=PAD_ID, eos_id=EOS_ID)
    return config, vocabulary, _fitting(canonical, config, vocabulary)


def _fitting(weights: Mapping[str, Tensor], config: ModelConfig, vocabulary: VocabularySizes) -> dict[str, Tensor]:
    """The weights with fused matrices split, checked against the model."""
    layouts = parameter_layouts(build_model(config, vocabulary, seed=None))
    rows = {name: shape[0] for name, shape in canonical_shapes(layouts).items()}
    blocks = {part: block for name, tensor in weights.items() for part, block in split_fused(name, tensor, rows).items()}
    try:
        check_canonical(layouts, TensorSource(blocks))
    except BundleError as error:
        raise ImportFormatError(f"the checkpoint is not the transformer that its settings describe: {error}") from error
    return blocks


def split_fused(name: str, tensor: Tensor, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """A fused matrix or bias as its blocks, any other tensor as it is. rows: of every tensor of the model, by canonical name.

    Grouped heads make the blocks unequal: q has a row per feature of every head, k and v only of the heads that they have.
    """
    path, _, kind = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    names = [f"{parent}.{block}.{kind}" for block in FUSED.get(last, ())]
    if not names or not rows.keys() >= set(names):
        return {name: tensor}
    sizes = [rows[block] for block in names]
    if sum(sizes) != len(tensor):
        blocks = " + ".join(f"{size} of {block}" for size, block in zip(sizes, FUSED[last], strict=True))
        raise ImportFormatError(
            f"the checkpoint's {name} has {len(tensor)} rows, but its settings make {blocks}; they are not those of this model"
        )
    return dict(zip(names, torch.split(tensor, sizes), strict=True))


def _checkpoint_config(checkpoint: FairseqCheckpoint) -> ModelConfig:
    """The configuration of its settings, without final norms if the format is older than they are."""
    versions = {side: checkpoint.weights.get(f"{side}.version") for side in WITH_FINAL_NORM}
    number = {side: 1.0 if version is None else float(version.flatten()[0]) for side, version in versions.items()}
    old = [side for side, oldest in WITH_FINAL_NORM.items() if number[side] < oldest]
    settings = dict(checkpoint.model)
    for side in WITH_FINAL_NORM:  # the weights decide: encoder-decoders ignore the option decoder_input_dim
        up_proj = checkpoint.weights.get(f"{side}.project_in_dim.weight")
        settings[f"{side}_input_dim"] = None if up_proj is None else up_proj.shape[1]
    return convert_config(settings, decoder_only=not checkpoint.has_encoder, without_final_norm=old)


def convert_config(values: Mapping[str, Any], *, decoder_only: bool, without_final_norm: Sequence[str] = ()) -> ModelConfig:
    """Our configuration of a fairseq transformer, or of its `transformer_lm`.

    values: its settings. without_final_norm: sides of a format so old that pre-norm models had no final norm. ImportFormatError
    names a setting that cannot be represented.
    """
    reading = SettingsReader()
    for name in UNSUPPORTED:
        if values.get(name):
            raise reading.refusal(name, values[name], WITHOUT[name])
    section = model_section(Settings(values, decoder_only), reading)
    for side in without_final_norm:
        if section["norm_order"] == "pre" and side in section:
            section[side]["final_norm"] = "no"
    try:
        config: ModelConfig = TypeAdapter(ModelConfig).validate_python(section)
    except ValidationError as error:
        raise ImportFormatError(f"the checkpoint's settings make no model: {error.errors()[0]['msg']}") from error
    return config


def _stacks(config: ModelConfig) -> dict[str, StackConfig]:
    if config.kind == "encoder_decoder":
        return {"encoder": config.encoder, "decoder": config.decoder}
    return {"decoder": config.decoder}


def read_dictionaries(
    directory: Path, checkpoint: FairseqCheckpoint, sentencepiece: tuple[Path, Path] | None = None
) -> TokenizerPair:
    """The tokenizers of both sides, from dict.SOURCE.txt and dict.TARGET.txt (or dict.txt for both) in `directory`.

    sentencepiece: models that make the dictionaries' symbols from source and target text; None if text is already split by
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


def unstack(weights: Mapping[str, Tensor], side: str, schedule: Sequence[int]) -> dict[str, Tensor]:
    """The weights with each layer once, after a check that a layer that runs at several depths is equal at each."""
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
    """Drop the further names of tied tables, after a check that they are equal. Factorized tables are never tied."""
    tied = {"all": tables, "decoder": tables[-2:], "none": tables[-1:]}[tie]
    factors = {f"{name.removesuffix('.weight')}.{part}.weight" for name in tables[:-1] for part in ("emb", "m", "up")}
    if factors & weights.keys():
        tables, tied = tables[-1:], tables[-1:]
    missing = [name for name in tables if name not in weights and name not in tied[1:]]
    if missing:
        raise ImportFormatError(f"the checkpoint lacks {', '.join(missing)}; it is incomplete or of another kind of model")
    for name in tied[1:]:
        other = weights.pop(name, None)
        if other is not None and not torch.equal(other, weights[tied[0]]):
            raise ImportFormatError(f"{tied[0]} and {name} differ, but the checkpoint's settings say that they are one matrix")

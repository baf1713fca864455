"""Checkpoints of fairseq's transformers, and their dictionaries -> our configuration, weights and tokenizers.

Only the model is read: no padding side, no batch order. Half-precision weights become float32. A matrix that fairseq stores under
several names must be equal under all of them. Tensors win over defaults: a setting that is missing is the one that they show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair
from dstrain.errors import BundleError, ImportFormatError
from dstrain.interop.fairseq.command_line.flags import WITHOUT
from dstrain.interop.fairseq.languages import APPENDING, ONE_PAIR, choose_pair, language_tokens, task_name
from dstrain.interop.fairseq.model import model_section
from dstrain.interop.fairseq.names import FUSED, SINUSOIDS, TABLES, canonical_name, current_name, left_out_reason, refusal_of_name
from dstrain.interop.fairseq.options import ARCHITECTURE_ALIASES, ARCHITECTURES, Settings, SettingsReader
from dstrain.interop.fairseq.safe_pickle import load_pickled
from dstrain.interop.fairseq.settings import plain_settings
from dstrain.log import logger
from dstrain.models.config import ModelConfig, StackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, canonical_shapes, check_canonical, parameter_layouts

PAD_ID, EOS_ID = 1, 2
_READ_ENTRIES = ("model", "cfg", "args")
TRAINING_STATE = "state of the training that made it; a new training has its own"
POSITION_ROWS = 2
"""Rows of a learned position table before that of the first token."""
WITH_FINAL_NORM = {"encoder": 2.0, "decoder": 3.0}
"""The format version from which on a pre-norm stack has a final norm. Without a version, its weights alone say whether it has."""
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
    """model: settings (`cfg["model"]`, or `args` in old files). task: data directory, languages. weights: by fairseq's names.

    settings: all groups of `cfg`, or `args`. unread: what else is in the file -> the reason why it is left out.
    """

    model: dict[str, Any]
    task: dict[str, Any]
    weights: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder model, not a language model."""
        return any(name.startswith("encoder.") for name in self.weights)

    @property
    def data_directory(self) -> str:
        """The first of the data directories that it was trained on."""
        data = self.task.get("data") or "."
        return str(data[0] if isinstance(data, list) else data).partition(":")[0]


def read_fairseq_checkpoint(path: Path, pair: str | None = None) -> FairseqCheckpoint:
    """Read a checkpoint file safely. pair: the direction to read of a multilingual one, such as de-en.

    ImportFormatError: see `load_pickled` and `choose_pair`; also if it is no fairseq checkpoint.
    """
    content = load_pickled(path)
    weights = content.get("model") if isinstance(content, dict) else None
    groups = (content.get("cfg") or content.get("args")) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or groups is None:
        raise ImportFormatError(
            f"{path} is no fairseq checkpoint: it lacks `model` and `cfg` or `args`; name a checkpoint*.pt file"
        )
    strange = [name for name, tensor in weights.items() if not (isinstance(name, str) and _is_plain(tensor))]
    if strange:
        raise ImportFormatError(
            f"{path}: model holds {strange[0]!r}, which is no plain tensor with a name; save its state_dict() alone"
        )
    settings = plain_settings(groups)
    model = settings["model"] if isinstance(settings.get("model"), dict) else settings
    sides = {side: model[side] for side in WITH_FINAL_NORM if isinstance(model.get(side), dict)}  # of fairseq's TransformerConfig
    model = {**model, **{f"{side}_{name}": value for side, part in sides.items() for name, value in part.items()}}
    task = settings["task"] if isinstance(settings.get("task"), dict) else settings
    _require_whole_transformer(path, weights, settings)
    unread = {str(name): TRAINING_STATE for name, entry in content.items() if name not in _READ_ENTRIES and not _is_empty(entry)}
    if isinstance(state := content.get("extra_state"), dict) and state.get("ema"):
        unread["extra_state.ema"] = "the moving average of the weights; to import it, save it as `model`"
    models = list(dict.fromkeys(name.split(".")[1] for name in weights if name.startswith("models.") and name.count(".") > 1))
    source, target = choose_pair(task, pair, models)
    if models:
        prefix = f"models.{source}-{target}."
        unread |= {f"models.{other}.*": f"another direction: --pair {other}" for other in models if prefix != f"models.{other}."}
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not any(name.startswith("decoder.") for name in weights):
        raise ImportFormatError(
            f"{path} holds no decoder (arch {model.get('arch')}); encoder-decoder and decoder-only models can be imported"
        )
    task = {**task, "source_lang": source, "target_lang": target}
    return FairseqCheckpoint(model, task, dict(weights), settings, unread)


def _require_whole_transformer(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    parts = settings.get("common", settings).get("model_parallel_size") or 1
    if parts > 1:
        raise ImportFormatError(
            f"{path} is one of {parts} parts of a model (model_parallel_size = {parts}); join them with the tool that cut it"
        )
    for name in weights:
        if (reason := refusal_of_name(name)) is not None:
            raise ImportFormatError(f"{path} holds {name}: {reason}")


def _is_plain(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta and min(tensor.shape, default=0) > 0
    )


def _is_empty(entry: Any) -> bool:
    return entry is None or (isinstance(entry, dict | list) and not entry)


def left_out(checkpoint: FairseqCheckpoint) -> dict[str, list[str]]:
    """What an import does not read of a checkpoint, by reason."""
    names: dict[str, list[str]] = {}
    tensors = {name: reason for name in checkpoint.weights if (reason := left_out_reason(name)) is not None}
    for name, reason in {**tensors, **checkpoint.unread}.items():
        names.setdefault(reason, []).append(name)
    return names


def convert(
    checkpoint: FairseqCheckpoint, tokenizers: TokenizerPair | None = None
) -> tuple[ModelConfig, VocabularySizes, dict[str, Tensor]]:
    """Configuration, vocabulary sizes and weights by canonical name.

    tokenizers: those that the model is to be used with, whose sizes must be the model's. A fine-tuned BART has a row for `<mask>`
    that its dictionaries lack; it is cut off. ImportFormatError names settings that dstrain cannot represent, tied matrices and
    stacked layers that differ, names and sizes that do not fit.
    """
    config = _checkpoint_config(checkpoint)
    weights = {current_name(name): tensor for name, tensor in checkpoint.weights.items() if left_out_reason(name) is None}
    sinusoids = [name for name in checkpoint.weights if SINUSOIDS.fullmatch(name)]
    if sinusoids and config.position.kind != "sinusoidal":
        raise ImportFormatError(
            f"the checkpoint has {sinusoids[0]}, which belongs to sinusoidal positions, but its settings make "
            f"{config.position.kind} ones; they are not those of this model"
        )
    if tokenizers is not None:
        _fit_vocabularies(weights, tokenizers, checkpoint)
    for side, stack in _stacks(config).items():
        weights = unstack(weights, side, stack.schedule)
    _untie(weights, [name for name in TABLES if checkpoint.has_encoder or name.startswith("decoder")], config.embedding.tie)
    canonical = {canonical_name(name): _float32(name, tensor) for name, tensor in weights.items()}
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
    if tokenizers is not None:
        vocabulary = VocabularySizes.of(tokenizers.source if "source" in sizes else tokenizers.target, tokenizers.target)
    return config, vocabulary, _fitting(canonical, config, vocabulary)


def _float32(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ImportFormatError(f"{name} is of {tensor.dtype}, as in a quantized model; import it from before quantization")
    if not tensor.isfinite().all():
        raise ImportFormatError(f"{name} holds NaN or infinity, so the training had diverged; import an earlier checkpoint")
    return tensor.float()


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
    """The configuration of its settings; those that are missing are read from the weights, then from the architecture's name."""
    weights, settings = checkpoint.weights, dict(checkpoint.model)
    arch = str(settings.get("arch"))
    by_name = {
        name: value
        for name, value in ARCHITECTURES.get(ARCHITECTURE_ALIASES.get(arch, arch), {}).items()
        if not isinstance(value, dict)  # a name did not always mean positions
    }
    by_weights = _shown_settings(weights)
    absent = {name: value for name, value in {**by_name, **by_weights}.items() if settings.get(name) is None}
    settings |= absent
    old = []
    for side, oldest in WITH_FINAL_NORM.items():
        version = weights.get(f"{side}.version")
        number = 1.0 if version is None else float(version.flatten()[0])
        if number < oldest and f"{side}.layer_norm.weight" not in weights:
            old.append(side)
        # the weights decide: encoder-decoders ignore the option decoder_input_dim
        up_proj = weights.get(f"{side}.project_in_dim.weight")
        settings[f"{side}_input_dim"] = None if up_proj is None else up_proj.shape[1]
    return convert_config(settings, decoder_only=not checkpoint.has_encoder, without_final_norm=old)


def _shown_settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings that tensors show. Heads are not among them."""
    tables = [weights[name] for name in TABLES if name in weights]
    decoder = [weights[name] for name in TABLES[1:] if name in weights]
    shown: dict[str, Any] = {
        "layernorm_embedding": "decoder.layernorm_embedding.weight" in weights,
        "share_all_embeddings": len(tables) == len(TABLES) and all(torch.equal(tables[0], table) for table in tables[1:]),
        "share_decoder_input_output_embed": len(decoder) == 2 and torch.equal(*decoder),
    }
    for side in ("encoder", "decoder"):
        up_proj = weights.get(f"{side}.layers.0.fc1.weight")
        if up_proj is not None:
            shown |= {f"{side}_ffn_embed_dim": up_proj.shape[0], f"{side}_embed_dim": up_proj.shape[1]}
        layers = {int(match[1]) for name in weights if (match := re.match(rf"{side}\.layers\.(\d+)\.", name))}
        shown |= {
            f"{side}_layers": max(layers, default=-1) + 1 or None,
            f"{side}_learned_pos": f"{side}.embed_positions.weight" in weights,
            f"{side}_normalize_before": f"{side}.layer_norm.weight" in weights or None,  # old ones have no final norm
        }
    return {name: value for name, value in shown.items() if value is not None}


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

    They have the symbols and markers that the checkpoint's task adds. sentencepiece: models that make the dictionaries' symbols
    from source and target text; None if text is already split by spaces. ImportFormatError if a dictionary is missing or the
    direction is open, DataError if a dictionary is malformed.
    """
    added = language_tokens(checkpoint.task, directory)
    fixed = Path(str(checkpoint.task.get("fixed_dictionary") or "dict.txt")).name
    sides = []
    for number, (side, markers) in enumerate((("source", added.source), ("target", added.target))):
        language = checkpoint.task.get(f"{side}_lang")
        names = dict.fromkeys([*([f"dict.{language}.txt"] if language else []), "dict.txt", fixed])
        path = next((directory / name for name in names if (directory / name).exists()), None)
        if path is None:
            raise ImportFormatError(
                f"{directory} has no {' and no '.join(names)}; give the directory of the model's dictionaries with --dictionary"
            )
        tokenizer = DictionaryTokenizer.from_files(path, sentencepiece[number] if sentencepiece else None)
        sides.append(tokenizer.with_symbols(added.symbols, markers=markers))
    return TokenizerPair(sides[0], sides[1])


def _fit_vocabularies(weights: dict[str, Tensor], tokenizers: TokenizerPair, checkpoint: FairseqCheckpoint) -> None:
    """Check that each table has a row per dictionary entry, after cutting BART's further row."""
    sizes = {"encoder": tokenizers.source.vocab_size, "decoder": tokenizers.target.vocab_size}
    tables = (*TABLES, *(f"{side}.embed_tokens.{part}.weight" for side in sizes for part in ("emb", "m")))
    task, is_bart = task_name(checkpoint.task), "bart" in str(checkpoint.model.get("arch"))
    for name in tables:
        table, size = weights.get(name), sizes[name.partition(".")[0]]
        if table is not None and is_bart and len(table) == size + 1:
            weights[name] = table[:size]
            logger.info("left out the last row of %s: it is that of <mask>, which the dictionary lacks", name)
        elif table is not None and len(table) != size:
            remark = f" and what task {task} appends" if task in APPENDING else ""
            if task not in APPENDING | ONE_PAIR:
                remark = f"; its task {task} may append symbols, which dstrain does not know"
            raise ImportFormatError(
                f"the checkpoint's {name} has {len(table)} rows, but the dictionary has {size} entries with the four specials"
                f"{remark}; give the dictionaries that the model was trained with"
            )


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

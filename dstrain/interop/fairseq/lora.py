"""Low-rank adapters in fairseq checkpoints: `lora_A`, `lora_B` beside weights into which they have been merged.

fairseq merges when it saves, W = W_base + scale B A, and keeps A and B in the same file; so W_base = W - scale B A, exact up to
one rounding of the stored precision. `crash.pt` is written from the middle of a step and holds W_base itself. A run that fairseq
resumed trains on with the adapter's state at the resume added to its base for good; the base read here has that in it, as the
model had. Trained biases are in the base, too, since their untrained values are nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.checkpoint import FUSED_BLOCKS, FairseqCheckpoint, convert, portable_name, unstack
from dstrain.models.config import ModelConfig, VocabularySizes

DEFAULTS: Mapping[str, Any] = {"r": 0, "alpha": 1, "dropout": 0.0, "rank_scaled": False, "target_modules": "", "bias": "none"}
TABLES = ("embed_tokens", "emb", "m")
"""Last names of token tables, whose A and B stand the other way round: (R, V) and (D, R)."""
WITHOUT_BIAS = ("output_projection", "up", "up_gate_proj", "down_proj")
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Name of a matrix without `.weight` -> A (R, I) and B (O, R) with the matrix's own (O, I)."""


@dataclass(frozen=True)
class ForeignAdapter:
    """settings: an `adapter` section of ours as plain values. weights: `lora_a`, `lora_b` by portable name."""

    settings: dict[str, Any]
    weights: dict[str, Tensor]


def convert_adapted(
    checkpoint: FairseqCheckpoint, tokenizers: TokenizerPair | None = None, *, unmerged: bool
) -> tuple[ModelConfig, VocabularySizes, dict[str, Tensor], ForeignAdapter | None]:
    """As `fairseq.convert`, with the weights of the base, and the adapter that was trained on it; None where there is none.

    unmerged: the file holds the weights of the base already. ImportFormatError also for adapters that are another function in
    fairseq's training than in its checkpoints, or that came with biases which the model does not have.
    """
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    model = {name: value for name, value in checkpoint.model.items() if name != "lora_args"}
    pairs = _pairs(checkpoint.weights)
    plain = replace(checkpoint, model=model, weights=weights)
    if not pairs:
        return *convert(plain, tokenizers), None
    _refuse_tied(checkpoint.model, pairs)
    for name in pairs:
        if f"{name}.bias" in weights and name.rpartition(".")[2] in WITHOUT_BIAS:
            raise ImportFormatError(
                f"the checkpoint has {name}.bias, a random bias that fairseq's adapter gave to a map without one; it has "
                "no counterpart here; train the adapter again without this target"
            )
    given = _settings(checkpoint.model.get("lora_args"), pairs)
    scale = given["alpha"] / (given["r"] ** 0.5 if given["rank_scaled"] else given["r"])
    if not unmerged:
        for name, (a, b) in pairs.items():
            weights[f"{name}.weight"] = torch.addmm(weights[f"{name}.weight"].float(), b, a, alpha=-scale)
    config, vocabulary, portable = convert(plain, tokenizers)
    adapter = _without_cut_rows(_portable(pairs, config), portable)
    settings = {
        "kind": "lora",
        "rank": given["r"],
        "alpha": given["alpha"],
        "dropout": given["dropout"],
        "rank_scaled": given["rank_scaled"],
        "targets": _targets({name.rpartition(".")[0] for name in adapter}, portable),
    }
    return config, vocabulary, portable, ForeignAdapter(settings, adapter)


def _pairs(weights: Mapping[str, Tensor]) -> Pairs:
    pairs: Pairs = {}
    for name in weights:
        path, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            continue
        lacking = [part for part in ("lora_A", "lora_B", "weight") if f"{path}.{part}" not in weights]
        if lacking:
            raise ImportFormatError(f"the checkpoint has {name} but no {path}.{lacking[0]}; it is incomplete")
        a, b = weights[f"{path}.lora_A"].float(), weights[f"{path}.lora_B"].float()
        a, b = (b.t().contiguous(), a.t().contiguous()) if path.rpartition(".")[2] in TABLES else (a, b)
        shape, found = tuple(weights[f"{path}.weight"].shape), (len(b), a.shape[1])
        if found != shape:
            raise ImportFormatError(
                f"the checkpoint's adapter of {path} is for a matrix of {found}, but it has {shape}; it is damaged"
            )
        pairs[path] = (a, b)
    return pairs


def _refuse_tied(model: Mapping[str, Any], pairs: Pairs) -> None:
    for name, side in (("share_all_embeddings", ""), ("share_decoder_input_output_embed", "decoder.")):
        tables = [path for path in pairs if path.startswith(side) and path.endswith(("embed_tokens", "output_projection"))]
        if model.get(name) and tables:
            raise ImportFormatError(
                f"the checkpoint has {name} and an adapter of {tables[0]}: fairseq trained it for one use of the matrix and "
                "saved it merged into all of them, which are two different models; train the adapter again without this target"
            )


def _settings(lora_args: Any, pairs: Pairs) -> dict[str, Any]:
    """The adapter's settings with fairseq's defaults."""
    try:
        given = json.loads(lora_args) if isinstance(lora_args, str) else dict(lora_args)
        unknown = sorted(given.keys() - DEFAULTS.keys())
    except (ValueError, TypeError, AttributeError):
        raise ImportFormatError(
            f"the checkpoint has adapters but lora_args = {lora_args!r}, which is no JSON object, so their scale is unknown"
        ) from None
    if unknown:
        raise ImportFormatError(f"the checkpoint has lora_args with {', '.join(unknown)}, which dstrain cannot represent")
    settings = {**DEFAULTS, **given}
    ranks = {len(a) for a, _ in pairs.values()}
    if ranks != {settings["r"]}:
        raise ImportFormatError(f"the checkpoint's adapters have rank {sorted(ranks)}, but its lora_args say r = {settings['r']}")
    return settings


def _portable(pairs: Pairs, config: ModelConfig) -> dict[str, Tensor]:
    """By portable name: fused projections split, layers that run at several depths once."""
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in pairs.items():
        parent, _, last = path.rpartition(".")
        blocks = FUSED_BLOCKS.get(last, (last,))
        for block, rows in zip(blocks, b.chunk(len(blocks)), strict=True):
            tensors |= {f"{parent}.{block}.lora_a": a, f"{parent}.{block}.lora_b": rows.contiguous()}
    tensors = unstack(tensors, "decoder", config.decoder.schedule)
    if config.kind == "encoder_decoder":
        tensors = unstack(tensors, "encoder", config.encoder.schedule)
    return {portable_name(name): tensor for name, tensor in tensors.items()}


def _without_cut_rows(adapter: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter of the weights as `convert` leaves them: of a table whose row for `<mask>` it cut off, without this row."""
    kept = dict(adapter)
    for name in adapter:
        path, _, kind = name.rpartition(".")
        if kind == "lora_b":
            kept[name] = adapter[name][: len(weights[f"{path}.weight"])]
    return kept


def _targets(adapted: set[str], weights: Mapping[str, Tensor]) -> list[str]:
    """Last names where they mean exactly the adapted parts, else whole paths."""
    names = {path.rpartition(".")[2] for path in adapted}
    meant = {name.removesuffix(".weight") for name in weights if name.split(".")[-1] == "weight" and name.split(".")[-2] in names}
    return sorted(names if meant == adapted else adapted)

"""Low-rank adapters in fairseq checkpoints: `lora_A`, `lora_B` beside weights into which they have been merged.

fairseq merges when it saves, W = W_base + scale B A, and keeps A and B in the same file; so W_base = W - scale B A, exact up to
one rounding of the stored precision. `crash.pt` is written from the middle of a step and holds W_base itself. A run that fairseq
resumed trains on with the adapter's state at the resume added to its base permanently; the base read here includes it, as the
model had. Trained biases are in the base, too, since their untrained values are nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dstrain.adapters.lora import target_names
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.checkpoint import FairseqCheckpoint, convert, split_fused, unstack
from dstrain.interop.fairseq.model import LORA_DEFAULTS, lora_settings
from dstrain.interop.fairseq.names import canonical_name
from dstrain.models.config import ModelConfig, VocabularySizes

TOKEN_TABLES = ("embed_tokens", "emb", "m")
"""Last names of token tables, whose A and B are transposed: (R, V) and (D, R)."""
WITHOUT_BIAS = ("output_projection", "up", "up_gate_proj", "down_proj", "project_in_dim", "project_out_dim")
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Name of a matrix without `.weight` -> A (R, I) and B (O, R) with the matrix's own (O, I)."""


@dataclass(frozen=True)
class ForeignAdapter:
    """settings: an `adapter` section of ours as plain values. weights: `lora_a`, `lora_b` by canonical name."""

    settings: dict[str, Any]
    weights: dict[str, Tensor]


def convert_adapted(
    checkpoint: FairseqCheckpoint, tokenizers: TokenizerPair | None = None, *, unmerged: bool
) -> tuple[ModelConfig, VocabularySizes, dict[str, Tensor], ForeignAdapter | None]:
    """As `convert`, with the weights of the base, and the adapter that was trained on it; None if there is none.

    unmerged: the file holds the weights of the base already. ImportFormatError also for adapters that are another function in
    fairseq's training than in its checkpoints, or that came with biases which the model does not have.
    """
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    pairs = _pairs(checkpoint.weights)
    plain = replace(checkpoint, weights=weights)
    if not pairs:
        return *convert(plain, tokenizers), None
    _refuse_tied(checkpoint.model, pairs)
    for name in pairs:
        if f"{name}.bias" in weights and name.rpartition(".")[2] in WITHOUT_BIAS:
            raise ImportFormatError(
                f"the checkpoint has {name}.bias, a random bias that fairseq's adapter gave to a map without one; it has "
                "no counterpart here; train the adapter again without this target"
            )
    lora = _lora_args(checkpoint.model.get("lora_args"), pairs)
    scale = lora["alpha"] / (lora["r"] ** 0.5 if lora["rank_scaled"] else lora["r"])
    if not unmerged:
        for name, (a, b) in pairs.items():
            weights[f"{name}.weight"] = torch.addmm(weights[f"{name}.weight"].float(), b, a, alpha=-scale)
    config, vocabulary, base = convert(plain, tokenizers)
    adapter = _canonical(pairs, config, base)
    targets = target_names({name.rpartition(".")[0] for name in adapter}, base)
    return config, vocabulary, base, ForeignAdapter({**lora_settings(lora), "targets": targets}, adapter)


def _pairs(weights: Mapping[str, Tensor]) -> Pairs:
    pairs: Pairs = {}
    for name in weights:
        path, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            continue
        missing = [kind for kind in ("lora_A", "lora_B", "weight") if f"{path}.{kind}" not in weights]
        if missing:
            raise ImportFormatError(f"the checkpoint has {name} but no {path}.{missing[0]}; it is incomplete")
        a, b = weights[f"{path}.lora_A"].float(), weights[f"{path}.lora_B"].float()
        a, b = (b.t().contiguous(), a.t().contiguous()) if path.rpartition(".")[2] in TOKEN_TABLES else (a, b)
        shape, adapted = tuple(weights[f"{path}.weight"].shape), (len(b), a.shape[1])
        if adapted != shape:
            raise ImportFormatError(
                f"the checkpoint's adapter of {path} is for a matrix of {adapted}, but it has {shape}; it is damaged"
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


def _lora_args(value: Any, pairs: Pairs) -> dict[str, Any]:
    """The adapter's settings with fairseq's defaults. An unknown one is an error, since it may change the function."""
    try:
        settings = json.loads(value) if isinstance(value, str) else dict(value)
        unknown = sorted(settings.keys() - LORA_DEFAULTS.keys())
    except (ValueError, TypeError, AttributeError):
        raise ImportFormatError(
            f"the checkpoint has adapters but lora_args = {value!r}, which is no JSON object, so their scale is unknown"
        ) from None
    if unknown:
        raise ImportFormatError(f"the checkpoint has lora_args with {', '.join(unknown)}, which dstrain cannot represent")
    lora = {**LORA_DEFAULTS, **settings}
    ranks = {len(a) for a, _ in pairs.values()}
    if ranks != {lora["r"]}:
        raise ImportFormatError(f"the checkpoint's adapters have rank {sorted(ranks)}, but its lora_args say r = {lora['r']}")
    return lora


def _canonical(pairs: Pairs, config: ModelConfig, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B by canonical name: fused projections split, stacked layers once, without the table rows that the base has not.

    base: weights as `convert` leaves them. It cuts off the row for `<mask>` of BART's tables.
    """
    rows = {name: len(tensor) for name, tensor in base.items()}
    tensors = {f"{path}.{kind}": tensor for path, pair in pairs.items() for kind, tensor in zip("ab", pair, strict=True)}
    tensors = unstack(tensors, "decoder", config.decoder.schedule)
    if config.kind == "encoder_decoder":
        tensors = unstack(tensors, "encoder", config.encoder.schedule)
    adapter: dict[str, Tensor] = {}
    for name, b in tensors.items():
        if not name.endswith(".b"):
            continue
        path = _base_path(canonical_name(f"{name.removesuffix('.b')}.weight"), rows)
        for block, part in split_fused(path, b, rows).items():
            stem = block.removesuffix(".weight")
            adapter[f"{stem}.lora_a"] = tensors[f"{name.removesuffix('.b')}.a"]
            adapter[f"{stem}.lora_b"] = part[: rows.get(block, len(part))].contiguous()
    return adapter


def _base_path(name: str, rows: Mapping[str, int]) -> str:
    """A token table that is projected to the model's width has a longer name here."""
    table = f"{name.removesuffix('.weight')}.table.weight"
    return table if table in rows else name

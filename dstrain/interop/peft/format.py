"""The low-rank adapters of PEFT and ours: the same function under other names.

    base_model.model.PATH.lora_A.weight        PATH.lora_a       (R, I)
    base_model.model.PATH.lora_B.weight        PATH.lora_b       (O, R)
    base_model.model.PATH.lora_embedding_A     PATH.lora_b       (R, V), transposed here
    base_model.model.PATH.lora_embedding_B     PATH.lora_a       (D, R), transposed here
    base_model.model.PATH.lora_magnitude_vector  PATH.lora_magnitude  (O,)
    base_model.model.PATH.base_layer.bias      PATH.bias         of an adapted map, without `base_layer` of another

PATH is a module's canonical name on both sides. A matrix that several modules share has one adapter here, which acts in all of
them; in PEFT an adapter belongs to one module. So an adapter of tied embeddings is refused, as is DoRA of token tables, whose
norms are over rows here and over columns there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import MAGNITUDE, A, B, is_token_table
from dstrain.models.config import ModelConfig

PREFIX = "base_model.model."
SETTINGS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "bias": "bias",
    "rank_scaled": "use_rslora",
    "dora": "use_dora",
}
"""Ours -> theirs."""
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors tell which are adapted
    *("megatron_core", "qalora_group_size", "runtime_config"),  # of settings that are refused themselves
}
FRESH_VALUES = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it was."""


def config_to_peft(config: LoraConfig, paths: Collection[str], base: str) -> dict[str, Any]:
    """What adapter_config.json says. paths: of the adapted modules. base: a name of the model, for readers."""
    settings = {theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()}
    fixed = {"peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True, "fan_in_fan_out": False}
    return {**fixed, **settings, "target_modules": sorted(paths)}


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What adapter_config.json asks for that cannot be represented, in words."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type = {kind}"
        return
    known = {*SETTINGS.values(), *WITHOUT_EFFECT, "init_lora_weights"}
    yield from (f"{key} = {value}" for key, value in config.items() if key not in known and value)
    if (fresh := config.get("init_lora_weights", True)) not in FRESH_VALUES:
        yield f"init_lora_weights = {fresh}, which changes the base"


def config_from_peft(config: Mapping[str, Any], targets: Iterable[str]) -> LoraConfig:
    """Our settings. KeyError or ValueError if a key is missing or wrong."""
    return LoraConfig(targets=tuple(targets), **{ours: config[theirs] for ours, theirs in SETTINGS.items() if theirs in config})


def weights_to_peft(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names."""
    adapted = {name.removesuffix(A) for name in weights if name.endswith(A)}
    return dict(_to_peft(name, tensor, adapted) for name, tensor in weights.items())


def _to_peft(name: str, tensor: Tensor, adapted: Collection[str]) -> tuple[str, Tensor]:
    path, _, kind = name.rpartition(".")
    if kind == "bias":
        return f"{PREFIX}{path}.{'base_layer.' if path in adapted else ''}bias", tensor
    if is_token_table(path):
        return f"{PREFIX}{path}.lora_embedding_{'B' if f'.{kind}' == A else 'A'}", tensor.t().contiguous()
    end = {A: "lora_A.weight", B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}[f".{kind}"]
    return f"{PREFIX}{path}.{end}", tensor


_KEYS = {
    r"(.+)\.lora_A\.weight": (A, False),
    r"(.+)\.lora_B\.weight": (B, False),
    r"(.+)\.lora_embedding_A": (B, True),
    r"(.+)\.lora_embedding_B": (A, True),
    r"(.+)\.lora_magnitude_vector(?:\.weight)?": (MAGNITUDE, False),
    r"(.+?)(?:\.base_layer)?\.bias": (".bias", False),
}
"""Their key -> the end of our name, and whether the tensor is transposed."""


def weights_from_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by our names, float32. KeyError with a key that is no part of a low-rank adapter."""
    return dict(_from_peft(key, tensor) for key, tensor in tensors.items())


def _from_peft(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    for pattern, (end, transposed) in _KEYS.items():
        if match := re.fullmatch(pattern, key.removeprefix(PREFIX)):
            return f"{match[1]}{end}", (tensor.t() if transposed else tensor).float().contiguous()
    raise KeyError(key)


def path_problems(model: ModelConfig, paths: Iterable[str], *, dora: bool) -> Iterator[str]:
    """Which of the adapted modules compute another function in PEFT, in words."""
    for path in paths:
        tied = "" if model.kind == "decoder_only" or model.embedding.tie == "all" else "source_embedding"
        outside = not path.startswith(("encoder.", "decoder."))
        if model.embedding.tie != "none" and outside and not (tied and path.startswith(tied)):
            yield f"{path}, whose matrix acts in other modules too (model.embedding.tie = {model.embedding.tie})"
        elif dora and is_token_table(path):
            yield f"{path}, a token table under DoRA, whose norms are those of columns there"

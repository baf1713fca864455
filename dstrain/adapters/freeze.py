"""Which parameters of an adapted model are trained; the optimizer, checkpoints and bundles of a run hold only these."""

from __future__ import annotations

from torch import nn

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.parts import LoraLinear
from dstrain.errors import RecipeError


def freeze(model: nn.Module, config: LoraConfig) -> None:
    """Train the adapters and the biases that `config.bias` names; nothing else. model: adapted by `lora.inject`."""
    adapted = {part.bias for part in model.modules() if isinstance(part, LoraLinear)}
    biases = 0
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        is_trained_bias = kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and parameter in adapted))
        biases += is_trained_bias
        parameter.requires_grad_("lora_" in kind or is_trained_bias)
    if config.bias != "none" and not biases:
        raise RecipeError(f"adapter.bias = {config.bias} trains nothing: the model has no such bias; set none")

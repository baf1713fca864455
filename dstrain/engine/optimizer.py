"""Torch's Adam and AdamW, or StableAdamW, over groups with and without weight decay.

`fused` is used on CPUs and GPUs alike: one kernel over each flat ZeRO partition, several times faster than the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dstrain.engine.config import OptimizerConfig
from dstrain.engine.stable_adamw import StableAdamW


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer of the module's trainable parameters; the learning rate is set before each step by the engine."""
    groups = parameter_groups(module, config)
    if config.kind == "stable_adamw":
        return StableAdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.kind]
    optimizer: torch.optim.Optimizer = kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    return optimizer


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters, tied ones once, with the decay each gets.

    One group if the decay is the same for all; else matrices first, then biases, norms and other vectors.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config.weight_decay == 0 or config.decay == "all":
        return [{"params": parameters, "weight_decay": config.weight_decay}]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

"""Torch's Adam and AdamW, or StableAdamW, over groups with and without weight decay.

`fused` is used on CPUs and GPUs alike: one kernel over each flat ZeRO partition, several times faster than the loop.

Torch marks the methods of its optimizers for `torch.compile`, and the marks import the compiler at their first call: 2
CPU-seconds of every start. Optimizers are never compiled here, so these have the methods behind the marks.
"""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch import nn

from dstrain.engine.config import OptimizerConfig
from dstrain.engine.stable_adamw import StableAdamW


class _Unmarked(torch.optim.Optimizer):
    """The methods of every optimizer without marks."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class _Adam(_Unmarked, torch.optim.Adam):
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class _AdamW(_Unmarked, torch.optim.AdamW):
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class _StableAdamW(_Unmarked, StableAdamW):
    pass


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer of the module's trainable parameters; the learning rate is set before each step by the engine."""
    groups = parameter_groups(module, config)
    if config.kind == "stable_adamw":
        return _StableAdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    kind = {"adam": _Adam, "adamw": _AdamW}[config.kind]
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

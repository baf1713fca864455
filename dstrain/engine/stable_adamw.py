"""StableAdamW: AdamW whose learning rate for a parameter falls while its gradients outgrow their second moment.

Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", algorithm 2. The moments are
kept debiased, as the paper writes them: with t the step from 1 and b' = b (1 - b^(t-1)) / (1 - b^t) for both betas,

    m <- b1' m + (1 - b1') g,    u <- b2' u + (1 - b2') g^2
    rate = learning_rate / max(1, RMS),    RMS = sqrt(mean over the parameter of g^2 / max(u, eps^2))
    w <- w - rate (weight_decay w + m / (sqrt(u) + eps))

Without the division w is AdamW's. RMS is at most 1 in the first step; later it exceeds 1 where gradients jump, in one parameter
too, which a clip of the norm over all of them does not see. A parameter is a tensor of the model: query, key and value
projections that are fused share one rate.

Under ZeRO a rank holds pieces of parameters, side by side in flat partitions, so the sums of g^2 / max(u, eps^2) are first added
up over the ranks: one all-reduce a partition, of as many numbers as it has parameters. Cost: some twelve passes over a piece; on
one core 5 ms a million parameters, where a fused Adam takes 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dstrain.engine.master_weights import Layout


class StableAdamW(torch.optim.Optimizer):
    """groups: contiguous parameters with their weight_decay, as `parameter_groups` gives them."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._layouts: Mapping[Tensor, Layout] = {}
        self._add_up: Callable[[Tensor, Layout], Tensor] = lambda sums, layout: sums

    def partition(self, layouts: Mapping[Tensor, Layout], add_up: Callable[[Tensor, Layout], Tensor]) -> None:
        """From now on update flat partitions. add_up: sums a number for each parameter of a layout over the ranks."""
        self._layouts = layouts
        self._add_up = add_up

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient. Collective where partitioned."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        layout = self._layouts.get(weight) or _whole(weight)
        flat = [tensor.view(-1) for tensor in (weight, gradient.contiguous(), *self._moments(weight, gradient, group["betas"]))]
        parts = [[tensor.narrow(0, start, length) for tensor in flat] for _, start, length in layout.pieces]
        numbers = [number for number, _, _ in layout.pieces]
        sums = torch.zeros_like(layout.sizes)
        for number, (_, grad, _, square) in zip(numbers, parts, strict=True):
            sums[number] = grad.square().div_(square.clamp(min=group["eps"] ** 2)).sum()
        rates = group["lr"] / (self._add_up(sums, layout) / layout.sizes).sqrt().clamp(min=1)
        for number, (own, _, mean, square) in zip(numbers, parts, strict=True):
            change = mean / square.sqrt().add_(group["eps"])
            own.sub_(change.add_(own, alpha=group["weight_decay"]).mul_(rates[number]))

    def _moments(self, weight: Tensor, gradient: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """m and u with one more gradient in them."""
        state = self.state[weight]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        first, second = ((1 - beta) / (1 - beta ** int(state["step"])) for beta in betas)  # 1 - b'
        state["exp_avg"].lerp_(gradient, first)
        state["exp_avg_sq"].mul_(1 - second).addcmul_(gradient, gradient, value=second)
        return state["exp_avg"], state["exp_avg_sq"]


def _whole(weight: Tensor) -> Layout:
    """The layout of a tensor that is one parameter."""
    return Layout(weight.new_full((1,), weight.numel()), weight.new_zeros(1), [(0, 0, weight.numel())])

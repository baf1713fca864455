"""Weights by portable names: what bundles hold and all tools exchange, whatever the execution choices of a model.

Fused projections are split into their blocks (q_proj, k_proj, v_proj) and tied matrices appear once, under the first of their
names. `encoder.layers.0.self_attention.qkv.weight` of a fused model is three portable tensors; so is what a separate model
calls `encoder.layers.0.self_attention.qkv.q_proj.weight` and so on: `encoder.layers.0.self_attention.q_proj.weight`, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dstrain.errors import BundleError
from dstrain.nn.linear import FusedLinear, SeparateLinear


@dataclass(frozen=True)
class Part:
    """A portable tensor: `rows` of a parameter, all of them if None."""

    name: str
    rows: slice | None


Layout = dict[str, list[Part]]
"""Name of a parameter, as `named_parameters` gives it -> the portable tensors it is made of, in row order."""


def portable_layout(model: nn.Module) -> Layout:
    """How the parameters of `model` map to portable names. Reads no values, so they may be sharded elsewhere."""
    fused: Layout = {}
    containers = []
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if isinstance(module, SeparateLinear):
            containers.append((f"{path}.", f"{parent}."))
        elif isinstance(module, FusedLinear):
            for kind, _ in module.named_parameters():
                fused[f"{path}.{kind}"] = _blocks(module.blocks, parent, kind)
    layout: Layout = {}
    for name, _ in model.named_parameters():
        portable = name
        for prefix, short in containers:
            if name.startswith(prefix):
                portable = short + name.removeprefix(prefix)
        layout[name] = fused.get(name, [Part(portable, None)])
    return layout


def _blocks(blocks: Mapping[str, int], parent: str, kind: str) -> list[Part]:
    parts, start = [], 0
    for block, size in blocks.items():
        parts.append(Part(f"{parent}.{block}.{kind}", slice(start, start + size)))
        start += size
    return parts


def split(layout: Layout, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors by parameter name -> views by portable name. Also for what goes with parameters: gradients, averages."""
    return {
        part.name: parameters[name] if part.rows is None else parameters[name][part.rows]
        for name, parts in layout.items()
        for part in parts
    }


def merge(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: tensors by portable name -> by parameter name."""
    return {
        name: weights[parts[0].name] if parts[0].rows is None else torch.cat([weights[part.name] for part in parts])
        for name, parts in layout.items()
    }


def to_portable(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model` by portable name: detached views that share its memory."""
    return split(portable_layout(model), {name: parameter.detach() for name, parameter in model.named_parameters()})


def load_portable(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into `model`; BundleError as `check_portable`, then nothing is copied."""
    check_portable(model, weights)
    for name, tensor in to_portable(model).items():
        tensor.copy_(weights[name])


def check_portable(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """BundleError naming every missing, unexpected or mis-shaped tensor of `weights`. `model` may be on the meta device."""
    wanted = to_portable(model)
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, the model needs {tuple(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    problems = [
        *_listed("missing", wanted.keys() - weights.keys()),
        *_listed("unexpected", weights.keys() - wanted.keys()),
        *_listed("of another shape", shapes),
    ]
    if problems:
        raise BundleError(f"the weights do not fit the model: {'; '.join(problems)}; take weights of this configuration")


def _listed(problem: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return [f"{problem}: {', '.join(found[:8])}{more}"] if found else []

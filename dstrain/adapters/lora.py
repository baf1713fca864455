"""Put adapters into a built model, and take them into its weights for good.

`inject` replaces parts of a model that was made with separate projections; `merged` does to weights on disk what the adapted
parts do in a forward pass. Paths are those of portable weights: `decoder.layers.3.cross_attention.q_proj`, without the name of
the block of projections in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.parts import LoraEmbedding, LoraLinear, LoraProjection, LowRank, effective_matrix, row_lengths
from dstrain.errors import BundleError, RecipeError
from dstrain.nn.embedding import Projection, TokenEmbedding
from dstrain.nn.linear import FusedLinear, Linear, SeparateLinear
from dstrain.seeding import derive_seed

Part = Linear | TokenEmbedding | Projection
A, B, MAGNITUDE = ".lora_a", ".lora_b", ".lora_magnitude"
"""Ends of the names of an adapter's tensors; what stands before them is the path of the part."""


class AdapterTarget(NamedTuple):
    """A part that may be adapted. path: its portable path; owner, name: where the model holds it. Shared parts have several."""

    path: str
    owner: nn.Module
    name: str
    part: Part


def adapter_targets(model: nn.Module) -> list[AdapterTarget]:
    """All parts of a model that may be adapted, in the order of its parameters."""
    found = []
    for full_path, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, FusedLinear):
            raise ValueError(f"{full_path} is fused; build the model with projections='separate' to adapt it")
        if isinstance(part, Linear | TokenEmbedding | Projection):
            parent, _, name = full_path.rpartition(".")
            owner = model.get_submodule(parent)
            parent = parent.rpartition(".")[0] if isinstance(owner, SeparateLinear) else parent
            found.append(AdapterTarget(f"{parent}.{name}".removeprefix("."), owner, name, part))
    return found


def inject(model: nn.Module, config: LoraConfig, *, seed: int) -> None:
    """Adapt the targets of `config` in place; the model computes what it did before, bit for bit.

    model: holds the base's weights. seed: decides the adapters' initial values, with their paths. RecipeError where a target
    matches nothing or a setting would change nothing in this model.
    """
    everything = adapter_targets(model)
    first = {target.part.weight: target.path for target in reversed(everything)}
    adapters = {
        weight: _fresh(weight, config, derive_seed(seed, f"adapter {first[weight]}"), table=_is_table(everything, weight))
        for weight in dict.fromkeys(target.part.weight for target in select(everything, config.targets))
    }
    replaced: dict[nn.Module, nn.Module] = {}
    for target in everything:
        if target.part not in replaced:
            replaced[target.part] = _adapted(target.part, adapters, config)
        setattr(target.owner, target.name, replaced[target.part])
    if config.dropout and not any(isinstance(part, LoraLinear) for part in replaced.values()):
        raise RecipeError(
            f"adapter.dropout = {config.dropout} does nothing: it acts on adapters of linear maps, and no target is one; set 0"
        )


def select(everything: Sequence[AdapterTarget], targets: Sequence[str]) -> list[AdapterTarget]:
    """The places that the targets name, in order. RecipeError names each target that matches none, and what there is."""
    unmatched = [pattern for pattern in targets if not any(_matches(pattern, target.path) for target in everything)]
    if unmatched:
        names = dict.fromkeys(target.path.rpartition(".")[2] for target in everything)
        raise RecipeError(
            f"adapter.targets: {', '.join(map(repr, unmatched))} matches no part of the model; its parts are called "
            f"{', '.join(names)}, one of them in full {everything[len(everything) // 2].path}"
        )
    return [target for target in everything if any(_matches(pattern, target.path) for pattern in targets)]


def _matches(pattern: str, path: str) -> bool:
    return pattern in (path, path.rpartition(".")[2]) or fnmatchcase(path, pattern)


def _is_table(everything: Sequence[AdapterTarget], weight: nn.Parameter) -> bool:
    return any(isinstance(target.part, TokenEmbedding) and target.part.weight is weight for target in everything)


def _fresh(weight: nn.Parameter, config: LoraConfig, seed: int, *, table: bool) -> LowRank:
    """B at zero; A as torch initializes a linear map (Kaiming-uniform, a = sqrt 5), for a token table from N(0, 1)."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.empty(config.rank, columns)
    if table:
        a.normal_(generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return LowRank(
        nn.Parameter(a.to(weight)),
        nn.Parameter(weight.new_zeros(rows, config.rank)),
        nn.Parameter(row_lengths(weight)) if config.dora else None,
    )


def _adapted(part: Part, adapters: Mapping[nn.Parameter, LowRank], config: LoraConfig) -> nn.Module:
    """The part with its adapter, or as it is where it has none."""
    mine = adapters.get(part.weight)
    match part:
        case Projection():
            back = None if part.back is None else adapters.get(part.back)
            return LoraProjection(part, weight=mine, back=back, scale=config.scale) if mine or back else part
        case TokenEmbedding():
            return LoraEmbedding(part, mine, scale=config.scale) if mine else part
        case Linear():
            return LoraLinear(part, mine, scale=config.scale, dropout=config.dropout) if mine else part


def merged(name: str, tensor: Tensor, adapter: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    """The base's tensor of that portable name as the adapter leaves it: a matrix with its change, a trained bias in its place.

    BundleError where the adapter's tensors do not have the shapes that the base asks for.
    """
    path = name.removesuffix(".weight")
    wanted: dict[str, tuple[int, ...]] = {}
    if name.endswith(".weight") and f"{path}{A}" in adapter:
        rows, columns = tensor.shape
        wanted = {f"{path}{A}": (config.rank, columns), f"{path}{B}": (rows, config.rank)}
        wanted |= {f"{path}{MAGNITUDE}": (rows,)} if config.dora else {}
    elif name in adapter:
        wanted = {name: tuple(tensor.shape)}
    for part, shape in wanted.items():
        if part not in adapter or tuple(adapter[part].shape) != shape:
            found = tuple(adapter[part].shape) if part in adapter else "missing"
            raise BundleError(f"the adapter does not fit its base: {part} is {found}, the base needs {shape}")
    if name in adapter:
        return adapter[name]
    if not wanted:
        return tensor
    low_rank = LowRank(adapter[f"{path}{A}"], adapter[f"{path}{B}"], adapter.get(f"{path}{MAGNITUDE}"))
    return effective_matrix(tensor.float(), low_rank, config.scale)


def strangers(adapter: Iterable[str], base: Iterable[str]) -> Iterator[str]:
    """The names of an adapter's tensors that belong to none of the base's, given by name."""
    known = set(base)
    for name in adapter:
        path, _, kind = name.rpartition(".")
        if name not in known and not (kind.startswith("lora_") and f"{path}.weight" in known):
            yield name

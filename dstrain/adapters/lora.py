"""Put adapters into a built model, and merge them into its weights.

`inject` replaces modules of a model that was made with separate projections, and may be on the meta device; `merged` applies
to weights on disk the change that the adapted modules make in a forward pass. Paths are those of canonical names:
`decoder.layers.3.cross_attention.q_proj`, without the name of the block of projections in between.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.parts import LoraEmbedding, LoraLinear, LoraProjection, LowRank, effective_matrix, row_lengths
from dstrain.errors import BundleError, RecipeError
from dstrain.nn.embedding import Projection, TokenEmbedding
from dstrain.nn.linear import FusedLinear, Linear, SeparateLinear
from dstrain.parallel.tensor import ParameterShard
from dstrain.protocols import WeightSource
from dstrain.seeding import derive_seed

Adaptable = Linear | TokenEmbedding | Projection
A, B, MAGNITUDE = ".lora_a", ".lora_b", ".lora_magnitude"
"""Ends of the names of an adapter's tensors; before them is the path of the module."""


class AdapterTarget(NamedTuple):
    """A module that may be adapted; a shared one has several targets. path: canonical; owner, name: parent and attribute."""

    path: str
    owner: nn.Module
    name: str
    module: Adaptable


def adapter_targets(model: nn.Module) -> list[AdapterTarget]:
    """All modules of a model that may be adapted, in the order of its parameters."""
    targets = []
    for full_path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FusedLinear):
            raise ValueError(f"{full_path} is fused; build the model with projections='separate' to adapt it")
        if isinstance(module, Linear | TokenEmbedding | Projection):
            parent, _, name = full_path.rpartition(".")
            owner = model.get_submodule(parent)
            parent = parent.rpartition(".")[0] if isinstance(owner, SeparateLinear) else parent
            targets.append(AdapterTarget(f"{parent}.{name}".removeprefix("."), owner, name, module))
    return targets


def inject(model: nn.Module, config: LoraConfig, base: WeightSource, *, seed: int) -> WeightSource:
    """Adapt the targets of `config` in place; returns the weights of the adapted model: those of `base` and a fresh adapter.

    With them the model equals the base, bit for bit; until they are loaded, the adapter has no values. seed: decides
    the adapter's initial values, with their paths. RecipeError if a target matches nothing or a setting would change nothing in
    this model.
    """
    targets = adapter_targets(model)
    path_of = {target.module.weight: target.path for target in reversed(targets)}  # of a tied matrix, the first
    adapters = {
        weight: _empty(weight, config)
        for weight in dict.fromkeys(target.module.weight for target in select(targets, config.targets))
    }
    replaced: dict[nn.Module, nn.Module] = {}
    # Children come first, as an adapted projection takes over its base's output_proj.
    for target in reversed(targets):
        if target.module not in replaced:
            replaced[target.module] = _adapted(target.module, adapters, config)
        setattr(target.owner, target.name, replaced[target.module])
    if config.dropout and not any(isinstance(module, LoraLinear) for module in replaced.values()):
        raise RecipeError(
            f"adapter.dropout = {config.dropout} does nothing: it acts on adapters of linear maps, and no target is one; set 0"
        )
    shards = {target.module.weight: target.module.shards().get("weight") for target in targets}
    shapes = {
        f"{path_of[weight]}{end}": shape
        for weight in adapters
        for end, shape in _adapter_shapes(_whole_shape(weight, shards[weight]), config).items()
    }
    return FreshAdapter(base, shapes, seed)


def select(targets: Sequence[AdapterTarget], patterns: Sequence[str]) -> list[AdapterTarget]:
    """The targets that the patterns name, in order. RecipeError lists the patterns without a match, and the names that exist."""
    unmatched = [pattern for pattern in patterns if not any(_matches(pattern, target.path) for target in targets)]
    if unmatched:
        names = dict.fromkeys(target.path.rpartition(".")[2] for target in targets)
        raise RecipeError(
            f"adapter.targets: {', '.join(map(repr, unmatched))} matches no module of the model; its modules are called "
            f"{', '.join(names)}, one of them in full {targets[len(targets) // 2].path}"
        )
    return [target for target in targets if any(_matches(pattern, target.path) for pattern in patterns)]


def target_names(adapted: Collection[str], weights: Iterable[str]) -> list[str]:
    """Targets of an adapter of these modules, given by path: last names if they name no other module, else whole paths.

    weights: names of all tensors of the base.
    """
    names = {path.rpartition(".")[2] for path in adapted}
    paths = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    return sorted(names if {path for path in paths if path.rpartition(".")[2] in names} == set(adapted) else adapted)


def is_token_table(path: str) -> bool:
    """Whether the module of that path looks tokens up."""
    return path.endswith((".tokens", ".table"))


def _matches(pattern: str, path: str) -> bool:
    return pattern in (path, path.rpartition(".")[2]) or fnmatchcase(path, pattern)


def _whole_shape(weight: nn.Parameter, shard: ParameterShard | None) -> tuple[int, int]:
    """Of a matrix of which this rank may hold a shard."""
    rows, columns = weight.shape
    if shard is None:
        return rows, columns
    return (shard.size, columns) if shard.dim == 0 else (rows, shard.size)


def _adapter_shapes(shape: tuple[int, int], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The adapter's tensors of a matrix of that shape, by the ends of their names."""
    rows, columns = shape
    return {A: (config.rank, columns), B: (rows, config.rank)} | ({MAGNITUDE: (rows,)} if config.dora else {})


def _empty(weight: nn.Parameter, config: LoraConfig) -> LowRank:
    """An adapter without values, on the device of the matrix that it adapts."""
    shapes = _adapter_shapes((weight.shape[0], weight.shape[1]), config)
    tensors = {end: nn.Parameter(weight.new_empty(shape)) for end, shape in shapes.items()}
    return LowRank(tensors[A], tensors[B], tensors.get(MAGNITUDE))


@dataclass(frozen=True)
class FreshAdapter:
    """A base and the initial values of an adapter over it, as a `WeightSource`. shapes: of the adapter's tensors."""

    base: WeightSource
    shapes: Mapping[str, tuple[int, ...]]
    seed: int

    def names(self) -> Collection[str]:
        """Of all tensors."""
        return {*self.base.names(), *self.shapes}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.shapes[name] if name in self.shapes else self.base.shape(name)

    def read(self, name: str) -> Tensor:
        """B at zero; A as torch initializes a linear map (Kaiming-uniform, a = sqrt 5), for a token table from N(0, 1)."""
        if name not in self.shapes:
            return self.base.read(name)
        path, _, kind = name.rpartition(".")
        if f".{kind}" == MAGNITUDE:
            return row_lengths(self.base.read(f"{path}.weight"))
        tensor = torch.zeros(self.shapes[name], dtype=torch.float32, device="cpu")
        generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, f"adapter {path}"))
        if f".{kind}" == A and is_token_table(path):
            tensor.normal_(generator=generator)
        elif f".{kind}" == A:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        return tensor


def _adapted(module: Adaptable, adapters: Mapping[nn.Parameter, LowRank], config: LoraConfig) -> nn.Module:
    """The module with its adapter, or unchanged if it has none."""
    adapter = adapters.get(module.weight)
    match module:
        case Projection():
            back = None if module.back is None else adapters.get(module.back)
            return LoraProjection(module, weight=adapter, back=back, scale=config.scale) if adapter or back else module
        case TokenEmbedding():
            return LoraEmbedding(module, adapter, scale=config.scale) if adapter else module
        case Linear():
            return LoraLinear(module, adapter, scale=config.scale, dropout=config.dropout) if adapter else module


def merged(name: str, tensor: Tensor, adapter: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    """The base's tensor of that canonical name with the adapter: a matrix plus its low-rank change, or a trained bias instead.

    BundleError if the adapter's tensors do not have the shapes that the base requires.
    """
    path = name.removesuffix(".weight")
    required: dict[str, tuple[int, ...]] = {}
    if name.endswith(".weight") and f"{path}{A}" in adapter:
        shapes = _adapter_shapes((tensor.shape[0], tensor.shape[1]), config)
        required = {f"{path}{end}": shape for end, shape in shapes.items()}
    elif name in adapter:
        required = {name: tuple(tensor.shape)}
    for key, shape in required.items():
        if key not in adapter or tuple(adapter[key].shape) != shape:
            actual = tuple(adapter[key].shape) if key in adapter else "missing"
            raise BundleError(f"the adapter does not fit its base: {key} is {actual}, the base needs {shape}")
    if name in adapter:
        return adapter[name]
    if not required:
        return tensor
    low_rank = LowRank(adapter[f"{path}{A}"], adapter[f"{path}{B}"], adapter.get(f"{path}{MAGNITUDE}"))
    return effective_matrix(tensor.float(), low_rank, config.scale)


def unmatched_keys(adapter: Iterable[str], base: Iterable[str]) -> Iterator[str]:
    """The names of an adapter's tensors that belong to none of the base's, given by name."""
    known = set(base)
    for name in adapter:
        path, _, kind = name.rpartition(".")
        if name not in known and not (kind.startswith("lora_") and f"{path}.weight" in known):
            yield name

"""Weights by canonical names, read one tensor at a time.

Canonical names do not depend on execution choices: fused projections are split into their blocks (q_proj, k_proj, v_proj), and
tied matrices appear once, under the first of their names. `encoder.layers.0.self_attention.qkv.weight` of a fused model is three
canonical tensors; `encoder.layers.0.self_attention.qkv.q_proj.weight` of a model with separate projections is
`encoder.layers.0.self_attention.q_proj.weight`. Bundles, adapters, checkpoints and foreign formats all use these names.

A model is built on the meta device, without memory, and its parameters are then filled from a `WeightSource` one by one, so
that filling needs the memory of the model (or of this rank's share of it) and of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dstrain.errors import BundleError
from dstrain.nn.linear import FusedLinear, SeparateLinear
from dstrain.parallel.group import Group
from dstrain.parallel.tensor import ParameterShard, Sharded, even_shard
from dstrain.protocols import WeightSource


@dataclass(frozen=True)
class TensorSource:
    """Tensors that are in memory already."""

    tensors: Mapping[str, Tensor]

    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self.tensors[name]


@dataclass(frozen=True)
class TensorSlice:
    """A canonical tensor, or this rank's `shard` of it, as the `rows` of a parameter, in the first dimension; all if None."""

    name: str
    rows: slice | None
    shard: ParameterShard | None = None


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter of a model is made of canonical tensors.

    shape: of the parameter, under tensor parallelism of this rank's part. slices: in row order.
    """

    shape: torch.Size
    slices: tuple[TensorSlice, ...]

    def local_shape_of(self, part: TensorSlice) -> tuple[int, ...]:
        """Of what this parameter holds of a canonical tensor."""
        return tuple(self.shape) if part.rows is None else (part.rows.stop - part.rows.start, *self.shape[1:])

    def shape_of(self, part: TensorSlice) -> tuple[int, ...]:
        """Of a canonical tensor in this parameter."""
        shape = list(self.local_shape_of(part))
        if part.shard is not None:
            shape[part.shard.dim] = part.shard.size
        return tuple(shape)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return sum(math.prod(self.shape_of(part)) for part in self.slices)

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks of a tensor group hold different parts of it."""
        return any(part.shard is not None for part in self.slices)

    def gather(self, value: Tensor, tensor: Group) -> dict[str, Tensor]:
        """The whole canonical tensors of a parameter with this value, on every rank of the tensor group. Collective."""
        whole = {}
        for part in self.slices:
            own = value if part.rows is None else value[part.rows]
            if part.shard is not None:
                own = tensor.gather_rows(own.transpose(0, part.shard.dim).contiguous()).transpose(0, part.shard.dim)
            whole[part.name] = own
        return whole

    def read(self, source: WeightSource, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The parameter in new memory; in the dtype of the source if `dtype` is None."""
        value: Tensor | None = None
        for part in self.slices:
            tensor = source.read(part.name)
            if part.shard is not None:
                tensor = tensor.narrow(part.shard.dim, part.shard.start, part.shard.stop - part.shard.start)
            if value is None:
                value = torch.empty(self.shape, dtype=dtype or tensor.dtype, device=device)
            (value if part.rows is None else value[part.rows]).copy_(tensor)
            del tensor  # freed before the next one is read
        assert value is not None
        return value


Layouts = dict[str, ParameterLayout]
"""By the name of the parameter, as `named_parameters` gives it."""


def parameter_layouts(model: nn.Module) -> Layouts:
    """The layout of every parameter. Reads no values; parameters may be on the meta device, but not partitioned by ZeRO-3."""
    fused: dict[str, tuple[TensorSlice, ...]] = {}
    shards: dict[str, ParameterShard] = {}
    containers = []
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if isinstance(module, Sharded):
            shards |= {f"{path}.{name}".removeprefix("."): shard for name, shard in module.shards().items()}
        if isinstance(module, SeparateLinear):
            containers.append((f"{path}.", f"{parent}."))
        elif isinstance(module, FusedLinear):
            for kind, _ in module.named_parameters():
                fused[f"{path}.{kind}"] = _blocks(module, parent, kind)
    layouts: Layouts = {}
    for name, parameter in model.named_parameters():
        canonical = name
        for prefix, short in containers:
            if name.startswith(prefix):
                canonical = short + name.removeprefix(prefix)
        layouts[name] = ParameterLayout(parameter.shape, fused.get(name, (TensorSlice(canonical, None, shards.get(name)),)))
    return layouts


def _blocks(module: FusedLinear, parent: str, kind: str) -> tuple[TensorSlice, ...]:
    slices, start = [], 0
    for block, size in module.blocks.items():
        shard = None if module.outputs is None else even_shard(0, size, module.outputs)
        slices.append(TensorSlice(f"{parent}.{block}.{kind}", slice(start, start + size), shard))
        start += size
    return tuple(slices)


def canonical_shapes(layouts: Layouts) -> dict[str, tuple[int, ...]]:
    """The shape of every whole canonical tensor."""
    return {part.name: layout.shape_of(part) for layout in layouts.values() for part in layout.slices}


def split_parameters(layouts: Layouts, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name -> views by canonical name. Also for gradients, moments and averages of parameters.

    Under tensor parallelism both hold this rank's parts.
    """
    return {
        part.name: parameters[name] if part.rows is None else parameters[name][part.rows]
        for name, layout in layouts.items()
        for part in layout.slices
    }


def to_canonical(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model` by canonical name: detached views that share its memory."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return split_parameters(parameter_layouts(model), parameters)


@torch.no_grad()
def load_canonical(model: nn.Module, source: WeightSource, *, device: torch.device | str = "cpu") -> None:
    """Fill every parameter of `model` from `source`, one at a time; BundleError as `check_canonical`, then nothing is changed.

    A parameter on the meta device gets memory on `device` in the dtype of the source; others keep their memory and dtype.
    """
    layouts = parameter_layouts(model)
    check_canonical(layouts, source)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            materialize_parameter(parameter, layouts[name].read(source, device=device))
        else:
            parameter.copy_(layouts[name].read(source, device=parameter.device, dtype=parameter.dtype))


@torch.no_grad()
def share_canonical(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let the parameters of `model`, which is on the meta device and of separate projections, be these tensors, without a copy.

    BundleError as `check_canonical`.
    """
    layouts = parameter_layouts(model)
    check_canonical(layouts, TensorSource(tensors))
    for name, parameter in model.named_parameters():
        (part,) = layouts[name].slices
        materialize_parameter(parameter, tensors[part.name])


def materialize_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a meta parameter its memory. The Parameter stays the same object, so ties and references to it hold."""
    filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, filled)  # type: ignore[no-untyped-call]


def check_canonical(layouts: Layouts, source: WeightSource) -> None:
    """BundleError naming every missing, unexpected or mis-shaped tensor of `source`."""
    required, names = canonical_shapes(layouts), set(source.names())
    shapes = [
        f"{name} is {source.shape(name)}, the model needs {required[name]}"
        for name in required.keys() & names
        if source.shape(name) != required[name]
    ]
    problems = [
        *_listed("missing", required.keys() - names),
        *_listed("unexpected", names - required.keys()),
        *_listed("of another shape", shapes),
    ]
    if problems:
        raise BundleError(f"the weights do not fit the model: {'; '.join(problems)}; take weights of this configuration")


def _listed(problem: str, items: Iterable[str]) -> list[str]:
    names = sorted(items)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return [f"{problem}: {', '.join(names[:8])}{more}"] if names else []

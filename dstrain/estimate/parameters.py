"""The numbers of a model's parameters on one rank, counted on the meta device: no formula has to follow the factory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from dstrain.adapters.config import AdapterConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject
from dstrain.engine.construction import size_of
from dstrain.engine.ds_config import ModelSize
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, to_canonical
from dstrain.nn.stack import LayerStack
from dstrain.parallel.group import Group


class ParameterSize(NamedTuple):
    """elements: on this rank. is_matrix: whether it has two dimensions or more. uses: modules' calls that read it in a forward
    pass. in_layer: whether a layer of a stack has it."""

    elements: int
    is_matrix: bool
    is_trained: bool
    uses: int
    in_layer: bool


@dataclass(frozen=True)
class ParameterSizes:
    """Of the parameters of a model on the first rank of a tensor group, which has the most. largest_layer: as ZeRO-3 gathers."""

    each: tuple[ParameterSize, ...]
    largest_layer: int

    @classmethod
    def of(cls, model: nn.Module) -> ParameterSizes:
        """Those of a built model, tied ones once; not partitioned by ZeRO-3."""
        repeats: dict[nn.Module, int] = {}
        for stack in (module for module in model.modules() if isinstance(module, LayerStack)):
            for index, layer in enumerate(stack.layers):
                repeats |= dict.fromkeys(layer.modules(), stack.schedule.count(index))
        uses: Counter[nn.Parameter] = Counter()
        for _, module in model.named_modules(remove_duplicate=False):
            uses.update(dict.fromkeys(module.parameters(recurse=False), repeats.get(module, 1)))
        in_layers = {each for module in repeats for each in module.parameters(recurse=False)}
        each = [
            ParameterSize(each.numel(), each.ndim > 1, each.requires_grad, uses[each], each in in_layers)
            for each in model.parameters()
        ]
        return cls(tuple(each), size_of(model).largest_layer)

    @property
    def total(self) -> int:
        """Elements of all."""
        return sum(each.elements for each in self.each)

    @property
    def trained(self) -> int:
        """Elements of those that the optimizer updates."""
        return sum(each.elements for each in self.each if each.is_trained)

    @property
    def model_size(self) -> ModelSize:
        """What the limits of a DeepSpeed file follow."""
        return ModelSize(self.total, self.largest_layer, self.trained)


@cache
def count_parameters(
    model: ModelConfig, vocabulary: VocabularySizes, *, tensor: int = 1, adapter: AdapterConfig | None = None
) -> ParameterSizes:
    """Of a model over `tensor` ranks. adapter: beside it, with all else frozen. Raises RecipeError as building the model does."""
    group = Group(0, tensor, None, torch.device("cpu"))
    built = build_model(model, vocabulary, projections="separate" if adapter else "fused", seed=None, tensor=group)
    if adapter is not None:
        whole = build_model(model, vocabulary, seed=None)
        inject(built, adapter, TensorSource(to_canonical(whole)), seed=0)
        freeze(built, adapter)
    return ParameterSizes.of(built)

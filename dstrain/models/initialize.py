"""Initial weights: a table from canonical names to distributions.

A tensor's values depend only on the seed, its name and its shape, so they are the same for fused and separate projections and on
any number of ranks. The distributions are those of fairseq's transformer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dstrain.seeding import derive_seed

Fill = Callable[[Tensor, int, torch.Generator], None]
"""Fill a tensor in place; the second argument is the input size of the linear map that the tensor belongs to."""


def _ones(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    tensor.fill_(1.0)


def _zeros(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    tensor.zero_()


def _attention_input(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Xavier with gain 1/sqrt(2), as if q, k and v were one matrix."""
    nn.init.xavier_uniform_(tensor, gain=1 / math.sqrt(2), generator=generator)


def _attention_output(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(tensor, generator=generator)


def _linear(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Torch's default for weights and biases of linear maps."""
    bound = 1 / math.sqrt(fan_in)
    tensor.uniform_(-bound, bound, generator=generator)


def _table(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Vectors of unit length on average; as a linear map it keeps the size of its input's features."""
    tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=generator)


def _widening(tensor: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Factorized embeddings, and logits computed through them, get the variance that they have without factors."""
    tensor.normal_(0.0, tensor.shape[0] ** -0.5, generator=generator)


INITIALIZERS: tuple[tuple[str, Fill], ...] = (
    (r"norm\.weight", _ones),
    (r"norm\.bias", _zeros),
    (r"_attention\.[qkv]_proj\.weight", _attention_input),
    (r"_attention\.out_proj\.weight", _attention_output),
    (r"_attention\.out_proj\.bias", _zeros),
    (r"tokens\.up_proj\.weight", _widening),
    (r"projection\.output_proj\.weight", _table),
    (r"_proj\.(weight|bias)", _linear),
    (r"(tokens|table|positions|projection)\.weight", _table),
)
"""The first pattern that the end of a name matches decides."""


@dataclass(frozen=True)
class InitialValues:
    """The initial weights of a model as a `WeightSource`; the embedding of padding starts at zero.

    shapes: of all its tensors by canonical name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    pad_id: int

    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.shapes[name]

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Draw one tensor. Device and dtype are explicit: the caller may build under another default."""
        fill = next(fill for pattern, fill in INITIALIZERS if re.search(rf"{pattern}$", name))
        tensor = torch.empty(self.shapes[name], dtype=torch.float32, device="cpu")
        generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, f"initialize {name}"))
        fan_in = self.shapes[re.sub("bias$", "weight", name)][-1]
        fill(tensor, fan_in, generator)
        if name.endswith(("tokens.weight", "table.weight")):
            tensor[self.pad_id] = 0.0
        return tensor

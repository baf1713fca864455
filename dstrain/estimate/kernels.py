"""What the kernels of a device keep for the backward pass, as far as devices differ.

torch's RMSNorm is one kernel on a GPU and a composition on a CPU, which keeps two float32 tensors. Attention of sentences on a
CPU keeps probabilities, and so does attention with dropout there; all but the native kernel keep copies of their heads, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dstrain.config_base import Precision
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.estimate.workload import ELEMENT_BYTES, DeviceKind
from dstrain.ops.kernels import TRAINING_ATTENTION

AttentionKernel = Literal["fused", "native", "batched_products", "composite"]
_KINDS: dict[str, AttentionKernel] = {"native": "native", "batched_products": "batched_products"}


@dataclass(frozen=True)
class Kernels:
    """Of a device, computing in a precision."""

    device: DeviceKind
    precision: Precision

    @property
    def mask_bytes(self) -> int:
        """Of an element of a dropout mask: the factor that an element is multiplied by."""
        return ELEMENT_BYTES[self.precision]

    @property
    def statistic_bytes(self) -> int:
        """Of a row's mean, or of its deviation, in a layer norm."""
        return 4 if self.device == "cuda" else ELEMENT_BYTES[self.precision]

    @property
    def has_fused_rms_norm(self) -> bool:
        """Whether it keeps the input and one number a row only."""
        return self.device == "cuda"

    def attention(self, *, queries: int, keys: int, grouped: bool, dropout: float) -> AttentionKernel:
        """The kernel that training chooses. queries, keys: lengths of the sequences."""
        if self.device == "cpu" and dropout > 0:
            return "composite"
        if grouped or dropout > 0:
            return "fused"
        device, dtype = torch.device(self.device), COMPUTE_DTYPES[self.precision]
        chosen = TRAINING_ATTENTION.choose(device, dtype, size=queries * keys)
        name = next(kernel.name for kernel in TRAINING_ATTENTION.kernels if kernel.function is chosen)
        return _KINDS.get(name, "fused")

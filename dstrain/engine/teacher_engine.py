"""Online teachers: bundles that compute beside the student and never learn.

A teacher is whole on every rank (`replicated`), or its parameters are partitioned over the ranks and gathered layer by layer
while it computes (`sharded`: DeepSpeed's ZeRO-3 without an optimizer; `offloaded`: the partitions wait in CPU memory). All three
give the same numbers, in fp32 to the last bit: DeepSpeed's own linear map, which adds biases in another way and would replace
torch's in the whole process, is off here and in the student's engine. Gathered layers are freed at once, so that a rank holds its
partition, the largest layer and the prefetched next one;
while a signal is open, also the projection. Weights are read from the bundle one tensor at a time; no rank holds a sharded
teacher whole, not even while it is loaded.

A teacher is in evaluation mode, without gradient, and outside the module that the training engine owns: no optimizer, no moving
average and no checkpoint knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dstrain.batch import Batch, Sequences
from dstrain.config_base import Precision
from dstrain.engine.config import Placement
from dstrain.engine.construction import COMPUTE_DTYPES, ParameterValues, fill, partition, size_of
from dstrain.engine.ds_config import resolve_reader_config
from dstrain.engine.ds_schema import OffloadSection
from dstrain.engine.launch import load_deepspeed, require_precision
from dstrain.model_output import ActivationCapture
from dstrain.parallel.mesh import Mesh
from dstrain.protocols import TeacherForced, WeightSource


@dataclass(frozen=True)
class VocabularyMap:
    """The teacher's id of each of the student's, one to one. source, target: (V,) int64 of the student's sizes."""

    source: Tensor
    target: Tensor

    def to(self, device: torch.device) -> VocabularyMap:
        """The same on `device`."""
        return VocabularyMap(self.source.to(device), self.target.to(device))


class TeacherModule(nn.Module):
    """A model with a teacher's one forward: a batch in, hidden states of its targets out, in the teacher's ids."""

    def __init__(self, model: TeacherForced, vocabulary: VocabularyMap | None) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary

    def forward(self, batch: Batch, capture: ActivationCapture | None) -> Tensor:
        """-> (n, D)"""
        batch = batch.for_kind(self.model.kind)
        source, target = batch.source, batch.target
        if self.vocabulary is not None:
            source = None if source is None else _renamed(source, self.vocabulary.source)
            target = _renamed(target, self.vocabulary.target)
        return self.model(source, target, capture).hidden.flatten(0, -2).index_select(0, batch.targets.index)


class TeacherEngine:
    """Implements `distillation.signals.Teacher`. model: an `nn.Module`, the same on every rank; the engine takes it over.

    weights: the source of its parameters if it is on the meta device, None if they have values already.

    Raises TrainingError if DeepSpeed cannot compute in `precision` on this device.
    """

    def __init__(
        self,
        model: TeacherForced,
        *,
        placement: Placement,
        precision: Precision,
        mesh: Mesh,
        weights: WeightSource | None = None,
        vocabulary: VocabularyMap | None = None,
    ) -> None:
        vocabulary = None if vocabulary is None else vocabulary.to(mesh.device)
        module = TeacherModule(model, vocabulary).eval().requires_grad_(False)
        self._projection = model.projection
        self._vocabulary = vocabulary
        self._forward: Any = module
        self._engine: Any = None
        self._gathered: Callable[[], AbstractContextManager[None]] = nullcontext
        values, dtype = ParameterValues(module, cast("nn.Module", model), weights), COMPUTE_DTYPES[precision]
        if placement == "replicated":
            fill(module, values, device=mesh.device, dtype=dtype)
            return
        deepspeed = load_deepspeed(mesh)
        require_precision(deepspeed, precision, mesh)
        offload = OffloadSection(device="cpu", pin_memory=mesh.device.type == "cuda") if placement == "offloaded" else None
        # All ranks share one copy, tensor ranks of the student too: a teacher has no tensor slices.
        config = resolve_reader_config(precision, ranks=mesh.world.size, size=size_of(module), offload=offload)
        partition(deepspeed, module, values, config, mpu=None, device=mesh.device, dtype=dtype)
        self._engine = deepspeed.initialize(model=module, config=config, dist_init_required=False)[0]
        self._engine.eval()
        self._forward = self._engine
        self._gathered = partial(deepspeed.zero.GatheredParameters, list(self._projection.parameters()))

    @contextmanager
    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (n, E) of the targets and the projection's weight (V, E), valid inside the context.

        capture: the activations to store. V counts the student's vocabulary; entries that only the teacher has are left out.
        Collective if sharded, at the start.
        """
        with torch.no_grad():
            hidden: Tensor = self._forward(batch, capture)
        with self._gathered():
            with torch.no_grad():
                features, weight = self._projection.operands(hidden)
                if self._vocabulary is not None:
                    weight = weight.index_select(0, self._vocabulary.target)
            yield features, weight

    def close(self) -> None:
        """Release DeepSpeed's engine, if there is one."""
        if self._engine is not None:
            self._engine.destroy()


def _renamed(sequences: Sequences, ids: Tensor) -> Sequences:
    """The same sequences in the teacher's vocabulary."""
    return replace(sequences, tokens=ids[sequences.tokens])

"""Teachers at work: bundles that compute beside the student and never learn.

A teacher stands whole on every rank (`replicated`), or its parameters are shared out over the ranks and gathered layer by layer
while it computes (`sharded`: DeepSpeed's ZeRO-3 without an optimizer; `offloaded`: the shares wait in CPU memory). All three give
the same numbers, in fp32 to the last bit: DeepSpeed's own linear layer, which adds biases in another order, stays off. Gathered
layers are freed at once, so that a rank holds its share, the largest layer and what is being fetched for the next.

A teacher is in evaluation mode, without gradient, and outside the module that the training engine owns: no optimizer, no moving
average and no checkpoint knows of it. Projection and loss happen inside the teacher's forward; `objectives/signals.py` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dstrain.batch import Batch, Sequences
from dstrain.config_base import Precision
from dstrain.engine.launch import load_deepspeed, require_precision
from dstrain.model_output import ActivationCapture
from dstrain.parallel.topology import World
from dstrain.protocols import TeacherForced

Look = Callable[[Tensor, Tensor], None]
Placement = Literal["replicated", "sharded", "offloaded"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class VocabularyMap:
    """The teacher's id of each of the student's, one to one. source, target: (V,) int64 of the student's sizes."""

    source: Tensor
    target: Tensor


class TeacherModule(nn.Module):
    """A model with the teacher's one forward: batch and rows in, features and projection shown to `look`, nothing out."""

    def __init__(self, model: TeacherForced, vocabulary: VocabularyMap | None) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary

    def forward(self, batch: Batch, rows: Tensor, look: Look, capture: ActivationCapture | None) -> Tensor:
        """`look(features, weight)` over the student's vocabulary: types that only the teacher has are left out."""
        source, target = batch.source, batch.target
        if self.vocabulary is not None:
            source = None if source is None else _renamed(source, self.vocabulary.source)
            target = _renamed(target, self.vocabulary.target)
        hidden = self.model(source, target, capture).hidden.flatten(0, 1).index_select(0, rows)

        def store(features: Tensor, weight: Tensor) -> Tensor:
            ids = None if self.vocabulary is None else self.vocabulary.target.to(weight.device)
            look(features, weight if ids is None else weight.index_select(0, ids))
            return features.new_zeros(())

        return self.model.reduce_projection(hidden, store)


class TeacherEngine:
    """Implements `objectives.signals.Teacher`. model: an `nn.Module`, the same on every rank; the engine takes it over.

    Raises TrainingError where DeepSpeed cannot compute in `precision` on this device.
    """

    def __init__(
        self,
        model: TeacherForced,
        *,
        placement: Placement,
        precision: Precision,
        world: World,
        vocabulary: VocabularyMap | None = None,
    ) -> None:
        module = TeacherModule(model, vocabulary).eval().requires_grad_(False)
        self._forward: Any = module
        self._engine: Any = None
        if placement == "replicated":
            module.to(world.device, DTYPES[precision])
            return
        deepspeed = load_deepspeed(world)
        require_precision(deepspeed, precision, world)
        config = _zero3(precision, world, offloaded=placement == "offloaded")
        self._engine = deepspeed.initialize(model=module, config=config, dist_init_required=False)[0]
        self._engine.eval()
        self._forward = self._engine

    @torch.no_grad()
    def teach(self, batch: Batch, rows: Tensor, look: Look, capture: ActivationCapture | None = None) -> None:
        """Call `look` with the features (n, E) of the scored tokens and the projection's weight (V, E). Collective if sharded.

        capture: the activations to store.
        """
        self._forward(batch, rows, look, capture)

    def close(self) -> None:
        """Let go of DeepSpeed's engine, if there is one."""
        if self._engine is not None:
            self._engine.destroy()


def _renamed(sequences: Sequences, ids: Tensor) -> Sequences:
    """The same sequences in the teacher's vocabulary."""
    tokens = ids.to(sequences.tokens.device)[sequences.tokens]
    return Sequences(tokens, sequences.lengths, sequences.positions, sequences.segments)


def _zero3(precision: Precision, world: World, *, offloaded: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that is only read."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_prefetch_bucket_size": 5_000_000,
        "stage3_max_live_parameters": 50_000_000,
        "stage3_max_reuse_distance": 0,
        "memory_efficient_linear": False,
    }
    if offloaded:
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    return {
        "train_batch_size": world.world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},
    }

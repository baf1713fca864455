"""The inputs of an estimate: what is trained, on which machines, and how it is laid out over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dstrain.adapters.config import AdapterConfig
from dstrain.config_base import Checkpointing, ChunkTokens, Precision
from dstrain.engine.config import EngineConfig, Placement
from dstrain.engine.ds_config import ModelSize, resolve_ds_config
from dstrain.models.config import ModelConfig, VocabularySizes

LossKind = Literal["cross_entropy", "r_drop", "dense_distillation", "sparse_distillation"]
DeviceKind = Literal["cpu", "cuda"]
ELEMENT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of a number, by precision."""


@dataclass(frozen=True)
class TeacherModel:
    """A model that computes beside the student, without gradient."""

    model: ModelConfig
    vocabulary: VocabularySizes
    precision: Precision
    placement: Placement


@dataclass(frozen=True)
class Workload:
    """A training, whatever it runs on.

    chunk_tokens: positions whose logits exist at one time. tokens_per_step: target tokens. source_length, target_length: tokens
    of a usual sentence. longest_row: padded tokens that a micro-batch must hold. ema: whether there is a moving average.
    decay_groups: whether matrices and vectors are two groups of the optimizer.
    """

    model: ModelConfig
    vocabulary: VocabularySizes
    precision: Precision
    loss: LossKind
    chunk_tokens: ChunkTokens
    tokens_per_step: int
    source_length: int
    target_length: int
    longest_row: int = 1
    adapter: AdapterConfig | None = None
    ema: bool = False
    decay_groups: bool = False
    teachers: tuple[TeacherModel, ...] = ()

    @property
    def element_bytes(self) -> int:
        """Of an activation and of a parameter that computes."""
        return ELEMENT_BYTES[self.precision]

    @property
    def passes(self) -> int:
        """Forward passes whose activations exist at one time."""
        return 2 if self.loss == "r_drop" else 1

    @property
    def row_length(self) -> int:
        """Padded tokens of a usual row, as `batching.max_tokens` counts them."""
        if self.model.kind == "decoder_only":
            return self.source_length + self.target_length - 1
        return max(self.source_length, self.target_length)


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches in a second. gemm: operations of large matrix products; the others: bytes, of links in one direction."""

    gemm: float
    memory: float
    intra_node: float
    inter_node: float


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs. gpu_memory: bytes of one."""

    nodes: int
    gpus_per_node: int
    gpu_memory: int
    rates: Rates

    @property
    def ranks(self) -> int:
        """GPUs in all; each is a rank."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Sharding:
    """A DeepSpeed file, resolved for a model.

    name: `engine.deepspeed`. gradient_bytes, reduction_bytes: of a gradient's element where it adds up, and on the network.
    bucket: elements of a reduction buffer. live, prefetch: elements of parameters that stage 3 gathers; reuse: it keeps those
    that are needed again within so many elements. persistent: elements up to which it keeps a parameter whole. all_reduce:
    whether stages 1 and 2 reduce by all-reduces of whole buckets.
    """

    name: str
    stage: int
    gradient_bytes: int
    reduction_bytes: int
    bucket: int
    overlap: bool
    live: int
    prefetch: int
    reuse: int
    persistent: int
    offload_optimizer: bool
    offload_parameters: bool
    all_reduce: bool

    @classmethod
    def of(cls, engine: EngineConfig, *, replicas: int, size: ModelSize) -> Sharding:
        """Raises RecipeError as `resolve_ds_config`."""
        config = resolve_ds_config(engine, replicas=replicas, size=size)
        zero, stage = config["zero_optimization"], config["zero_optimization"]["stage"]
        gradient = config.get("data_types", {}).get("grad_accum_dtype", engine.precision)
        overlap = zero.get("overlap_comm")
        return cls(
            name=engine.deepspeed,
            stage=stage,
            gradient_bytes=ELEMENT_BYTES[gradient],
            reduction_bytes=ELEMENT_BYTES[config.get("communication_data_type", engine.precision)],
            bucket=zero.get("reduce_bucket_size", 500_000_000) if stage > 0 else 0,
            overlap=stage == 3 if overlap is None else overlap,
            live=zero.get("stage3_max_live_parameters", 1_000_000_000),
            prefetch=zero.get("stage3_prefetch_bucket_size", 50_000_000),
            reuse=zero.get("stage3_max_reuse_distance", 1_000_000_000),
            persistent=zero.get("stage3_param_persistence_threshold", 100_000),
            offload_optimizer=_offloads(zero.get("offload_optimizer")),
            offload_parameters=_offloads(zero.get("offload_param")),
            all_reduce=zero.get("use_multi_rank_bucket_allreduce", True),
        )


def _offloads(section: Mapping[str, object] | None) -> bool:
    return section is not None and section["device"] != "none"


@dataclass(frozen=True)
class ParallelLayout:
    """How a workload is spread out.

    max_tokens: padded tokens of a micro-batch, which the ranks of a sequence group share. device: of the ranks. packed: whether
    sequences stand one after another, not one a row. tiles: parts of the tokens that a feed-forward network sees in turn.
    """

    ranks: int
    tensor: int
    sequence: int
    max_tokens: int
    checkpointing: Checkpointing
    sharding: Sharding
    device: DeviceKind = "cuda"
    packed: bool = True
    tiles: int = 1

    @property
    def replicas(self) -> int:
        """Ranks over which ZeRO partitions."""
        return self.ranks // self.tensor

    @property
    def data(self) -> int:
        """Ranks that read batches of their own."""
        return self.replicas // self.sequence


@dataclass(frozen=True)
class MicroBatch:
    """rows of source and target tokens each, on a rank before a sequence group shares them; source: 0 for a decoder-only model.

    source_tokens, target_tokens: of all rows, padding included; packed sequences on a GPU always are `max_tokens`.
    """

    rows: float
    source: int
    target: int
    source_tokens: float
    target_tokens: float

    @classmethod
    def of(cls, workload: Workload, layout: ParallelLayout) -> MicroBatch:
        """The largest of a step: `max_tokens` of usual sentences, fewer if a step has no more for each data rank."""
        rows = layout.max_tokens / workload.row_length
        rows = max(1.0, min(rows, workload.tokens_per_step / layout.data / workload.target_length))
        joint = workload.model.kind == "decoder_only"
        source, target = (0, workload.row_length) if joint else (workload.source_length, workload.target_length)
        if layout.packed and layout.device == "cuda":
            return cls(rows, source, target, 0 if joint else layout.max_tokens, layout.max_tokens)
        return cls(rows, source, target, rows * source, rows * target)

    def scored(self, workload: Workload) -> float:
        """Target tokens that the loss counts."""
        return self.rows * workload.target_length


def count_micro_batches(workload: Workload, layout: ParallelLayout) -> int:
    """Of a step, on each data rank."""
    scored = MicroBatch.of(workload, layout).scored(workload)
    return max(1, math.ceil(workload.tokens_per_step / layout.data / scored - 1e-9))

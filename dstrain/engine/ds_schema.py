"""Every key of a DeepSpeed JSON file that dstrain accepts; each is used.

DeepSpeed itself drops unknown keys of most sections silently and fills "auto" with its own defaults, so nothing reaches it
that has not passed here. The keys that decide the result (optimizer, schedule, batch sizes, clipping, precision) belong to the
recipe: they are refused with the recipe's key for them, or may be "auto". Limits that are "auto" follow the model's size
(ds_config.py). Other defaults shown are DeepSpeed's; only what a file says is passed on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from dstrain.config_base import Config

Auto = Literal["auto"]

BELONGS_ELSEWHERE = {
    "optimizer": "set the recipe's optimizer section",
    "scheduler": "set the recipe's schedule section",
    "train_batch_size": "set batching.tokens_per_step in the recipe",
    "torch_autocast": "set engine.precision in the recipe",
    "amp": "set engine.precision in the recipe",
    "checkpoint": "set the recipe's checkpoint section",
    "tensorboard": "set reporting.tensorboard in the recipe",
    "wandb": "set reporting.wandb in the recipe",
    "csv_monitor": "events.jsonl in the run directory holds every figure",
    "comet": "events.jsonl in the run directory holds every figure",
    "steps_per_print": "set reporting.log_every in the recipe",
    "zero_optimization.memory_efficient_linear": "the linear maps of models keep no gathered weight anyway; leave it out",
    "gradient_allreduce_op": "dstrain scales the loss itself; leave it out",
    "prescale_gradients": "dstrain scales the loss itself; leave it out",
    "gradient_predivide_factor": "dstrain scales the loss itself; leave it out",
    "managed_gradient_accumulation": "dstrain accumulates by itself; leave it out",
    "activation_checkpointing": "set engine.activation_checkpointing in the recipe",
    "tensor_parallel": "set engine.parallel.tensor in the recipe",
    "sequence_parallel_size": "set engine.parallel.sequence in the recipe",
    "aio": "offloading to NVMe is not supported; offload to cpu",
}
"""Known sections that dstrain does not take from the JSON, and where their facts live."""


class Bf16Section(Config):
    """bf16 parameters with fp32 masters."""

    enabled: bool | Auto = "auto"


class Fp16Section(Config):
    """fp16 parameters with fp32 masters and loss scaling; loss_scale 0 = dynamic, starting at 2**initial_scale_power."""

    enabled: bool | Auto = "auto"
    loss_scale: NonNegativeFloat = 0.0
    initial_scale_power: NonNegativeInt = 16
    loss_scale_window: PositiveInt = 1000
    hysteresis: PositiveInt = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: PositiveInt = 1


class OffloadSection(Config):
    """Keep optimizer states or parameters in CPU memory."""

    device: Literal["cpu", "none"]
    pin_memory: bool = True


class ZeroSection(Config):
    """The state that is partitioned over the ranks: 0 nothing, 1 optimizer states, 2 + gradients, 3 + parameters."""

    stage: Literal[0, 1, 2, 3]
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: PositiveInt | Auto = "auto"
    use_multi_rank_bucket_allreduce: bool = True
    allgather_bucket_size: PositiveInt = 500_000_000
    overlap_comm: bool | None = None
    offload_optimizer: OffloadSection | None = None
    offload_param: OffloadSection | None = None
    sub_group_size: PositiveInt | Auto = "auto"
    stage3_prefetch_bucket_size: NonNegativeInt | Auto = "auto"
    stage3_param_persistence_threshold: NonNegativeInt = 100_000
    stage3_model_persistence_threshold: NonNegativeInt = 2**63 - 1
    stage3_max_live_parameters: NonNegativeInt | Auto = "auto"
    stage3_max_reuse_distance: NonNegativeInt | Auto = "auto"
    stage3_module_granularity_threshold: NonNegativeInt = 0
    zero_hpz_partition_size: PositiveInt = 1


class DataTypesSection(Config):
    """In which type gradients are added up over micro-batches; by default fp32, or fp16 for fp16 parameters."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"]


class FlopsProfilerSection(Config):
    """DeepSpeed's profile of one step, printed or written to `output_file`."""

    enabled: bool = False
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None
    recompute_fwd_factor: NonNegativeFloat = 0.0


class CommsLoggerSection(Config):
    """DeepSpeed's log of collectives, and their summary when training ends."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    debug: bool = False
    prof_ops: tuple[str, ...] = ()


class DeepSpeedFile(Config):
    """A file in ds_configs/."""

    train_micro_batch_size_per_gpu: Annotated[int, Field(ge=1)] | Auto = "auto"
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] | Auto = "auto"
    gradient_clipping: NonNegativeFloat | Auto = "auto"
    bf16: Bf16Section = Field(default_factory=Bf16Section)
    fp16: Fp16Section = Field(default_factory=Fp16Section)
    zero_optimization: ZeroSection
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    data_types: DataTypesSection | None = None
    flops_profiler: FlopsProfilerSection = Field(default_factory=FlopsProfilerSection)
    comms_logger: CommsLoggerSection = Field(default_factory=CommsLoggerSection)
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False

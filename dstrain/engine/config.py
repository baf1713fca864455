"""Optimizer, schedule and precision: the part of the engine that decides the result.

How fast and how big (ZeRO stage, offload, buckets) stands in a DeepSpeed JSON file that `EngineConfig.deepspeed` names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dstrain.config_base import Config, Precision

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamConfig(Config):
    """Adam (`adam`: weight decay added to the gradient), AdamW (`adamw`: decoupled) or StableAdamW (`stable_adamw`).

    StableAdamW is AdamW that lowers a parameter's learning rate while its gradients outgrow their second moment, in place of
    engine.clip_norm; its authors take an eps of 1e-6. decay: which parameters decay: `matrices` spares biases, norms and all
    one-dimensional ones; `all` spares none.
    """

    kind: Literal["adam", "adamw", "stable_adamw"] = "adamw"
    learning_rate: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    decay: Literal["matrices", "all"] = "matrices"


OptimizerConfig = Annotated[AdamConfig, Field()]


class _WarmUp(Config):
    """warmup_steps: linear from `warmup_init` to the optimizer's learning rate."""

    warmup_steps: NonNegativeInt = 0
    warmup_init: NonNegativeFloat = 0.0


class InverseSqrtSchedule(_WarmUp):
    """After warm-up, learning_rate * sqrt(warmup_steps / step)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_steps: PositiveInt = 4000


class ConstantSchedule(_WarmUp):
    """After warm-up, the learning rate itself."""

    kind: Literal["constant"] = "constant"


class FallingSchedule(_WarmUp):
    """What schedules with an end share: after warm-up down to `final` at `total_steps`."""

    total_steps: PositiveInt
    final: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _falls(self) -> FallingSchedule:
        if self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} reaches total_steps = {self.total_steps}; raise total_steps")
        return self


class LinearSchedule(FallingSchedule):
    """After warm-up, straight down to `final` at `total_steps`."""

    kind: Literal["linear"] = "linear"


class CosineSchedule(FallingSchedule):
    """After warm-up, half a cosine down to `final` at `total_steps`."""

    kind: Literal["cosine"] = "cosine"


class PolynomialSchedule(FallingSchedule):
    """After warm-up, (remaining share)**power down to `final` at `total_steps`."""

    kind: Literal["polynomial"] = "polynomial"
    power: PositiveFloat = 1.0


class WsdSchedule(FallingSchedule):
    """Warm-up, stable, decay: the learning rate itself until `decay_steps` before `total_steps`, then straight to `final`."""

    kind: Literal["wsd"] = "wsd"
    decay_steps: PositiveInt

    @model_validator(mode="after")
    def _decays_after_warmup(self) -> WsdSchedule:
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and decay_steps = {self.decay_steps} exceed total_steps = {self.total_steps}"
            )
        return self


ScheduleConfig = Annotated[
    InverseSqrtSchedule | ConstantSchedule | LinearSchedule | CosineSchedule | PolynomialSchedule | WsdSchedule,
    Field(discriminator="kind"),
]


class EngineConfig(Config):
    """deepspeed: name of a file in ds_configs/ (`zero1`) or a path. clip_norm: 0 = no clipping."""

    deepspeed: str = "zero1"
    precision: Precision = "fp32"
    clip_norm: NonNegativeFloat = 0.0


class EmaConfig(Config):
    """An exponential moving average of the weights, updated after each step from `start_step` on; bundles hold it."""

    decay: float = Field(gt=0, lt=1)
    start_step: NonNegativeInt = 0

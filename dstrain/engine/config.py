"""Optimizer, schedule and precision: the settings of the engine that decide the result.

Speed and memory (ZeRO stage, offload, buckets) are set in a DeepSpeed JSON file that `EngineConfig.deepspeed` names.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dstrain.config_base import Checkpointing, Compiling, Config, Precision

Beta = Annotated[float, Field(ge=0, lt=1)]
SequenceLayout = Literal["auto", "packed", "padded"]
"""Of the sequences of a batch in training."""
Placement = Literal["replicated", "sharded", "offloaded"]
"""Of a teacher's parameters: whole on every rank, shared out over the ranks, or shared out in CPU memory."""


class AdamConfig(Config):
    """Adam (`adam`: weight decay added to the gradient), AdamW (`adamw`: decoupled) or StableAdamW (`stable_adamw`).

    StableAdamW is AdamW that lowers a parameter's learning rate while its gradients outgrow their second moment, in place of
    engine.clip_norm; its authors take an eps of 1e-6.
    """

    kind: Literal["adam", "adamw", "stable_adamw"] = Field(default="adamw", description="The algorithm.")
    learning_rate: PositiveFloat = Field(description="The peak of the schedule.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.98), description="Decay of the first and the second moment.")
    eps: PositiveFloat = Field(default=1e-8, description="Added to the root of the second moment.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Strength of weight decay.")
    decay: Literal["matrices", "all"] = Field(
        default="matrices", description="Parameters that decay; matrices = without biases, norms and other vectors."
    )


OptimizerConfig = Annotated[AdamConfig, Field()]


class _WarmUp(Config):
    """Linear warm-up to the optimizer's learning rate."""

    warmup_steps: NonNegativeInt = Field(default=0, description="Steps of the warm-up.")
    warmup_init: NonNegativeFloat = Field(default=0.0, description="Learning rate at its beginning.")


class InverseSqrtSchedule(_WarmUp):
    """After warm-up, learning_rate * sqrt(warmup_steps / step)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_steps: PositiveInt = Field(default=4000, description="Steps of the warm-up, which also set the speed of the decay.")


class ConstantSchedule(_WarmUp):
    """After warm-up, the learning rate itself."""

    kind: Literal["constant"] = "constant"


class FallingSchedule(_WarmUp):
    """Base of schedules that end."""

    total_steps: PositiveInt = Field(description="Step at which the schedule ends.")
    final: NonNegativeFloat = Field(default=0.0, description="Learning rate there.")

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
    power: PositiveFloat = Field(default=1.0, description="Power of the remaining share; 1 is linear.")


class WsdSchedule(FallingSchedule):
    """Warm-up, stable, decay: the learning rate itself until `decay_steps` before `total_steps`, then straight to `final`."""

    kind: Literal["wsd"] = "wsd"
    decay_steps: PositiveInt = Field(description="Steps of the decay, the last ones before total_steps.")

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


class ParallelConfig(Config):
    """Model parallelism."""

    tensor: PositiveInt = Field(
        default=1,
        description="Ranks that share one copy of the parameters, all on one node; divides heads and features, but not "
        "necessarily the vocabulary.",
    )
    sequence: PositiveInt = Field(default=1, description="Ranks that share the tokens of a batch, and in attention the heads.")


class KernelsConfig(Config):
    """The kernel of each op in training; auto = the one that `dstrain doctor` shows as chosen, which prints the others too.

    All compute the same up to rounding. One that cannot run on the device is refused before training starts.
    """

    training_attention: Literal["auto", "native", "batched_products", "scaled_dot_product_attention"] = Field(
        default="auto",
        description="Of attention without dropout of its probabilities, in rows. native: C++, compiled on this machine.",
    )
    dropout_attention: Literal["auto", "counted_masks", "scaled_dot_product_attention"] = Field(
        default="auto", description="Of attention with dropout of its probabilities, in rows."
    )
    matmul: Literal["auto", "torch", "native"] = Field(
        default="auto",
        description="Of products of matrices, forward and backward. native: C++, compiled on this machine; auto takes it "
        "for large ones in fp32 on processors of AMD.",
    )
    decoding_layers: Literal["auto", "native", "composed"] = Field(
        default="auto",
        description="Of the decoder's layers in the steps of generation, in validation and of an on-policy student. native: C++, "
        "compiled on this machine; it keeps a second copy of their weights.",
    )
    encoding_layers: Literal["auto", "native", "composed"] = Field(
        default="auto", description="Of the encoder's layers in generation; native keeps a second copy of their weights."
    )
    decoding_attention: Literal["auto", "decoding_products", "scaled_dot_product_attention"] = Field(
        default="auto", description="Of these steps, by composed layers."
    )
    fixed_linear: Literal["auto", "native", "transposed_linear", "packed_linear", "linear"] = Field(
        default="auto",
        description="Of linear maps in generation; all keep a second copy of weights, linear only of what projects the source.",
    )
    cache_moves: Literal["auto", "native", "indexed"] = Field(
        default="auto", description="Of cached keys and values whose rows continue others, in beam search on a CPU."
    )
    log_probs: Literal["auto", "native", "torch"] = Field(default="auto", description="Of a step's logits in generation.")
    continuations: Literal["auto", "native", "block_maxima"] = Field(
        default="auto", description="Of the best continuations of hypotheses in beam search."
    )
    extension: Literal["auto", "native", "indexed"] = Field(
        default="auto", description="Of hypotheses by their next token in beam search."
    )
    packed_attention: Literal["auto", "varlen", "padded_rows"] = Field(
        default="auto", description="Of attention of packed sequences without ALiBi; with dropout it is padded_rows."
    )
    packed_alibi_attention: Literal["auto", "flex", "padded_rows"] = Field(
        default="auto", description="Of attention of packed sequences with ALiBi; with dropout it is padded_rows."
    )
    norm: Literal["auto", "triton", "liger", "torch"] = Field(
        default="auto",
        description="Of LayerNorm and RMSNorm; triton makes the sum with the residual and its dropout in the same pass.",
    )
    dropout: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="Of dropout and of the sum with the residual; triton keeps no mask for the backward pass."
    )
    rotary: Literal["auto", "triton", "torch"] = Field(default="auto", description="Of rotary positions.")
    gate: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="Of the activation of gated feed-forward networks; triton keeps no product of it."
    )
    cross_entropy: Literal["auto", "triton", "liger", "torch"] = Field(
        default="auto",
        description="Of label-smoothed cross-entropy from logits; triton makes no pass more than it needs; liger waits for the "
        "GPU in each chunk, and does not share a vocabulary (parallel.tensor).",
    )
    r_drop: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="Of R-Drop, from the logits of both passes; triton makes no copies of them."
    )
    dense_distillation: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="Of divergences from a teacher's distribution over all vocabulary entries."
    )
    sparse_distillation: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="Of divergences from samples or from the most probable entries and a tail."
    )
    argmax: Literal["auto", "numpy", "torch"] = Field(default="auto", description="Of the most probable vocabulary entry.")

    @property
    def by_name(self) -> dict[str, str]:
        """Op -> kernel, of those that are not `auto`."""
        return {op: kernel for op, kernel in self if kernel != "auto"}


class EngineConfig(Config):
    """How the model is computed and distributed."""

    deepspeed: str = Field(default="zero1", description="Name of a file in ds_configs/, or a path to a DeepSpeed JSON file.")
    precision: Precision = Field(default="fp32", description="Precision of the model's computation; master weights are fp32.")
    clip_norm: NonNegativeFloat = Field(default=0.0, description="Largest L2 norm of the gradient; 0 = no clipping.")
    activation_checkpointing: Checkpointing = Field(
        default="none",
        description="What layers compute again in the backward pass: none; selective = all but products and attention; "
        "full = all; offload = all, from inputs that wait in CPU memory.",
    )
    layout: SequenceLayout = Field(
        default="auto",
        description="Sequences of a batch in training: packed, one after another; padded, one a row; auto = packed on a GPU, "
        "with parallel.sequence, and for blocks of documents that see themselves only (batching.packing).",
    )
    feed_forward_tiles: PositiveInt = Field(
        default=1,
        description="Parts of the tokens that a feed-forward network sees one after another, to save memory with long sequences; "
        "it runs again in the backward pass; 1 = all at once.",
    )
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="How many ranks share one model, or one batch.")
    kernels: KernelsConfig = Field(default=KernelsConfig(), description="Which kernel runs an op, if not the one of the table.")

    compile: Compiling = Field(
        default="none",
        description="What torch.compile makes faster in training: none; layers = all of a layer but its attention. The first two "
        "micro-batches then take minutes, a resume is equal within rounding, and layout: auto is packed.",
    )

    @model_validator(mode="after")
    def _compiles(self) -> EngineConfig:
        if self.compile == "none":
            return self
        if self.layout == "padded":
            raise ValueError("compile = layers needs one size a batch, but layout = padded has two; choose layout: auto")
        if self.activation_checkpointing != "none":  # the second computation may find another graph than the first
            raise ValueError(
                f"compile = layers does not work with activation_checkpointing = {self.activation_checkpointing}; choose "
                "activation_checkpointing: none, or compile: none"
            )
        if self.feed_forward_tiles > 1:
            raise ValueError(
                f"compile = layers makes one graph of what feed_forward_tiles = {self.feed_forward_tiles} cuts; choose "
                "feed_forward_tiles: 1, or compile: none"
            )
        for op, kernel in {"norm": "liger", "matmul": "native"}.items():
            if getattr(self.kernels, op) == kernel:
                raise ValueError(
                    f"compile = layers makes one graph, and kernels.{op} = {kernel} cannot be part of it; choose "
                    f"kernels.{op}: auto, or compile: none"
                )
        return self

    @model_validator(mode="after")
    def _kernels_take_slices(self) -> EngineConfig:
        if self.parallel.tensor > 1 and self.kernels.cross_entropy == "liger":
            raise ValueError(
                f"kernels.cross_entropy = liger needs the whole vocabulary on each rank, but parallel.tensor = "
                f"{self.parallel.tensor} shares it; choose kernels.cross_entropy: auto or triton"
            )
        return self

    @model_validator(mode="after")
    def _shares_packed_tokens(self) -> EngineConfig:
        if self.layout == "padded" and self.parallel.sequence > 1:
            raise ValueError(
                f"parallel.sequence = {self.parallel.sequence} shares packed tokens, but layout = padded; choose layout: auto"
            )
        return self


class EmaConfig(Config):
    """An exponential moving average of the weights, updated after each step; bundles hold it.

    Its decay rises with the number t of updates as (1 + t) / (10 + t), so that a short run's average is not its initial weights.
    """

    decay: float = Field(gt=0, lt=1, description="Largest share of the average that stays at an update.")
    start_step: NonNegativeInt = Field(default=0, description="Step of the first update.")

    def decay_after(self, updates: int) -> float:
        """The share that stays at update number `updates`, from 1 on; 0 before the first: the average is a copy."""
        return min(self.decay, (1 + updates) / (10 + updates)) if updates > 0 else 0.0

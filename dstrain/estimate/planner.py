"""An estimate of one layout, and the fastest layout that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from dstrain.config_base import Checkpointing
from dstrain.engine.config import EngineConfig, ParallelConfig
from dstrain.errors import RecipeError
from dstrain.estimate.activations import Activations, activations
from dstrain.estimate.flops import Flops, flops
from dstrain.estimate.loss import LossBytes, loss_bytes
from dstrain.estimate.parameters import ParameterSizes, count_parameters
from dstrain.estimate.states import States, states
from dstrain.estimate.step_time import StepTime, step_time
from dstrain.estimate.traffic import Transfer, traffic
from dstrain.estimate.workload import Cluster, ParallelLayout, Sharding, Workload, count_micro_batches
from dstrain.models.config import sequence_problems, tensor_problems

USABLE = 0.9
"""Share of a device's memory that an estimate may take: libraries, their workspaces and gaps between tensors need the rest."""
_BATCH_TOKENS = tuple(2**power for power in range(10, 18))
"""Sizes of micro-batches that are tried."""
_MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""Kinds of activation checkpointing that are tried."""
_FILES = ("zero1", "zero2", "zero3")
"""DeepSpeed files that are tried."""
_OFFLOADING = ("zero1_offload", "zero2_offload", "zero3_offload")
"""DeepSpeed files that are tried if nothing else fits. Times count neither the optimizer on the CPU nor what goes to and fro."""
_EVEN = 1.05
"""Layouts whose times differ by less are equally fast: the simplest of them is recommended."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of a rank."""

    states: States
    activations: Activations
    loss: LossBytes

    @property
    def temporary(self) -> float:
        """What comes and goes: the loss, then the layer at work in the backward pass."""
        return max(self.loss.peak, self.activations.recomputed + self.activations.backward)

    @property
    def total(self) -> float:
        """The highest of a step."""
        return self.states.total + self.activations.kept + self.temporary

    @property
    def host(self) -> float:
        """In CPU memory, of a GPU's rank."""
        return self.states.host + self.activations.host

    def fits(self, capacity: int) -> bool:
        """In the usable share of a device's memory."""
        return self.total <= USABLE * capacity


@dataclass(frozen=True)
class Estimate:
    """What a workload needs under a layout. time: None without a cluster, whose rates give it."""

    workload: Workload
    layout: ParallelLayout
    parameters: ParameterSizes
    memory: RankMemory
    traffic: tuple[Transfer, ...]
    flops: Flops
    time: StepTime | None

    @property
    def micro_batches(self) -> int:
        """Of a step, on each data rank."""
        return count_micro_batches(self.workload, self.layout)

    @property
    def tokens_per_second(self) -> float:
        """Target tokens of all ranks."""
        return self.workload.tokens_per_step / self.time.total if self.time else 0.0


def estimate_layout(
    workload: Workload, layout: ParallelLayout, *, parameters: ParameterSizes | None = None, cluster: Cluster | None = None
) -> Estimate:
    """Of one layout. parameters: of its tensor slice, None to count them."""
    sizes = parameters or _sizes(workload, layout.tensor)
    held, work, transfers = states(workload, layout, sizes), flops(workload, layout), traffic(workload, layout, sizes)
    memory = RankMemory(held, activations(workload, layout), loss_bytes(workload, layout))
    time = None
    if cluster is not None:
        time = step_time(workload, layout, cluster, work=work, held=held, transfers=transfers)
    return Estimate(workload, layout, sizes, memory, tuple(transfers), work, time)


def recommend(workload: Workload, engine: EngineConfig, cluster: Cluster) -> Estimate:
    """The fastest layout of the cluster that fits; of equally fast ones the simplest. engine: gives precision and clipping.

    Raises RecipeError if none fits.
    """
    fitting: list[Estimate] = []
    least = float("inf")
    for files in (_FILES, _OFFLOADING):
        for layout in [] if fitting else candidates(workload, engine, cluster, files):
            estimate = estimate_layout(workload, layout, cluster=cluster)
            least = min(least, estimate.memory.total)
            if estimate.memory.fits(cluster.gpu_memory):
                fitting.append(estimate)
    if not fitting:
        raise RecipeError(
            f"no layout on {cluster.ranks} GPUs fits: the smallest needs {least / 2**30:.1f} GiB of each GPU, of whose "
            f"{cluster.gpu_memory / 2**30:g} GiB {USABLE:.0%} are usable; take more GPUs, more memory, or a smaller model"
        )
    fastest = min(_total(estimate) for estimate in fitting)
    return min((each for each in fitting if _total(each) <= _EVEN * fastest), key=_complexity)


def _total(estimate: Estimate) -> float:
    assert estimate.time is not None
    return estimate.time.total


def _complexity(estimate: Estimate) -> tuple[float, ...]:
    layout = estimate.layout
    return (
        layout.tensor * layout.sequence,
        layout.sharding.stage,
        get_args(Checkpointing).index(layout.checkpointing),
        _total(estimate),
    )


def candidates(workload: Workload, engine: EngineConfig, cluster: Cluster, files: Sequence[str]) -> Iterator[ParallelLayout]:
    """Tensor groups within a node that divide the model; sequence groups if rows are long."""
    for tensor in divisors(workload.model.decoder.num_heads):
        if cluster.gpus_per_node % tensor or any(tensor_problems(workload.model, tensor)):
            continue
        try:
            size = _sizes(workload, tensor).model_size
        except RecipeError:  # a vocabulary leaves a rank without entries
            if tensor == 1:
                raise
            continue
        replicas = cluster.ranks // tensor
        for sequence in _sequences(workload, engine, replicas, tensor):
            parallel = ParallelConfig(tensor=tensor, sequence=sequence)
            for name in files:
                changed = engine.model_copy(update={"deepspeed": name, "parallel": parallel})
                sharding = Sharding.of(changed, replicas=replicas, size=size)
                for checkpointing in _MODES:
                    for max_tokens in _batch_sizes(workload, replicas // sequence):
                        layout = ParallelLayout(cluster.ranks, tensor, sequence, max_tokens, checkpointing, sharding)
                        yield replace(layout, packed=engine.layout != "padded", tiles=engine.feed_forward_tiles)


def _sequences(workload: Workload, engine: EngineConfig, replicas: int, tensor: int) -> Iterator[int]:
    for sequence in divisors(workload.model.decoder.num_heads // tensor):
        is_useful = sequence == 1 or (engine.layout != "padded" and workload.row_length >= 1024 * sequence)
        if not is_useful or replicas % sequence:
            continue
        if not any(sequence_problems(workload.model, tensor=tensor, sequence=sequence)):
            yield sequence


def _batch_sizes(workload: Workload, data: int) -> list[int]:
    """Those that hold a row, up to the first that holds a data rank's whole step."""
    whole = workload.tokens_per_step / data * workload.row_length / workload.target_length
    longest = max(workload.row_length, workload.longest_row)
    sizes = [size for size in _BATCH_TOKENS if size >= longest] or [longest]
    return [size for number, size in enumerate(sizes) if number == 0 or sizes[number - 1] < whole]


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _sizes(workload: Workload, tensor: int) -> ParameterSizes:
    return count_parameters(workload.model, workload.vocabulary, tensor=tensor, adapter=workload.adapter)

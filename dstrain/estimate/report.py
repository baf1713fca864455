"""Estimates in words for people, and as plain values for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dstrain.estimate.planner import USABLE, Estimate, RankMemory
from dstrain.estimate.traffic import ranks_of
from dstrain.estimate.workload import Cluster

GIB = 2**30


def memory_parts(memory: RankMemory) -> dict[str, float]:
    """Bytes by component; their sum is the total but for the smaller of `loss` and `backward`, which come one after the other."""
    held, kept = memory.states, memory.activations
    return {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "moving average": held.ema,
        "buffers": held.buffers,
        "teacher": held.teacher,
        "activations": kept.kept,
        "loss": memory.loss.peak,
        "backward": kept.recomputed + kept.backward,
    }


def memory_line(memory: RankMemory) -> str:
    """The total and its two largest parts, which fit beside the time into 80 columns."""
    parts = sorted(memory_parts(memory).items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {shown_gib(value)}" for name, value in parts[:2])
    return f"about {shown_gib(memory.total)} GiB a rank: {largest}"


def shown_gib(value: float) -> str:
    """Bytes in GiB, with three digits."""
    gib = value / GIB
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 1 else f"{gib:.3f}"


def describe_estimates(columns: Mapping[str, Estimate], cluster: Cluster) -> str:
    """A table with a column for each estimate, by its title."""
    estimates = list(columns.values())
    rows = [("", list(columns)), *_layout_rows(estimates), ("", []), ("memory of a GPU, GiB", [])]
    parts = [memory_parts(each.memory) for each in estimates]
    rows += [(f"  {name}", [shown_gib(own[name]) for own in parts]) for name in parts[0] if any(own[name] for own in parts)]
    rows.append(("  total", [shown_gib(each.memory.total) for each in estimates]))
    if any(each.memory.host for each in estimates):
        rows.append(("  of the CPU, for each GPU", [shown_gib(each.memory.host) for each in estimates]))
    limit = shown_gib(USABLE * cluster.gpu_memory)
    fits = ["yes" if each.memory.fits(cluster.gpu_memory) else "no" for each in estimates]
    rows += [(f"  fits, in {limit} of {shown_gib(cluster.gpu_memory)}", fits), ("", [])]
    rows += [("sent by a GPU in a step, GiB", []), *_traffic_rows(estimates), ("", []), ("time of a step, seconds", [])]
    rows += _time_rows(estimates)
    width = 2 + max(len(name) for name, _ in rows)
    columns_width = 2 + max(len(value) for _, values in rows for value in values)
    lines = [name.ljust(width) + "".join(value.rjust(columns_width) for value in values) for name, values in rows]
    return "\n".join(line.rstrip() for line in lines)


Row = tuple[str, list[str]]


def _layout_rows(estimates: Sequence[Estimate]) -> Iterator[Row]:
    layouts = [each.layout for each in estimates]
    yield "ranks: data x sequence x tensor", [f"{each.data} x {each.sequence} x {each.tensor}" for each in layouts]
    yield "engine.deepspeed", [each.sharding.name for each in layouts]
    yield "engine.activation_checkpointing", [each.checkpointing for each in layouts]
    yield "batching.max_tokens", [f"{each.max_tokens:,}" for each in layouts]
    yield "micro-batches of a step and data rank", [f"{each.micro_batches:,}" for each in estimates]


def _traffic_rows(estimates: Sequence[Estimate]) -> Iterator[Row]:
    sent = [
        {(each.purpose, each.group): each.sent(ranks_of(estimate.layout, each.group)) for each in estimate.traffic}
        for estimate in estimates
    ]
    for key in dict.fromkeys(key for own in sent for key in own):
        yield f"  {key[0]}, over {key[1]}", [shown_gib(own.get(key, 0.0)) for own in sent]
    if not any(sent):
        yield "  nothing", []


def _time_rows(estimates: Sequence[Estimate]) -> Iterator[Row]:
    times = [each.time for each in estimates if each.time is not None]
    yield "  matrix products", [f"{each.products:.4f}" for each in times]
    yield "  other operations", [f"{each.elementwise:.4f}" for each in times]
    yield "  launches of the CPU, meanwhile", [f"{each.launches:.4f}" for each in times]
    yield "  optimizer", [f"{each.optimizer:.4f}" for each in times]
    yield "  communication", [f"{each.communication:.4f}" for each in times]
    yield "  total", [f"{each.total:.4f}" for each in times]
    yield "target tokens per second", [f"{each.tokens_per_second:,.0f}" for each in estimates]
    shares = [
        each.flops.model * each.micro_batches / each.layout.tensor / each.layout.sequence / time.total
        for each, time in zip(estimates, times, strict=True)
    ]
    yield "TFLOP/s of a GPU, without repetitions", [f"{share / 1e12:,.0f}" for share in shares]


def estimate_tree(estimate: Estimate, cluster: Cluster) -> dict[str, Any]:
    """Plain values: bytes, seconds and FLOPs."""
    layout = estimate.layout
    return {
        "layout": {**asdict(layout), "data": layout.data},
        "parameters": estimate.parameters.total,
        "micro_batches": estimate.micro_batches,
        "memory": {**memory_parts(estimate.memory), "total": estimate.memory.total, "host": estimate.memory.host},
        "fits": estimate.memory.fits(cluster.gpu_memory),
        "traffic": [{**asdict(each), "sent": each.sent(ranks_of(layout, each.group))} for each in estimate.traffic],
        "flops": {**asdict(estimate.flops), "model": estimate.flops.model, "total": estimate.flops.total},
        "seconds": None if estimate.time is None else {**asdict(estimate.time), "total": estimate.time.total},
        "tokens_per_second": estimate.tokens_per_second,
    }

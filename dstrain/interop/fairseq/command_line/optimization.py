"""The `batching`, `optimizer`, `schedule` and `engine` sections from fairseq's optimization options."""

from __future__ import annotations

from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.command import Command, Notes

Tree = dict[str, Any]

TOKENS_A_SENTENCE = 32
"""Stands in where a command line counts sentences alone."""


def batching_section(command: Command, notes: Notes) -> Tree:
    """Steps in tokens from batches of each process, accumulation and the number of processes."""
    ranks = command.integer("distributed-world-size")
    if ranks is None:
        notes.reads("no --distributed-world-size", "no-world-size")
    frequencies = command.numbers("update-freq") or [1]
    accumulation = int(frequencies[-1])
    if len(frequencies) > 1:
        notes.lack(command.shown("update-freq"), "update-freq")
    tokens, sentences = command.integer("max-tokens"), command.integer("batch-size")
    if tokens is None and sentences is None:
        raise ImportFormatError("the command line has neither --max-tokens nor --batch-size; fairseq needs one of them")
    if tokens is None:
        tokens = TOKENS_A_SENTENCE * (sentences or 0)
        notes.lack(command.shown("batch-size"), "batch-size", assumed=TOKENS_A_SENTENCE)
    elif sentences is not None:
        notes.lack(command.shown("batch-size"), "batch-size-too")
    step = tokens * accumulation * (ranks or 1)
    given = {name: command.shown(name) for name in ("max-tokens", "update-freq", "distributed-world-size") if command.has(name)}
    notes.reads(
        ", ".join(given.values()) or "steps", "step", tokens=tokens, accumulation=accumulation, ranks=ranks or 1, step=step
    )
    multiple = "required-batch-size-multiple"
    notes.differ(command.shown(multiple) if command.has(multiple) else f"--{multiple} 8 (default)", multiple)
    return {"tokens_per_step": step, "max_tokens": tokens}


def optimizer_section(command: Command, notes: Notes) -> Tree:
    """Adam with decoupled decay of all parameters, as fairseq's is."""
    name = command.text("optimizer") or "adam"
    if name not in {"adam", "cpu_adam"}:
        notes.lack(f"--optimizer {name}", "optimizer")
    rates = command.numbers("lr") or [0.25]
    if len(rates) > 1:
        notes.lack(command.shown("lr"), "lr")
    stable = command.has("adam-stable")
    if stable:
        notes.differ("--adam-stable", "adam-stable")
    betas = command.numbers("adam-betas") or [0.9, 0.999]
    eps, decay = command.number("adam-eps"), command.number("weight-decay")
    return {
        "kind": "stable_adamw" if stable else "adamw",
        "learning_rate": rates[0],
        "betas": betas,
        "eps": 1e-8 if eps is None else eps,
        "weight_decay": decay or 0.0,
        "decay": "all",
    }


def schedule_section(command: Command, notes: Notes, rate: float) -> Tree:
    """How the rate goes. rate: its peak."""
    name = command.text("lr-scheduler") or "fixed"
    warmup = command.integer("warmup-updates")
    match name:
        case "inverse_sqrt":
            return _inverse_sqrt(command, notes, 4000 if warmup is None else warmup, rate)
        case "polynomial_decay":
            total = command.integer("total-num-update") or command.integer("max-update")
            final, power = command.number("end-learning-rate"), command.number("power")
            section = {"kind": "polynomial", "total_steps": _needed(total, name, "--total-num-update"), "power": power or 1.0}
            return section | {"warmup_steps": warmup or 0, "final": final or 0.0}
        case "cosine":
            return _cosine(command, notes, warmup or 0)
        case "tri_stage":
            return _tri_stage(command, notes, rate)
        case "fixed":
            if command.has("force-anneal"):
                notes.lack(command.shown("force-anneal"), "force-anneal")
            return {"kind": "constant", "warmup_steps": warmup or 0, "warmup_init": rate / warmup if warmup else 0.0}
        case _:
            notes.lack(f"--lr-scheduler {name}", "lr-scheduler")
            return {"kind": "constant", "warmup_steps": warmup or 0}


def _inverse_sqrt(command: Command, notes: Notes, warmup: int, rate: float) -> Tree:
    if warmup == 0:
        notes.differ("--warmup-updates 0", "inverse-sqrt")
    start = command.number("warmup-init-lr")
    return {"kind": "inverse_sqrt", "warmup_steps": max(1, warmup), "warmup_init": 0.0 if start is None or start < 0 else start}


def _cosine(command: Command, notes: Notes, warmup: int) -> Tree:
    period, limit = command.integer("lr-period-updates"), command.integer("max-update")
    total = warmup + period if period else limit
    if period and limit and limit > warmup + period:
        total = limit
        notes.lack(command.shown("lr-period-updates"), "cycles")
    for name in ("t-mult", "lr-shrink"):
        if command.has(name):
            notes.lack(command.shown(name), "cycles")
    start = command.number("warmup-init-lr")
    return {
        "kind": "cosine",
        "total_steps": _needed(total, "cosine", "--lr-period-updates"),
        "warmup_steps": warmup,
        "warmup_init": 0.0 if start is None or start < 0 else start,
        "final": command.number("min-lr") or 0.0,
    }


def _tri_stage(command: Command, notes: Notes, rate: float) -> Tree:
    stages = [command.integer(name) or 0 for name in ("warmup-steps", "hold-steps", "decay-steps")]
    shares = command.numbers("phase-ratio")
    if shares is not None:
        limit = _needed(command.integer("max-update"), "tri_stage with --phase-ratio", "--max-update")
        stages = [int(limit * share) for share in shares]
    notes.differ("--lr-scheduler tri_stage", "tri-stage")
    start, end = command.number("init-lr-scale"), command.number("final-lr-scale")
    return {
        "kind": "wsd",
        "total_steps": _needed(sum(stages), "tri_stage", "--warmup-steps, --hold-steps and --decay-steps"),
        "warmup_steps": stages[0],
        "warmup_init": rate * (0.01 if start is None else start),
        "decay_steps": max(1, stages[2]),
        "final": rate * (0.01 if end is None else end),
    }


def _needed(value: int | None, name: str, option: str) -> int:
    if not value:
        raise ImportFormatError(f"--lr-scheduler {name} has no end here; add {option} or --max-update to the command line")
    return value


def engine_section(command: Command, notes: Notes) -> Tree:
    """Precision, clipping and the DeepSpeed file."""
    precision = "fp32"
    if any(command.has(name) for name in ("bf16", "memory-efficient-bf16")):
        precision = "bf16"
        notes.differ("--bf16", "bf16")
    if any(command.has(name) for name in ("fp16", "memory-efficient-fp16", "amp")):
        precision = "fp16"
    for name in ("fp16-init-scale", "fp16-scale-window", "fp16-scale-tolerance", "min-loss-scale"):
        if command.has(name):
            notes.lack(command.shown(name), "loss-scale")
    sharded = command.text("ddp-backend") in {"fully_sharded", "fsdp"}
    offload = command.has("cpu-offload") or command.text("optimizer") == "cpu_adam"
    stage = "zero3" if sharded else "zero1"
    file = f"{stage}_offload" if offload else stage
    for name in ("ddp-backend", "zero-sharding", "cpu-offload"):
        if command.has(name):
            notes.reads(command.shown(name), "deepspeed", file=file)
    return {
        "deepspeed": file,
        "precision": precision,
        "clip_norm": command.number("clip-norm") or 0.0,
    }

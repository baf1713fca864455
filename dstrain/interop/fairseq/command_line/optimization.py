"""The `batching`, `optimizer`, `schedule` and `engine` sections from fairseq's optimization options."""

from __future__ import annotations

from dstrain.config_base import Tree
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.notes import Notes
from dstrain.interop.fairseq.options import Settings, dashed

TOKENS_PER_SENTENCE = 32
"""Assumed if a command line counts only sentences."""


def batching_section(settings: Settings, notes: Notes) -> Tree:
    """Steps in tokens from batches of each process, accumulation and the number of processes."""
    ranks = settings["distributed_world_size"]
    if ranks is None:
        notes.reads("no --distributed-world-size", "no-world-size")
    frequencies = settings["update_freq"]
    accumulation = int(frequencies[-1])
    if len(frequencies) > 1:
        notes.lack(settings.shown("update_freq"), "update-freq")
    tokens, sentences = settings["max_tokens"], settings["batch_size"]
    if tokens is None and sentences is None:
        raise ImportFormatError("the command line has neither --max-tokens nor --batch-size; fairseq needs one of them")
    if tokens is None:
        tokens = TOKENS_PER_SENTENCE * (sentences or 0)
        notes.lack(settings.shown("batch_size"), "batch-size", assumed=TOKENS_PER_SENTENCE)
    elif sentences is not None:
        notes.lack(settings.shown("batch_size"), "batch-size-too")
    step = tokens * accumulation * (ranks or 1)
    options = [settings.shown(name) for name in ("max_tokens", "update_freq", "distributed_world_size") if settings.has(name)]
    notes.reads(", ".join(options) or "steps", "step", tokens=tokens, accumulation=accumulation, ranks=ranks or 1, step=step)
    multiple = "required_batch_size_multiple"
    shown = settings.shown(multiple) if settings.has(multiple) else f"{dashed(multiple)} {settings[multiple]} (default)"
    notes.differ(shown, "required-batch-size-multiple")
    return {"tokens_per_step": step, "max_tokens": tokens}


def optimizer_section(settings: Settings, notes: Notes) -> Tree:
    """Adam with decoupled decay of all parameters, as in fairseq."""
    name = settings["optimizer"]
    if name not in {"adam", "cpu_adam"}:
        notes.lack(f"--optimizer {name}", "optimizer")
    rates = settings["lr"]
    if len(rates) > 1:
        notes.lack(settings.shown("lr"), "lr")
    if settings["adam_stable"]:
        notes.differ("--adam-stable", "adam-stable")
    return {
        "kind": "stable_adamw" if settings["adam_stable"] else "adamw",
        "learning_rate": rates[0],
        "betas": settings["adam_betas"],
        "eps": settings["adam_eps"],
        "weight_decay": settings["weight_decay"],
        "decay": "all",
    }


def schedule_section(settings: Settings, notes: Notes, rate: float) -> Tree:
    """The learning rate by step. rate: its peak."""
    name = settings["lr_scheduler"]
    warmup = settings["warmup_updates"]
    match name:
        case "inverse_sqrt":
            return _inverse_sqrt(settings, notes, 4000 if warmup is None else warmup, rate)
        case "polynomial_decay":
            total = settings["total_num_update"] or settings["max_update"]
            return {
                "kind": "polynomial",
                "total_steps": _needed(total, name, "--total-num-update"),
                "power": settings["power"],
                "warmup_steps": warmup or 0,
                "final": settings["end_learning_rate"],
            }
        case "cosine":
            return _cosine(settings, notes, warmup or 0)
        case "tri_stage":
            return _tri_stage(settings, notes, rate)
        case "fixed":
            if settings.has("force_anneal"):
                notes.lack(settings.shown("force_anneal"), "force-anneal")
            return {"kind": "constant", "warmup_steps": warmup or 0, "warmup_init": rate / warmup if warmup else 0.0}
        case _:
            notes.lack(f"--lr-scheduler {name}", "lr-scheduler")
            return {"kind": "constant", "warmup_steps": warmup or 0}


def _inverse_sqrt(settings: Settings, notes: Notes, warmup: int, rate: float) -> Tree:
    if warmup == 0:
        notes.differ("--warmup-updates 0", "inverse-sqrt")
    return {"kind": "inverse_sqrt", "warmup_steps": max(1, warmup), "warmup_init": max(0.0, settings["warmup_init_lr"])}


def _cosine(settings: Settings, notes: Notes, warmup: int) -> Tree:
    period, limit = settings["lr_period_updates"], settings["max_update"]
    total = warmup + period if period else limit
    if period and limit and limit > warmup + period:
        total = limit
        notes.lack(settings.shown("lr_period_updates"), "cycles")
    for name in ("t_mult", "lr_shrink"):
        if settings.has(name):
            notes.lack(settings.shown(name), "cycles")
    return {
        "kind": "cosine",
        "total_steps": _needed(total, "cosine", "--lr-period-updates"),
        "warmup_steps": warmup,
        "warmup_init": max(0.0, settings["warmup_init_lr"]),
        "final": settings["min_lr"],
    }


def _tri_stage(settings: Settings, notes: Notes, rate: float) -> Tree:
    stages = [settings[name] for name in ("warmup_steps", "hold_steps", "decay_steps")]
    shares = settings["phase_ratio"]
    if shares is not None:
        limit = _needed(settings["max_update"], "tri_stage with --phase-ratio", "--max-update")
        stages = [int(limit * share) for share in shares]
    notes.differ("--lr-scheduler tri_stage", "tri-stage")
    return {
        "kind": "wsd",
        "total_steps": _needed(sum(stages), "tri_stage", "--warmup-steps, --hold-steps and --decay-steps"),
        "warmup_steps": stages[0],
        "warmup_init": rate * settings["init_lr_scale"],
        "decay_steps": max(1, stages[2]),
        "final": rate * settings["final_lr_scale"],
    }


def _needed(value: int | None, name: str, option: str) -> int:
    if not value:
        raise ImportFormatError(f"--lr-scheduler {name} has no end here; add {option} or --max-update to the command line")
    return value


def engine_section(settings: Settings, notes: Notes) -> Tree:
    """Precision, clipping and the DeepSpeed file."""
    precision = "fp32"
    if settings["bf16"] or settings["memory_efficient_bf16"]:
        precision = "bf16"
        notes.differ("--bf16", "bf16")
    if settings["fp16"] or settings["memory_efficient_fp16"] or settings["amp"]:
        precision = "fp16"
    for name in ("fp16_init_scale", "fp16_scale_window", "fp16_scale_tolerance", "min_loss_scale"):
        if settings.has(name):
            notes.lack(settings.shown(name), "loss-scale")
    sharded = settings["ddp_backend"] in {"fully_sharded", "fsdp"}
    offload = settings["cpu_offload"] or settings["optimizer"] == "cpu_adam"
    stage = "zero3" if sharded else "zero1"
    file = f"{stage}_offload" if offload else stage
    for name in ("ddp_backend", "zero_sharding", "cpu_offload"):
        if settings.has(name):
            notes.reads(settings.shown(name), "deepspeed", file=file)
    return {
        "deepspeed": file,
        "precision": precision,
        "clip_norm": settings["clip_norm"],
    }

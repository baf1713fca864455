"""The `training`, `validation`, `checkpoint` and `reporting` sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.config_base import Tree
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.notes import Notes
from dstrain.interop.fairseq.options import Settings

ENDLESS_EPOCHS = 1000
KEPT_BUNDLES = 10
METRICS = ("loss", "bleu")
GENERATION = {
    "beam": "beam_size",
    "max_len_a": "max_length_ratio",
    "max_len_b": "max_length_offset",
    "min_len": "min_length",
    "lenpen": "length_penalty",
    "unkpen": "unk_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "temperature": "temperature",
    "diverse_beam_groups": "groups",
    "diverse_beam_strength": "diversity",
}
"""Keys of --eval-bleu-args -> keys of `generation`."""


def training_section(settings: Settings, schedule: Mapping[str, Any], notes: Notes) -> Tree:
    """When training ends, from which seed it starts, and the moving average."""
    section: Tree = {"seed": settings["seed"]}
    steps, epochs, hours = settings["max_update"], settings["max_epoch"], settings["stop_time_hours"]
    total = schedule.get("total_steps")
    if steps and total and steps > total:
        notes.differ(f"--max-update {steps}", "max-update", total=total)
        steps = total
    section |= {"max_steps": steps or None, "max_epochs": epochs or None, "max_hours": hours or None}
    if not (steps or epochs or hours):
        section["max_epochs"] = ENDLESS_EPOCHS
        notes.reads("no --max-update, --max-epoch or --stop-time-hours", "endless", epochs=ENDLESS_EPOCHS)
    if settings["store_ema"]:
        notes.reads("--store-ema", "store-ema")
        section["ema"] = {"decay": settings["ema_decay"], "start_step": settings["ema_start_update"]}
    return section


def validation_section(settings: Settings, notes: Notes) -> Tree:
    """When and on what metric."""
    unit, every = _interval(settings, "validate_interval", notes)
    if unit == "epochs" and settings["save_interval_updates"] > 0:
        unit, every = "steps", settings["save_interval_updates"]
        notes.reads(settings.shown("save_interval_updates"), "save-interval-updates")
        if settings.has("validate_interval"):
            notes.lack(settings.shown("validate_interval"), "interval")
    generation = _generation(settings, notes) if settings["eval_bleu"] else None
    return {
        "unit": unit,
        "every": every,
        "metric": _metric(settings, generation is not None, notes),
        "generation": generation,
        "patience": settings["patience"] if settings["patience"] > 0 else None,
        "run_sanity_validation": settings["run_sanity_validation_steps"],
    }


def checkpoint_section(settings: Settings, notes: Notes) -> Tree:
    """How often, and how many stay. fairseq's files both resume and translate; dstrain keeps checkpoints and bundles apart."""
    unit, every = _interval(settings, "save_interval", notes)
    kept = settings["keep_interval_updates" if unit == "steps" else "keep_last_epochs"] or -1
    bundles = kept if kept > 0 else KEPT_BUNDLES
    if settings["no_epoch_checkpoints"]:
        bundles = 1
    elif kept < 0:
        notes.reads("no --keep-interval-updates or --keep-last-epochs", "keep", bundles=bundles)
    if settings["keep_best_checkpoints"] > 1:
        notes.lack(settings.shown("keep_best_checkpoints"), "keep-best-checkpoints")
    other = "keep_last_epochs" if unit == "steps" else "keep_interval_updates"
    if settings[other] > 0:
        notes.lack(settings.shown(other), "keep-other", every=every, unit=unit)
    return {"unit": unit, "every": every, "keep_checkpoints": 2, "keep_bundles": bundles}


def reporting_section(settings: Settings, notes: Notes) -> Tree:
    """Events, TensorBoard, Weights & Biases."""
    section: Tree = {"log_every": settings["log_interval"]}
    if settings.has("tensorboard_logdir"):
        section["tensorboard"] = True
        notes.reads(settings.shown("tensorboard_logdir"), "tensorboard-logdir")
    project, name = settings["wandb_project"], settings["wandb_run_name"]
    if project is not None:
        section["wandb"] = {"project": project, **({"name": name} if name else {})}
    return section


def _interval(settings: Settings, name: str, notes: Notes) -> tuple[str, int]:
    """`--NAME-updates` if it is on, else `--NAME` in epochs."""
    steps, in_epochs = settings[f"{name}_updates"], settings.has(name)
    if steps <= 0:
        return "epochs", max(1, settings[name])
    if in_epochs:
        notes.lack(settings.shown(name), "interval")
    return "steps", steps


def _metric(settings: Settings, generates: bool, notes: Notes) -> str:
    name: str = settings["best_checkpoint_metric"]
    highest = settings["maximize_best_checkpoint_metric"]
    if name not in METRICS:
        notes.lack(f"--best-checkpoint-metric {name}", "best-checkpoint-metric")
        return "loss"
    if name == "bleu" and not generates:
        raise ImportFormatError("--best-checkpoint-metric bleu needs --eval-bleu; add it to the command line")
    if (name == "bleu") != highest:
        how = "with" if highest else "without"
        notes.differ(f"--best-checkpoint-metric {name}", "best-checkpoint-metric", how=how)
    return name


def _generation(settings: Settings, notes: Notes) -> Tree:
    method = settings["eval_bleu_args"] or {}
    section: Tree = {"kind": "beam", "beam_size": 5, "max_length_ratio": 0.0, "max_length_offset": 200}
    for key, value in method.items():
        if key in GENERATION:
            section[GENERATION[key]] = value
        elif key == "unnormalized":
            section["score"] = "sum" if value else "normalized"
        else:
            notes.lack("--eval-bleu-args", "eval-bleu-args", key=key, value=value)
    if section.get("groups", 1) < 1:
        section["groups"] = 1
    notes.differ("--eval-bleu", "eval-bleu")
    detokenizer = settings["eval_bleu_detok"]
    if detokenizer not in {None, "space"}:
        notes.lack(settings.shown("eval_bleu_detok"), "eval-bleu-detok")
    if settings.has("eval_bleu_remove_bpe"):
        _note_pieces(settings, notes)
    if settings["eval_tokenized_bleu"]:
        notes.lack("--eval-tokenized-bleu", "eval-tokenized-bleu")
    return section


def _note_pieces(settings: Settings, notes: Notes) -> None:
    symbol = settings["eval_bleu_remove_bpe"]
    if symbol == "sentencepiece":
        notes.reads(settings.shown("eval_bleu_remove_bpe"), "sentencepiece")
    else:
        notes.lack(settings.shown("eval_bleu_remove_bpe"), "eval-bleu-remove-bpe")

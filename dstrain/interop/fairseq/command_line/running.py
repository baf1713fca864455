"""The `training`, `validation`, `checkpoint` and `reporting` sections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.command import Command, Notes

Tree = dict[str, Any]

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
"""Keys of --eval-bleu-args by name of our own."""


def training_section(command: Command, schedule: Mapping[str, Any], notes: Notes) -> Tree:
    """When training ends, from which seed it starts, and the moving average."""
    seed = command.integer("seed")
    section: Tree = {"seed": 1 if seed is None else seed}
    steps, epochs, hours = command.integer("max-update"), command.integer("max-epoch"), command.number("stop-time-hours")
    total = schedule.get("total_steps")
    if steps and total and steps > total:
        notes.differ(f"--max-update {steps}", "max-update", total=total)
        steps = total
    section |= {"max_steps": steps or None, "max_epochs": epochs or None, "max_hours": hours or None}
    if not (steps or epochs or hours):
        section["max_epochs"] = ENDLESS_EPOCHS
        notes.reads("no --max-update, --max-epoch or --stop-time-hours", "endless", epochs=ENDLESS_EPOCHS)
    if command.has("store-ema"):
        decay = command.number("ema-decay")
        section["ema"] = {"decay": 0.9999 if decay is None else decay, "start_step": command.integer("ema-start-update") or 0}
    return section


def validation_section(command: Command, notes: Notes) -> Tree:
    """When and on what metric."""
    unit, every = _interval(command, "validate-interval", notes)
    if unit == "epochs" and (command.integer("save-interval-updates") or 0) > 0:
        unit, every = "steps", command.integer("save-interval-updates") or 0
        notes.reads(command.shown("save-interval-updates"), "save-interval-updates")
        if command.has("validate-interval"):
            notes.lack(command.shown("validate-interval"), "interval")
    generation = _generation(command, notes) if command.has("eval-bleu") else None
    patience = command.integer("patience") or 0
    return {
        "unit": unit,
        "every": every,
        "metric": _metric(command, generation is not None, notes),
        "generation": generation,
        "patience": patience if patience > 0 else None,
        "run_sanity_validation": command.has("run-sanity-validation-steps"),
    }


def checkpoint_section(command: Command, notes: Notes) -> Tree:
    """How often, and how many stay. fairseq's files both resume and translate; dstrain keeps checkpoints and bundles apart."""
    unit, every = _interval(command, "save-interval", notes)
    kept = command.integer("keep-interval-updates" if unit == "steps" else "keep-last-epochs") or -1
    bundles = kept if kept > 0 else KEPT_BUNDLES
    if command.has("no-epoch-checkpoints"):
        bundles = 1
    elif kept < 0:
        notes.reads("no --keep-interval-updates or --keep-last-epochs", "keep", bundles=bundles)
    best = command.integer("keep-best-checkpoints") or 0
    if best > 1:
        notes.lack(command.shown("keep-best-checkpoints"), "keep-best-checkpoints")
    other = "keep-last-epochs" if unit == "steps" else "keep-interval-updates"
    if (command.integer(other) or 0) > 0:
        notes.lack(command.shown(other), "keep-other", every=every, unit=unit)
    return {"unit": unit, "every": every, "keep_checkpoints": 2, "keep_bundles": bundles}


def reporting_section(command: Command, notes: Notes) -> Tree:
    """Events, TensorBoard, Weights & Biases."""
    section: Tree = {"log_every": command.integer("log-interval") or 100}
    if command.has("tensorboard-logdir"):
        section["tensorboard"] = True
        notes.reads(command.shown("tensorboard-logdir"), "tensorboard-logdir")
    project, name = command.text("wandb-project"), command.text("wandb-run-name")
    if project is not None:
        section["wandb"] = {"project": project, **({"name": name} if name else {})}
    return section


def _interval(command: Command, name: str, notes: Notes) -> tuple[str, int]:
    """`--NAME-updates` where it is on, else `--NAME` in epochs."""
    steps, epochs = command.integer(f"{name}-updates") or 0, command.integer(name)
    if steps <= 0:
        return "epochs", 1 if epochs is None else max(1, epochs)
    if epochs is not None:
        notes.lack(command.shown(name), "interval")
    return "steps", steps


def _metric(command: Command, generates: bool, notes: Notes) -> str:
    name = command.text("best-checkpoint-metric") or "loss"
    highest = command.has("maximize-best-checkpoint-metric")
    if name not in METRICS:
        notes.lack(f"--best-checkpoint-metric {name}", "best-checkpoint-metric")
        return "loss"
    if name == "bleu" and not generates:
        raise ImportFormatError("--best-checkpoint-metric bleu needs --eval-bleu; add it to the command line")
    if (name == "bleu") != highest:
        how = "with" if highest else "without"
        notes.differ(f"--best-checkpoint-metric {name}", "best-checkpoint-metric", how=how)
    return name


def _generation(command: Command, notes: Notes) -> Tree:
    given = command.json("eval-bleu-args") or {}
    section: Tree = {"kind": "beam", "beam_size": 5, "max_length_ratio": 0.0, "max_length_offset": 200}
    for key, value in given.items():
        if key in GENERATION:
            section[GENERATION[key]] = value
        elif key == "unnormalized":
            section["score"] = "sum" if value else "normalized"
        else:
            notes.lack("--eval-bleu-args", "eval-bleu-args", key=key, value=value)
    if section.get("groups", 1) < 1:
        section["groups"] = 1
    notes.differ("--eval-bleu", "eval-bleu")
    detokenizer = command.text("eval-bleu-detok")
    if detokenizer not in {None, "space"}:
        notes.lack(command.shown("eval-bleu-detok"), "eval-bleu-detok")
    if command.has("eval-bleu-remove-bpe"):
        _note_pieces(command, notes)
    if command.has("eval-tokenized-bleu"):
        notes.lack("--eval-tokenized-bleu", "eval-tokenized-bleu")
    return section


def _note_pieces(command: Command, notes: Notes) -> None:
    symbol = command.text("eval-bleu-remove-bpe")
    if symbol == "sentencepiece":
        notes.reads(command.shown("eval-bleu-remove-bpe"), "sentencepiece")
    else:
        notes.lack(command.shown("eval-bleu-remove-bpe"), "eval-bleu-remove-bpe")


def run_name(command: Command) -> str:
    """The directories of the data, for the description."""
    return ":".join(PurePath(directory).name or directory for directory in command.data)

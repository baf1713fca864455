"""The `objective` section from fairseq's criteria, those of its fork included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.config_base import Tree
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.notes import Notes
from dstrain.interop.fairseq.options import Settings

SELECTIONS = {
    "word_level": "word",
    "word_seq_level": "word_and_sequence",
    "batch_level": "batch",
    "global_level": "global",
    "global_language_wise": "global_by_language",
}
LATE_KEYS = ("strategy", "loss_type", "beta")


def objective_section(settings: Settings, notes: Notes) -> Tree:
    """The loss."""
    criterion = settings["criterion"]
    smoothing = settings["label_smoothing"]
    match criterion:
        case "label_smoothed_cross_entropy_with_kd":
            return _distillation(settings, smoothing, notes)
        case "lm_distillation_loss":
            return _late_distillation(settings, notes)
        case "label_smoothed_cross_entropy_with_rdrop":
            return {**_cross_entropy(smoothing, settings, notes), **_r_drop(settings, notes)}
        case "cross_entropy":
            if smoothing:
                notes.differ(settings.shown("label_smoothing"), "label-smoothing")
            return _cross_entropy(0.0, settings, notes)
        case "label_smoothed_cross_entropy":
            return _cross_entropy(smoothing, settings, notes)
        case _:
            notes.lack(f"--criterion {criterion}", "criterion")
            return _cross_entropy(smoothing, settings, notes)


def _cross_entropy(smoothing: float, settings: Settings, notes: Notes) -> Tree:
    section: Tree = {"kind": "cross_entropy", "label_smoothing": smoothing}
    if settings.has("length_normalize_loss"):
        section["average"] = "sentences"
        notes.differ("--length-normalize-loss", "length-normalize-loss")
    if settings.has("sentence_avg"):
        notes.lack("--sentence-avg", "sentence-avg")
    return section


def _r_drop(settings: Settings, notes: Notes) -> Tree:
    alpha = settings["rdrop_alpha"]
    if alpha == 0:
        notes.differ("--rdrop-alpha 0 (default)", "rdrop-alpha")
        return {}
    notes.reads(settings.shown("rdrop_alpha"), "rdrop-alpha")
    return {"r_drop": {"alpha": alpha}}


def _distillation(settings: Settings, smoothing: float, notes: Notes) -> Tree:
    kd_args = settings["kd_args"] or {}
    notes.ignored("kd_args", kd_args, {"strategy", "rate", "queue_size"})
    strategy = kd_args.get("strategy", "word_level")
    if strategy not in SELECTIONS:
        raise ImportFormatError(f"--kd-args: strategy {strategy!r} is none of {', '.join(SELECTIONS)}; fix the JSON")
    _note_teacher(settings, notes)
    section: Tree = {"kind": "distillation", "label_smoothing": smoothing, "selection": {"kind": SELECTIONS[strategy]}}
    if strategy == "word_level":
        section |= {"label_smoothing": 0.0, "hard_weight": 0.0}
        if smoothing:
            notes.differ(settings.shown("label_smoothing"), "label-smoothing")
    elif strategy != "word_seq_level":
        section["selection"] |= _selected(kd_args, strategy, settings, notes)
    return section


def _selected(kd_args: Mapping[str, Any], strategy: str, settings: Settings, notes: Notes) -> Tree:
    rate = float(kd_args.get("rate", 0.0))
    if not 0 < rate <= 1:
        raise ImportFormatError(f"--kd-args: rate = {rate:g} (0 by default) crashed {strategy}; give a share above 0, at most 1")
    notes.differ(f"--kd-args: {strategy}", "kd-padding")
    if strategy == "batch_level":
        return {"rate": rate}
    notes.differ(f"--kd-args: {strategy}", "kd-queue")
    section: Tree = {"rate": rate, "queue_size": int(kd_args.get("queue_size", 10000))}
    if strategy == "global_language_wise":
        notes.differ(f"--kd-args: {strategy}", "kd-language")
        tags = settings["language_tags"]
        if not tags:
            raise ImportFormatError(f"--kd-args: {strategy} needs --language-tags, the first symbols of source sentences")
        section["tags"] = tags.split(",")
    return section


def _late_distillation(settings: Settings, notes: Notes) -> Tree:
    kd_args = settings["kd_args"] or {}
    notes.ignored("kd_args", kd_args, {"lambda", *LATE_KEYS})
    share = float(kd_args.get("lambda", 1.0))
    _note_teacher(settings, notes)
    for key in LATE_KEYS:
        if key in kd_args:
            notes.differ("--kd-args", "kd-late", key=key)
    if not 0 < share <= 1:
        raise ImportFormatError(f"--kd-args: lambda = {share:g} is no share above 0 and at most 1; fix the JSON")
    weights = {"kd_weight": share, "hard_weight": 1 - share, "label_smoothing": 0.0}
    return {"kind": "distillation", **weights, "selection": {"kind": "word" if share == 1 else "word_and_sequence"}}


def _note_teacher(settings: Settings, notes: Notes) -> None:
    if settings.has("teacher_checkpoint_path"):
        notes.reads(settings.shown("teacher_checkpoint_path"), "teacher-checkpoint-path")

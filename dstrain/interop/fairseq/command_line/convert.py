"""A `fairseq-train` command line -> a recipe, as YAML with comments on everything that is not the same."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dstrain.data.config import DataConfig
from dstrain.data.sources.fairseq_directory import fairseq_data, fairseq_data_by_name, fairseq_text_by_name
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.adapter import adapter_section
from dstrain.interop.fairseq.command_line.architectures import Settings
from dstrain.interop.fairseq.command_line.command import Command, Notes, parse_command
from dstrain.interop.fairseq.command_line.flags import WITHOUT
from dstrain.interop.fairseq.command_line.model import model_section
from dstrain.interop.fairseq.command_line.objective import objective_section
from dstrain.interop.fairseq.command_line.optimization import (
    batching_section,
    engine_section,
    optimizer_section,
    schedule_section,
)
from dstrain.interop.fairseq.command_line.running import (
    checkpoint_section,
    reporting_section,
    run_name,
    training_section,
    validation_section,
)
from dstrain.recipe import RECIPE_VERSION
from dstrain.recipe_file import check_recipe

Tree = dict[str, Any]

PAIR_TASKS = {"translation", "translation_with_kd", "seq2seq_lm_distillation"}
PLACEHOLDER = {"kind": "tsv", "path": "PAIRS.tsv"}
HEADINGS = {
    "read": "How it was read",
    "differs": "What fairseq did otherwise than the option says, and what dstrain does",
    "lacking": "Options without a counterpart",
    "unknown": "Unknown, and not read",
}
WIDTH = 126


def recipe_from_command(line: str) -> str:
    """The recipe as text that `load_recipe` accepts, with notes as comments at the top.

    Raises ImportFormatError where the command line is malformed or asks for what fairseq itself cannot do, RecipeError where its
    values make no recipe.
    """
    command, notes = parse_command(line), Notes()
    tree = _tree(command, notes)
    _note_the_rest(command, notes)
    check_recipe(tree, "the recipe of this command line")
    header = "".join(f"# {text}\n" if text else "#\n" for text in _comments(notes))
    return header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _tree(command: Command, notes: Notes) -> Tree:
    settings = Settings(command)
    optimizer = optimizer_section(command, notes)
    schedule = schedule_section(command, notes, optimizer["learning_rate"])
    model, adapter = model_section(settings, notes), adapter_section(command, notes)
    return {
        "version": RECIPE_VERSION,
        "description": f"From a fairseq-train command line: {settings.arch} on {run_name(command)}.",
        "data": _data(settings, model, notes),
        "batching": batching_section(command, notes),
        "model": model,
        **({} if adapter is None else {"adapter": adapter}),
        "objective": objective_section(command, notes),
        "optimizer": optimizer,
        "schedule": schedule,
        "engine": engine_section(command, notes),
        "training": training_section(command, schedule, notes),
        "validation": validation_section(command, notes),
        "checkpoint": checkpoint_section(command, notes),
        "reporting": reporting_section(command, notes),
    }


def _data(settings: Settings, model: Tree, notes: Notes) -> Tree:
    """What `dstrain import fairseq-data` makes of the same directories, filtered by the limits of model and batch."""
    command = settings.command
    task = command.text("task") or ("language_modeling" if settings.decoder_only else "translation")
    if command.text("valid-subset") not in {None, "valid"}:
        notes.lack(command.shown("valid-subset"), "valid-subset")
    if settings.decoder_only:
        notes.lack(f"--task {task}", "lines")
        data = _text(command, notes)
    elif task not in PAIR_TASKS:
        notes.lack(f"--task {task}", "task")
        return {"train": [PLACEHOLDER], "valid": [dict(PLACEHOLDER)], "filter": _filter(model, command, notes)}
    else:
        data = _pairs(command, notes)
    tree = data.model_dump(mode="json")
    tree["tokenizer"] = {name: value for name, value in tree["tokenizer"].items() if value}
    tree["filter"] = _filter(model, command, notes)
    return {name: tree[name] for name in ("train", "valid", "test", "tokenizer", "filter") if tree[name]}


def _filter(model: Tree, command: Command, notes: Notes) -> dict[str, int]:
    """fairseq's limits of a training example, by side."""
    most = command.integer("max-tokens") or math.inf
    limits = {name: model[name] for name in ("max_source_length", "max_target_length") if name in model}
    if any(most < limit for limit in limits.values()):
        notes.reads(command.shown("max-tokens"), "filter")
    return {name: int(min(limit, most)) for name, limit in limits.items()}


def _pairs(command: Command, notes: Notes) -> DataConfig:
    source, target = command.text("source-lang"), command.text("target-lang")
    directories, model = _places(command, notes), _sentencepiece(command, notes)
    models = None if model is None else (model, model)
    tags = (command.text("language-tags") or "").split(",") if models and command.has("language-tags") else []
    if all(directory.is_dir() for directory in directories):
        return fairseq_data(directories, source=source, target=target, models=models, tags=tags)
    if source is None or target is None:
        raise ImportFormatError(
            f"{':'.join(command.data)} is not here to look at, so its languages are unknown; give --source-lang and --target-lang"
        )
    notes.reads(":".join(command.data), "elsewhere")
    return fairseq_data_by_name(directories, source=source, target=target, models=models, tags=tags)


def _text(command: Command, notes: Notes) -> DataConfig:
    directories, model = _places(command, notes), _sentencepiece(command, notes)
    if all(directory.is_dir() for directory in directories):
        return fairseq_data(directories, models=None if model is None else (model, model))
    notes.reads(":".join(command.data), "elsewhere")
    return fairseq_text_by_name(directories, model=model)


def _places(command: Command, notes: Notes) -> list[Path]:
    if len(command.data) > 1:
        notes.differ(":".join(command.data), "directories")
    return [Path(directory) for directory in command.data]


def _sentencepiece(command: Command, notes: Notes) -> str | None:
    if command.text("bpe") not in {None, "sentencepiece"}:
        notes.lack(command.shown("bpe"), "bpe")
    return command.text("sentencepiece-model") if command.text("bpe") == "sentencepiece" else None


def _note_the_rest(command: Command, notes: Notes) -> None:
    """Every option that no section has asked for, with the reason."""
    for name in command.rest():
        reason = WITHOUT.get(name, "no effect together with the other options")
        notes.lacking.append(f"{command.shown(name)}: {reason}")
    notes.unknown += command.unknown
    if command.before:
        notes.reads(" ".join(command.before), "before")


def _comments(notes: Notes) -> Iterator[str]:
    yield "Made by `dstrain import fairseq-args`. Prepare the data with `dstrain prepare`, then `dstrain train`."
    for name, heading in HEADINGS.items():
        entries = list(dict.fromkeys(vars(notes)[name]))
        if entries:
            yield ""
            yield f"{heading}:"
        for entry in entries:
            yield from textwrap.wrap(entry, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)

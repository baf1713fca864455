"""A `fairseq-train` command line -> a recipe, as YAML with comments on everything that is not the same."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path, PurePath

import yaml

from dstrain.config_base import Tree
from dstrain.data.config import DataConfig
from dstrain.data.sources.fairseq_directory import fairseq_data, fairseq_data_by_name, fairseq_text_by_name
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.command import Command, parse_command
from dstrain.interop.fairseq.command_line.denoising import denoising_task
from dstrain.interop.fairseq.command_line.flags import WITHOUT
from dstrain.interop.fairseq.command_line.notes import Notes
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
    training_section,
    validation_section,
)
from dstrain.interop.fairseq.model import adapter_section, model_section
from dstrain.interop.fairseq.options import ARCHITECTURE_REMARKS, PRESETS_OF, Settings, architecture
from dstrain.recipe import RECIPE_VERSION
from dstrain.recipe_file import check_recipe

PAIR_TASKS = {"translation", "translation_with_kd", "seq2seq_lm_distillation"}
PLACEHOLDER = {"kind": "tsv", "path": "PAIRS.tsv"}
HEADINGS = {
    "read": "How it was read",
    "differs": "Where fairseq differs from the option, and from dstrain",
    "lacking": "Options without a counterpart",
    "unknown": "Unknown, and not read",
}
REPORT_WIDTH = 126


def recipe_from_command(line: str) -> str:
    """The recipe as text that `load_recipe` accepts, with notes as comments at the top.

    Raises ImportFormatError if the command line is malformed or fails in fairseq itself, RecipeError if its values make none.
    """
    command, notes = parse_command(line), Notes()
    arch, values = architecture(command.values.get("arch"))
    settings = Settings(command.values, arch.startswith("transformer_lm"), values, command.words)
    settings.has("arch")  # counts as read
    tree = _tree(arch, command, settings, notes)
    _note_the_rest(command, settings, notes)
    check_recipe(tree, "the recipe of this command line")
    header = "".join(f"# {text}\n" if text else "#\n" for text in _comments(notes))
    return header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _tree(arch: str, command: Command, settings: Settings, notes: Notes) -> Tree:
    optimizer = optimizer_section(settings, notes)
    schedule = schedule_section(settings, notes, optimizer["learning_rate"])
    if arch in ARCHITECTURE_REMARKS:
        notes.differs.append(f"--arch {arch}: {ARCHITECTURE_REMARKS[arch]}")
    if arch in PRESETS_OF:
        notes.reads(f"--arch {arch}", "preset", name=PRESETS_OF[arch])
    for name in ("attn_implementation", "use_native_attention"):
        if settings.has(name):
            notes.reads(settings.shown(name), "attn-implementation")
    model, adapter = model_section(settings, notes), adapter_section(settings, notes)
    run_name = ":".join(PurePath(directory).name or directory for directory in command.data)
    return {
        "version": RECIPE_VERSION,
        "description": f"From a fairseq-train command line: {arch} on {run_name}.",
        "data": _data(command, settings, model, notes),
        "batching": batching_section(settings, notes),
        "model": model,
        **({} if adapter is None else {"adapter": adapter}),
        **training_sections(settings, optimizer, schedule, notes),
    }


def training_sections(settings: Settings, optimizer: Tree, schedule: Tree, notes: Notes) -> Tree:
    """The sections from `objective` on, which no data and no model decide. optimizer, schedule: as made before."""
    return {
        "objective": objective_section(settings, notes),
        "optimizer": optimizer,
        "schedule": schedule,
        "engine": engine_section(settings, notes),
        "training": training_section(settings, schedule, notes),
        "validation": validation_section(settings, notes),
        "checkpoint": checkpoint_section(settings, notes),
        "reporting": reporting_section(settings, notes),
    }


def _data(command: Command, settings: Settings, model: Tree, notes: Notes) -> Tree:
    """The data section of `dstrain import fairseq-data` for the same directories, filtered by the limits of model and batch."""
    task = settings["task"] or ("language_modeling" if settings.decoder_only else "translation")
    if settings["valid_subset"] != "valid":
        notes.lack(settings.shown("valid_subset"), "valid-subset")
    if settings.decoder_only or task == "denoising":
        notes.lack(f"--task {task}", "lines")
        data = _text(command, settings, notes)
        if task == "denoising":
            return data_tree(data, length_limits(model, settings, notes), denoising_task(settings, notes))
    elif task not in PAIR_TASKS:
        notes.lack(f"--task {task}", "task")
        return {"train": [PLACEHOLDER], "valid": [dict(PLACEHOLDER)], "filter": length_limits(model, settings, notes)}
    else:
        data = _pairs(command, settings, notes)
    return data_tree(data, length_limits(model, settings, notes))


def data_tree(data: DataConfig, limits: Mapping[str, int | str], task: Tree | None = None) -> Tree:
    """A data section as plain values, what is not set left out. limits: its filter. task: of all its text; None for the usual."""
    tree = data.model_dump(mode="json")
    for corpora in (tree["train"], tree["valid"], *tree["test"].values()):
        corpora[:] = [_corpus_tree(corpus, task) for corpus in corpora]
    tree["tokenizer"] = {name: value for name, value in tree["tokenizer"].items() if value}
    tree["filter"] = dict(limits)
    return {name: tree[name] for name in ("train", "valid", "test", "tokenizer", "filter") if tree[name]}


def _corpus_tree(corpus: Tree, task: Tree | None) -> Tree:
    named = {key: value for key, value in corpus.items() if value is not None and key != "task"}
    return named if task is None else {**named, "task": deepcopy(task)}  # a value twice would be an anchor in YAML


def length_limits(model: Tree, settings: Settings, notes: Notes) -> dict[str, int | str]:
    """The filter: fairseq's limits of a training example, by side, and whether longer sources are cut."""
    most = settings["max_tokens"] or math.inf
    limits = {name: model[name] for name in ("max_source_length", "max_target_length") if name in model}
    if any(most < limit for limit in limits.values()):
        notes.reads(settings.shown("max_tokens"), "filter")
    has_pairs = "max_source_length" in limits and settings["task"] != "denoising"
    cut = {"long_sources": "truncate"} if has_pairs and settings["truncate_source"] else {}
    return {name: int(min(limit, most)) for name, limit in limits.items()} | cut


def _pairs(command: Command, settings: Settings, notes: Notes) -> DataConfig:
    source, target = settings["source_lang"], settings["target_lang"]
    directories, model = _directories(command, notes), _sentencepiece(settings, notes)
    models = None if model is None else (model, model)
    tags = (settings["language_tags"] or "").split(",") if models and settings.has("language_tags") else []
    if all(directory.is_dir() for directory in directories):
        return fairseq_data(directories, source=source, target=target, models=models, tags=tags)
    if source is None or target is None:
        raise ImportFormatError(
            f"{':'.join(command.data)} is not on this machine, so its languages are unknown; give --source-lang and --target-lang"
        )
    notes.reads(":".join(command.data), "elsewhere")
    return fairseq_data_by_name(directories, source=source, target=target, models=models, tags=tags)


def _text(command: Command, settings: Settings, notes: Notes) -> DataConfig:
    directories, model = _directories(command, notes), _sentencepiece(settings, notes)
    if all(directory.is_dir() for directory in directories):
        return fairseq_data(directories, models=None if model is None else (model, model))
    notes.reads(":".join(command.data), "elsewhere")
    return fairseq_text_by_name(directories, model=model)


def _directories(command: Command, notes: Notes) -> list[Path]:
    if len(command.data) > 1:
        notes.differ(":".join(command.data), "directories")
    return [Path(directory) for directory in command.data]


def _sentencepiece(settings: Settings, notes: Notes) -> str | None:
    if settings["bpe"] not in {None, "sentencepiece"}:
        notes.lack(settings.shown("bpe"), "bpe")
    return settings["sentencepiece_model"] if settings["bpe"] == "sentencepiece" else None


def _note_the_rest(command: Command, settings: Settings, notes: Notes) -> None:
    """Every option that no section has read, with the reason."""
    for name in settings.unread():
        reason = WITHOUT.get(name, "no effect together with the other options")
        notes.lacking.append(f"{settings.shown(name)}: {reason}")
    notes.unknown += command.unknown
    if command.before:
        notes.reads(" ".join(command.before), "before")


def _comments(notes: Notes) -> Iterator[str]:
    yield "Made by `dstrain import fairseq-args`. Prepare the data with `dstrain prepare`, then `dstrain train`."
    yield from note_lines(notes)


def note_lines(notes: Notes) -> Iterator[str]:
    """The notes under their headings, in lines of REPORT_WIDTH."""
    for name, heading in HEADINGS.items():
        entries = list(dict.fromkeys(vars(notes)[name]))
        if entries:
            yield ""
            yield f"{heading}:"
        for entry in entries:
            yield from textwrap.wrap(entry, REPORT_WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)

"""The recipe of an imported model, from the settings of the training that its checkpoint holds: for training it further.

Model, optimizer, schedule, tokens of a step, dropout, label smoothing and clipping are those of the checkpoint. The data are the
binarized ones beside the dictionaries, if they are there; else a placeholder, with the tokenizer of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstrain.config_base import Tree
from dstrain.data.sources.fairseq_directory import fairseq_data
from dstrain.errors import DataError
from dstrain.interop.fairseq.checkpoint import FairseqCheckpoint
from dstrain.interop.fairseq.command_line.command import read_value
from dstrain.interop.fairseq.command_line.convert import PLACEHOLDER, data_tree, length_limits, training_sections
from dstrain.interop.fairseq.command_line.flags import ALIASES
from dstrain.interop.fairseq.command_line.notes import Notes
from dstrain.interop.fairseq.command_line.optimization import (
    batching_section,
    optimizer_section,
    schedule_section,
)
from dstrain.interop.fairseq.languages import ONE_PAIR, LanguageTokens, language_tokens, task_name
from dstrain.interop.fairseq.lora import ForeignAdapter
from dstrain.interop.fairseq.options import OPTIONS, Settings
from dstrain.models.config import ModelConfig
from dstrain.recipe import RECIPE_VERSION
from dstrain.recipe_file import check_recipe

GROUPS = ("common", "distributed_training", "dataset", "optimization", "checkpoint", "task", "ema")
COMPONENTS = ("criterion", "optimizer", "lr_scheduler")
"""Groups whose `_name` is the value of an option."""
UNCHANGED: Mapping[str, Any] = {
    "ddp_backend": "pytorch_ddp",
    "zero_sharding": "none",
    "fp16_init_scale": 128,
    "fp16_scale_tolerance": 0,
    "min_loss_scale": 1e-4,
}
"""Defaults of fairseq that options.py has not, because on a command line only what is given counts."""
TEXT_PLACEHOLDER = {"kind": "text", "path": "TEXT.txt"}


def recipe_of_checkpoint(
    checkpoint: FairseqCheckpoint,
    config: ModelConfig,
    adapter: ForeignAdapter | None,
    *,
    directory: Path,
    tokenizer: Path,
    models: tuple[Path, Path] | None,
    tags: Sequence[str],
) -> tuple[Tree, Notes]:
    """The recipe as plain values, and notes on what differs.

    config, adapter: as imported. directory: of the dictionaries. tokenizer: of the bundle. models, tags: see `fairseq_data`.
    ImportFormatError or RecipeError if the settings make none, such as those of a file that holds only the model's.
    """
    notes = Notes()
    values = _options(checkpoint.settings)
    words = {name: str(value) for name, value in values.items()}
    settings = Settings(values, decoder_only=not checkpoint.has_encoder, words=words)
    model = config.model_dump(mode="json")
    optimizer = optimizer_section(settings, notes)
    schedule = schedule_section(settings, notes, optimizer["learning_rate"])
    limits = length_limits(model, settings, notes)
    tree = {
        "version": RECIPE_VERSION,
        "description": f"From a fairseq checkpoint: {checkpoint.model.get('arch')}.",
        "data": _data(checkpoint, directory, models, tags, limits) or _placeholder(checkpoint, tokenizer, limits, notes),
        "batching": batching_section(settings, notes),
        "model": model,
        **({} if adapter is None else {"adapter": adapter.settings}),
        **training_sections(settings, optimizer, schedule, notes),
    }
    check_recipe(tree, "the recipe of this checkpoint")
    return tree, notes


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training that differ from fairseq's defaults, from groups or from one flat namespace."""
    flat = {ALIASES.get(name, name): value for name, value in settings.items() if not isinstance(value, dict)}
    for name in ("model", *GROUPS, *COMPONENTS):
        if isinstance(settings.get(name), dict):
            flat |= settings[name]
    flat |= {name: settings[name].get("_name") for name in COMPONENTS if isinstance(settings.get(name), dict)}
    values = {name: read_value(name, flat[name]) for name in OPTIONS if flat.get(name) is not None and flat[name] != ""}
    return {name: value for name, value in values.items() if value not in (OPTIONS[name].default, UNCHANGED.get(name))}


def _data(
    checkpoint: FairseqCheckpoint,
    directory: Path,
    models: tuple[Path, Path] | None,
    tags: Sequence[str],
    limits: Mapping[str, int | str],
) -> Tree | None:
    """The binarized data in the directory; None without them, or if the task adds tokens to them, which dstrain does not."""
    if task_name(checkpoint.task) not in ONE_PAIR or language_tokens(checkpoint.task, directory) != LanguageTokens():
        return None
    source, target = (checkpoint.task.get(f"{side}_lang") for side in ("source", "target"))
    paths = None if models is None else (str(models[0].resolve()), str(models[1].resolve()))
    try:
        data = fairseq_data([directory.resolve()], source=source, target=target, models=paths, tags=tags if models else ())
    except DataError:
        return None
    return data_tree(data, limits)


def _placeholder(checkpoint: FairseqCheckpoint, tokenizer: Path, limits: Mapping[str, int | str], notes: Notes) -> Tree:
    corpus = PLACEHOLDER if checkpoint.has_encoder else TEXT_PLACEHOLDER
    notes.reads("no binarized data beside the dictionaries", "placeholder", path=corpus["path"])
    return {
        "train": [dict(corpus)],
        "valid": [dict(corpus)],
        "tokenizer": {"kind": "tokenizer_directory", "path": str(tokenizer.resolve())},
        "filter": dict(limits),
    }

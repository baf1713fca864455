"""Shipped recipes at toy size: their own keys, but small models, few steps, and text made here in the files that they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dstrain.checkpoint.bundle import find_bundle
from dstrain.config_base import Tree
from dstrain.data.sources.grammar import sentence_pairs
from dstrain.models.config import ModelConfig
from dstrain.recipe import Recipe
from dstrain.recipe_file import check_recipe, dump_recipe, load_recipe, recipe_tree
from tests.e2e.support import dstrain, succeeds

STEPS = 20
NUM_PAIRS = {"train": 120, "valid": 8, "test": 8}

STARTS_FROM = {
    "language_modeling/wikitext_extend": "language_modeling/wikitext_tiny",
    "summarization/scitldr_tiny": "summarization/scitldr_tiny_denoising",
    "translation/multi30k_multilingual_lora": "translation/multi30k_multilingual",
    "translation/multi30k_tiny_lora": "translation/multi30k_tiny",
}
"""A recipe that needs --base -> the recipe whose bundle it is."""
LEARNS_FROM = {
    "translation/multi30k_multilingual_kd": "translation/multi30k_multilingual",
    "translation/multi30k_tiny_kd": "translation/multi30k_base",
}
"""A recipe that needs --teacher -> the recipe whose bundle it is."""

SIZES = {"model_dim": 32, "ffn_dim": 48, "depth": 1, "unique_layers": None, "num_heads": 2, "head_dim": None, "dropout": 0.0}
"""The sizes of a model's stacks, wherever they stand in its section; heads of keys become one."""


class Toys:
    """Toy text, data, runs and bundles below one directory, all of equally many steps. What is there is not made again."""

    def __init__(self, directory: Path, steps: int = STEPS) -> None:
        self.directory = directory
        self.steps = steps
        self.variables = {"DSTRAIN_DATA": str(directory / "text")}

    def run(self, name: str) -> Path:
        """The run directory of a recipe."""
        return self.directory / "runs" / name

    def bundle(self, name: str) -> Path:
        """The bundle of a recipe, which is trained for it."""
        bundle = self.run(name) / "bundles" / "last"
        if not bundle.exists():
            self.train(name)
        return bundle

    def train(self, name: str) -> None:
        """Train a recipe, with the base or the teacher that it needs, in a process of its own."""
        base = ["--base", self.bundle(STARTS_FROM[name])] if name in STARTS_FROM else []
        teacher = ["--teacher", self.bundle(LEARNS_FROM[name])] if name in LEARNS_FROM else []
        place = ["--data", self.data(name), "--output", self.run(name), "--device", "cpu"]
        succeeds(dstrain("train", self.file(name), *place, *base, *teacher, variables=self.variables))

    def file(self, name: str) -> Path:
        """A file of the recipe at toy size."""
        file = self.directory / "recipes" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_recipe(self._recipe(name)), encoding="utf-8")
        return file

    def data(self, name: str) -> Path:
        """The prepared data of a recipe, which recipes of equal text and tokenizer share."""
        data = recipe_tree(self._recipe(name))["data"]
        output = self.directory / "data" / hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
        if not output.exists():
            for split in ("train", "valid"):
                self._write_texts(data[split], split)
            for corpora in data["test"].values():
                self._write_texts(corpora, "test")
            succeeds(dstrain("prepare", self.file(name), "--output", output, "--workers", "1", variables=self.variables))
        return output

    def _recipe(self, name: str) -> Recipe:
        def base_model() -> ModelConfig:
            return find_bundle(self.bundle(STARTS_FROM[name])).description.model

        tree = recipe_tree(load_recipe(name, base_model=base_model if name in STARTS_FROM else None))
        _shrink_data(tree["data"])
        tree["model"] = _small_model(tree["model"])
        tree["optimizer"] |= {"learning_rate": 0.01}  # of a model so small
        tree["batching"] |= {"tokens_per_step": 400, "max_tokens": 600}
        if tree["batching"]["packing"] is not None:
            tree["batching"]["packing"] |= {"block_size": 100}
        tree["schedule"] |= _of_its_keys(tree["schedule"], {"warmup_steps": 2, "total_steps": self.steps, "decay_steps": 5})
        tree["training"] |= {"max_steps": self.steps, "max_epochs": None}
        tree["validation"] |= {"unit": "steps", "every": self.steps, "patience": None}
        tree["checkpoint"] |= {"unit": "steps", "every": self.steps}
        tree["reporting"] |= {"log_every": 1}
        return check_recipe(tree, name)

    def _write_texts(self, corpora: list[Tree], split: str) -> None:
        """The files of corpora."""
        pairs = list(islice(sentence_pairs(split, seed=1), NUM_PAIRS[split]))  # type: ignore[arg-type]
        for corpus in corpora:
            match corpus["kind"]:
                case "grammar":
                    pass
                case "parallel":
                    self._write_lines(corpus["source"], (pair.english for pair in pairs))
                    self._write_lines(corpus["target"], (pair.german for pair in pairs))
                case "text":
                    self._write_lines(corpus["path"], (f"{pair.english} {pair.english}" for pair in pairs))
                case "jsonl":
                    sides = ((_nested(corpus["source"], pair.english), _nested(corpus["target"], pair.german)) for pair in pairs)
                    self._write_lines(corpus["path"], (json.dumps(source | target) for source, target in sides))
                case kind:
                    raise NotImplementedError(f"write a toy corpus of kind {kind} here")

    def _write_lines(self, path: str, lines: Iterable[str]) -> None:
        file = Path(path.replace("${DSTRAIN_DATA}", self.variables["DSTRAIN_DATA"]))
        assert file.is_relative_to(self.directory), f"{path} does not begin with ${{DSTRAIN_DATA}}"
        if file.exists():  # of another corpus
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _shrink_data(data: Tree) -> None:
    for split in ("train", "valid"):
        for corpus in data[split]:
            corpus |= _of_its_keys(corpus, {"num_pairs": NUM_PAIRS[split]})
    for corpus in (corpus for corpora in data["test"].values() for corpus in corpora):
        corpus |= _of_its_keys(corpus, {"num_pairs": NUM_PAIRS["test"]})
    data["tokenizer"] |= _of_its_keys(data["tokenizer"], {"vocab_size": 200})


def _nested(path: str, value: Any) -> Tree:
    """{"a": [value]} for the path a.0."""
    for key in reversed(path.split(".")):
        value = [value] if key == "0" else {key: value}
    return dict(value)


def _small_model(part: Any) -> Any:
    if isinstance(part, list):
        return [_small_model(item) for item in part]
    if not isinstance(part, dict):
        return part
    heads = {key: 1 for key in ("num_kv_heads", "num_cross_kv_heads") if part.get(key) is not None}
    embedding = {"dim": 16} if part.get("kind") == "factorized" else {}
    return {key: _small_model(value) for key, value in part.items()} | _of_its_keys(part, SIZES) | heads | embedding


def _of_its_keys(section: Mapping[str, Any], values: Mapping[str, Any]) -> Tree:
    """The values of the keys that a section has."""
    return {key: value for key, value in values.items() if key in section}

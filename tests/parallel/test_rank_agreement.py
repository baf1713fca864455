"""Two ranks that were started differently end before a model is built, both with one message that names the difference."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from dstrain import __version__
from dstrain.checkpoint.bundle import find_bundle, save_bundle
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical
from dstrain.recipe_file import load_recipe, recipe_tree
from tests.parallel.launch import run_ranks

HOST = socket.gethostname()
SMALL = [
    "data.train.0.num_pairs=60",
    "data.valid.0.num_pairs=5",
    "data.test={}",
    "data.tokenizer.vocab_size=120",
    "model.model_dim=16",
    "model.encoder={depth: 1, num_heads: 2, ffn_dim: 16}",
    "model.decoder={depth: 1, num_heads: 2, ffn_dim: 16}",
]
KEYS = {
    "optimizer.learning_rate": ("0.001", "0.002"),
    "training.seed": ("1", "2"),
    "model.dropout": ("0.1", "0.0"),
    "batching.tokens_per_step": ("700", "701"),
}
"""Recipe keys that differ: rank 0's value, rank 1's."""


def zero_file(path: Path, bucket: int) -> str:
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": bucket}}))
    return f"engine.deepspeed={path}"


def bundle(directory: Path, data: Path, seed: int) -> str:
    """A model of random weights with the data's tokenizer."""
    recipe, tokenizers = load_recipe("translation/quickstart", SMALL), load_tokenizers(data / "tokenizer")
    sizes = VocabularySizes(source=tokenizers.source.vocab_size, target=tokenizers.target.vocab_size)
    model = build_model(recipe.model, sizes, seed=seed)
    weights = to_canonical(model)
    tree = recipe_tree(recipe)
    save_bundle(
        directory, model_config=recipe.model, vocabulary=sizes, weights=weights, tokenizers=tokenizers, recipe=tree, notes={}
    )
    return str(directory)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: what both ranks ended with, and the lines that are expected."""
    directory = tmp_path_factory.mktemp("agreement")
    data, other_data = directory / "data", directory / "other"
    prepare(load_recipe("translation/quickstart", SMALL).data, data, workers=1, progress=False)
    prepare(
        load_recipe("translation/quickstart", [*SMALL, "data.train.0.num_pairs=61"]).data, other_data, workers=1, progress=False
    )
    first, second = (bundle(directory / f"bundle{seed}", data, seed) for seed in (1, 2))
    prints = [json.dumps(find_bundle(Path(path)).fingerprint) for path in (first, second)]
    distil = [*SMALL, "objective={kind: distillation}"]
    plain: dict[str, Any] = {
        **{"settings": SMALL, "data": str(data), "output": str(directory / "run")},
        **{"base": None, "teachers": [], "placement": None},
    }
    distilling = {**plain, "settings": distil, "teachers": [first]}
    cases = {key: [{**plain, "settings": [*SMALL, f"{key}={value}"]} for value in values] for key, values in KEYS.items()}
    expected = {key: [(key, *values)] for key, values in KEYS.items()}

    zero = [zero_file(directory / f"zero{bucket}.json", bucket) for bucket in (1000, 2000)]
    cases["DeepSpeed file"] = [{**plain, "settings": [*SMALL, name]} for name in zero]
    files = [json.dumps(name.partition("=")[2]) for name in zero]
    expected["DeepSpeed file"] = [
        ("DeepSpeed file.zero_optimization.reduce_bucket_size", "1000", "2000"),
        ("engine.deepspeed", *files),
    ]
    cases["data"] = [plain, {**plain, "settings": [*SMALL, "data.train.0.num_pairs=61"], "data": str(other_data)}]
    expected["data"] = [("data.train[0].num_pairs", "60", "61")]
    cases["base"], expected["base"] = [{**plain, "base": path} for path in (first, second)], [("--base", *prints)]
    cases["no base"], expected["no base"] = [{**plain, "base": first}, plain], [("--base", prints[0], "null")]
    cases["teacher"] = [{**distilling, "teachers": [path]} for path in (first, second)]
    expected["teacher"] = [("--teacher or --logits[0]", *prints)]
    cases["placement"] = [{**distilling, "placement": value} for value in ("sharded", "replicated")]
    expected["placement"] = [("--teacher-placement", '"sharded"', '"replicated"')]
    cases["version"] = [plain, {**plain, "version": "0.0.1"}]
    expected["version"] = [("version.dstrain", json.dumps(__version__), '"0.0.1"')]
    outputs = [str(directory / name) for name in ("run", "elsewhere")]
    cases["output"] = [{**plain, "output": path} for path in outputs]
    expected["output"] = [("--output", *map(json.dumps, outputs))]
    cases["failure"] = [plain, {**plain, "data": str(directory / "missing")}]

    ranks = run_ranks("disagreements", 2, directory / "results", cases=list(cases.values()))
    assert not (directory / "run").exists(), "nothing was started"
    return {name: {"ranks": pair, "expected": expected.get(name)} for name, *pair in zip(cases, *ranks, strict=True)}


@pytest.mark.parametrize(
    "name", [*KEYS, "DeepSpeed file", "data", "base", "no base", "teacher", "placement", "version", "output"]
)
def test_a_difference_ends_both_ranks_with_one_message(found: dict[str, Any], name: str) -> None:
    first, second = found[name]["ranks"]
    assert first == second
    kind, text = first
    assert kind == "TrainingError"
    for key, value, other in found[name]["expected"]:
        assert f"\n  {key}: {value} on rank 0 ({HOST}), {other} on rank 1 ({HOST})\n" in text
    data_differs = name == "data"
    assert len(text.splitlines()) == 2 + len(found[name]["expected"]) + data_differs
    assert ("\n  --data: " in text) == data_differs


def test_a_rank_that_cannot_start_ends_the_other_with_its_message(found: dict[str, Any]) -> None:
    first, second = found["failure"]["ranks"]
    assert first == second
    assert first[0] == "DataError"
    assert "missing" in first[1]

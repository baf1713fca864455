"""Pretraining at toy size: resumed, validated, mixed with pairs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.api import load_recipe, prepare
from dstrain.data.prepared.dataset import open_dataset
from dstrain.recipe_file import dump_recipe
from tests.e2e.support import curve, dstrain, events, fails, succeeds
from tests.unit.data.corpus import parallel, sentences, write_lines

TOY = (
    "model.model_dim=32",
    "model.encoder={depth: 1, num_heads: 2, ffn_dim: 32}",
    "model.decoder={depth: 1, num_heads: 2, ffn_dim: 32}",
    "data.tokenizer.vocab_size=120",
    "data.tokenizer.character_coverage=1.0",
    "batching={tokens_per_step: 120, max_tokens: 300}",
    "schedule={kind: constant, warmup_steps: 3}",
    "training.max_steps=20",
    "validation.every=10",
    "checkpoint.every=10",
    "reporting.log_every=1",
)


def prepared(folder: Path, name: str, *overrides: str) -> tuple[Path, Path]:
    """A recipe of pretraining at toy size, on texts of three sentences unless that is overridden, and its data."""
    lines = [" . ".join(sentences(number + 3)[-3:]) + " ." for number in range(60)]
    path = write_lines(folder / "text.txt", lines)
    corpora = [f"data.{split}.0.path={path}" for split in ("train", "valid")]
    recipe = load_recipe(f"pretraining/{name}", [*TOY, *corpora, *overrides])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    prepare(recipe.data, folder / "data", workers=1, progress=False)
    return folder / "recipe.yaml", folder / "data"


def trained(recipe: Path, data: Path, output: Path, *words: str) -> Path:
    succeeds(dstrain("train", recipe, "--data", data, "--output", output, "--device", "cpu", *words))
    return output


def test_a_resumed_run_has_the_same_noise_and_its_bundle_the_loss_of_its_last_validation(tmp_path: Path) -> None:
    recipe, data = prepared(tmp_path, "wikitext_denoising_tiny")
    straight = trained(recipe, data, tmp_path / "straight")
    resumed = trained(recipe, data, tmp_path / "resumed", "--set", "training.max_steps=10")
    assert curve(trained(recipe, data, resumed)) == curve(straight)
    first, last = events(straight, "valid")
    scores = json.loads(succeeds(dstrain("validate", straight / "bundles/last", "--data", data, "--device", "cpu")).stdout)
    assert scores["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert scores["num_targets"] == last["num_targets"] == first["num_targets"]
    assert "bleu" not in scores


def test_tasks_and_pairs_are_mixed_by_weight_and_report_their_losses(tmp_path: Path) -> None:
    text = {"kind": "text", "path": str(write_lines(tmp_path / "lines.txt", [f"{line} ." for line in sentences(80)]))}
    corpora = [
        {**text, "name": "denoised", "task": {"kind": "denoising"}},
        {**text, "name": "masked", "task": {"kind": "mass"}},
        {**parallel(tmp_path, "pairs", sentences(50), sentences(50)), "name": "pairs"},
    ]
    splits = [f"data.{split}={json.dumps(corpora)}" for split in ("train", "valid")]
    weights = "batching.sampling={kind: weights, weights: {denoised: 1, masked: 1, pairs: 2}}"
    recipe, data = prepared(tmp_path, "wikitext_denoising_tiny", *splits, weights, "training.max_steps=10")
    run = trained(recipe, data, tmp_path / "run")
    names = {"nll/denoised", "nll/masked", "nll/pairs"}
    assert names <= {name for event in events(run, "train") for name in event}
    (valid,) = events(run, "valid")
    assert names <= valid.keys()
    lengths = open_dataset(data, "valid").target_lengths.tolist()  # with EOS; those of the second corpus are halved
    targets = [round((length - 1) / 2) + 1 if 80 <= row < 160 else length for row, length in enumerate(lengths)]
    assert valid["num_targets"] == sum(targets)


def test_a_text_with_more_spans_than_sentinels_is_found_before_anything_starts(tmp_path: Path) -> None:
    one = ("data.tokenizer.user_symbols=['<extra_id_0>']", "data.train.0.task.mean_span_length=1")
    recipe, data = prepared(tmp_path, "wikitext_span_corruption_tiny", *one)
    result = dstrain("train", recipe, "--data", data, "--output", tmp_path / "run", "--device", "cpu")
    fails(result, "data.train.0.task: a text of", "spans, but the tokenizer only 1 sentinels: name them up to <extra_id_")
    assert not (tmp_path / "run").exists()

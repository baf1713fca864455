"""A language model that is trained on blocks of documents goes on where it was stopped: losses and weights, bit for bit."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from dstrain.api import load_recipe, prepare
from dstrain.data.sources.grammar import sentence_pairs
from dstrain.recipe_file import dump_recipe
from tests.e2e.support import curve, dstrain, events, settings, succeeds

STEPS = 12
TOY = (
    "data.tokenizer.vocab_size=120",
    "batching={tokens_per_step: 480, max_tokens: 240, packing: {block_size: 40}}",
    "model.model_dim=16",
    "model.decoder={depth: 1, num_heads: 2, num_kv_heads: 1, ffn_dim: 16}",
    "schedule={kind: constant, warmup_steps: 3}",
    f"training.max_steps={STEPS}",
    f"validation.every={STEPS}",
    f"checkpoint.every={STEPS // 2}",
    "reporting.log_every=1",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and its data: documents of six lines, a title first."""
    folder = tmp_path_factory.mktemp("text")
    lines = [pair.english for pair in islice(sentence_pairs("train", seed=1), 90)]
    titled = (f"= {line}" if row % 6 == 0 else line for row, line in enumerate(lines))
    (folder / "text.txt").write_text("\n".join(titled) + "\n")
    corpora = [f"data.{split}=[{{kind: text, path: {folder}/text.txt, document_start: '= '}}]" for split in ("train", "valid")]
    recipe = load_recipe("language_modeling/wikitext_tiny", [*TOY, *corpora])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    prepare(recipe.data, folder / "data", workers=1, progress=False)
    return folder


def train(text: Path, run: Path, *overrides: str) -> None:
    paths = ("--data", text / "data", "--output", run, "--device", "cpu")
    succeeds(dstrain("train", text / "recipe.yaml", *paths, *settings(*overrides)))


@pytest.mark.parametrize("documents", ["cut", "best_fit"])
def test_stopped_in_the_middle_of_an_epoch_and_resumed(documents: str, text: Path, tmp_path: Path) -> None:
    """In the second epoch, with dropout."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    packing = f"batching.packing.documents={documents}"
    train(text, whole, packing)
    epochs = [event["epoch"] for event in events(whole, "train")]
    assert 1 < epochs[STEPS // 2 - 1] == epochs[STEPS // 2] < epochs[-1], "the stop is within an epoch after the first"

    train(text, stopped, packing, f"training.max_steps={STEPS // 2}")
    assert curve(stopped) == curve(whole)[: STEPS // 2]
    train(text, stopped, packing)
    assert curve(stopped) == curve(whole)
    assert len(events(stopped, "resume")) == 1
    weights = [run / "bundles" / "last" / "model.safetensors" for run in (stopped, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

"""The bench's Transformers loop trains dstrain's model: the first loss of `Seq2SeqTrainer` is dstrain's on the same batch."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.batching.collate import Collator
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.train_module import TrainModule
from dstrain.recipe_file import load_recipe
from tests.paths import ROOT

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

TOY = ["model.model_dim=12", "model.encoder.ffn_dim=20", "model.decoder.ffn_dim=20", "model.decoder.depth=3", "model.dropout=0"]


@pytest.mark.parametrize(("order", "smoothing"), [("group_by_length", 0.1), ("random", 0.1), ("random", 0.0)])
def test_first_loss_of_seq2seq_trainer(order: str, smoothing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # an engine of another test may have left them, for accelerate to find
        monkeypatch.delenv(variable, raising=False)
    loop = importlib.import_module("transformers_loop")
    recipe = load_recipe("translation/multi30k_tiny", [*TOY, f"objective.label_smoothing={smoothing}"])
    sizes = VocabularySizes(source=37, target=37)
    random = np.random.default_rng(1)
    pairs = [tuple(np.append(random.integers(4, 37, n), 2) for n in random.integers(0, 14, 2)) for _ in range(5)]

    module = TrainModule(build_model(recipe.model, sizes, seed=recipe.training.seed), build_cross_entropy(recipe.objective))
    batch = Collator("encoder_decoder", pad_id=sizes.pad_id, eos_id=sizes.eos_id)(pairs, np.arange(5))
    loss = float(module(batch).loss_sum.detach()) / batch.num_targets

    features = [{"input_ids": source.tolist(), "labels": target.tolist()} for source, target in pairs]
    stored = loop.with_lengths(features) if order == "group_by_length" else features
    trainer = loop.build_trainer(
        loop.initial_model(recipe, sizes), stored, recipe, pairs=5, steps=1, order=order, output=str(tmp_path)
    )
    assert trainer.train().training_loss == pytest.approx(loss, rel=1e-5)
    assert trainer.data_collator.targets == [batch.num_targets]
    assert not list(tmp_path.iterdir())


def test_a_peer_that_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    bench = importlib.import_module("bench_train")
    assert bench.installed(["cli", "transformers", "bare"]) == ["bare", "transformers", "cli"]
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "accelerate" else name)
    assert bench.installed(["cli", "transformers", "bare"]) == ["bare", "cli"]
    assert bench.installed(["cli"]) == ["cli"]
    assert capsys.readouterr().out == "transformers: skipped, not installed: accelerate\n"

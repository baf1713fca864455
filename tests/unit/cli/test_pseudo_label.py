"""The verb pseudo-label: targets are those of a beam search sentence by sentence; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.checkpoint.bundle import load_bundle
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator
from tests.unit.cli.verbs import Verbs, bundle_for
from tests.unit.distillation.toy_store import prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data", num_pairs=30)


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(data, tmp_path_factory.mktemp("teacher") / "bundle", seed=3, eos_scale=4.0)


@pytest.fixture
def verbs(capsys: pytest.CaptureFixture[str]) -> Verbs:
    return Verbs(capsys)


def words(teacher: Path, data: Path, output: Path, *more: str) -> list[str | Path]:
    return ["pseudo-label", "--teacher", teacher, "--data", data, "--output", output, "--device", "cpu", *more]


def test_targets_are_those_of_a_search_sentence_by_sentence(data: Path, teacher: Path, tmp_path: Path, verbs: Verbs) -> None:
    options = (
        "--beam-size",
        "3",
        "--length-penalty",
        "0.5",
        "--max-repeats",
        "1000",
        "--pairs-per-shard",
        "8",
        "--max-tokens",
        "300",
    )
    for share in ("2/3", "0/3", "1/3"):
        verbs.succeed(*words(teacher, data, tmp_path / "labeled", *options, "--shard", share))
    assert "is complete: 30 of 30 pairs; dropped: none" in verbs.succeed("pseudo-label", "--merge", tmp_path / "labeled")
    bundle, ids = load_bundle(teacher), SpecialIds.of(load_tokenizers(data / "tokenizer").target)
    config = BeamSearchConfig(beam_size=3, length_penalty=0.5)
    generator = Generator(bundle.model, config, ids, limits=bundle.model_config.limits)
    original, labeled = open_dataset(data, "train"), open_dataset(tmp_path / "labeled", "train")
    for row in range(30):
        source = original[row].source.tolist()
        assert labeled[row].source.tolist() == source
        assert labeled[row].target.tolist() == generator.translate_ids([source])[0][0].tokens
    assert "outputs of teacher" in verbs.succeed("inspect", tmp_path / "labeled")


def test_mismatches_and_options_that_cannot_be(data: Path, teacher: Path, tmp_path: Path, verbs: Verbs) -> None:
    other = prepared(tmp_path / "other", vocab_size=110)
    output = tmp_path / "labeled"
    assert "ids would mean other words" in verbs.fail(*words(teacher, other, output))
    assert "is not a bundle" in verbs.fail(*words(tmp_path / "none", data, output))
    assert "--max-ratio 0.5 would drop every pair of unequal lengths" in verbs.fail(
        *words(teacher, data, output, "--max-ratio", "0.5")
    )
    assert "is not a whole number" in verbs.fail(*words(teacher, data, output, "--beam-size", "0"), code=2)
    assert "is no share I/N" in verbs.fail(*words(teacher, data, output, "--shard", "2"), code=2)
    assert "or --merge DATA2 without them" in verbs.fail("pseudo-label", "--teacher", teacher)
    assert "was not written by `dstrain pseudo-label`" in verbs.fail("pseudo-label", "--merge", output)
    assert not output.exists()
    verbs.succeed(*words(teacher, data, output, "--shard", "1/2", "--pairs-per-shard", "10", "--beam-size", "1"))
    assert "shards are not done or not merged" in verbs.fail("inspect", output)
    assert "generation:" in verbs.fail(*words(teacher, data, output, "--pairs-per-shard", "10", "--beam-size", "2"))


def test_a_teacher_in_half_precision_labels_another_job(data: Path, teacher: Path, tmp_path: Path, verbs: Verbs) -> None:
    options = ("--max-repeats", "1000", "--beam-size", "2")
    for name in ("fp32", "bf16"):
        verbs.succeed(*words(teacher, data, tmp_path / name, *options, "--precision", name))
        labels = load_manifest(tmp_path / name).pseudo_labels
        assert labels is not None
        assert labels["precision"] == name
    exact, half = (open_dataset(tmp_path / name, "train") for name in ("fp32", "bf16"))
    assert load_manifest(tmp_path / "fp32").job != load_manifest(tmp_path / "bf16").job
    assert len(exact) == len(half) == 30
    alike = sum(exact[row].target.tolist() == half[row].target.tolist() for row in range(30))
    assert 10 <= alike < 30  # an untrained teacher decides by little
    message = verbs.fail(*words(teacher, data, tmp_path / "fp32", *options, "--precision", "bf16"))
    assert "was started with another job (precision: fp32 -> bf16)" in message

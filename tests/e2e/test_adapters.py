"""Adapters through the command line: pretrain, adapt, translate with the adapter bundle, merge; and a user's mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, curve, dstrain, events, fails, settings, succeeds

ADAPTER = "adapter={kind: lora, rank: 4, alpha: 16, dropout: 0.1, bias: lora_only, targets: [q_proj, v_proj, up_proj, tokens]}"
FAST = (*SMALL_DATA, *SMALL_TRAINING, "checkpoint={unit: steps, every: 20, keep_checkpoints: 1, keep_bundles: 2}")


def words(data: Path, run: Path, *overrides: str, base: Path | None = None) -> list[str | Path]:
    based = [] if base is None else ["--base", base]
    return ["train", RECIPE, "--data", data, "--output", run, *based, *settings(*FAST, *overrides)]


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `base`, a pretrained run, and `run`, adapters over it trained by two processes."""
    directory = tmp_path_factory.mktemp("runs")
    succeeds(dstrain(*words(data, directory / "base", "training.max_steps=120")))
    adapting = Ranks(
        words(data, directory / "run", ADAPTER, "training.max_steps=40", base=directory / "base/bundles/last"),
        2,
        directory / "log",
    )
    assert adapting.wait() == [0, 0], adapting.output()
    assert adapting.output().count("of them are trained") == 1
    return directory


def translations(bundle: Path, source: Path, output: Path) -> str:
    succeeds(dstrain("generate", bundle, "--input", source, "--output", output, "--beam-size", "2"))
    return output.read_text()


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    succeeds(dstrain("text", data, "--split", "test", "--output", directory))
    return directory / "source.txt"


def test_adapting_goes_on_where_the_base_ended(runs: Path) -> None:
    begin, first, last = (curve(runs / "base")[0][1], curve(runs / "run")[0][1], curve(runs / "run")[-1][1])
    assert first < 0.8 * begin
    assert last < first


def test_bundles_hold_only_the_adapter(runs: Path) -> None:
    for name in ("best", "last", "step_00000040"):
        bundle = runs / "run" / "bundles" / name
        assert sorted(path.name for path in bundle.iterdir()) == ["adapter", "recipe.yaml"]
    size = sum(path.stat().st_size for path in (bundle / "adapter").iterdir())
    assert size < 0.5 * (runs / "base/bundles/last/model.safetensors").stat().st_size
    weights = (bundle / "adapter/adapter.safetensors").stat()
    checkpoint = sum(path.stat().st_size for path in (runs / "run/checkpoints").rglob("shard_*"))
    assert checkpoint < 5 * weights.st_size, "checkpoints hold no frozen weight either"


def test_an_adapter_bundle_translates_as_its_merged_one(runs: Path, source: Path, tmp_path: Path) -> None:
    bundle = runs / "run/bundles/last"
    succeeds(dstrain("merge", bundle, "--output", tmp_path / "merged"))
    adapted = translations(bundle, source, tmp_path / "adapted.txt")
    assert adapted == translations(tmp_path / "merged", source, tmp_path / "merged.txt")
    assert adapted != translations(runs / "base/bundles/last", source, tmp_path / "base.txt")
    assert len(adapted.split()) > 20


def test_validate_and_average_know_adapters(runs: Path, data: Path, tmp_path: Path) -> None:
    scores = json.loads(succeeds(dstrain("validate", runs / "run/bundles/best", "--data", data, "--no-generate")).stdout)
    expected = events(runs / "run", "valid")[-1]
    assert scores["loss"] == pytest.approx(expected["best_score"], rel=1e-5)
    succeeds(dstrain("average", runs / "run", "--last", "2", "--output", tmp_path / "mean"))
    assert (tmp_path / "mean/model.safetensors").exists()
    succeeds(dstrain("validate", tmp_path / "mean", "--data", data, "--no-generate"))


def test_a_resumed_run_repeats_an_uninterrupted_one(runs: Path, data: Path, tmp_path: Path) -> None:
    base = runs / "base/bundles/last"
    for name, steps in (("straight", 12), ("cut", 7), ("cut", 12)):
        succeeds(dstrain(*words(data, tmp_path / name, ADAPTER, f"training.max_steps={steps}", base=base)))
    assert curve(tmp_path / "cut") == curve(tmp_path / "straight")
    found, expected = (tmp_path / name / "bundles/last/adapter/adapter.safetensors" for name in ("cut", "straight"))
    assert found.read_bytes() == expected.read_bytes()
    other = runs / "base/bundles/step_00000100"
    assert other.exists()
    again = words(data, tmp_path / "cut", ADAPTER, "training.max_steps=14", base=other)
    fails(dstrain(*again), "was saved with base = ", "but this run has base = ")


def test_fine_tuning_without_an_adapter_starts_from_the_base_too(runs: Path, data: Path, tmp_path: Path) -> None:
    succeeds(dstrain(*words(data, tmp_path / "run", "training.max_steps=2", base=runs / "run/bundles/last")))
    assert (tmp_path / "run/bundles/last/model.safetensors").exists()
    assert curve(tmp_path / "run")[0][1] == pytest.approx(curve(runs / "run")[-1][1], rel=0.2)


@pytest.mark.parametrize(
    ("overrides", "based", "fragment"),
    [
        (
            (ADAPTER,),
            False,
            "the recipe has an adapter section, which adapts a trained model; name its bundle with --base BUNDLE",
        ),
        (
            (ADAPTER.replace("q_proj", "query"),),
            True,
            "adapter.targets: 'query' matches no module of the model; its modules are called",
        ),
        ((ADAPTER.replace("[q_proj, v_proj, up_proj, tokens]", "[]"),), True, "adapter.targets"),
        ((ADAPTER.replace("lora_only", "some"),), True, "adapter.bias"),
        ((ADAPTER, "model.activation=gelu"), True, 'model.activation: "relu" -> "gelu"'),
        ((ADAPTER, "adapter.targets=[tokens]", "adapter.bias=none"), True, "adapter.dropout = 0.1 does nothing"),
    ],
)
def test_mistakes_are_one_message(
    *, overrides: tuple[str, ...], based: bool, fragment: str, runs: Path, data: Path, tmp_path: Path
) -> None:
    base = runs / "base/bundles/last" if based else None
    fails(dstrain(*words(data, tmp_path / "run", *overrides, base=base)), fragment)


def test_a_base_that_moved_or_changed_is_named(runs: Path, source: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(runs / "run/bundles/last", bundle)
    file = bundle / "adapter/adapter.yaml"
    content = yaml.safe_load(file.read_text())
    generate = ("generate", bundle, "--input", source, "--output", tmp_path / "out.txt")
    for path, fragment in (
        ("/nowhere", "base.path = /nowhere"),
        (str(runs / "base/bundles/step_00000100"), "base.fingerprint = "),
    ):
        content["base"]["path"] = path
        file.write_text(yaml.safe_dump(content))
        fails(dstrain(*generate), str(file), fragment)
    assert not (tmp_path / "out.txt").exists()

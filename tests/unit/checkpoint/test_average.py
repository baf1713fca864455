"""The average is the plain mean in fp32, and only of models whose weights mean the same."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dstrain.checkpoint.average import average_bundles, average_weights
from dstrain.checkpoint.bundle import load_bundle, save_bundle
from dstrain.checkpoint.directories import newest_step_bundles
from dstrain.cli.main import main
from dstrain.errors import BundleError
from dstrain.models.config import EncoderDecoderConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, to_canonical
from dstrain.protocols import WeightSource
from dstrain.storage.atomic import replace_directory

STACK = {"depth": 1, "num_heads": 2, "ffn_dim": 12}


def make(directory: Path, seed: int, *, vocabulary: int = 11, **changes: Any) -> dict[str, Tensor]:
    """Write a small bundle; returns its weights."""
    config = EncoderDecoderConfig(**{"model_dim": 8, "encoder": STACK, "decoder": STACK, **changes})
    sizes = VocabularySizes(source=vocabulary, target=vocabulary)
    weights = to_canonical(build_model(config, sizes, seed=seed))
    save_bundle(directory, model_config=config, vocabulary=sizes, weights=weights, tokenizers=None, recipe={"seed": seed})
    return weights


def test_the_average_is_the_mean_of_every_tensor(tmp_path: Path) -> None:
    parts = [make(tmp_path / str(seed), seed) for seed in range(1, 4)]
    average_bundles(lambda: [tmp_path / str(seed) for seed in range(1, 4)], tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert set(found) == set(parts[0])
    for name, tensor in found.items():
        expected = torch.stack([part[name].double() for part in parts]).mean(0).float()
        assert torch.equal(tensor, expected), name
    bundle = load_bundle(tmp_path / "mean")
    assert bundle.recipe == {"seed": 3}
    assert bundle.notes == {"average_of": [str(tmp_path / str(seed)) for seed in range(1, 4)]}


def test_the_average_of_one_bundle_is_itself(tmp_path: Path) -> None:
    weights = make(tmp_path / "one", 1)
    average_bundles(lambda: [tmp_path / "one"] * 3, tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_half_precision_weights_are_averaged_in_full_precision() -> None:
    sides = [(name, torch.full((3,), value, dtype=torch.bfloat16)) for name, value in (("a", 1.0), ("b", 1.0078125))]
    mean = average_weights([(name, TensorSource({"w": value})) for name, value in sides])["w"]
    assert mean.dtype == torch.float32
    assert mean.tolist() == [1.00390625] * 3


def test_tensors_that_differ_in_name_or_shape_are_named() -> None:
    first = ("a", TensorSource({"w": torch.zeros(3), "v": torch.zeros(1)}))
    other_name = ("b", TensorSource({"w": torch.zeros(3), "u": torch.zeros(1)}))
    other_shape = ("c", TensorSource({"w": torch.zeros(4), "v": torch.zeros(1)}))
    with pytest.raises(BundleError, match=r"b and .*a hold different tensors: u, v"):
        average_weights([first, other_name])
    with pytest.raises(BundleError, match=r"c: w has shape \(4,\), in .*a it has \(3,\)"):
        average_weights([first, other_shape])


def test_different_models_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "one", 1)
    make(tmp_path / "deep", 1, encoder={**STACK, "depth": 2})
    make(tmp_path / "wide", 1, vocabulary=12)
    with pytest.raises(
        BundleError, match=r"one and .*deep are different models and cannot be averaged: encoder: .*'depth': 1.*'depth': 2"
    ):
        average_bundles(lambda: [tmp_path / "one", tmp_path / "deep"], tmp_path / "mean")
    with pytest.raises(BundleError, match=r"different models.*vocabulary: .*11.*12"):
        average_bundles(lambda: [tmp_path / "one", tmp_path / "wide"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_models_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, fingerprint in (("one", "a" * 64), ("two", "b" * 64)):
        make(tmp_path / name, 1)
        path = tmp_path / name / "model.yaml"
        path.write_text(path.read_text().replace("tokenizer: null", f"tokenizer: {fingerprint}"))
    with pytest.raises(BundleError, match=r"different tokenizers \(aaaaaaaaaaaa and bbbbbbbbbbbb\)"):
        average_bundles(lambda: [tmp_path / "one", tmp_path / "two"], tmp_path / "mean")


def test_an_altered_or_missing_file_is_named(tmp_path: Path) -> None:
    make(tmp_path / "one", 1)
    make(tmp_path / "two", 2)
    weights = tmp_path / "two" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"two/model.safetensors: the file was altered"):
        average_bundles(lambda: [tmp_path / "one", tmp_path / "two"], tmp_path / "mean")
    weights.unlink()
    with pytest.raises(BundleError, match=r"two/model.safetensors is missing"):
        average_bundles(lambda: [tmp_path / "one", tmp_path / "two"], tmp_path / "mean")
    with pytest.raises(BundleError, match="three is not a bundle"):
        average_bundles(lambda: [tmp_path / "one", tmp_path / "three"], tmp_path / "mean")


def test_bundles_that_a_training_replaces_and_removes_meanwhile_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time, one is replaced after its checksum was compared and before its weights are read, another removed."""
    run, changes = tmp_path / "run" / "bundles", iter([True, False])
    for step in (10, 20):
        make(run / f"step_{step:08d}", step)

    def changed_before_reading(sources: Sequence[tuple[str, WeightSource]]) -> dict[str, Tensor]:
        if next(changes):
            make(tmp_path / "new", 5)
            replace_directory(tmp_path / "new", run / "step_00000020")
            shutil.rmtree(run / "step_00000010")
        return average_weights(sources)

    monkeypatch.setattr("dstrain.checkpoint.average.average_weights", changed_before_reading)
    used = average_bundles(partial(newest_step_bundles, run.parent, None), tmp_path / "mean")
    assert [path.name for path in used] == ["step_00000020"]
    make(tmp_path / "expected", 5)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "mean"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_altered_bundle_that_stays_is_an_error_at_once(tmp_path: Path) -> None:
    make(tmp_path / "one", 1)
    flip = tmp_path / "one" / "model.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1] + b"x")
    calls: list[int] = []

    def choose() -> list[Path]:
        calls.append(1)
        return [tmp_path / "one"]

    with pytest.raises(BundleError, match="altered after it was written"):
        average_bundles(choose, tmp_path / "mean")
    assert len(calls) == 1


class TestVerb:
    """dstrain average."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        for step in (90, 100, 110):
            make(tmp_path / "run" / "bundles" / f"step_{step:08d}", step)
        make(tmp_path / "run" / "bundles" / "best", 7)
        return tmp_path / "run"

    def test_the_newest_of_a_run(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["average", str(run), "--last", "2", "--output", str(run / "mean")]) == 0
        assert "mean of 2 bundles (step_00000100, step_00000110)" in capsys.readouterr().out
        assert [Path(path).name for path in load_bundle(run / "mean").notes["average_of"]] == ["step_00000100", "step_00000110"]

    def test_one_bundle_is_no_plural(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["average", str(run), "--last", "1", "--output", str(run / "mean")]) == 0
        assert "mean of 1 bundle (step_00000110)" in capsys.readouterr().out

    def test_all_of_a_run_and_named_bundles(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["average", str(run), "--output", str(run / "mean")]) == 0
        assert "mean of 3 bundles" in capsys.readouterr().out
        named = [str(run / "bundles" / name) for name in ("best", "step_00000090")]
        assert main(["average", *named, "--output", str(run / "mean")]) == 1
        assert "mean exists; add --overwrite to replace it" in capsys.readouterr().err
        assert main(["average", *named, "--output", str(run / "mean"), "--overwrite"]) == 0
        assert "mean of 2 bundles (best, step_00000090)" in capsys.readouterr().out

    def test_no_input_is_replaced(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for output in (run, run / "bundles" / "best"):
            words = ["average", str(run / "bundles" / "best"), str(run / "bundles" / "step_00000090"), "--output", str(output)]
            assert main([*words, "--overwrite"]) == 1
            assert re.search("is the same as|is not a bundle, so it is not replaced", capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["run", "--last", "4"], "holds 3 step_... bundles, not 4: lower --last"),
            (["run/bundles/best", "--last", "1"], "--last goes with one run directory"),
            (["run/nothing"], "neither a run (it has no bundles/) nor a bundle"),
            (["run", "run/bundles/best"], "is not a bundle"),
            (["run/bundles/best", "run/bundles/../bundles/best"], "bundles/best and would count twice; name it once"),
        ],
    )
    def test_mistakes(self, run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        paths = [str(run.parent / word) if word.startswith("run") else word for word in words]
        assert main(["average", *paths, "--output", str(run / "mean")]) == 1
        assert message in capsys.readouterr().err

    def test_zero_is_no_number_of_bundles(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["average", str(run), "--last", "0", "--output", str(run / "mean")])
        assert "'0' is not a whole number from 1 on" in capsys.readouterr().err

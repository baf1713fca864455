"""Adapters over a loaded base: several share its memory, each answers as its own bundle does, and the base stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstrain.adapters.config import LoraConfig
from dstrain.api import load
from dstrain.build.base import build_on_base
from dstrain.checkpoint.bundle import find_bundle
from dstrain.cli.main import main
from dstrain.errors import BundleError
from dstrain.models.weights import load_canonical, to_canonical
from tests.unit.adapters.adapted import ADAPTED, adapt
from tests.unit.generation.small_bundle import SENTENCES, make_bundle


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [adapt(home / f"adapter_{seed}", base, seed=seed) for seed in (2, 3)]


def test_each_answers_as_its_own_bundle_and_shares_the_base(base: Path, adapters: list[Path]) -> None:
    model = load(base)
    before = {name: tensor.clone() for name, tensor in to_canonical(model.bundle.model).items()}
    answers = [model.generate(SENTENCES)]
    for directory in adapters:
        adapted, alone = model.adapted(directory), load(directory)
        found, expected = adapted.generate(SENTENCES), alone.generate(SENTENCES)
        assert [[hypothesis.text for hypothesis in row] for row in found] == [[one.text for one in row] for row in expected]
        scores = [torch.tensor([[one.score for one in row] for row in side]) for side in (found, expected)]
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
        own, shared = to_canonical(adapted.bundle.model), to_canonical(model.bundle.model)
        assert all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in shared.items())
        assert adapted.bundle.fingerprint == alone.bundle.fingerprint
        assert (adapted.bundle.notes, adapted.bundle.recipe) == (alone.bundle.notes, alone.bundle.recipe)
        answers.append(found)
    assert answers[0] != answers[1] != answers[2]
    assert all(tensor.equal(before[name]) for name, tensor in to_canonical(model.bundle.model).items())
    assert model.generate(SENTENCES) == answers[0]


def test_generate_takes_an_adapter_of_either_format(
    base: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("\n".join(SENTENCES) + "\n")
    assert main(["export", str(adapters[0]), "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
    capsys.readouterr()

    def answers(*words: str | Path) -> str:
        assert main(["generate", *map(str, words), "--input", str(tmp_path / "in.txt"), "--beam-size", "2"]) == 0
        return capsys.readouterr().out

    expected = answers(adapters[0])
    assert answers(base) != expected
    assert answers(base, "--adapter", adapters[0]) == answers(base, "--adapter", tmp_path / "peft") == expected


def test_what_is_no_adapter_of_this_base_is_named(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    model, other = load(base), make_bundle(tmp_path / "other", max_length=17)
    with pytest.raises(BundleError, match=r"other is no adapter: it is no adapter bundle and has no adapter_config\.json of"):
        model.adapted(other)
    with pytest.raises(BundleError, match=r"the adapter was trained on another base; let base\.path or --base name that one"):
        load(other).adapted(adapters[0])
    upper = adapt(tmp_path / "upper", adapters[0], seed=4)
    with pytest.raises(BundleError, match="the adapter was trained on another base"):
        model.adapted(upper)
    assert load(adapters[0]).adapted(upper).bundle.adapters == 2
    root = make_bundle(tmp_path / "root")
    middle = adapt(tmp_path / "middle", root, seed=2)
    highest, moved = adapt(tmp_path / "highest", middle, seed=3), root.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match=r"highest adapts .*middle, not .*moved; name that one, or merge it first"):
        load(moved).adapted(highest)


def test_a_merged_bundle_is_a_base_like_any_other(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    """It trains on with all weights or under the next adapter."""
    merged = tmp_path / "merged"
    assert main(["merge", str(adapters[0]), "--output", str(merged)]) == 0
    stored, expected = find_bundle(merged), find_bundle(adapters[0])
    for adapter in (None, LoraConfig(rank=1, alpha=1, targets=ADAPTED)):
        model, weights = build_on_base(stored, stored.description.model, adapter, seed=1)
        load_canonical(model, weights)
        tensors = to_canonical(model)
        assert all(tensors[name].equal(expected.read(name)) for name in expected.names())
    assert load(merged).adapted(adapt(tmp_path / "next", merged, seed=5)).bundle.adapters == 1

"""A bundle from a checkpoint: the bytes that training would write, in little memory, and one message for each mistake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.checkpoint.adapter_files import read_adapter
from dstrain.checkpoint.bundle import find_bundle, load_bundle
from dstrain.checkpoint.consolidate import consolidate
from dstrain.checkpoint.manager import CheckpointManager
from dstrain.checkpoint.template import BundleTemplate
from dstrain.errors import BundleError, CheckpointError
from dstrain.fragment import Fragment, StoredState
from dstrain.models.config import EncoderDecoderConfig, PlainEmbedding, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import canonical_shapes, parameter_layouts
from tests.paths import ROOT
from tests.unit.adapters.adapted import logits
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.checkpoint.test_adapter_bundle import ADAPTER, make
from tests.unit.checkpoint.test_bundle import save, tokenizers
from tests.unit.models.build import VOCABULARY, small_config, small_model

STATE = {"step": 7, "num_targets": 99, "best_score": 0.5, "epoch": 1}
RECIPE = {"version": 1, "description": "Prüfung"}


class Sharded:
    """Rank `rank` of `size` holds an equal share of every tensor."""

    layout = "any"

    def __init__(self, tensors: dict[str, Tensor], ranks: ThreadRanks) -> None:
        self.tensors, self.rank, self.size = tensors, ranks.rank, ranks.size

    def fragments(self) -> list[Fragment]:
        found = []
        for name, tensor in self.tensors.items():
            share = -(-tensor.numel() // self.size)
            values = tensor.flatten()[self.rank * share :][:share]
            found += [Fragment(name, tuple(tensor.shape), self.rank * share, values)] if len(values) else []
        return found

    def scalars(self) -> dict[str, Any]:
        return {}

    def load(self, stored: StoredState) -> None:
        raise NotImplementedError

    def sync(self) -> None:
        raise NotImplementedError


def weights_of(config: EncoderDecoderConfig, vocabulary: VocabularySizes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = canonical_shapes(parameter_layouts(build_model(config, vocabulary, seed=None)))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def checkpoint_of(directory: Path, template: BundleTemplate, size: int, **kinds: dict[str, Tensor]) -> Path:
    """Written by `size` ranks: tensors by kind and name."""
    tensors = {f"{kind}/{name}": tensor for kind, held in kinds.items() for name, tensor in held.items()}

    def save(ranks: ThreadRanks) -> Path:
        manager = CheckpointManager(directory, ranks, keep=1, run_id="run", template=template.write)
        return manager.save(7, Sharded(tensors, ranks), STATE)

    path = on_ranks(size, save)[0]
    assert isinstance(path, Path), path
    return path


TEMPLATE = BundleTemplate(small_config(), VOCABULARY, tokenizers(), RECIPE, None)
TRAINED, AVERAGED = (weights_of(small_config(), VOCABULARY, seed) for seed in (1, 2))
OWN = {"objective.projection.weight": torch.ones(3, 3)}
NOTES = {"step": 7, "num_targets": 99, "best_score": 0.5}


def content(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [1, 3, 5])
def test_it_is_byte_for_byte_the_bundle_that_training_writes(tmp_path: Path, size: int) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", TEMPLATE, size, master=TRAINED | OWN, exp_avg=AVERAGED | OWN)
    assert consolidate(checkpoint, tmp_path / "found") == "trained"
    TEMPLATE.save(tmp_path / "expected", TRAINED, NOTES)
    assert content(tmp_path / "found") == content(tmp_path / "expected")


def test_the_moving_average_is_what_bundles_hold_and_the_choice_is_free(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", TEMPLATE, 2, master=TRAINED, ema=AVERAGED)
    for choice, kind, weights in (
        ("as_bundles", "averaged", AVERAGED),
        ("averaged", "averaged", AVERAGED),
        ("trained", "trained", TRAINED),
    ):
        found, expected = tmp_path / f"found_{choice}", tmp_path / f"expected_{choice}"
        assert consolidate(checkpoint, found, weights=choice) == kind  # type: ignore[arg-type]
        TEMPLATE.save(expected, weights, NOTES)
        assert content(found) == content(expected)


def test_an_adapter_keeps_its_reference_to_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base was named by a relative path, and the bundle lies elsewhere than the checkpoint."""
    monkeypatch.chdir(tmp_path)
    save(Path("base"), small_model())
    make(Path("runs/adapted"), Path("base"))
    weights = read_adapter(Path("runs/adapted")).weights
    template = BundleTemplate(small_config(), VOCABULARY, tokenizers(), RECIPE, (ADAPTER, find_bundle(Path("base"))))
    checkpoint = checkpoint_of(Path("runs/checkpoints"), template, 3, master=weights)
    consolidate(checkpoint, Path("other/place/bundle"))
    template.save(Path("other/place/expected"), weights, NOTES)
    assert content(Path("other/place/bundle")) == content(Path("other/place/expected"))
    assert torch.equal(logits(load_bundle(Path("other/place/bundle")).model), logits(load_bundle(Path("runs/adapted")).model))


def test_mistakes_are_named(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", TEMPLATE, 2, master=TRAINED)
    output = tmp_path / "bundle"
    with pytest.raises(CheckpointError, match=r"holds no moving average: its run has no training.ema; choose --weights trained$"):
        consolidate(checkpoint, output, weights="averaged")
    assert consolidate(checkpoint, tmp_path / "trained", weights="trained") == "trained"
    with pytest.raises(CheckpointError, match=r"c is no checkpoint: did you mean .*/c/step_00000007\?"):
        consolidate(checkpoint.parent, output)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle, so it is not replaced"):
        consolidate(checkpoint, tmp_path / "text")
    short = checkpoint_of(tmp_path / "short", TEMPLATE, 2, master=dict(list(TRAINED.items())[1:]))
    with pytest.raises(BundleError, match=rf"missing: {next(iter(TRAINED))}"):
        consolidate(short, output)
    path = checkpoint / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    remedy = "use another checkpoint, or restore this one from a copy"
    with pytest.raises(CheckpointError, match=rf"rank_00001.safetensors holds [^;]* it is truncated or altered; {remedy}$"):
        consolidate(checkpoint, output)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"rank_00001.safetensors: [^;]*; the manifest lists this file: {remedy}$"):
        consolidate(checkpoint, output)
    assert not output.exists()


MEASURE = """
import sys
from pathlib import Path
from dstrain.checkpoint.adapter_files import read_adapter
from dstrain.checkpoint.bundle import find_bundle, load_bundle
from dstrain.checkpoint.consolidate import consolidate
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
consolidate(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""
"""ru_maxrss would be that of the parent, which holds all tensors."""


def test_a_checkpoint_of_200_mb_needs_less_memory_than_its_largest_tensor(tmp_path: Path) -> None:
    config = small_config(model_dim=516, embedding=PlainEmbedding(tie="none"))
    vocabulary = VocabularySizes(source=30_000, target=30_000)
    weights = weights_of(config, vocabulary, 1)
    sizes = [tensor.nbytes / 2**20 for tensor in weights.values()]
    assert sum(sizes) > 190
    template = BundleTemplate(config, vocabulary, tokenizers(), RECIPE, None)
    checkpoint = checkpoint_of(tmp_path / "c", template, 3, master=weights)
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 1.3 * max(sizes), f"largest tensor: {max(sizes):.0f} MiB"
    print(f"peak {float(done.stdout):.0f} MiB, largest tensor {max(sizes):.0f} MiB, all {sum(sizes):.0f} MiB")
    shutil.rmtree(tmp_path)

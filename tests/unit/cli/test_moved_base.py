"""Every verb that reads an adapter bundle takes the place its base has moved to, and no other base."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import inject
from dstrain.api import load
from dstrain.checkpoint.bundle import find_bundle, load_bundle, save_adapter_bundle
from dstrain.errors import BundleError
from dstrain.models.factory import build_model
from dstrain.models.weights import load_canonical
from tests.unit.adapters.adapted import adapter_of
from tests.unit.cli.verbs import Verbs, bundle_for
from tests.unit.distillation.toy_store import MODEL, prepared

VERBS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "BUNDLE", "--input", "DATA/../in.txt", "--output", "OUT", "--beam-size", "1"),
    "interactive": ("interactive", "BUNDLE", "--beam-size", "1"),
    "validate": ("validate", "BUNDLE", "--data", "DATA", "--no-generate", "--device", "cpu"),
    "inspect": ("inspect", "BUNDLE"),
    "merge": ("merge", "BUNDLE", "--output", "OUT"),
    "export": ("export", "BUNDLE", "--format", "ctranslate2", "--output", "OUT"),
    "export peft": ("export", "BUNDLE", "--format", "peft", "--output", "OUT"),
    "average": ("average", "BUNDLE", "OTHER", "--output", "OUT"),
    "dump-logits": ("dump-logits", "--teacher", "BUNDLE", "--data", "DATA", "--split", "valid", "--output", "OUT"),
    "pseudo-label": ("pseudo-label", "--teacher", "BUNDLE", "--data", "DATA", "--output", "OUT", "--max-repeats", "99"),
}


def adapt(directory: Path, base: Path, *, seed: int) -> Path:
    """A trained-looking adapter bundle over a bundle."""
    stored, adapter = find_bundle(base), LoraConfig(rank=2, alpha=4, targets=("q_proj",))
    model = build_model(MODEL, stored.description.vocabulary, projections="separate", seed=None)
    load_canonical(model, inject(model, adapter, stored, seed=seed))
    weights = {name: torch.full_like(tensor, 0.1) for name, tensor in adapter_of(model).items() if "lora" in name}
    save_adapter_bundle(directory, adapter=adapter, base=stored, weights=weights, recipe=None, notes={"step": seed})
    return directory


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DATA; BUNDLE and OTHER over a base that has moved to BASE; ANOTHER, a base of another run."""
    home = tmp_path_factory.mktemp("moved")
    data = prepared(home / "data")
    (home / "in.txt").write_text("the dog runs .\n")
    base = bundle_for(data, home / "base", seed=3, eos_scale=4.0)
    adapted = [adapt(home / name, base, seed=seed) for seed, name in enumerate(("adapted", "other"))]
    moved = base.rename(home / "away")
    another = bundle_for(data, home / "another", seed=4)
    return {"DATA": data, "BUNDLE": adapted[0], "OTHER": adapted[1], "BASE": moved, "ANOTHER": another}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_told_where_the_base_is(
    verb: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(output: str) -> list[str]:
        names = {**places, "OUT": tmp_path / output}
        return [str(names.get(word, word)).replace("DATA/..", str(places["DATA"].parent)) for word in VERBS[verb]]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the dog runs .\n")))
    run = Verbs(capsys)
    assert "which is no directory; put the base bundle there, write its new path into base.path, or name it with --base" in (
        run.fail(*words("first"))
    )
    assert "the adapter was trained on another base" in run.fail(*words("second"), "--base", places["ANOTHER"])
    printed = run.succeed(*words("third"), "--base", places["BASE"])
    assert printed or (tmp_path / "third").exists()


def test_the_moved_base_gives_the_same_model(places: dict[str, Path], tmp_path: Path) -> None:
    """Also if it is under two adapters, the upper one being where it was, and if another bundle is at its old place."""
    model = load(places["BUNDLE"], base=places["BASE"])
    assert model.bundle.fingerprint != load(places["BASE"]).bundle.fingerprint
    old = places["BASE"].with_name("base")
    old.symlink_to(places["BASE"])
    try:
        assert load(places["BUNDLE"]).bundle.fingerprint == model.bundle.fingerprint
        upper = adapt(tmp_path / "upper", places["BUNDLE"], seed=7)
        expected = find_bundle(upper).fingerprint
        old.unlink()
        old.symlink_to(places["ANOTHER"])
        assert load(places["BUNDLE"], base=places["BASE"]).bundle.fingerprint == model.bundle.fingerprint
    finally:
        old.unlink()
    stacked = load_bundle(upper, base=places["BASE"])
    assert (stacked.fingerprint, stacked.adapters) == (expected, 2)


def test_a_base_without_use_is_refused(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BundleError, match="away is no adapter bundle, so it rests on no other; leave --base out"):
        load(places["BASE"], base=places["ANOTHER"])
    run = Verbs(capsys)
    assert "is for an adapter bundle, which" in run.fail("inspect", places["DATA"], "--base", places["BASE"])

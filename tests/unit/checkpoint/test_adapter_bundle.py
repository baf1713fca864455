"""Adapter bundles: small, read as their merged model, true to their base, and every kind of damage is named."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject
from dstrain.checkpoint import adapter_files
from dstrain.checkpoint.average import average_bundles
from dstrain.checkpoint.bundle import find_bundle, load_bundle, save_adapter_bundle
from dstrain.cli.main import main
from dstrain.errors import BundleError
from dstrain.models.factory import Model
from dstrain.models.weights import load_canonical, to_canonical
from dstrain.storage.hashing import sha256_of_file
from tests.unit.adapters.adapted import adapter_of, logits, lora
from tests.unit.checkpoint.test_bundle import save
from tests.unit.models.build import small_model

ADAPTER = lora("q_proj", "tokens", bias="lora_only", dora=True)


def make(directory: Path, base: Path, adapter: LoraConfig = ADAPTER, *, seed: int = 1) -> Model:
    """An adapter bundle on a base bundle; returns the adapted model, computing with its parts apart."""
    model = small_model(projections="separate")
    load_canonical(model, inject(model, adapter, find_bundle(base), seed=seed))
    freeze(model, adapter)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * parameter.requires_grad)
    save_adapter_bundle(
        directory,
        adapter=adapter,
        base=find_bundle(base),
        weights=adapter_of(model),
        recipe={"version": 1, "description": "adapter"},
        notes={"step": seed},
        overwrite=True,
    )
    return model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, with a plain bundle `base` and an adapter bundle `runs/adapted` on it, named by relative paths."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(Path("base"), small_model())
    make(Path("runs/adapted"), Path("base"))
    return tmp_path / "here"


ADAPTED = Path("runs/adapted")


def test_an_adapter_bundle_is_small_and_computes_what_was_trained(place: Path) -> None:
    model = make(ADAPTED, Path("base"), seed=2)
    names = sorted(str(path.relative_to(ADAPTED)) for path in ADAPTED.rglob("*") if path.is_file())
    assert names == ["adapter/adapter.safetensors", "adapter/adapter.yaml", "recipe.yaml"]
    loaded, base = load_bundle(ADAPTED), load_bundle(Path("base"))
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=3e-5)
    assert (logits(loaded.model) - logits(base.model)).abs().max() > 0.1
    assert not loaded.model.training
    assert (loaded.model_config, loaded.vocabulary) == (base.model_config, base.vocabulary)
    assert loaded.tokenizers is not None
    assert loaded.recipe == {"version": 1, "description": "adapter"}
    assert (loaded.notes, loaded.adapters, base.adapters) == ({"step": 2}, 1, 0)


def test_the_base_is_found_by_a_path_from_the_bundle_or_an_absolute_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference()["path"] == "../../base"
    expected = logits(load_bundle(ADAPTED).model)
    monkeypatch.chdir("/")
    place.rename(place.with_name("moved"))
    moved = place.with_name("moved")
    assert torch.equal(logits(load_bundle(moved / ADAPTED).model), expected)
    make(moved / "elsewhere" / "deep", moved / "base")
    assert reference(moved / "elsewhere" / "deep")["path"] == str(moved / "base")
    (moved / "elsewhere" / "deep").rename(moved / "flat")
    load_bundle(moved / "flat")


def reference(bundle: Path = ADAPTED) -> dict[str, str]:
    """What adapter.yaml says of the base."""
    found: dict[str, str] = yaml.safe_load((bundle / "adapter/adapter.yaml").read_text())["base"]
    return found


def change(**fields: object) -> Callable[[Path], None]:
    def act(bundle: Path) -> None:
        file = bundle / "adapter/adapter.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **fields}))

    return act


def alter(bundle: Path) -> None:
    file = bundle / "adapter/adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def rename_a_tensor(bundle: Path) -> None:
    file = bundle / "adapter/adapter.safetensors"
    tensors = load_file(file)
    tensors["encoder.layers.9.self_attention.q_proj.lora_a"] = tensors.pop("encoder.layers.0.self_attention.q_proj.lora_a")
    save_file(tensors, file)
    change(sha256=sha256_of_file(file))(bundle)


def another_base(bundle: Path) -> None:
    save(Path("base"), small_model(seed=2))


def circle(bundle: Path) -> None:
    shutil.copytree(bundle, "runs/other")
    for one, other in ((bundle, "other"), (Path("runs/other"), "adapted")):
        change(base={**reference(one), "path": f"../{other}"})(one)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "moved base": (
        lambda b: Path("base").rename("away"),
        r"adapter\.yaml: base\.path = \.\./\.\./base leads to .*, which is no directory; put the base bundle there, write",
    ),
    "wrong base": (
        another_base,
        r"adapter\.yaml: base\.fingerprint = \w{12}, but .*base has \w{12}: the adapter was trained on another "
        r"base; let base\.path or --base name that one",
    ),
    "broken base": (lambda b: Path("base/model.yaml").unlink(), r"base is not a bundle: it has no model\.yaml"),
    "no weights": (lambda b: (b / "adapter/adapter.safetensors").unlink(), r"adapter\.safetensors is missing: the bundle is inc"),
    "altered weights": (alter, r"adapter\.safetensors: the file was altered .*\(checksum\); restore it"),
    "a tensor of another name": (rename_a_tensor, r"safetensors: the base has no weights for encoder\.layers\.9\.self_attention"),
    "other format": (change(format=7), r"adapter\.yaml has format 7, this dstrain reads 1; use the version that wrote it"),
    "unknown key": (change(flavor="sweet"), r"adapter\.yaml is not a valid description of an adapter: flavor: unknown key"),
    "other rank": (
        change(adapter=ADAPTER.model_copy(update={"rank": 4}).model_dump(mode="json")),
        r"adapter\.safetensors: the adapter does not fit its base: .*lora_a is \(3, 24\), the base needs \(4, 24\)",
    ),
    "no YAML": (
        lambda b: (b / "adapter/adapter.yaml").write_text("{"),
        r"adapter\.yaml is not valid YAML \(line 1, column 2: .*restore it from a copy",
    ),
    "a circle": (circle, r"adapter\.yaml: base\.path leads back to .*adapted; let it name the bundle trained on"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(place: Path, damage: str) -> None:
    act, message = DAMAGES[damage]
    act(ADAPTED)
    with pytest.raises(BundleError) as caught:
        load_bundle(ADAPTED)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value


def test_an_adapter_that_knows_its_base_by_the_weights_only_is_still_read(place: Path) -> None:
    """As adapters were written before a bundle had one fingerprint."""
    expected = find_bundle(ADAPTED).fingerprint
    base = find_bundle(Path("base"))
    change(base={"path": "../../base", "fingerprint": base.description.sha256})(ADAPTED)
    assert find_bundle(ADAPTED).fingerprint == expected
    assert load_bundle(ADAPTED).fingerprint == expected


def test_adapters_are_trained_one_after_another(place: Path) -> None:
    """On an adapter bundle, and on a merged one: the same function, another fingerprint."""
    assert main(["merge", str(ADAPTED), "--output", "merged"]) == 0
    second = LoraConfig(rank=2, alpha=1, targets=("v_proj", "projection"), rank_scaled=True)
    models = [make(Path(f"runs/{name}"), base, second) for name, base in (("stacked", ADAPTED), ("flat", Path("merged")))]
    for model, name in zip(models, ("stacked", "flat"), strict=True):
        loaded = load_bundle(Path("runs") / name)
        torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-5, atol=3e-5)
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert load_bundle(Path("runs/stacked")).adapters == 2
    fingerprints = [
        find_bundle(Path(name)).fingerprint for name in ("base", "runs/adapted", "merged", "runs/stacked", "runs/flat")
    ]
    assert len(set(fingerprints)) == 5
    make(ADAPTED, Path("base"), seed=9)
    with pytest.raises(BundleError, match=r"stacked/adapter/adapter\.yaml: base\.fingerprint = .* was trained on another base"):
        load_bundle(Path("runs/stacked"))


def test_merge_makes_a_plain_bundle(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = load_bundle(ADAPTED)
    assert main(["merge", str(ADAPTED), "--output", "merged"]) == 0
    shutil.rmtree("base")
    shutil.rmtree("runs")
    merged = load_bundle(Path("merged"))
    assert torch.equal(logits(merged.model), logits(expected.model))
    assert merged.adapters == 0
    assert merged.recipe == expected.recipe
    assert merged.notes == {"step": 1, "merged_from": "runs/adapted"}
    assert main(["merge", "merged", "--output", "again"]) == 1
    assert "merged is a plain bundle already; name an adapter bundle" in capfd.readouterr().err


def test_the_average_is_that_of_the_adapted_weights(place: Path) -> None:
    make(Path("runs/other"), Path("base"), seed=2)
    average_bundles(lambda: [ADAPTED, Path("runs/other"), Path("base")], Path("mean"))
    parts = [find_bundle(path) for path in (ADAPTED, Path("runs/other"), Path("base"))]
    found = load_bundle(Path("mean"))
    assert found.adapters == 0
    for name, tensor in to_canonical(found.model).items():
        torch.testing.assert_close(tensor, sum(part.read(name) for part in parts) / 3, rtol=1e-6, atol=1e-6)


def test_inspect_names_the_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ADAPTED)]) == 0
    printed = capsys.readouterr().out
    assert f"adapters: 1, over {place / 'base'}" in printed
    assert main(["inspect", "base"]) == 0
    assert "adapters" not in capsys.readouterr().out


def test_bundles_replace_each_other_and_nothing_else(place: Path) -> None:
    make(Path("base2"), Path("base"))
    save(Path("base2"), small_model())
    assert load_bundle(Path("base2")).adapters == 0
    Path("thesis").mkdir()
    Path("thesis/chapter").touch()
    with pytest.raises(BundleError, match="thesis exists and is not a bundle, so it is not replaced"):
        make(Path("thesis"), Path("base"))


def test_what_was_not_written_unchanged_is_no_bundle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = adapter_files.save_tensors
    monkeypatch.setattr(
        adapter_files, "save_tensors", lambda path, tensors: write(path, {name: value + 1 for name, value in tensors.items()})
    )
    with pytest.raises(BundleError, match="adapter differs from the data written into it; check the disk and the memory"):
        make(ADAPTED, Path("base"), seed=5)
    assert load_bundle(ADAPTED).notes == {"step": 1}, "the bundle that was there stays"

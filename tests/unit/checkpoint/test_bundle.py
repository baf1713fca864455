"""Bundles: what is written is what is read; replaced atomically; every kind of damage is named."""

import hashlib
import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dstrain.checkpoint import bundle as bundle_module
from dstrain.checkpoint.bundle import find_bundle, load_bundle, save_bundle
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer, TokenizerPair
from dstrain.errors import BundleError, DataError, StorageError
from dstrain.models.config import PlainEmbedding
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.weights import to_canonical
from dstrain.storage import atomic
from dstrain.storage.hashing import sha256_of_file
from tests.unit.models.build import VOCABULARY, sequences, small_config, small_model


def tokenizers() -> TokenizerPair:
    content = "".join(f"word{number} 1\n" for number in range(VOCABULARY.source - 4)).encode()
    return TokenizerPair(DictionaryTokenizer(content), DictionaryTokenizer(content))


def save(directory: Path, model: EncoderDecoder, *, step: int = 1, overwrite: bool = True) -> None:
    save_bundle(
        directory,
        model_config=model.config,
        vocabulary=model.vocabulary,
        weights=to_canonical(model),
        tokenizers=tokenizers(),
        recipe={"version": 1, "description": "Prüfung"},
        notes={"step": step},
        overwrite=overwrite,
    )


@pytest.mark.parametrize("tie", ["all", "decoder", "none"])
@pytest.mark.parametrize("projections", ["fused", "separate"])
def test_logits_before_equal_logits_after(tmp_path: Path, tie: str, projections: str) -> None:
    model = small_model(small_config(embedding=PlainEmbedding(tie=tie)), projections=projections)
    save(tmp_path / "bundle", model)
    loaded = load_bundle(tmp_path / "bundle")
    source, target = sequences(5, 3), sequences(4, 6)
    assert not loaded.model.training
    torch.testing.assert_close(
        loaded.model.project(loaded.model(source, target).hidden),
        model.project(model(source, target).hidden),
        rtol=1e-5,
        atol=1e-5,
    )
    before, after = to_canonical(model), to_canonical(loaded.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.model_config, loaded.vocabulary) == (model.config, VOCABULARY)
    assert loaded.recipe == {"version": 1, "description": "Prüfung"}
    assert loaded.notes == {"step": 1}
    assert loaded.tokenizers.fingerprint == tokenizers().fingerprint
    assert loaded.directory == tmp_path / "bundle"


def test_the_files_are_plain(tmp_path: Path) -> None:
    model = small_model(small_config(embedding=PlainEmbedding(tie="all")))
    save(tmp_path / "bundle", model)
    names = sorted(path.relative_to(tmp_path / "bundle").as_posix() for path in (tmp_path / "bundle").rglob("*.*"))
    assert names == ["model.safetensors", "model.yaml", "recipe.yaml", "tokenizer/joint.dict.txt", "tokenizer/tokenizer.yaml"]
    stored = load_file(tmp_path / "bundle/model.safetensors")
    assert "encoder.layers.0.self_attention.q_proj.weight" in stored
    assert "projection.weight" not in stored, "tied matrices are stored once"
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())


def test_without_tokenizers_and_recipe(tmp_path: Path) -> None:
    model = small_model()
    save_bundle(
        tmp_path / "deep" / "bundle",
        model_config=model.config,
        vocabulary=VOCABULARY,
        weights=to_canonical(model),
        tokenizers=None,
        recipe=None,
    )
    loaded = load_bundle(tmp_path / "deep" / "bundle")
    assert (loaded.tokenizers, loaded.recipe, loaded.notes) == (None, None, {})


def test_weights_that_do_not_fit_are_never_written(tmp_path: Path) -> None:
    model = small_model()
    save(tmp_path / "bundle", model, step=1)
    weights = {name: tensor for name, tensor in to_canonical(model).items() if "cross" not in name}
    with pytest.raises(BundleError, match=r"missing: decoder\.layers\.0\.cross_attention"):
        save_bundle(
            tmp_path / "bundle", model_config=model.config, vocabulary=VOCABULARY, weights=weights, tokenizers=None, recipe=None
        )
    assert load_bundle(tmp_path / "bundle").notes == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_on_request_only(tmp_path: Path) -> None:
    save(tmp_path / "bundle", small_model(), step=1, overwrite=False)
    with pytest.raises(StorageError, match="bundle exists; add --overwrite to replace it, or choose another --output"):
        save(tmp_path / "bundle", small_model(), step=2, overwrite=False)
    assert load_bundle(tmp_path / "bundle").notes == {"step": 1}
    save(tmp_path / "bundle", small_model(), step=2)
    assert load_bundle(tmp_path / "bundle").notes == {"step": 2}


def test_only_bundles_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for name in ("thesis", "file"):
        with pytest.raises(
            BundleError, match=f"{name} exists and is not a bundle, so it is not replaced; choose another --output"
        ):
            save(tmp_path / name, small_model())
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", small_model())
    assert load_bundle(tmp_path / "empty").notes == {"step": 1}


def test_a_failed_save_leaves_the_old_bundle_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    save(tmp_path / "bundle", model, step=1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync_tree", full)
    with pytest.raises(BundleError, match=r"cannot write the bundle .*bundle: .*No space left on device; free some space"):
        save(tmp_path / "bundle", model, step=2)
    assert load_bundle(tmp_path / "bundle").notes == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    monkeypatch.undo()
    save(tmp_path / "bundle", model, step=2)
    assert load_bundle(tmp_path / "bundle").notes == {"step": 2}


def test_a_kill_between_the_renames_leaves_a_readable_bundle(tmp_path: Path) -> None:
    save(tmp_path / "bundle", small_model())
    (tmp_path / "bundle").rename(tmp_path / ".bundle.old")
    assert load_bundle(tmp_path / "bundle").notes == {"step": 1}


def save_for_ever(directory: Path) -> None:
    model = small_model()
    for step in range(1, 1_000_000):
        save(directory, model, step=step)


def inode(directory: Path) -> int | None:
    """Another one for each save; None between its two renames."""
    try:
        return directory.stat().st_ino
    except FileNotFoundError:
        return None


def test_killed_at_any_moment_a_whole_bundle_remains(tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    save(directory, small_model(), step=0)
    reached = []
    for delay in (0.0, 0.027, 0.061, 0.083, 0.12):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(directory,))
        before = inode(directory)
        process.start()
        deadline = time.monotonic() + 60
        while inode(directory) in (before, None) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join(timeout=60)
        reached.append(load_bundle(directory).notes["step"])
    assert max(reached) > 0, "no save was finished, so nothing was tested"
    save(directory, small_model(), step=99)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "the next save clears what the kills left"


def alter_weights(bundle: Path) -> None:
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (bundle / "model.safetensors").write_bytes(content)


def change_yaml(**fields: object) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        content = yaml.safe_load((bundle / "model.yaml").read_text())
        for name, value in fields.items():
            if value is None:
                del content[name]
            else:
                content[name] = value
        (bundle / "model.yaml").write_text(yaml.safe_dump(content))

    return change


def lose_a_tensor(bundle: Path) -> None:
    weights = load_file(bundle / "model.safetensors")
    del weights["projection.weight"]
    save_file(weights, bundle / "model.safetensors")
    change_yaml(sha256=sha256_of_file(bundle / "model.safetensors"))(bundle)


def other_tokenizer(bundle: Path) -> None:
    pair = DictionaryTokenizer(b"a 1\nb 1\n")
    bundle_module.save_tokenizers(TokenizerPair(pair, pair), bundle / "tokenizer")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model.yaml": (lambda b: (b / "model.yaml").unlink(), r"is not a bundle: it has no model\.yaml; name a bundle that"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), r"model\.safetensors is missing: the bundle is incomplete"),
    "altered weights": (alter_weights, r"model\.safetensors: the file was altered .*\(checksum\); restore it"),
    "a tensor lost": (lose_a_tensor, r"model\.safetensors: the weights do not fit the model: missing: projection\.weight"),
    "other format": (change_yaml(format=7), r"model\.yaml has format 7, this dstrain reads 1; use the version that wrote it"),
    "missing key": (
        change_yaml(vocabulary=None),
        r"model\.yaml is not a valid description of a model: vocabulary: missing",
    ),
    "unknown key": (change_yaml(flavor="sweet"), r"model\.yaml is not a valid description of a model: flavor: unknown key"),
    "no mapping": (lambda b: (b / "model.yaml").write_text("- 1"), r"model\.yaml holds no mapping"),
    "no YAML": (
        lambda b: (b / "model.yaml").write_text("{"),
        r"model\.yaml is not valid YAML \(line 1, column 2: .*restore it from a copy",
    ),
    "no tokenizer": (lambda b: (b / "tokenizer").rename(b / "elsewhere"), r"tokenizer is missing: the bundle is incomplete"),
    "other tokenizer": (other_tokenizer, r"tokenizer is not the tokenizer of this model; restore it"),
    "no tokenizer file": (lambda b: (b / "tokenizer/joint.dict.txt").unlink(), r"joint\.dict\.txt: No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path / "bundle", small_model())
    act, message = DAMAGES[damage]
    act(tmp_path / "bundle")
    with pytest.raises((BundleError, DataError)) as caught:
        load_bundle(tmp_path / "bundle")
    assert re.search(message, str(caught.value), re.DOTALL), caught.value


def test_the_fingerprint_is_of_architecture_vocabulary_and_weights(tmp_path: Path) -> None:
    """The value that dumped logits and pseudo-labels have always named their teacher by."""
    save(tmp_path / "bundle", small_model())
    content = yaml.safe_load((tmp_path / "bundle/model.yaml").read_text())
    contents = json.dumps(
        [content["model"], content["vocabulary"], sha256_of_file(tmp_path / "bundle/model.safetensors")], sort_keys=True
    )
    assert find_bundle(tmp_path / "bundle").fingerprint == hashlib.sha256(contents.encode()).hexdigest()
    change_yaml(model={**content["model"], "activation": "gelu"})(tmp_path / "bundle")
    assert find_bundle(tmp_path / "bundle").fingerprint != hashlib.sha256(contents.encode()).hexdigest()


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="absent is not a bundle"):
        load_bundle(tmp_path / "absent")


def test_a_bundle_that_is_replaced_before_its_weights_are_read_is_not_mixed(tmp_path: Path) -> None:
    """A training reads its base and its teachers tensor by tensor, long after it has compared their checksums."""
    bundle = tmp_path / "best"
    save(bundle, small_model(small_config(), seed=1))
    stored = find_bundle(bundle)
    name = next(iter(stored.names()))
    assert torch.equal(stored.read(name), load_file(bundle / "model.safetensors")[name])
    save(bundle, small_model(small_config(), seed=2))
    with pytest.raises(BundleError, match=r"best was replaced while it was read, .*; run the same command again"):
        stored.read(name)
    assert torch.equal(find_bundle(bundle).read(name), load_file(bundle / "model.safetensors")[name])
    shutil.rmtree(bundle)
    with pytest.raises(BundleError, match="best was replaced while it was read"):
        stored.read(name)

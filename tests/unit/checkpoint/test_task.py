"""What a bundle's model does is stated in the bundle, carried on to the bundles made from it, and derived only for old ones."""

from pathlib import Path

import pytest
import yaml

from dstrain.adapters.config import LoraConfig
from dstrain.api import load
from dstrain.checkpoint.average import average_bundles
from dstrain.checkpoint.bundle import find_bundle, save_adapter_bundle
from dstrain.checkpoint.task import BundleTask, task_of
from dstrain.cli.main import main
from dstrain.data.config import KINDS_WITHOUT_SOURCE, DataConfig, TextOnly, is_text_only
from dstrain.errors import BundleError
from dstrain.models.config import DecoderOnlyConfig
from tests.unit.generation.small_bundle import make_bundle, make_decoder_only_bundle
from tests.unit.models.build import small_config

LANGUAGE_MODEL = DecoderOnlyConfig(model_dim=8, decoder={"depth": 1, "num_heads": 2, "ffn_dim": 8})


def recipe(*kinds: str) -> dict[str, object]:
    return {"data": {"train": [{"kind": kind} for kind in kinds]}}


def test_the_rule() -> None:
    assert task_of(small_config(), recipe("parallel")) == "translation"
    assert task_of(small_config(), None) == "translation"
    assert task_of(LANGUAGE_MODEL, None) == "continuation"
    assert task_of(LANGUAGE_MODEL, recipe("text", "fairseq_text")) == "continuation"
    assert task_of(LANGUAGE_MODEL, recipe("text", "tsv")) == "translation"
    for kind, task in (("language_modeling", "continuation"), ("prefix_lm", "translation"), ("denoising", "translation")):
        corpus = {"kind": "text", "task": {"kind": kind}}
        assert task_of(LANGUAGE_MODEL, {"data": {"train": [corpus]}}) == task


def test_the_kinds_without_a_source_are_those_of_the_recipe() -> None:
    paths = {"source": "s", "target": "t", "path": "p", "split": "train", "num_pairs": 1}
    for kind, keys in (
        ("parallel", ("source", "target")),
        ("tsv", ("path",)),
        ("text", ("path",)),
        ("fairseq_text", ("path",)),
    ):
        corpus = {"kind": kind, **{key: paths[key] for key in keys}}
        dictionaries = {"kind": "fairseq_dictionaries", "source": "d"}
        parsed = DataConfig.model_validate({"train": [corpus], "valid": [corpus], "tokenizer": dictionaries})
        assert is_text_only(parsed.train[0]) == (kind in KINDS_WITHOUT_SOURCE) == isinstance(parsed.train[0], TextOnly)


@pytest.mark.parametrize(
    ("trained_on", "task"), [("fairseq_text", "continuation"), ("tsv", "translation"), (None, "continuation")]
)
def test_the_bundle_states_it_and_old_ones_are_read_by_the_rule(trained_on: str | None, task: BundleTask, tmp_path: Path) -> None:
    bundle = make_decoder_only_bundle(tmp_path / "bundle", trained_on=trained_on)
    path = bundle / "model.yaml"
    tree = yaml.safe_load(path.read_text())
    assert tree["task"] == task
    before = find_bundle(bundle).fingerprint
    del tree["task"]
    path.write_text(yaml.safe_dump(tree))
    old = find_bundle(bundle)
    assert (old.task, old.fingerprint) == (task, before)
    assert load(bundle).continues == (task == "continuation")


def test_it_stays_in_bundles_made_from_others(tmp_path: Path) -> None:
    """Also where the rule would say another thing: the recipe is gone, the statement is not."""
    bundle = make_decoder_only_bundle(tmp_path / "bundle", trained_on="tsv")
    (bundle / "recipe.yaml").unlink()
    average_bundles(lambda: [bundle, bundle], tmp_path / "average")
    base = find_bundle(bundle)
    adapter = LoraConfig(rank=2, alpha=1, targets=("q_proj",))
    name = "decoder.layers.0.self_attention.q_proj"
    rows, columns = base.shape(f"{name}.weight")
    weights = {f"{name}.lora_a": base.read(f"{name}.weight")[:2], f"{name}.lora_b": base.read(f"{name}.weight")[:, :2]}
    assert (rows, columns) == (16, 16)
    for directory, trained in (("adapted", None), ("continuing", recipe("fairseq_text"))):
        save_adapter_bundle(tmp_path / directory, adapter=adapter, base=base, weights=weights, recipe=trained, notes={})
        assert main(["merge", str(tmp_path / directory), "--output", str(tmp_path / f"{directory}_merged")]) == 0
    found = {path.name: find_bundle(path).task for path in tmp_path.iterdir()}
    translation = dict.fromkeys(("bundle", "average", "adapted", "adapted_merged"), "translation")
    assert found == {**translation, "continuing": "continuation", "continuing_merged": "continuation"}


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "bundle") / "model.yaml"
    path.write_text(path.read_text().replace("task: translation", "task: rhyme"))
    with pytest.raises(BundleError, match=r"task: input should be 'translation' or 'continuation', not 'rhyme'"):
        find_bundle(tmp_path / "bundle")

"""What training may start from, and the look at what it wrote before it ends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import yaml

from dstrain.adapters.config import LoraConfig
from dstrain.batch import Batch
from dstrain.build.base import build_on_base, check_reloaded, find_base
from dstrain.build.training_options import TrainOptions
from dstrain.build.training_plan import plan_training
from dstrain.checkpoint.bundle import find_bundle, load_bundle, save_adapter_bundle, save_bundle
from dstrain.cli.main import main
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import evaluation_loader
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.errors import BundleError, DataError, TrainingError
from dstrain.evaluation.validator import WholeModel
from dstrain.models.config import EncoderDecoderConfig
from dstrain.models.factory import build_model
from dstrain.models.position_config import LearnedPosition
from dstrain.models.weights import load_canonical, to_canonical
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh, build_mesh
from dstrain.recipe_file import load_recipe, recipe_tree
from tests.unit.adapters.adapted import adapter_of, train
from tests.unit.evaluation.test_bundle_validation import MODEL, STACK, bundle_for, prepared

ADAPTER = LoraConfig(rank=2, alpha=4, targets=("*",))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data") / "data", 90)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(data, tmp_path_factory.mktemp("base") / "base")


def test_a_base_gives_its_weights_and_an_adapter_freezes_them(data: Path, base: Path) -> None:
    """Only dropout may differ from the base's."""
    found = find_base(base, MODEL.model_copy(update={"dropout": 0.0}), load_manifest(data))
    weights = {name: found.read(name) for name in found.names()}
    (plain, source), (adapted, adapted_source) = (build_on_base(found, MODEL, adapter, seed=1) for adapter in (None, ADAPTER))
    load_canonical(plain, source)
    load_canonical(adapted, adapted_source)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in to_canonical(plain).items())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert all(torch.equal(to_canonical(adapted)[name], tensor) for name, tensor in weights.items())
    assert adapter_of(adapted).keys() == to_canonical(adapted).keys() - weights.keys()


def test_another_model_is_refused_with_the_difference(data: Path, base: Path) -> None:
    other = MODEL.model_copy(update={"norm_order": "pre", "activation": "gelu", "attention_dropout": 0.3})
    with pytest.raises(BundleError) as caught:
        find_base(base, other, load_manifest(data))
    assert str(caught.value) == (
        f"--base {base} is another model than the recipe's (base -> recipe):\n"
        '  model.activation: "relu" -> "gelu"\n'
        '  model.norm_order: "post" -> "pre"\n'
        "give the recipe the base's values (--set KEY=VALUE), or name another base"
    )
    deeper = EncoderDecoderConfig(model_dim=16, encoder={**STACK, "depth": 2}, decoder={**STACK, "layer_drop": 0.2})
    with pytest.raises(BundleError, match=r"\n  model\.encoder\.depth: 1 -> 2\ngive"):
        find_base(base, deeper, load_manifest(data))


def test_the_longest_sequences_may_differ_where_no_weight_depends_on_them(data: Path, base: Path, tmp_path: Path) -> None:
    """Not under an adapter, whose bundle has the lengths of its base; and not if each position has a vector."""
    longer, manifest = MODEL.model_copy(update={"max_source_length": 2000, "max_target_length": 3000}), load_manifest(data)
    found = find_base(base, longer, manifest)
    model, source = build_on_base(found, longer, None, seed=1)
    load_canonical(model, source)
    assert model.config.limits[:2] == (2000, 3000)
    with pytest.raises(BundleError, match=r"model\.max_source_length: 1024 -> 2000\n"):
        find_base(base, longer, manifest, adapted=True)
    learned = MODEL.model_copy(update={"position": LearnedPosition()})
    trained = tmp_path / "learned"
    pair = load_bundle(base)
    weights = to_canonical(build_model(learned, pair.vocabulary, seed=1))
    save_bundle(
        trained, model_config=learned, vocabulary=pair.vocabulary, weights=weights, tokenizers=pair.tokenizers, recipe=None
    )
    with pytest.raises(BundleError, match=r"model\.max_target_length: 1024 -> 3000\n"):
        find_base(trained, learned.model_copy(update={"max_target_length": 3000}), manifest)


@pytest.fixture
def without_model(tmp_path: Path) -> Path:
    """A recipe for fine-tuning: the quickstart without its model, on the data of this module."""
    tree = recipe_tree(load_recipe("translation/quickstart"))
    del tree["model"]
    corpus = {"kind": "grammar", "num_pairs": 60}
    tree["data"] = {
        "train": [{**corpus, "split": "train"}],
        "valid": [{**corpus, "split": "valid", "num_pairs": 7}],
        "tokenizer": {"kind": "sentencepiece", "vocab_size": 90},
    }
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_recipe_without_a_model_has_that_of_the_base(
    without_model: Path, data: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every verb that reads a recipe; the recipe's other keys go over it."""
    assert main(["show", str(without_model), "--base", str(base)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"] == MODEL.model_dump(mode="json")
    assert load_recipe("translation/quickstart", ["model=null"], base_model=lambda: MODEL).model == MODEL
    assert main(["prepare", str(without_model), "--base", str(base), "--output", str(tmp_path / "data")]) == 0
    assert load_manifest(tmp_path / "data").content == load_manifest(data).content
    changed = load_recipe(
        without_model, ["model={from_base: true, dropout: 0.25, max_target_length: 1500}"], base_model=lambda: MODEL
    )
    assert changed.model == MODEL.model_copy(update={"dropout": 0.25, "max_target_length": 1500})
    plan = plan_training(changed, TrainOptions(data=data, output=tmp_path / "run", base=base))
    assert plan.base is not None
    assert plan.base.fingerprint == find_bundle(base).fingerprint


def test_a_model_that_nothing_gives_is_explained(without_model: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str) -> str:
        assert main(["show", *words]) == 1
        return capsys.readouterr().err

    assert "(with --base BUNDLE `model` may be left out: it is the bundle's)" in error(str(without_model))
    from_base = error(str(without_model), "--set", "model.from_base=true")
    assert "1 mistake\n  model.from_base: no base is named; add --base BUNDLE" in from_base
    twice = error(str(without_model), "--set", "model={preset: base, from_base: true}", "--base", str(base))
    assert "1 mistake\n  model.preset: model.from_base names the architecture, too; leave one of the two out" in twice
    wrong = error(str(without_model), "--set", "model.from_base=3", "--base", str(base))
    assert "model.from_base: input should be true, not" in wrong
    assert "changes nothing here: the recipe has a model of its own; leave --base out" in error(
        "translation/quickstart", "--base", str(base)
    )


def test_another_tokenizer_or_none_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path / "data", 80)
    with pytest.raises(
        DataError, match=r"the data was prepared with tokenizer \w{12}, --base .* has \w{12}: ids would mean other"
    ):
        find_base(base, MODEL, load_manifest(other))
    bare = bundle_for(data, tmp_path / "bare", tokenizers=False)
    with pytest.raises(BundleError, match=r"--base .*bare has no tokenizer, so it is unknown whether the ids of the data"):
        find_base(bare, MODEL, load_manifest(data))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return build_mesh("cpu")


class Averaging(WholeModel):
    """A whole model that counts how often its average was asked for."""

    asked = 0

    def averaged_weights(self) -> AbstractContextManager[None]:
        self.asked += 1
        return nullcontext()


def test_a_bundle_that_computes_something_else_is_an_error(data: Path, base: Path, tmp_path: Path, mesh: Mesh) -> None:
    found = find_base(base, MODEL, load_manifest(data))
    model, source = build_on_base(found, MODEL, ADAPTER, seed=1)
    load_canonical(model, source)
    train(model)
    bundle = tmp_path / "adapted"
    save_adapter_bundle(bundle, adapter=ADAPTER, base=found, weights=adapter_of(model), recipe=None, notes={})
    batch: Batch = next(evaluation_loader(open_dataset(data, "valid"), 400, Collator("encoder_decoder", pad_id=1, eos_id=2)))
    engine = Averaging(TrainModule(model, CrossEntropy(CrossEntropyConfig())), model, mesh.device)
    check_reloaded(bundle, engine, batch, mesh, averaged=False, tolerance=1e-5)
    assert engine.asked == 0
    check_reloaded(bundle, engine, batch, mesh, averaged=True, tolerance=1e-5)
    assert engine.asked == 1

    doubled = ADAPTER.model_copy(update={"alpha": 8.0})
    save_adapter_bundle(bundle, adapter=doubled, base=found, weights=adapter_of(model), recipe=None, notes={}, overwrite=True)
    with pytest.raises(TrainingError, match=r"adapted does not compute what was trained: \d+ tokens have a loss of [\d.]+ in tr"):
        check_reloaded(bundle, engine, batch, mesh, averaged=False, tolerance=1e-4)
    (bundle / "adapter/adapter.safetensors").unlink()
    with pytest.raises(BundleError, match=r"adapter\.safetensors is missing"):
        check_reloaded(bundle, engine, batch, mesh, averaged=False, tolerance=1e-4)

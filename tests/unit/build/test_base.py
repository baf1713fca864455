"""What training may start from, and the look at what it wrote before it ends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from dstrain.adapters.config import LoraConfig
from dstrain.batch import Batch
from dstrain.build.base import build_on_base, check_reloaded, find_base
from dstrain.checkpoint.bundle import save_adapter_bundle
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import evaluation_loader
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.errors import BundleError, DataError, TrainingError
from dstrain.evaluation.validator import WholeModel
from dstrain.models.config import EncoderDecoderConfig
from dstrain.models.weights import load_canonical, to_canonical
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh, build_mesh
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
    save_adapter_bundle(bundle, adapter=doubled, base=found, weights=adapter_of(model), recipe=None, notes={})
    with pytest.raises(TrainingError, match=r"adapted does not compute what was trained: \d+ tokens have a loss of [\d.]+ in tr"):
        check_reloaded(bundle, engine, batch, mesh, averaged=False, tolerance=1e-4)
    (bundle / "adapter/adapter.safetensors").unlink()
    with pytest.raises(BundleError, match=r"adapter\.safetensors is missing"):
        check_reloaded(bundle, engine, batch, mesh, averaged=False, tolerance=1e-4)

"""Adapters in PEFT's format: PEFT reads what is written here, and what PEFT saves computes the same here.

PEFT adapts a tree of torch modules with the names and matrices of a bundle. What it merges into them is compared with what is
merged here, matrix by matrix, and its merged matrices in a model of ours with the adapter beside its base, by logits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject
from dstrain.api import load
from dstrain.checkpoint.bundle import find_bundle, save_adapter_bundle, save_bundle
from dstrain.cli.main import main
from dstrain.interop.peft.adapter import PeftAdapter, read_peft
from dstrain.models.config import PlainEmbedding
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from tests.unit.adapters.adapted import adapter_of, lora, train
from tests.unit.models.build import VOCABULARY, small_config, small_model

peft = pytest.importorskip("peft")

CONFIG = small_config(embedding=PlainEmbedding(tie="none"), dropout=0.0)
TABLES = ("source_embedding.tokens", "target_embedding.tokens")
CASES = {
    "plain": lora("q_proj", "v_proj", "up_proj"),
    "scaled": lora("*_proj", rank_scaled=True, dropout=0.1),
    "tables": lora("tokens", "projection", "decoder.layers.1.self_attention.k_proj"),
    "dora": lora("out_proj", "down_proj", dora=True),
    "biases": lora("q_proj", bias="lora_only"),
    "all biases": lora("q_proj", bias="all"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "base"
    model = small_model(CONFIG)
    weights = to_canonical(model)
    save_bundle(directory, model_config=CONFIG, vocabulary=VOCABULARY, weights=weights, tokenizers=None, recipe=None)
    return directory


def adapter_bundle(directory: Path, base: Path, config: LoraConfig) -> Path:
    """As after some training."""
    stored, model = find_bundle(base), small_model(CONFIG, projections="separate")
    load_canonical(model, inject(model, config, stored, seed=1))
    freeze(model, config)
    train(model)
    save_adapter_bundle(directory, adapter=config, base=stored, weights=adapter_of(model), recipe=None, notes={})
    return directory


class Named(nn.Module):
    """A tree of torch modules with the names and matrices of a bundle."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in weights:
            path, _, kind = name.rpartition(".")
            if kind != "weight" or path.endswith("norm") or path.endswith("positions"):
                continue
            *parents, last = path.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in dict(owner.named_children()):
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            matrix, bias = weights[name], weights.get(f"{path}.bias")
            table = nn.Embedding(*matrix.shape) if path in TABLES else nn.Linear(*reversed(matrix.shape), bias=bias is not None)
            owner.add_module(last, table)
            table.load_state_dict({"weight": matrix, **({} if bias is None else {"bias": bias})})


def weights_of(bundle: Path) -> dict[str, Tensor]:
    stored = find_bundle(bundle)
    return {name: stored.read(name) for name in stored.names()}


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights and biases of a model of plain torch modules, merged."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield from ((f"{path}.{kind}", value.detach()) for kind, value in module.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_is_exported(case: str, base: Path, tmp_path: Path) -> None:
    """And merges it into the same matrices as `dstrain merge`."""
    adapted = adapter_bundle(tmp_path / "adapted", base, CASES[case])
    assert main(["export", str(adapted), "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        warnings.filterwarnings("ignore", message=".*config.*")
        model = peft.PeftModel.from_pretrained(Named(weights_of(base)), tmp_path / "peft")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 5, CASES[case].rank_scaled)
    merged, expected = dict(matrices(model.merge_and_unload())), weights_of(adapted)
    changed = {name for name, tensor in weights_of(base).items() if not tensor.equal(expected[name])}
    if CASES[case].bias != "all":  # of norms, which the module tree has not
        assert changed <= merged.keys()
    for name, matrix in merged.items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-5, atol=1e-6)


def saved_by_peft(directory: Path, base: Path, **settings: Any) -> nn.Module:
    """An adapter of PEFT over the base's matrices, as after some training."""
    torch.manual_seed(5)
    model = peft.get_peft_model(Named(weights_of(base)), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1},
        {"target_modules": r"decoder\..*_proj", "use_rslora": True},
        {"target_modules": ["k_proj", "out_proj"], "use_dora": True, "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["tokens", "projection"]},
        {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "bias": "all", "init_lora_weights": "gaussian"},
    ],
)
def test_what_peft_saved_computes_the_same(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """As an adapter beside the base, and imported as a bundle."""
    theirs = saved_by_peft(tmp_path / "peft", base, **settings)
    assert main(["import", "peft", str(tmp_path / "peft"), "--base", str(base), "--output", str(tmp_path / "adapted")]) == 0
    assert find_bundle(tmp_path / "adapted").adapters[-1].description.adapter.rank == 4
    merged = {**weights_of(base), **dict(matrices(theirs.merge_and_unload()))}
    plain = small_model(CONFIG)
    load_canonical(plain, TensorSource(merged))
    save_bundle(
        tmp_path / "merged",
        model_config=CONFIG,
        vocabulary=VOCABULARY,
        weights=to_canonical(plain),
        tokenizers=None,
        recipe=None,
    )
    ids = [[5, 9, 30, 2]], [[2, 8, 17, 4, 11]]
    (expected,) = load(tmp_path / "merged").logits(*ids)
    assert abs(expected - load(base).logits(*ids)[0]).max() > 1e-2
    for model in (load(base, adapter=tmp_path / "peft"), load(tmp_path / "adapted"), load(base).adapted(tmp_path / "adapted")):
        torch.testing.assert_close(torch.from_numpy(model.logits(*ids)[0]), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_there_and_back_is_the_same_adapter(base: Path, tmp_path: Path) -> None:
    config = CASES["tables"]
    adapted = adapter_bundle(tmp_path / "adapted", base, config)
    assert main(["export", str(adapted), "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
    stored = find_bundle(base)
    back: PeftAdapter = read_peft(tmp_path / "peft", stored, CONFIG)
    first = find_bundle(adapted).adapters[-1]
    assert back.weights.keys() == first.weights.keys()
    assert all(tensor.equal(first.weights[name]) for name, tensor in back.weights.items())
    assert (back.config.rank, back.config.alpha) == (config.rank, config.alpha)
    assert back.config.targets == (
        "decoder.layers.1.self_attention.k_proj",
        "projection",
        "source_embedding.tokens",
        "target_embedding.tokens",
    )
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

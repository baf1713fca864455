"""PEFT's adapter format: what either side cannot represent is refused by name, and so is what is damaged or of another model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dstrain.adapters.lora import inject
from dstrain.checkpoint.bundle import find_bundle, save_adapter_bundle, save_bundle
from dstrain.models.config import PlainEmbedding
from dstrain.models.weights import load_canonical, to_canonical
from tests.unit.adapters.adapted import adapter_of, lora
from tests.unit.cli.verbs import Verbs
from tests.unit.models.build import VOCABULARY, small_config, small_model


def adapter_bundle(directory: Path, tie: str, *targets: str, **changes: Any) -> Path:
    """A fresh adapter in `directory`/adapted over `directory`/base."""
    config, adapter = small_config(embedding=PlainEmbedding(tie=tie)), lora(*targets, **changes)
    weights = to_canonical(small_model(config))
    base = directory / "base"
    save_bundle(base, model_config=config, vocabulary=VOCABULARY, weights=weights, tokenizers=None, recipe=None)
    model, stored = small_model(config, projections="separate"), find_bundle(base)
    load_canonical(model, inject(model, adapter, stored, seed=1))
    tensors = {name: tensor for name, tensor in adapter_of(model).items() if "lora" in name}
    save_adapter_bundle(directory / "adapted", adapter=adapter, base=stored, weights=tensors, recipe=None, notes={})
    return directory / "adapted"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("peft")
    adapter_bundle(directory, "all", "q_proj", "up_proj")
    return directory


@pytest.fixture
def verbs(capsys: pytest.CaptureFixture[str]) -> Verbs:
    return Verbs(capsys)


def export(verbs: Verbs, bundle: Path, output: Path, *words: str, fails: bool = True) -> str:
    run = verbs.fail if fails else verbs.succeed
    return run("export", bundle, "--format", "peft", "--output", output, *words)


@pytest.mark.parametrize(
    ("tie", "changes", "message"),
    [
        ("all", {}, "source_embedding.tokens, whose matrix acts in other modules too (model.embedding.tie = all)"),
        ("decoder", {}, "of target_embedding.tokens, whose matrix acts in other modules too"),
        ("none", {"dora": True}, "source_embedding.tokens, a token table under DoRA, whose norms are those"),
    ],
)
def test_what_peft_cannot_represent(tie: str, changes: dict[str, Any], message: str, tmp_path: Path, verbs: Verbs) -> None:
    """An untied source table beside a tied target one is no problem."""
    adapted = adapter_bundle(tmp_path, tie, "tokens", **changes)
    error = export(verbs, adapted, tmp_path / "out")
    assert message in error
    assert "(`dstrain merge`), or train it again without this target" in error
    assert not (tmp_path / "out").exists()
    verbs.succeed("merge", adapted, "--output", tmp_path / "merged")
    if tie == "decoder":
        assert "source_embedding" not in error


def test_only_an_adapter_is_exported_and_only_its_own_kind_replaced(home: Path, tmp_path: Path, verbs: Verbs) -> None:
    adapted = home / "adapted"
    assert "base has no adapter, and PEFT's format holds nothing else; name an adapter bundle" in export(
        verbs, home / "base", tmp_path / "out"
    )
    quantized = export(verbs, adapted, tmp_path / "out", "--quantization", "int8")
    assert "--quantization int8 is for CTranslate2; leave it out beside --format peft" in quantized
    export(verbs, adapted, tmp_path / "out", fails=False)
    assert "add --overwrite to replace it" in export(verbs, adapted, tmp_path / "out")
    said = export(verbs, adapted, tmp_path / "out", "--overwrite", fails=False)
    assert f"rank 3, 12 modules, for the model of {home / 'base'}" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file({name: tensor.clone() for name, tensor in found.items()}, path)

    return rewrite


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


TABLE = "base_model.model.source_embedding.tokens.lora_embedding_"
QUERY = "base_model.model.encoder.layers.0.self_attention.q_proj.lora_A.weight"
CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (
        settings(peft_type="IA3"),
        "adapter_config.json: peft_type = IA3 has no counterpart here; merge the adapter where it",
    ),
    (settings(modules_to_save=["norm"], lora_bias=True), "modules_to_save = ['norm']; lora_bias = True has no counterpart here"),
    (settings(rank_pattern={"q_proj": 4}), "rank_pattern = {'q_proj': 4} has no counterpart"),
    (settings(init_lora_weights="pissa"), "init_lora_weights = pissa, which changes the base has no counterpart"),
    (settings(invented_later={"a": 1}), "invented_later = {'a': 1} has no counterpart"),
    (settings(bias="some"), "adapter_config.json: 1 validation error"),
    (settings(r=4), "q_proj.lora_a is (3, 24), the base needs (4, 24)"),
    (text("adapter_config.json", "{"), "adapter_config.json: not valid JSON"),
    (text("adapter_config.json", "[]"), "adapter_config.json: the settings are no JSON object; restore it from a copy"),
    (text("adapter_model.safetensors", "pickle"), "adapter_model.safetensors is not a safetensors file"),
    (
        lambda directory: (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin"),
        "adapter_model.safetensors is missing; save the adapter with safe_serialization=True, which writes it",
    ),
    (tensors(lambda found: found.update(other=found[QUERY])), "'other' is no part of a low-rank adapter; merge the adapter"),
    (tensors(lambda found: found.pop(QUERY.replace("_A", "_B"))), "q_proj.lora_b is missing, the base needs (24, 3)"),
    (
        tensors(lambda found: found.update({QUERY.replace("encoder.layers.0", "model.layers.9"): found[QUERY]})),
        "the base has no weights for model.layers.9.self_attention.q_proj.lora_a; its modules are called decoder.lay",
    ),
    (
        tensors(lambda found: found.update({TABLE + "A": torch.ones(3, 41), TABLE + "B": torch.ones(24, 3)})),
        "adapts source_embedding.tokens, whose matrix acts in other modules too (model.embedding.tie = all): another function",
    ),
    (tensors(lambda found: found.pop(QUERY)), "encoder.layers.0.self_attention.q_proj has no A; restore the file from a copy"),
    (
        tensors(lambda found: found.update({QUERY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(24)})),
        "q_proj.lora_magnitude is of DoRA, but use_dora is false in adapter_config.json; correct it",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_peft_says_and_we_cannot(
    change: Callable[[Path], object], message: str, home: Path, tmp_path: Path, verbs: Verbs
) -> None:
    directory = tmp_path / "peft"
    export(verbs, home / "adapted", directory, fails=False)
    settings(init_lora_weights=True, task_type="SEQ_2_SEQ_LM", loftq_config={}, alpha_pattern={})(directory)
    verbs.succeed("import", "peft", directory, "--base", home / "base", "--output", tmp_path / "good")
    change(directory)
    assert message in verbs.fail("import", "peft", directory, "--base", home / "base", "--output", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_directory_without_an_adapter(home: Path, tmp_path: Path, verbs: Verbs) -> None:
    error = verbs.fail("import", "peft", home / "base", "--base", home / "base", "--output", tmp_path / "bad")
    assert "base has no adapter_config.json; name a directory that PEFT's save_pretrained wrote" in error

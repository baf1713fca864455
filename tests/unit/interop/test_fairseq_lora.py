"""The reader of fairseq's adapters: settings, fused and stacked layers, token tables, and what it refuses by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import merged
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.checkpoint import FairseqCheckpoint, convert, read_dictionaries
from dstrain.interop.fairseq.lora import convert_adapted
from tests.unit.interop.fairseq_checkpoints import dictionaries, small_weights
from tests.unit.interop.test_fairseq_reader import checkpoint

ARGS = '{"r": 2, "alpha": 3, "target_modules": "q_proj"}'
FC1 = "encoder.layers.0.fc1"


def adapters(weights: dict[str, Tensor], *paths: str, table: bool = False) -> dict[str, Tensor]:
    """A and B of matrices, of rank 2, in fairseq's shapes."""
    found = {}
    for path in paths:
        rows, columns = weights[f"{path}.weight"].shape
        found[f"{path}.lora_A"] = torch.randn(2, rows if table else columns)
        found[f"{path}.lora_B"] = torch.randn(columns if table else rows, 2)
    return found


def merge(weights: dict[str, Tensor], lora: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """As fairseq saves: merged weights with the adapter beside them."""
    saved = {**weights, **lora}
    for path in {name.rpartition(".")[0] for name in lora}:
        change = scale * lora[f"{path}.lora_B"] @ lora[f"{path}.lora_A"]
        saved[f"{path}.weight"] = weights[f"{path}.weight"] + (change.t() if path.endswith("embed_tokens") else change)
    return saved


def assert_read(saved: FairseqCheckpoint, base: dict[str, Tensor], **settings: Any) -> LoraConfig:
    """The base is that of before, and with the adapter it is what was saved."""
    _, _, weights, adapter = convert_adapted(saved, unmerged=False)
    assert adapter is not None
    plain = {name: value for name, value in saved.weights.items() if "lora" not in name}
    expected, whole = (convert(checkpoint(each, **settings))[2] for each in (base, plain))
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    lora = LoraConfig(**adapter.settings)
    found = {name: merged(name, tensor, adapter.weights, lora) for name, tensor in weights.items()}
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    return lora


@pytest.mark.parametrize(("given", "scale"), [("", 1.5), (', "rank_scaled": true', 3 / 2**0.5)])
def test_names_settings_and_scale(given: str, scale: float) -> None:
    weights = small_weights()
    paths = [f"{side}.layers.0.self_attn.q_proj" for side in ("encoder", "decoder")]
    saved = merge(weights, adapters(weights, *paths, "decoder.layers.0.encoder_attn.q_proj"), scale)
    args = ARGS.replace("}", given + ', "dropout": 0.25, "bias": "all"}')
    lora = assert_read(checkpoint(saved, lora_args=args), weights)
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets, lora.bias) == (2, 3, 0.25, ("q_proj",), "none")
    assert lora.rank_scaled == bool(given)


def test_parts_of_one_name_that_are_not_all_adapted_are_named_in_full() -> None:
    weights = small_weights()
    saved = merge(weights, adapters(weights, "decoder.layers.0.encoder_attn.k_proj"), 1.5)
    lora = assert_read(checkpoint(saved, lora_args=ARGS), weights)
    assert lora.targets == ("decoder.layers.0.cross_attention.k_proj",)


def test_an_unmerged_file_holds_the_base() -> None:
    weights = small_weights()
    found = convert_adapted(checkpoint({**weights, **adapters(weights, FC1)}, lora_args=ARGS), unmerged=True)
    assert found[3] is not None
    assert torch.equal(found[2]["encoder.layers.0.feed_forward.up_proj.weight"], weights[f"{FC1}.weight"])


def test_token_tables_stand_the_other_way_round() -> None:
    weights = small_weights()
    saved = merge(weights, adapters(weights, "encoder.embed_tokens", "decoder.embed_tokens", table=True), 1.5)
    assert assert_read(checkpoint(saved, lora_args=ARGS), weights).targets == ("tokens",)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_adapter_of_barts_table_loses_the_mask_row_too(side: str, tmp_path: Path) -> None:
    weights, table = small_weights(), f"{side}.embed_tokens"
    saved = checkpoint(merge(weights, adapters(weights, table, table=True), 1.5), arch="bart_base", lora_args=ARGS)
    tokenizers = read_dictionaries(dictionaries(tmp_path, 10, 12), saved)
    _, vocabulary, base, adapter = convert_adapted(saved, tokenizers, unmerged=False)
    assert adapter is not None
    name = "source_embedding.tokens" if side == "encoder" else "target_embedding.tokens"
    rows = {"encoder": vocabulary.source, "decoder": vocabulary.target}[side]
    assert {key: tuple(value.shape) for key, value in adapter.weights.items()} == {
        f"{name}.lora_a": (2, 8),
        f"{name}.lora_b": (rows, 2),
    }
    torch.testing.assert_close(base[f"{name}.weight"], weights[f"{table}.weight"][:-1], rtol=1e-5, atol=1e-5)
    whole = merged(f"{name}.weight", base[f"{name}.weight"], adapter.weights, LoraConfig(**adapter.settings))
    torch.testing.assert_close(whole, saved.weights[f"{table}.weight"][:-1], rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_shape_is_named() -> None:
    weights = small_weights()
    weights |= adapters(weights, FC1)
    weights[f"{FC1}.lora_B"] = torch.randn(15, 2)
    message = r"adapter of encoder\.layers\.0\.fc1 is for a matrix of \(15, 8\), but it has \(16, 8\); it is damaged"
    with pytest.raises(ImportFormatError, match=message):
        convert_adapted(checkpoint(weights, lora_args=ARGS), unmerged=True)


def test_fused_projections_are_split() -> None:
    weights = small_weights()
    here = "encoder.layers.0.self_attn"
    for kind in ("weight", "bias"):
        weights[f"{here}.qkv_proj.{kind}"] = torch.cat([weights.pop(f"{here}.{block}_proj.{kind}") for block in "qkv"])
    saved = merge(weights, adapters(weights, f"{here}.qkv_proj"), 1.5)
    lora = assert_read(checkpoint(saved, lora_args=ARGS), weights)
    assert lora.targets == tuple(f"encoder.layers.0.self_attention.{block}_proj" for block in "kqv")


def test_a_stacked_layer_has_one_adapter() -> None:
    weights = small_weights()
    saved = merge(weights, adapters(weights, FC1), 1.5)
    for tree in (weights, saved):
        tree |= {name.replace("layers.0", "layers.1"): tree[name] for name in list(tree) if name.startswith("encoder.layers.0")}
    assert_read(checkpoint(saved, lora_args=ARGS, encoder_recurrent_stacking=2), weights, encoder_recurrent_stacking=2)


def test_a_checkpoint_without_adapters_is_plain() -> None:
    weights = small_weights()
    config, vocabulary, canonical, adapter = convert_adapted(checkpoint(weights, lora_args='{"r": 0}'), unmerged=False)
    assert adapter is None
    assert (config, vocabulary) == convert(checkpoint(weights))[:2]
    assert canonical.keys() == convert(checkpoint(weights))[2].keys()


PROJECTION, TABLE = "decoder.output_projection", "decoder.embed_tokens"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a random bias": (
        PROJECTION,
        {"lora_args": ARGS},
        r"has decoder\.output_projection\.bias, a random bias that fairseq's adapter gave to a map without one; it has no",
    ),
    "a tied table": (
        TABLE,
        {"lora_args": ARGS, "share_decoder_input_output_embed": True},
        r"has share_decoder_input_output_embed and an adapter of decoder\.embed_tokens: .*two different models; train",
    ),
    "a tied projection": (
        PROJECTION,
        {"lora_args": ARGS, "share_all_embeddings": True},
        r"has share_all_embeddings and an adapter of decoder\.output_projection: .*two different models; train",
    ),
    "no settings": (FC1, {}, r"has adapters but lora_args = None, which is no JSON object, so their scale is unknown"),
    "no JSON": (FC1, {"lora_args": "{r: 2}"}, r"lora_args = '{r: 2}', which is no JSON object"),
    "an unknown setting": (
        FC1,
        {"lora_args": '{"r": 2, "use_dora": true}'},
        r"has lora_args with use_dora, which dstrain",
    ),
    "another rank": (FC1, {"lora_args": '{"r": 8}'}, r"adapters have rank \[2\], but its lora_args say r = 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str) -> None:
    path, settings, message = REFUSED[case]
    weights = small_weights()
    weights |= adapters(weights, path, table=path == TABLE)
    if path == PROJECTION:
        weights[f"{path}.bias"] = torch.randn(13)
    with pytest.raises(ImportFormatError, match=message):
        convert_adapted(checkpoint(weights, **settings), unmerged=False)


def test_half_an_adapter_is_named() -> None:
    weights = small_weights()
    weights |= adapters(weights, FC1)
    del weights[f"{FC1}.lora_B"]
    with pytest.raises(ImportFormatError, match=r"has encoder\.layers\.0\.fc1\.lora_A but no encoder\.layers\.0\.fc1\.lora_B"):
        convert_adapted(checkpoint(weights, lora_args=ARGS), unmerged=False)

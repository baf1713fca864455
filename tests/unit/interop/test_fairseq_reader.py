"""The reader of fairseq checkpoints: settings, old names, refusals. What its models compute is in tests/equivalence."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.checkpoint import (
    UNSUPPORTED,
    FairseqCheckpoint,
    convert,
    convert_config,
    read_dictionaries,
    read_fairseq_checkpoint,
)
from dstrain.interop.fairseq.command_line.flags import WITHOUT
from dstrain.interop.fairseq.lora import convert_adapted
from dstrain.models.config import (
    DecoderStackConfig,
    EncoderDecoderConfig,
    NoPosition,
    PlainEmbedding,
    RotaryPosition,
    StackConfig,
    YarnScaling,
)
from tests.paths import GOLDEN, needs_golden

SMALL = {
    "arch": "transformer",
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
}
NORMS = {"encoder": ["self_attn_layer_norm", "final_layer_norm"]}
NORMS["decoder"] = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]


def small_weights(*, source: int = 11, target: int = 13, version: float | None = 3.0) -> dict[str, Tensor]:
    """State of the 1 + 1 layer transformer of `SMALL`, by fairseq's names."""
    weights: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        weights[name] = torch.randn(*shape)

    for side, size in (("encoder", source), ("decoder", target)):
        if version is not None:
            weights[f"{side}.version"] = torch.tensor([version])
        add(f"{side}.embed_tokens.weight", size, 8)
        layer = f"{side}.layers.0"
        for attention in ("self_attn",) if side == "encoder" else ("self_attn", "encoder_attn"):
            for block in ("k_proj", "v_proj", "q_proj", "out_proj"):
                add(f"{layer}.{attention}.{block}.weight", 8, 8)
                add(f"{layer}.{attention}.{block}.bias", 8)
        for norm in NORMS[side]:
            add(f"{layer}.{norm}.weight", 8)
            add(f"{layer}.{norm}.bias", 8)
        for name, rows, columns in (("fc1", 16, 8), ("fc2", 8, 16)):
            add(f"{layer}.{name}.weight", rows, columns)
            add(f"{layer}.{name}.bias", rows)
    add("decoder.output_projection.weight", target, 8)
    return weights


def checkpoint(weights: dict[str, Tensor], **settings: Any) -> FairseqCheckpoint:
    return FairseqCheckpoint({**SMALL, **settings}, {"source_lang": "en", "target_lang": "de"}, weights)


def test_settings() -> None:
    given = {
        "encoder_embed_dim": 64,
        "encoder_ffn_embed_dim": 96,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_layerdrop": 0.1,
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
        "decoder_ffn_embed_dim": 128,
        "decoder_layers": 5,
        "decoder_attention_heads": 2,
        "decoder_layerdrop": 0.2,
        "no_decoder_final_norm": True,
        "activation_fn": "gelu_fast",
        "layernorm_embedding": True,
        "no_scale_embedding": True,
        "share_decoder_input_output_embed": True,
        "no_token_positional_embeddings": True,
        "dropout": 0.3,
        "attention_dropout": 0.15,
        "relu_dropout": 0.25,
        "max_source_positions": 100,
        "max_target_positions": 200,
        "adaptive_softmax_cutoff": None,
        "encoder_recurrent_stacking": None,
    }
    assert convert_config(given, decoder_only=False) == EncoderDecoderConfig(
        model_dim=64,
        encoder=StackConfig(depth=3, num_heads=4, ffn_dim=96, layer_drop=0.1),
        decoder=DecoderStackConfig(depth=5, num_heads=2, ffn_dim=128, layer_drop=0.2, final_norm="no"),
        norm_order="pre",
        activation="gelu_tanh",
        position=NoPosition(),
        embedding=PlainEmbedding(scale=False, norm=True, tie="decoder"),
        dropout=0.3,
        attention_dropout=0.15,
        activation_dropout=0.25,
        max_source_length=100,
        max_target_length=200,
    )


@pytest.mark.parametrize(
    ("more", "slow", "warns"), [("", 2.0, True), (', "beta_slow": 1', 1.0, False), (', "beta_slow": 2', 2.0, False)]
)
@pytest.mark.parametrize("kind", ["vanilla", "dynamic"])
def test_yarn_without_beta_slow_has_the_default_of_its_time(
    kind: str, more: str, slow: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """2 until 2024-06-11, whatever the documentation said; nothing in a file tells its day."""
    given = {"yarn_args": f'{{"type": "{kind}", "scale": 4{more}}}', "no_token_positional_embeddings": True}
    config = convert_config(given, decoder_only=False)
    assert isinstance(config.position, RotaryPosition)
    assert isinstance(config.position.scaling, YarnScaling)
    assert config.position.scaling.beta_slow == slow
    assert ("name no beta_slow: 2 is taken, the predecessor's default until 2024-06-11" in caplog.text) == warns


def test_missing_settings_take_fairseqs_defaults() -> None:
    config = convert_config({}, decoder_only=False)
    assert config == EncoderDecoderConfig(
        model_dim=512,
        encoder=StackConfig(depth=6, num_heads=8, ffn_dim=2048),
        decoder=DecoderStackConfig(depth=6, num_heads=8, ffn_dim=2048),
    )


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_settings_without_a_counterpart_are_refused_by_name(option: str) -> None:
    with pytest.raises(ImportFormatError, match=rf"the checkpoint has {option} = 3, .*{WITHOUT[option]}"):
        convert_config({option: 3}, decoder_only=False)
    for harmless in (None, False, 0):
        convert_config({option: harmless}, decoder_only=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_embed_dim": 256}, "decoder_embed_dim = 256, .* it differs from encoder_embed_dim = 512"),
        ({"decoder_normalize_before": True}, "decoder_normalize_before = True, .* encoder_normalize_before = False"),
        ({"decoder_learned_pos": True}, "decoder_learned_pos = True, .* encoder_learned_pos = False"),
        ({"activation_fn": "relu_squared"}, "activation_fn = 'relu_squared', .* known are relu, gelu, "),
    ],
)
def test_sides_that_differ_and_unknown_activations_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ImportFormatError, match=message):
        convert_config(settings, decoder_only=False)


def test_settings_that_make_no_model_are_refused() -> None:
    with pytest.raises(ImportFormatError, match=r"make no model: .*num_heads = 3 does not divide model_dim = 8"):
        convert(checkpoint(small_weights(), encoder_attention_heads=3))


def test_old_names_mean_the_same() -> None:
    modern = small_weights()
    old = dict(modern)
    for side, norms in NORMS.items():
        for number, norm in enumerate(norms):
            for kind in ("weight", "bias"):
                old[f"{side}.layers.0.layer_norms.{number}.{kind}"] = old.pop(f"{side}.layers.0.{norm}.{kind}")
        for attention in ("self_attn", "encoder_attn"):
            for kind in ("weight", "bias"):
                here = f"{side}.layers.0.{attention}"
                if f"{here}.q_proj.{kind}" in old:
                    old[f"{here}.in_proj_{kind}"] = torch.cat([old.pop(f"{here}.{block}_proj.{kind}") for block in "qkv"])
    old["decoder.embed_out"] = old.pop("decoder.output_projection.weight")
    old["encoder.embed_positions._float_tensor"] = torch.zeros(1)
    old["decoder.embed_positions.weights"] = torch.zeros(30, 8)
    assert old.keys() != modern.keys()
    expected, found = convert(checkpoint(modern)), convert(checkpoint(old))
    assert found[:2] == expected[:2]
    assert found[2].keys() == expected[2].keys()
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])


@pytest.mark.parametrize(
    ("version", "encoder_norm", "decoder_norm"), [(None, "no", "no"), (2.0, "auto", "no"), (3.0, "auto", "auto")]
)
def test_old_versions_of_pre_norm_models_have_no_final_norm(version: float | None, encoder_norm: str, decoder_norm: str) -> None:
    weights = small_weights(version=version)
    for side in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            weights[f"{side}.layer_norm.{kind}"] = torch.randn(8)
    config, _, canonical = convert(checkpoint(weights, encoder_normalize_before=True, decoder_normalize_before=True))
    assert (config.encoder.final_norm, config.decoder.final_norm) == (encoder_norm, decoder_norm)
    assert ("encoder.final_norm.weight" in canonical) == (encoder_norm == "auto")
    assert ("decoder.final_norm.weight" in canonical) == (decoder_norm == "auto")


def test_half_precision_becomes_float32() -> None:
    weights = {name: tensor.half() for name, tensor in small_weights().items()}
    _, _, canonical = convert(checkpoint(weights))
    assert {tensor.dtype for tensor in canonical.values()} == {torch.float32}


def test_tied_matrices_are_stored_once_and_must_be_equal() -> None:
    weights = small_weights()
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"].clone()
    _, _, canonical = convert(checkpoint(weights, share_decoder_input_output_embed=True))
    assert "projection.weight" not in canonical
    del weights["decoder.output_projection.weight"]
    convert(checkpoint(weights, share_decoder_input_output_embed=True))
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"] + 1
    with pytest.raises(
        ImportFormatError, match=r"decoder\.embed_tokens\.weight and decoder\.output_projection\.weight differ, .*one matrix"
    ):
        convert(checkpoint(weights, share_decoder_input_output_embed=True))


def test_learned_positions_lose_the_rows_before_the_first_token() -> None:
    weights = small_weights()
    table = torch.randn(22, 8)
    weights["encoder.embed_positions.weight"] = weights["decoder.embed_positions.weight"] = table
    limits = {"max_source_positions": 20, "max_target_positions": 20}
    _, _, canonical = convert(checkpoint(weights, encoder_learned_pos=True, decoder_learned_pos=True, **limits))
    assert torch.equal(canonical["source_embedding.positions.weight"], table[2:])


def test_names_that_do_not_fit_are_listed() -> None:
    weights = small_weights()
    weights["classification_heads.mnli.dense.weight"] = torch.zeros(1)
    del weights["encoder.layers.0.fc1.bias"]
    with pytest.raises(
        ImportFormatError, match=r"missing: encoder.layers.0.feed_forward.up_proj.bias; unexpected: classification_h"
    ):
        convert(checkpoint(weights))


@pytest.mark.parametrize("name", ["encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"])
def test_missing_tables_are_named(name: str) -> None:
    weights = small_weights()
    del weights[f"{name}.weight"]
    with pytest.raises(ImportFormatError, match=rf"the checkpoint lacks {name}\.weight; it is incomplete"):
        convert(checkpoint(weights))


def test_both_locations_of_the_settings_are_read(tmp_path: Path) -> None:
    path, weights = tmp_path / "checkpoint.pt", small_weights()
    flat = {**SMALL, "data": "first:second", "source_lang": "en", "target_lang": "de"}
    expected = convert(checkpoint(weights))
    for content in (
        {"args": Namespace(**flat), "model": weights},
        {"args": None, "cfg": {"model": Namespace(**SMALL), "task": {"data": "first", "source_lang": "en"}}, "model": weights},
    ):
        torch.save(content, path)
        found = read_fairseq_checkpoint(path)
        assert found.data_directory == "first"
        assert found.task["source_lang"] == "en"
        assert convert(found)[:2] == expected[:2]


def test_files_that_are_no_translation_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ImportFormatError, match="is no fairseq checkpoint: it lacks `model` and `cfg` or `args`"):
        read_fairseq_checkpoint(path)
    torch.save({"args": Namespace(arch="roberta"), "model": {"encoder.embed_tokens.weight": torch.zeros(3, 2)}}, path)
    with pytest.raises(ImportFormatError, match=r"holds no decoder \(arch roberta\)"):
        read_fairseq_checkpoint(path)


def dictionaries(folder: Path, source: int, target: int) -> Path:
    for language, size in (("en", source), ("de", target)):
        (folder / f"dict.{language}.txt").write_text("".join(f"word{number} 1\n" for number in range(size - 4)))
    return folder


def test_dictionaries_must_have_the_models_sizes(tmp_path: Path) -> None:
    found = checkpoint(small_weights())
    fitting = read_dictionaries(dictionaries(tmp_path, 11, 13), found)
    assert (fitting.source.vocab_size, fitting.target.vocab_size) == (11, 13)
    convert(found, fitting)
    other = read_dictionaries(dictionaries(tmp_path, 11, 12), found)
    with pytest.raises(ImportFormatError, match=r"decoder\.embed_tokens\.weight has 13 rows, but the dictionary has 12 entries"):
        convert(found, other)


def test_barts_mask_row_is_cut(tmp_path: Path) -> None:
    found = checkpoint(small_weights(), arch="bart_base")
    _, vocabulary, canonical = convert(found, read_dictionaries(dictionaries(tmp_path, 10, 12), found))
    assert (vocabulary.source, vocabulary.target) == (10, 12)
    assert canonical["projection.weight"].shape == (12, 8)


def test_a_missing_dictionary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImportFormatError, match=r"has no dict\.en\.txt and no dict\.txt; .*--dictionary"):
        read_dictionaries(tmp_path, checkpoint(small_weights()))
    (tmp_path / "dict.txt").write_text("a 1\nb 1\n")
    assert read_dictionaries(tmp_path, checkpoint(small_weights())).shared


@needs_golden
def test_every_golden_checkpoint_is_read() -> None:
    folders = sorted(path.parent for kind in ("ref", "late") for path in (GOLDEN / kind).glob("*/checkpoint.pt"))
    assert len(folders) == 26
    for folder in folders:
        config, _, weights, adapter = convert_adapted(read_fairseq_checkpoint(folder / "checkpoint.pt"), unmerged=False)
        assert (adapter is not None) == (folder.name == "j_lora_r4"), folder
        assert config.decoder.num_heads == 4, folder
        assert sum(tensor.numel() for tensor in weights.values()) > 20_000, folder


def test_stacked_layers_must_be_equal() -> None:
    weights = small_weights()
    second = {
        name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in weights.items() if "encoder.layers.0" in name
    }
    config, _, once = convert(checkpoint({**weights, **second}, encoder_recurrent_stacking=2))
    assert (config.encoder.depth, config.encoder.unique_layers) == (2, 1)
    assert not any(name.startswith("encoder.layers.1.") for name in once)
    second["encoder.layers.1.fc1.weight"][3, 5] += 1
    stacked = checkpoint({**weights, **second}, encoder_recurrent_stacking=2)
    with pytest.raises(ImportFormatError, match=r"encoder\.layers\.0\..* and encoder\.layers\.1\..* differ, but .* one layer"):
        convert(stacked)

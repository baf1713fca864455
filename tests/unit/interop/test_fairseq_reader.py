"""The reader of fairseq checkpoints: settings, old names, refusals. What its models compute is in tests/equivalence."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
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
    left_out,
    read_dictionaries,
    read_fairseq_checkpoint,
)
from dstrain.interop.fairseq.command_line.flags import WITHOUT
from dstrain.interop.fairseq.lora import convert_adapted
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig
from dstrain.models.position_config import NoPosition, RotaryPosition, YarnScaling
from tests.paths import GOLDEN, needs_golden
from tests.unit.interop.fairseq_checkpoints import NORMS, SMALL, dictionaries, small_weights


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


def test_a_moving_average_is_not_left_out_in_silence(tmp_path: Path) -> None:
    content = {"args": Namespace(**SMALL), "model": small_weights(), "extra_state": {"ema": small_weights(), "best": 2.5}}
    torch.save(content, tmp_path / "checkpoint.pt")
    listed = left_out(read_fairseq_checkpoint(tmp_path / "checkpoint.pt"))
    assert ["extra_state.ema"] in listed.values()


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


PRE_NORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}


def final_norms(*sides: str) -> dict[str, Tensor]:
    return {f"{side}.layer_norm.{kind}": torch.randn(8) for side in sides for kind in ("weight", "bias")}


@pytest.mark.parametrize("version", [None, 1.0, 2.0, 3.0])
def test_final_norms_that_are_there_stay_whatever_the_version(version: float | None) -> None:
    weights = small_weights(version=version) | final_norms("encoder", "decoder")
    config, _, canonical = convert(checkpoint(weights, **PRE_NORM))
    assert (config.encoder.final_norm, config.decoder.final_norm) == ("auto", "auto")
    for side in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            assert torch.equal(canonical[f"{side}.final_norm.{kind}"], weights[f"{side}.layer_norm.{kind}"])


@pytest.mark.parametrize(("version", "there"), [(None, ()), (1.0, ()), (2.0, ("encoder",))])
def test_old_versions_of_pre_norm_models_have_no_final_norm(version: float | None, there: tuple[str, ...]) -> None:
    config, _, canonical = convert(checkpoint(small_weights(version=version) | final_norms(*there), **PRE_NORM))
    assert config.decoder.final_norm == "no"
    assert config.encoder.final_norm == ("auto" if there else "no")
    assert "decoder.final_norm.weight" not in canonical


@pytest.mark.parametrize(
    ("version", "settings", "there", "message"),
    [
        (3.0, PRE_NORM, (), r"missing: decoder\.final_norm.*"),
        (3.0, {}, ("decoder",), r"unexpected: decoder\.final_norm"),
        (3.0, {**PRE_NORM, "no_decoder_final_norm": True}, ("encoder", "decoder"), r"unexpected: decoder\.final_norm"),
    ],
)
def test_final_norms_that_settings_do_not_have_are_an_error(
    version: float, settings: dict[str, Any], there: tuple[str, ...], message: str
) -> None:
    sides = {"encoder_normalize_before": False, "decoder_normalize_before": False, **settings}
    with pytest.raises(ImportFormatError, match=message):
        convert(checkpoint(small_weights(version=version) | final_norms(*there), **sides))


def test_settings_that_are_missing_are_those_that_tensors_show() -> None:
    """Not fairseq's defaults, and not the architecture's; heads, which no tensor shows, are the architecture's."""
    weights = small_weights() | final_norms("encoder", "decoder")
    for side in ("encoder", "decoder"):
        weights |= {f"{side}.layernorm_embedding.{kind}": torch.randn(8) for kind in ("weight", "bias")}
        weights[f"{side}.embed_positions.weight"] = torch.randn(1026, 8)
    weights["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"].clone()
    config, _, canonical = convert(FairseqCheckpoint({"arch": "transformer_iwslt_de_en"}, {}, weights))
    assert isinstance(config, EncoderDecoderConfig)
    assert (config.model_dim, config.norm_order, config.position.kind) == (8, "pre", "learned")
    assert config.encoder == StackConfig(depth=1, num_heads=4, ffn_dim=16)
    assert config.embedding == PlainEmbedding(norm=True, tie="decoder")
    assert torch.equal(canonical["source_embedding.norm.bias"], weights["encoder.layernorm_embedding.bias"])


def test_buffers_of_sinusoids_do_not_vanish_from_a_model_without_positions() -> None:
    weights = small_weights() | {"encoder.embed_positions._float_tensor": torch.zeros(1)}
    with pytest.raises(
        ImportFormatError, match=r"encoder\.embed_positions\._float_tensor, which belongs to sinusoidal positions, "
    ):
        convert(checkpoint(weights, no_token_positional_embeddings=True))


def test_what_is_left_out_is_listed_with_the_reason() -> None:
    weights = small_weights() | {"classification_heads.mnli.dense.weight": torch.zeros(1)}
    listed = left_out(replace(checkpoint(weights), unread={"extra_state": "of the training"}))
    names = {name: reason for reason, names in listed.items() for name in names}
    assert names.keys() == {"encoder.version", "decoder.version", "classification_heads.mnli.dense.weight", "extra_state"}
    assert "a classifier of sentences" in names["classification_heads.mnli.dense.weight"]
    convert(checkpoint(weights))


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
    weights["decoder.adapter.weight"] = torch.zeros(1)
    del weights["encoder.layers.0.fc1.bias"]
    with pytest.raises(
        ImportFormatError, match=r"missing: encoder.layers.0.feed_forward.up_proj.bias; unexpected: decoder.adapter"
    ):
        convert(checkpoint(weights))


@pytest.mark.parametrize("name", ["encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"])
def test_missing_tables_are_named(name: str) -> None:
    weights = small_weights()
    del weights[f"{name}.weight"]
    with pytest.raises(ImportFormatError, match=rf"the checkpoint lacks {name}\.weight; it is incomplete"):
        convert(checkpoint(weights))


def test_every_location_of_the_settings_is_read(tmp_path: Path) -> None:
    path, weights = tmp_path / "checkpoint.pt", small_weights()
    flat = {**SMALL, "data": "first:second", "source_lang": "en", "target_lang": "de"}
    expected = convert(checkpoint(weights))
    nested: dict[str, Any] = {"_name": "transformer", "encoder": {}, "decoder": {}}
    for name, value in SMALL.items():
        side, _, key = name.partition("_")
        nested.get(side, nested)[key or name] = value
    for content in (
        {"cfg": {"model": nested, "task": {"data": "first", "source_lang": "en"}}, "model": weights},
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


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("module.decoder.layers.0.fc1.weight", {}, "a name that DistributedDataParallel gave; save model.module.state_dict"),
        ("encoder.layers.0._fsdp_wrapped_module.flat_param_0", {}, "a shard of a model that FSDP cut"),
        ("model.partitions.0.2.fc1.weight", {}, "a stage of pipeline parallelism"),
        ("decoder.sentence_encoder.layers.0.fc1.weight", {}, "an encoder of masked language modeling"),
        ("encoder.sentence_encoder.layers.0.fc1.weight", {}, "an encoder of masked language modeling"),
        ("encoder.convolutions.0.weight_v", {}, "a convolution"),
        ("decoder.layers.0.conv.weight", {}, "a convolution"),
        ("encoder.lstm.weight_ih_l0", {}, "a recurrent layer"),
        ("decoder.layers.0.weight_hh", {}, "a recurrent layer"),
        ("encoder.layers.1.moe_layer.experts.0.fc1.weight", {}, "a mixture of experts"),
        ("decoder.layers.0.fc1.centroids", {}, "quantized; import the model from before quantization"),
        ("decoder.layers.0.fc1.weight", {"model_parallel_size": 2}, r"one of 2 parts of a model \(model_parallel_size = 2\)"),
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_other_models_are_refused_for_what_they_are(
    name: str, settings: dict[str, Any], message: str, grouped: bool, tmp_path: Path
) -> None:
    content = {"cfg": {"common": settings, "model": SMALL}} if grouped else {"args": Namespace(**SMALL, **settings)}
    torch.save({**content, "model": {name: torch.zeros(1)}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ImportFormatError, match=message):
        read_fairseq_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (0, torch.ones(1)),
        ("w", [1.0]),
        ("w", torch.ones(2).to_sparse()),
        ("w", torch.ones(2, device="meta")),
        ("w", torch.tensor(1.0)),
        ("encoder.version", torch.zeros(0)),
    ],
)
def test_what_is_no_plain_tensor_is_named(name: object, tensor: object, tmp_path: Path) -> None:
    torch.save({"args": Namespace(**SMALL), "model": {**small_weights(), name: tensor}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ImportFormatError, match=rf"model holds {name!r}, which is no plain tensor with a name"):
        read_fairseq_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.int8), r"of torch\.int8, as in a quantized model"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), r"of torch\.qint8, as in a quantized model"),
        (lambda tensor: tensor / 0, "holds NaN or infinity, so the training had diverged"),
    ],
)
def test_values_that_are_no_finite_numbers_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    weights = small_weights()
    weights["encoder.layers.0.fc1.weight"] = change(weights["encoder.layers.0.fc1.weight"])
    with pytest.raises(ImportFormatError, match=rf"encoder\.layers\.0\.fc1\.weight (is )?{message}"):
        convert(checkpoint(weights))


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

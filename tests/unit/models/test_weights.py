"""Portable weights: names, sharing, round trips and refusals."""

import pytest
import torch

from dstrain.errors import BundleError
from dstrain.models.config import EncoderDecoderConfig, PlainEmbedding
from dstrain.models.weights import load_portable, merge, portable_layout, split, to_portable
from tests.unit.models.build import name_of, sequences, small_config, small_model, variants


def test_names_are_ours_and_the_same_for_fused_and_separate() -> None:
    names = set(to_portable(small_model()))
    assert names == set(to_portable(small_model(projections="separate")))
    assert {
        "source_embedding.tokens.weight",
        "encoder.layers.0.self_attention.q_proj.weight",
        "encoder.layers.2.self_attention.v_proj.bias",
        "encoder.layers.2.feed_forward_norm.weight",
        "decoder.layers.1.cross_attention.k_proj.weight",
        "decoder.layers.1.cross_attention.q_proj.bias",
        "decoder.layers.1.feed_forward.down_proj.weight",
        "projection.weight",
    } <= names


@pytest.mark.parametrize(("tie", "gone"), [("all", {"target_embedding.tokens", "projection"}), ("decoder", {"projection"})])
def test_tied_matrices_stand_once(tie: str, gone: set[str]) -> None:
    names = set(to_portable(small_model(small_config(embedding=PlainEmbedding(tie=tie)))))
    assert not any(f"{part}.weight" in names for part in gone)


@pytest.mark.parametrize("config", variants()[::4], ids=name_of)
def test_weights_move_between_execution_choices(config: EncoderDecoderConfig) -> None:
    fused, separate = small_model(config, seed=1), small_model(config, projections="separate", seed=2)
    source, target = sequences(5, 3), sequences(4, 6)
    expected = fused(source, target).hidden
    load_portable(separate, to_portable(fused))
    torch.testing.assert_close(separate(source, target).hidden, expected, rtol=1e-5, atol=1e-5)
    again = small_model(config, seed=3)
    load_portable(again, to_portable(separate))
    assert torch.equal(again(source, target).hidden, expected)
    assert (again.projection.weight is again.target_embedding.tokens.weight) == (config.embedding.tie != "none")


def test_split_and_merge_are_inverse_for_anything_shaped_like_parameters() -> None:
    model = small_model()
    layout = portable_layout(model)
    values = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    back = merge(layout, split(layout, values))
    assert back.keys() == values.keys()
    assert all(torch.equal(back[name], values[name]) for name in values)


def test_the_layout_needs_no_values() -> None:
    """Under ZeRO-3 a rank holds empty parameters."""
    model = small_model()
    expected = portable_layout(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert portable_layout(model) == expected


def test_every_misfit_is_named_and_nothing_is_copied() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in to_portable(model).items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del weights["projection.weight"]
    weights["decoder.layers.7.lora_A"] = torch.zeros(1)
    weights["encoder.layers.0.self_attention.k_proj.weight"] = torch.zeros(24, 23)
    with pytest.raises(BundleError) as caught:
        load_portable(model, weights)
    assert str(caught.value) == (
        "the weights do not fit the model: missing: projection.weight; unexpected: decoder.layers.7.lora_A; "
        "of another shape: encoder.layers.0.self_attention.k_proj.weight is (24, 23), the model needs (24, 24); "
        "take weights of this configuration"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in to_portable(model).items())


def test_many_misfits_are_counted() -> None:
    with pytest.raises(BundleError, match=r"missing: .* and \d+ more"):
        load_portable(small_model(), {})

"""Portable weights: names, sharing, round trips and refusals."""

import pytest
import torch

from dstrain.errors import BundleError
from dstrain.models.config import EncoderDecoderConfig, PlainEmbedding
from dstrain.models.factory import build_model
from dstrain.models.weights import (
    TensorSource,
    canonical_shapes,
    load_canonical,
    parameter_layouts,
    split_parameters,
    to_canonical,
)
from tests.unit.models.build import VOCABULARY, name_of, sequences, small_config, small_model, variants


def test_names_are_ours_and_the_same_for_fused_and_separate() -> None:
    names = set(to_canonical(small_model()))
    assert names == set(to_canonical(small_model(projections="separate")))
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
    names = set(to_canonical(small_model(small_config(embedding=PlainEmbedding(tie=tie)))))
    assert not any(f"{part}.weight" in names for part in gone)


@pytest.mark.parametrize("config", variants()[::4], ids=name_of)
def test_weights_move_between_execution_choices(config: EncoderDecoderConfig) -> None:
    fused, separate = small_model(config, seed=1), small_model(config, projections="separate", seed=2)
    source, target = sequences(5, 3), sequences(4, 6)
    expected = fused(source, target).hidden
    load_canonical(separate, TensorSource(to_canonical(fused)))
    torch.testing.assert_close(separate(source, target).hidden, expected, rtol=1e-5, atol=1e-5)
    again = small_model(config, seed=3)
    load_canonical(again, TensorSource(to_canonical(separate)))
    assert torch.equal(again(source, target).hidden, expected)
    assert (again.projection.weight is again.target_embedding.tokens.weight) == (config.embedding.tie != "none")


def test_splitting_and_reading_are_inverse_for_anything_shaped_like_parameters() -> None:
    model = small_model()
    layouts = parameter_layouts(model)
    values = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    source = TensorSource(split_parameters(layouts, values))
    assert all(torch.equal(layouts[name].read(source), values[name]) for name in values)
    assert canonical_shapes(layouts) == {name: source.shape(name) for name in source.names()}


def test_layouts_need_no_values() -> None:
    assert parameter_layouts(build_model(small_config(), VOCABULARY, seed=None)) == parameter_layouts(small_model())


def test_every_misfit_is_named_and_nothing_is_copied() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in to_canonical(model).items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del weights["projection.weight"]
    weights["decoder.layers.7.lora_A"] = torch.zeros(1)
    weights["encoder.layers.0.self_attention.k_proj.weight"] = torch.zeros(24, 23)
    with pytest.raises(BundleError) as caught:
        load_canonical(model, TensorSource(weights))
    assert str(caught.value) == (
        "the weights do not fit the model: missing: projection.weight; unexpected: decoder.layers.7.lora_A; "
        "of another shape: encoder.layers.0.self_attention.k_proj.weight is (24, 23), the model needs (24, 24); "
        "take weights of this configuration"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in to_canonical(model).items())


def test_many_misfits_are_counted() -> None:
    with pytest.raises(BundleError, match=r"missing: .* and \d+ more"):
        load_canonical(small_model(), TensorSource({}))

"""Configurations become the parts they name; initial weights follow their table."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from dstrain.errors import RecipeError
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.presets import PRESETS
from dstrain.models.weights import to_canonical
from dstrain.parallel.group import Group
from tests.unit.models.build import VOCABULARY, name_of, sequences, small_config, small_model, variants

PARAMETERS = {"iwslt": 31_641_600, "base": 44_236_800, "big": 176_553_984, "it2": 831_410_176, "it2_dist": 132_485_120}
"""With 64 source and 64 target tokens, counted by the predecessor."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_predecessors_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(PRESETS[name], VocabularySizes(source=64, target=64), seed=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_transformer_tiny() -> None:
    model = build_model(PRESETS["tiny"], VocabularySizes(source=7792, target=7792), seed=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_322_432


@pytest.mark.parametrize("tie", ["all", "decoder", "none"])
def test_tying_shares_the_very_parameter(tie: str) -> None:
    model = small_model(small_config(embedding=PlainEmbedding(tie=tie)))
    source, target = model.source_embedding.tokens.weight, model.target_embedding.tokens.weight
    assert (source is target) == (tie == "all")
    assert (model.projection.weight is target) == (tie != "none")


def test_one_matrix_needs_one_vocabulary() -> None:
    config = small_config(embedding=PlainEmbedding(tie="all"))
    with pytest.raises(RecipeError, match=r"model\.embedding\.tie = all.*40 and 41 entries.*sharing: joint.*tie: decoder"):
        build_model(config, VocabularySizes(source=40, target=41), seed=1)


@pytest.mark.parametrize(("target", "ranks", "fits"), [(41, 4, True), (5, 4, False), (9, 4, False), (7, 4, True), (3, 4, False)])
def test_a_vocabulary_may_be_uneven_but_every_rank_has_entries(target: int, ranks: int, fits: bool) -> None:
    config = small_config(encoder=StackConfig(depth=1, num_heads=4, ffn_dim=40), embedding=PlainEmbedding(tie="none"))
    tensor = Group(1, ranks, None, torch.device("cpu"))
    message = rf"tensor = {ranks} leaves a rank without entries of the target vocabulary of {target}; lower it"
    with nullcontext() if fits else pytest.raises(RecipeError, match=message):
        build_model(config, VocabularySizes(source=41, target=target), seed=None, tensor=tensor)


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("choice", ["auto", "yes", "no"])
def test_final_norm(order: str, choice: str) -> None:
    stack: dict[str, Any] = {"depth": 1, "num_heads": 2, "ffn_dim": 8, "final_norm": choice}
    model = small_model(small_config(norm_order=order, encoder=StackConfig(**stack), decoder=DecoderStackConfig(**stack)))
    expected = choice == "yes" or (choice == "auto" and order == "pre")
    for part in (model.encoder, model.decoder):
        assert isinstance(part.final_norm, nn.LayerNorm) == expected


def test_norm_eps_reaches_every_norm() -> None:
    model = small_model(small_config(norm={"kind": "layer_norm", "eps": 0.25}, norm_order="pre"))
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 3 * 2 + 2 * 3 + 2
    assert {norm.eps for norm in norms} == {0.25}


@pytest.mark.parametrize("config", variants()[::3], ids=name_of)
def test_fused_and_separate_projections_start_and_compute_the_same(config: EncoderDecoderConfig) -> None:
    fused, separate = small_model(config), small_model(config, projections="separate")
    weights, others = to_canonical(fused), to_canonical(separate)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    source, target = sequences(5, 3), sequences(4, 6)
    torch.testing.assert_close(fused(source, target).hidden, separate(source, target).hidden, rtol=1e-5, atol=1e-5)


def test_only_the_seed_decides() -> None:
    torch.manual_seed(1)
    first = to_canonical(build_model(small_config(), VOCABULARY, seed=3))
    torch.manual_seed(2)
    again = to_canonical(build_model(small_config(), VOCABULARY, seed=3))
    other = to_canonical(build_model(small_config(), VOCABULARY, seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projection.weight"], other["projection.weight"])


def test_an_output_projection_keeps_the_size_of_logits() -> None:
    """Features of unit variance give logits of unit variance, with the map to another width as without."""
    sizes = VocabularySizes(source=500, target=400)
    configs = [small_config(model_dim=240, embedding={"kind": "plain", "output_dim": width}) for width in (None, 60, 480)]
    plain, narrow, wide = (build_model(config, sizes, seed=1) for config in configs)
    hidden = torch.randn(64, 240)
    for model in (plain, narrow, wide):
        assert model.project(hidden).std().item() == pytest.approx(1, rel=0.05)
    weights, others = to_canonical(plain), to_canonical(narrow)
    assert weights.keys() ^ others.keys() == {"projection.output_proj.weight"}
    assert others["projection.output_proj.weight"].shape == (60, 240)
    assert all(torch.equal(weights[name], others[name]) for name in weights if name != "projection.weight")


def test_initial_distributions() -> None:
    """Those of the predecessor: see its wiring notes."""
    config = small_config(
        model_dim=256,
        encoder=StackConfig(depth=1, num_heads=4, ffn_dim=1024),
        decoder=DecoderStackConfig(depth=1, num_heads=4, ffn_dim=1024),
        position={"kind": "learned"},
    )
    weights = to_canonical(build_model(config, VocabularySizes(source=500, target=400), seed=1))

    def spread(name: str) -> float:
        return weights[name].std().item()

    def limit(name: str) -> float:
        return weights[name].abs().max().item()

    xavier = math.sqrt(6 / (256 + 256))
    for attention in ("encoder.layers.0.self_attention", "decoder.layers.0.cross_attention"):
        for block in ("q_proj", "k_proj", "v_proj"):
            assert limit(f"{attention}.{block}.weight") == pytest.approx(xavier / math.sqrt(2), rel=0.01)
            assert spread(f"{attention}.{block}.weight") == pytest.approx(xavier / math.sqrt(2) / math.sqrt(3), rel=0.02)
            assert limit(f"{attention}.{block}.bias") == pytest.approx(1 / 16, rel=0.05)
        assert limit(f"{attention}.out_proj.weight") == pytest.approx(xavier, rel=0.01)
        assert weights[f"{attention}.out_proj.bias"].eq(0).all()
    assert limit("encoder.layers.0.feed_forward.up_proj.weight") == pytest.approx(1 / 16, rel=0.01)
    assert limit("encoder.layers.0.feed_forward.up_proj.bias") == pytest.approx(1 / 16, rel=0.05)
    assert limit("encoder.layers.0.feed_forward.down_proj.weight") == pytest.approx(1 / 32, rel=0.01)
    for table in ("source_embedding.tokens", "target_embedding.tokens", "projection", "source_embedding.positions"):
        assert spread(f"{table}.weight") == pytest.approx(1 / 16, rel=0.03)
    for side in ("source", "target"):
        assert weights[f"{side}_embedding.tokens.weight"][VOCABULARY.pad_id].eq(0).all()
    assert weights["encoder.layers.0.self_attention_norm.weight"].eq(1).all()
    assert weights["encoder.layers.0.self_attention_norm.bias"].eq(0).all()

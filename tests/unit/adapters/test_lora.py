"""Low-rank adapters: nothing at the start, the formula afterwards, the same when merged; no setting without effect."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import adapter_targets, inject, merged, unmatched_keys
from dstrain.adapters.parts import LoraEmbedding, LoraLinear, LoraProjection
from dstrain.errors import BundleError, RecipeError
from dstrain.models.config import (
    DecoderOnlyConfig,
    DecoderOnlyStackConfig,
    DecoderStackConfig,
    EncoderDecoderConfig,
    FactorizedEmbedding,
    PlainEmbedding,
    StackConfig,
)
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy
from tests.batches import decoder_hidden
from tests.unit.adapters.adapted import SOURCE, TARGET, adapted, adapter_of, copies, logits, lora, merged_model
from tests.unit.models.build import sequences, small_config, small_model

Config = EncoderDecoderConfig | DecoderOnlyConfig
GATED = {"depth": 2, "num_heads": 3, "ffn_dim": 40, "feed_forward": "gated"}
MODELS: dict[str, Config] = {
    **{
        f"{kind}-{tie}": small_config(embedding=embedding)
        for tie in ("all", "decoder", "none")
        for kind, embedding in (
            ("plain", PlainEmbedding(tie=tie)),
            ("factorized", FactorizedEmbedding(tie=tie, dim=7, activation="gelu")),
        )
    },
    "output-projection": small_config(embedding=PlainEmbedding(output_dim=9)),
    "output-projection-tied": small_config(embedding=FactorizedEmbedding(tie="all", dim=7, output_dim=7)),
    "stacked": small_config(encoder=StackConfig(depth=3, unique_layers=1, num_heads=3, ffn_dim=40)),
    "gated": small_config(encoder=StackConfig(**GATED), decoder=DecoderStackConfig(**GATED, num_kv_heads=1)),
    "decoder-only": DecoderOnlyConfig(
        model_dim=24,
        decoder=DecoderOnlyStackConfig(depth=2, num_heads=4, ffn_dim=56, output_activation="tanh"),
        embedding=PlainEmbedding(tie="decoder"),
        max_target_length=32,
    ),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_at_the_start_and_equal_when_merged(name: str, dora: bool) -> None:
    config, adapter = MODELS[name], lora("*", bias="lora_only", dora=dora)
    base = small_model(config, projections="separate")
    fresh = adapted(adapter, config, trained=False)
    assert torch.equal(logits(fresh), logits(base)), "bit for bit"
    weights, before = copies(fresh), copies(base)
    assert [key for key in weights if "lora" not in key] == list(before), "no name of the base moves"
    assert all(torch.equal(weights[key], before[key]) for key in before)

    model = adapted(adapter, config)
    assert (logits(model) - logits(base)).abs().max() > 0.5
    plain = merged_model(model, adapter, config).double()  # what float32 sums to depends on the processor
    torch.testing.assert_close(logits(plain), logits(model.double()), rtol=1e-5, atol=3e-5)
    assert not list(unmatched_keys(adapter_of(model), before))


@pytest.mark.parametrize("name", ["plain-all", "factorized-all", "stacked", "decoder-only"])
def test_incremental_decoding_equals_the_full_forward(name: str) -> None:
    model = adapted(lora("*"), MODELS[name])
    tokens = sequences(6, 6).tokens
    with torch.no_grad():
        full = model.project(decoder_hidden(model, sequences(5, 5), sequences(6, 6)))
    state = model.start(sequences(5, 5), num_sentences=2, rows_per_sentence=1, max_length=6)
    steps = torch.cat([model.step(tokens[:, t : t + 1], state) for t in range(6)], dim=1)
    torch.testing.assert_close(steps, full, rtol=1e-5, atol=1e-4)


def written_out(x: Tensor, part: LoraLinear, scale: float) -> Tensor:
    """The papers' formulas, one row of the matrix at a time."""
    rows = []
    for row in range(part.weight.shape[0]):
        vector = part.weight[row] + scale * sum(part.lora_b[row, rank] * part.lora_a[rank] for rank in range(3))
        if part.lora_magnitude is not None:
            vector = part.lora_magnitude[row] * vector / vector.detach().square().sum().sqrt()
        rows.append((x * vector).sum(-1) + part.bias[row])
    return torch.stack(rows, dim=-1)


@pytest.mark.parametrize("rank_scaled", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_linear_map_equals_the_formula_with_its_gradients(dora: bool, rank_scaled: bool) -> None:
    adapter = lora("decoder.layers.1.feed_forward.up_proj", dora=dora, rank_scaled=rank_scaled)
    part = adapted(adapter).double().get_submodule("decoder.layers.1.feed_forward.up_proj")
    assert isinstance(part, LoraLinear)
    scale = 5 / math.sqrt(3) if rank_scaled else 5 / 3
    x = torch.randn(4, 1, 24, dtype=torch.float64, requires_grad=True)
    trained = [part.lora_a, part.lora_b, *([part.lora_magnitude] if part.lora_magnitude is not None else [])]
    slope = torch.randn(4, 1, 56, dtype=torch.float64)
    reference = written_out(x, part, scale)
    torch.testing.assert_close(part(x), reference, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(part(x), [x, *trained], slope)
    torch.testing.assert_close(found, torch.autograd.grad(reference, [x, *trained], slope), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dora", [False, True])
def test_a_tied_table_is_one_matrix_in_both_uses(dora: bool) -> None:
    """Embedding and projection equal an explicit matrix, in values and in the gradients of the one adapter."""
    model = adapted(lora("tokens", dora=dora), MODELS["plain-all"]).double()
    table, projection = model.target_embedding.tokens, model.projection
    assert isinstance(table, LoraEmbedding)
    assert isinstance(projection, LoraProjection)
    assert model.source_embedding.tokens is table
    assert projection.lora_a is table.lora_a
    matrix = table.weight + 5 / 3 * table.lora_b @ table.lora_a
    if table.lora_magnitude is not None:
        lengths = matrix.detach().norm(dim=1, keepdim=True).clamp_min(1e-300)
        matrix = matrix / lengths * table.lora_magnitude[:, None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == (3 if dora else 2)

    tokens, hidden = torch.tensor([[5, 1, 7, 5]]), torch.randn(9, 24, dtype=torch.float64)
    labels = torch.arange(9) % 5
    found, nll = projection(hidden, partial(linear_cross_entropy, labels=labels, label_smoothing=0.1, chunk_tokens=4))
    found = found + table(tokens).square().sum()
    expected = F.cross_entropy(hidden @ matrix.t(), labels, reduction="none")
    torch.testing.assert_close(nll, expected.detach())
    log_probs = (hidden @ matrix.t()).log_softmax(-1)
    spread = 0.1 / 40
    expected = (0.9 - spread) * expected.sum() - spread * log_probs.sum() + matrix[tokens].square().sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), rtol=1e-9, atol=1e-9)


def test_both_factors_of_a_tied_embedding_act_on_the_way_back() -> None:
    model = adapted(lora("table", "target_embedding.tokens.up_proj"), MODELS["factorized-all"])
    embedding = model.target_embedding.tokens
    assert len(adapter_of(model)) == 4
    table, up = (part.weight + 5 / 3 * part.lora_b @ part.lora_a for part in (embedding.table, embedding.up_proj))
    hidden = torch.randn(3, 24)
    torch.testing.assert_close(model.project(hidden), hidden @ up @ table.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["tokens", "source_embedding.tokens", "target_embedding.tokens", "projection"])
def test_naming_any_use_of_a_tied_matrix_adapts_it_everywhere(target: str) -> None:
    expected = adapted(lora("tokens"), MODELS["plain-all"])
    found = adapted(lora(target), MODELS["plain-all"])
    assert adapter_of(found).keys() == adapter_of(expected).keys()
    assert torch.equal(logits(found), logits(expected))


def test_a_stacked_layer_has_one_adapter() -> None:
    trained = adapter_of(adapted(lora("q_proj"), MODELS["stacked"]))
    assert [name for name in trained if name.startswith("encoder")] == [
        f"encoder.layers.0.self_attention.q_proj.lora_{side}" for side in "ab"
    ]


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    """The embedding of padding has no direction to stretch."""
    model = small_model(MODELS["plain-all"], projections="separate")
    assert not model.target_embedding.tokens.weight[1].any()
    load_canonical(model, inject(model, lora("tokens", dora=True), TensorSource(to_canonical(model)), seed=1))
    model.project(decoder_hidden(model, SOURCE, TARGET)).sum().backward()
    gradients = [model.target_embedding.tokens.get_parameter(f"lora_{kind}").grad for kind in ("a", "b", "magnitude")]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert not model.target_embedding.tokens(torch.tensor([1])).any()


def test_initial_values() -> None:
    model = adapted(lora("*", rank=8), MODELS["plain-none"], trained=False)
    for name, tensor in adapter_of(model).items():
        if name.endswith("lora_b"):
            assert not tensor.any(), name
        elif "tokens" in name:
            assert 0.8 < tensor.std() < 1.2, name
        else:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert bound * 0.85 < tensor.abs().max() <= bound, name
    again, other = (adapter_of(adapted(lora("*", rank=8), MODELS["plain-none"], trained=False, seed=seed)) for seed in (1, 2))
    first = adapter_of(model)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("lora_a"))
    a = [first[f"encoder.layers.{layer}.self_attention.q_proj.lora_a"] for layer in (0, 1)]
    assert not torch.equal(*a), "every matrix has its own"


VALUES = {"self_attention.v_proj", "cross_attention.v_proj"}


@pytest.mark.parametrize(
    ("targets", "adapted_paths"),
    [
        (["q_proj"], {"self_attention.q_proj", "cross_attention.q_proj"}),
        (["decoder.layers.1.cross_attention.q_proj"], {"cross_attention.q_proj"}),
        (["decoder.*.[kv]_proj"], {*VALUES, "self_attention.k_proj", "cross_attention.k_proj"}),
        (["*.feed_forward.*", "v_proj"], {"feed_forward.up_proj", "feed_forward.down_proj", *VALUES}),
    ],
)
def test_targets_are_names_paths_and_patterns(targets: list[str], adapted_paths: set[str]) -> None:
    names = adapter_of(adapted(lora(*targets)))
    assert {".".join(name.split(".")[-3:-1]) for name in names} == adapted_paths
    if targets[0].startswith("decoder"):
        assert all(name.startswith("decoder") for name in names)


def test_an_unmatched_target_is_refused_with_what_there_is() -> None:
    with pytest.raises(RecipeError) as caught:
        adapted(lora("q_proj", "fc1", "encoder.*.cross_attention.q_proj"))
    assert str(caught.value) == (
        "adapter.targets: 'fc1', 'encoder.*.cross_attention.q_proj' matches no module of the model; its modules are called "
        "tokens, q_proj, k_proj, v_proj, out_proj, up_proj, down_proj, projection, one of them in full "
        "decoder.layers.0.self_attention.q_proj"
    )


def test_paths_are_those_of_canonical_weights() -> None:
    model = small_model(MODELS["gated"], projections="separate")
    named = {f"{target.path}.weight" for target in adapter_targets(model)}
    assert named - {"target_embedding.tokens.weight"} <= to_canonical(model).keys()
    assert "encoder.layers.0.feed_forward.gate_proj.weight" in named


def test_fused_projections_cannot_be_adapted() -> None:
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.self_attention\.qkv is fused; build the model with proj"):
        inject(small_model(), lora("q_proj"), TensorSource({}), seed=1)


CHANGES: list[dict[str, Any]] = [
    {"rank": 4},
    {"alpha": 6},
    {"dropout": 0.3},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"targets": ["q_proj"]},
    {"rank_scaled": True},
    {"dora": True},
]


def outcome(adapter: LoraConfig) -> tuple[list[str], Tensor]:
    """Which tensors are trained, and the logits after a step of training in training mode."""
    model = adapted(adapter, small_config(dropout=0.0)).train()
    torch.manual_seed(4)
    model.project(decoder_hidden(model, SOURCE, TARGET)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-4)
    return sorted(adapter_of(model)), logits(model.eval())


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_acts(change: dict[str, Any]) -> None:
    before, after = (outcome(lora(**{"targets": ["q_proj", "v_proj"], **settings})) for settings in ({}, change))
    assert before[0] != after[0] or not torch.allclose(before[1], after[1], atol=1e-4)
    trained_too = {"bias": 2 if change.get("bias") == "lora_only" else 1, "dora": 1}
    assert (len(after[0]) > len(before[0])) == any(name in change for name in trained_too)


def test_every_setting_is_tried() -> None:
    assert {name for change in CHANGES for name in change} == LoraConfig.model_fields.keys() - {"kind"}


def test_dropout_acts_in_training_only() -> None:
    model = adapted(lora("q_proj", dropout=0.5), small_config(dropout=0.0))
    still = adapted(lora("q_proj"), small_config(dropout=0.0))
    assert torch.equal(logits(model), logits(still))
    torch.manual_seed(1)
    assert not torch.allclose(logits(model.train()), logits(still), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["tokens"], "dropout": 0.1},
            r"adapter\.dropout = 0\.1 does nothing: .*no target is one; set 0",
        ),
        ({"targets": ["projection"], "bias": "lora_only"}, r"adapter\.bias = lora_only trains nothing: .*no such bias; set none"),
    ],
)
def test_a_setting_without_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        adapted(lora(**changes))


def test_an_adapter_that_does_not_fit_is_named() -> None:
    weight = torch.zeros(6, 5)
    fitting = {"p.lora_a": torch.zeros(3, 5), "p.lora_b": torch.zeros(6, 3)}
    assert torch.equal(merged("p.weight", weight, fitting, lora("p")), weight)
    for name, wrong, message in (
        ("p.lora_a", torch.zeros(2, 5), r"p\.lora_a is \(2, 5\), the base needs \(3, 5\)"),
        ("p.lora_b", torch.zeros(5, 3), r"p\.lora_b is \(5, 3\), the base needs \(6, 3\)"),
    ):
        with pytest.raises(BundleError, match=message):
            merged("p.weight", weight, {**fitting, name: wrong}, lora("p"))
    with pytest.raises(BundleError, match=r"p\.lora_magnitude is missing, the base needs \(6,\)"):
        merged("p.weight", weight, fitting, lora("p", dora=True))
    with pytest.raises(BundleError, match=r"p\.bias is \(5,\), the base needs \(6,\)"):
        merged("p.bias", torch.zeros(6), {"p.bias": torch.zeros(5)}, lora("p"))
    assert list(unmatched_keys(["p.lora_a", "q.lora_a", "r.bias"], ["p.weight", "q.bias"])) == ["q.lora_a", "r.bias"]


def test_all_else_is_frozen() -> None:
    model = adapted(lora("q_proj"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * (3 + 2 + 2)
    assert all(name.rpartition(".")[2] in {"lora_a", "lora_b"} for name in trained)

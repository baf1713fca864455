"""No field of the model's configuration is silently inert: changing it changes the model or what it computes."""

from typing import Any

import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from dstrain.models import config as configurations
from dstrain.models import position_config
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig, ModelConfig
from dstrain.models.factory import build_model
from dstrain.models.position_config import DynamicYarnScaling
from dstrain.models.weights import to_canonical
from tests.batches import decoder_hidden
from tests.unit.models.build import VOCABULARY, sequences

Tree = dict[str, Any]
STACK: Tree = {"depth": 2, "num_heads": 2, "ffn_dim": 20}
ENCODER_DECODER: Tree = {
    "kind": "encoder_decoder",
    "model_dim": 16,
    "encoder": STACK,
    "decoder": STACK,
    "position": {"kind": "learned"},
    "embedding": {"kind": "plain"},
    "max_source_length": 40,
    "max_target_length": 40,
}
DECODER_ONLY: Tree = {
    "kind": "decoder_only",
    "model_dim": 16,
    "decoder": STACK,
    "position": {"kind": "learned"},
    "embedding": {"kind": "plain"},
}
FACTORIZED: Tree = {"embedding": {"kind": "factorized", "dim": 6, "activation": "linear"}}
YARN: Tree = {"kind": "yarn", "factor": 4.0, "original_length": 64}
DYNAMIC: Tree = {"kind": "dynamic_yarn", "original_length": 64, "from_length": 3}

STACK_CHANGES: list[Tree] = [
    {"depth": 3},
    {"unique_layers": 1},
    {"num_heads": 4},
    {"num_kv_heads": 1},
    {"ffn_dim": 24},
    {"feed_forward": "gated"},
    {"layer_drop": 0.5},
    {"final_norm": "yes"},
]
COMMON: list[tuple[Tree, Tree]] = [
    ({}, {"model_dim": 20}),
    ({}, {"norm_order": "pre"}),
    ({}, {"norm": {"kind": "layer_norm", "eps": 0.1}}),
    ({}, {"norm": {"kind": "rms_norm"}}),
    ({"norm": {"kind": "rms_norm"}}, {"norm": {"kind": "rms_norm", "eps": 0.1}}),
    ({}, {"activation": "gelu"}),
    ({}, {"embedding": {"scale": False}}),
    ({}, {"embedding": {"norm": True}}),
    ({}, {"embedding": {"tie": "decoder"}}),
    ({}, {"embedding": {"output_dim": 6}}),
    ({}, {"embedding": {"output_dim": 16}}),
    (FACTORIZED, {"embedding": {"output_dim": 4}}),
    (FACTORIZED, {"embedding": {"output_dim": 6, "tie": "decoder"}}),
    ({}, FACTORIZED),
    (FACTORIZED, {"embedding": {"kind": "factorized", "dim": 4}}),
    (FACTORIZED, {"embedding": {"activation": "relu"}}),
    (FACTORIZED, {"embedding": {"tie": "decoder"}}),
    ({}, {"dropout": 0.3}),
    ({}, {"attention_dropout": 0.3}),
    ({}, {"activation_dropout": 0.3}),
    ({}, {"max_target_length": 41}),
    ({}, {"decoder": {"output_activation": "tanh"}}),
    ({}, {"position": {"kind": "sinusoidal"}}),
    ({}, {"position": {"kind": "none"}}),
    ({"position": {"kind": "none"}}, {"position": {"kind": "rotary"}}),
    ({"position": {"kind": "none"}}, {"position": {"kind": "alibi"}}),
    ({"position": {"kind": "rotary"}}, {"position": {"theta": 100.0}}),
    ({"position": {"kind": "rotary"}}, {"position": {"fraction": 0.5}}),
    ({"position": {"kind": "rotary"}}, {"position": {"layout": "interleaved"}}),
    ({"position": {"kind": "rotary"}}, {"position": {"scaling": {"kind": "linear", "factor": 2.0}}}),
    (
        {"position": {"kind": "rotary", "scaling": {"kind": "linear", "factor": 2.0}}},
        {"position": {"scaling": {"factor": 3.0}}},
    ),
    ({"position": {"kind": "rotary"}}, {"position": {"scaling": {"kind": "ntk", "factor": 2.0}}}),
    ({"position": {"kind": "rotary", "scaling": {"kind": "ntk", "factor": 2.0}}}, {"position": {"scaling": {"factor": 3.0}}}),
    ({"position": {"kind": "rotary"}}, {"position": {"scaling": {"kind": "dynamic_ntk", "original_length": 3}}}),
    *[
        (
            {"position": {"kind": "rotary", "scaling": {"kind": "dynamic_ntk", "original_length": 3}}},
            {"position": {"scaling": change}},
        )
        for change in ({"factor": 2.0}, {"original_length": 4})
    ],
    ({"position": {"kind": "rotary"}}, {"position": {"scaling": YARN}}),
    ({"position": {"kind": "rotary"}}, {"position": {"scaling": DYNAMIC}}),
    *[
        ({"position": {"kind": "rotary", "theta": 100.0, "scaling": YARN}}, {"position": {"scaling": change}})
        for change in (
            {"factor": 2.0},
            {"original_length": 8},
            {"beta_fast": 3.0},
            {"beta_slow": 30.0},
            {"extrapolation_factor": 0.5},
            {"attention_factor": 1.5},
        )
    ],
    *[
        ({"position": {"kind": "rotary", "theta": 100.0, "scaling": DYNAMIC}}, {"position": {"scaling": change}})
        for change in (
            {"factor": 9.0},
            {"original_length": 8},
            {"from_length": 4},
            {"from_length": None},
            {"beta_fast": 3.0},
            {"beta_slow": 30.0},
            {"extrapolation_factor": 0.5},
            {"attention_factor": 1.5},
        )
    ],
    *[({}, {"decoder": change}) for change in STACK_CHANGES],
]
OF_TWO_STACKS: list[tuple[Tree, Tree]] = [
    ({}, {"embedding": {"tie": "all"}}),
    (FACTORIZED, {"embedding": {"tie": "all"}}),
    (FACTORIZED, {"embedding": {"sides": "source"}}),
    (FACTORIZED, {"embedding": {"sides": "target", "tie": "decoder"}}),
    ({}, {"max_source_length": 41}),
    ({}, {"decoder": {"num_cross_kv_heads": 1}}),
    *[({}, {"encoder": change}) for change in STACK_CHANGES],
    ({"position": {"kind": "alibi"}}, {"position": {"encoder": "asymmetric"}}),
    ({"position": {"kind": "alibi"}}, {"position": {"encoder": "none"}}),
]
CASES = [(base, first, second) for base in (ENCODER_DECODER, DECODER_ONLY) for first, second in COMMON] + [
    (ENCODER_DECODER, first, second) for first, second in OF_TWO_STACKS
]


def changed(base: Tree, change: Tree) -> Tree:
    """`change` over `base`; a part of another kind replaces the old one."""
    tree = dict(base)
    for key, value in change.items():
        old = tree.get(key)
        same = isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        tree[key] = changed(old, value) if same else value
    return tree


def read(tree: Tree) -> EncoderDecoderConfig | DecoderOnlyConfig:
    parsed: EncoderDecoderConfig | DecoderOnlyConfig = TypeAdapter(ModelConfig).validate_python(tree)
    return parsed


def signature(tree: Tree) -> tuple[dict[str, torch.Size], Tensor]:
    """Shapes of the weights, and the logits of a training step."""
    model = build_model(read(tree), VOCABULARY, seed=1).train()
    torch.manual_seed(5)
    logits = model.project(decoder_hidden(model, sequences(5, 3), sequences(4, 4)))
    return {name: tensor.shape for name, tensor in to_canonical(model).items()}, logits.detach()


@pytest.mark.parametrize(("base", "first", "second"), CASES, ids=lambda part: part.get("kind") or str(part)[:60])
def test_a_changed_field_changes_the_model(base: Tree, first: Tree, second: Tree) -> None:
    start = changed(base, first)
    shapes, logits = signature(start)
    again_shapes, again = signature(start)
    assert (shapes, logits.tolist()) == (again_shapes, again.tolist())
    changed_shapes, other = signature(changed(start, second))
    assert changed_shapes != shapes or not torch.allclose(other, logits, rtol=1e-4, atol=1e-6)


def differences(before: BaseModel, after: BaseModel) -> set[tuple[str, str]]:
    """(model, field) of every field that differs, through parts of the same kind."""
    found: set[tuple[str, str]] = set()
    for name in type(before).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, BaseModel) and type(old) is type(new):
            found |= (inner := differences(old, new))
            found |= {(type(before).__name__, name)} if inner else set()
        elif old != new:
            found.add((type(before).__name__, name))
            if isinstance(new, BaseModel):
                found.add((type(new).__name__, "kind"))
    return found


def test_every_field_was_changed() -> None:
    """Each field of each class of the package was changed, in one case at least."""
    seen: set[tuple[str, str]] = set()
    for base, first, second in CASES:
        start = changed(base, first)
        seen |= differences(read(base), read(start)) | differences(read(start), read(changed(start, second)))
    modules = (configurations, position_config)
    classes = [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.__module__ == module.__name__
    ]
    parts = [kind for kind in classes if not kind.__subclasses__()]
    parts += [configurations.StackConfig, position_config.YarnScaling]
    wanted = {(kind.__name__, field) for kind in parts for field in kind.model_fields if field != "kind"}
    kinds = {(kind.__name__, "kind") for kind in parts if "kind" in kind.model_fields}
    bases = {
        ("EncoderDecoderConfig", "kind"),
        ("DecoderOnlyConfig", "kind"),
        ("PlainEmbedding", "kind"),
        ("LayerNormConfig", "kind"),
    }
    bases |= {("LearnedPosition", "kind"), ("NoScaling", "kind")}
    missing = (
        (wanted | kinds) - seen - bases - {("VocabularySizes", field) for field in configurations.VocabularySizes.model_fields}
    )
    assert {entry for entry in missing if entry[0] != "FactorizedEmbedding" or entry[1] not in {"scale", "norm"}} == set()


REFUSED: list[tuple[Tree, str]] = [
    ({"position": {"kind": "rotary", "fraction": 0.4}}, "position.fraction = 0.4 rotates 3.2 of a head's 8 features"),
    ({"model_dim": 18, "position": {"kind": "rotary"}}, "rotates 9 of a head's 9 features, which form no pairs"),
    ({"decoder": {"num_heads": 3}}, "decoder.num_heads = 3 does not divide model_dim = 16"),
    ({"decoder": {"num_heads": 4, "num_kv_heads": 3}}, "num_kv_heads = 3 does not divide num_heads = 4"),
    ({"decoder": {"unique_layers": 3}}, "unique_layers = 3 exceeds depth = 2"),
    ({"position": {"kind": "rotary", "scaling": {"kind": "yarn", "factor": 4.0}}}, "original_length"),
    ({"position": {"kind": "rotary", "scaling": {**YARN, "beta_slow": 32.0}}}, "beta_slow = 32.0 must be below beta_fast = 32.0"),
    ({"position": {"kind": "rotary", "encoder": "symmetric"}}, "encoder"),
    ({"embedding": {"dim": 4}}, "dim"),
    (
        {"embedding": {"output_dim": 6, "tie": "decoder"}},
        "embedding.output_dim = 6 differs from the width of the tied token vectors, 16; choose the same width, or tie: none",
    ),
    (
        {"embedding": {"kind": "factorized", "dim": 4, "sides": "source", "tie": "all"}},
        "sides = source gives the sides unequal widths, but tie = all shares one; choose tie: none",
    ),
    (
        {"embedding": {"kind": "factorized", "dim": 4, "sides": "source", "output_dim": 4, "tie": "decoder"}},
        "embedding.output_dim = 4 differs from the width of the tied token vectors, 16",
    ),
    (
        {"embedding": {"kind": "factorized", "dim": 4, "output_dim": 16, "tie": "all"}},
        "embedding.output_dim = 16 differs from the width of the tied token vectors, 4",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_would_be_inert_or_wrong_is_refused(change: Tree, message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + message.replace(".", r"\.")):
        read(changed(ENCODER_DECODER, change))


def test_what_only_two_stacks_have_is_refused_for_one() -> None:
    for change, message in (
        ({"embedding": {"tie": "all"}}, "a decoder-only model has one; choose tie: decoder"),
        (
            {"embedding": {"kind": "factorized", "dim": 4, "sides": "target"}},
            "has one side; leave sides out",
        ),
        ({"encoder": STACK}, "encoder"),
        ({"decoder": {"num_cross_kv_heads": 1}}, "num_cross_kv_heads"),
        ({"position": {"kind": "alibi", "encoder": "symmetric"}}, "encoder"),
        ({"max_source_length": 5}, "max_source_length"),
    ):
        with pytest.raises(ValueError, match=message):
            read(changed(DECODER_ONLY, change))


def test_a_dynamic_factor_starts_at_the_original_length_by_default() -> None:
    assert DynamicYarnScaling(original_length=7).from_length is None

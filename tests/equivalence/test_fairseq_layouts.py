"""Imported models compute what their weights say, for layouts that no golden folder has.

Golden checkpoints with their projections fused by hand must still give the golden logits. State dicts written from random weights
of a model of ours, in fairseq's names and row order, must give that model's logits. The rules by which they are written follow
the documented format; they do not use the reader's tables.
"""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.lora import merged
from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.checkpoint import FairseqCheckpoint, convert, read_fairseq_checkpoint
from dstrain.interop.fairseq.lora import convert_adapted
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.models.factory import Model, build_model
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from tests.equivalence.test_fairseq_models import CLOSE, PAD, arrays, right_padded
from tests.paths import GOLDEN, needs_golden
from tests.unit.models.build import VOCABULARY, sequences

State = dict[str, Tensor]
Config = EncoderDecoderConfig | DecoderOnlyConfig
DIM, HEADS, FFN, WIDTH = 24, 6, 20, 10
SOURCE, TARGET = sequences(5, 3, seed=2), sequences(4, 6, seed=3)


def fused(state: State) -> State:
    """Self-attention as qkv_proj (rows q, k, v), cross-attention as q_proj and kv_proj (rows k, v); LoRA stays as it is."""
    state = dict(state)
    for name in [name for name in state if re.search(r"_attn\.k_proj\.(weight|bias)$", name)]:
        path, kind = name.split(".k_proj.")
        blocks, whole = ("qkv", "qkv_proj") if path.endswith("self_attn") else ("kv", "kv_proj")
        state[f"{path}.{whole}.{kind}"] = torch.cat([state.pop(f"{path}.{block}_proj.{kind}") for block in blocks])
    return state


@needs_golden
@pytest.mark.parametrize("variant", ["l_base", "l_glu_silu", "l_gqa", "l_rmsnorm", "l_rope_fast"])
def test_golden_logits_of_fused_projections(variant: str) -> None:
    golden, checkpoint = arrays(f"late/{variant}"), read_fairseq_checkpoint(GOLDEN / "late" / variant / "checkpoint.pt")
    settings = {**checkpoint.model, "attn_implementation": "fast_gqa_fused" if variant == "l_gqa" else "fast_fused"}
    weights = fused(checkpoint.weights)
    rows = {len(tensor) for name, tensor in weights.items() if name.endswith("self_attn.qkv_proj.weight")}
    assert rows == {32 + 2 * 16} if variant == "l_gqa" else {3 * 32}, "two of four heads have keys and values"
    model = imported(dataclasses.replace(checkpoint, model=settings, weights=weights))
    with torch.no_grad():
        source, target = right_padded(golden["src_tokens_rightpad"]), right_padded(golden["prev_output_tokens"])
        found = model.project(model(source, target).hidden)
    real = golden["prev_output_tokens"] != PAD
    torch.testing.assert_close(found[real], golden["logits"][real], **CLOSE)


def imported(checkpoint: FairseqCheckpoint) -> Model:
    """The model of a checkpoint, its adapter merged."""
    config, vocabulary, weights, adapter = convert_adapted(checkpoint, unmerged=False)
    model = build_model(config, vocabulary, seed=None).eval()
    if adapter is not None:
        lora = LoraConfig(**adapter.settings)
        weights = {name: merged(name, tensor, adapter.weights, lora) for name, tensor in weights.items()}
    load_canonical(model, TensorSource(weights))
    return model


def logits(model: Model) -> Tensor:
    source = SOURCE if isinstance(model.config, EncoderDecoderConfig) else None
    with torch.no_grad():
        return model.project(model(source, TARGET).hidden)


def random_model(config: Config) -> Model:
    model = build_model(config, VOCABULARY, seed=1).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


RENAMED = (
    (r"^(en|de)coder\.final_norm", r"\1coder.layer_norm"),
    ("^source_embedding", "encoder"),
    ("^target_embedding", "decoder"),
    (r"tokens\.table", "embed_tokens"),
    (r"tokens\.up_proj", "project_in_dim"),
    (r"\.tokens", ".embed_tokens"),
    (r"^projection\.output_proj", "decoder.project_out_dim"),
    ("^projection", "decoder.output_projection"),
    ("self_attention_norm", "self_attn_layer_norm"),
    ("cross_attention_norm", "encoder_attn_layer_norm"),
    ("feed_forward_norm", "final_layer_norm"),
    ("self_attention", "self_attn"),
    ("cross_attention", "encoder_attn"),
)


def fairseq_state(model: Model) -> State:
    """Its weights as the late generation saves them, tied matrices under all of their names, projections separate."""
    state: State = {}
    for name, tensor in to_canonical(model).items():
        for ours, theirs in RENAMED:
            name = re.sub(ours, theirs, name)
        state[name] = tensor.clone()
    for name in [name for name in state if name.endswith("feed_forward.gate_proj.weight")]:
        path = name.removesuffix("feed_forward.gate_proj.weight")
        up, gate, down = (state.pop(f"{path}feed_forward.{block}_proj.weight") for block in ("up", "gate", "down"))
        state |= {f"{path}glu.up_gate_proj.weight": torch.cat([up, gate]), f"{path}glu.down_proj.weight": down}
    state = {
        name.replace("feed_forward.up_proj", "fc1").replace("feed_forward.down_proj", "fc2"): tensor
        for name, tensor in state.items()
    }
    tie = model.config.embedding.tie
    if tie == "all":
        state["decoder.embed_tokens.weight"] = state["encoder.embed_tokens.weight"]
    if tie != "none":
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    return {**state, "encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0])}


BASE: dict[str, Any] = {"attn_implementation": "fast_gqa_fused", "encoder_embed_dim": DIM, "encoder_ffn_embed_dim": FFN}
BASE |= {
    f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", HEADS))
}
ROPE = {"no_token_positional_embeddings": True, "rope_args": '{"theta": 500}'}
PRE = {"encoder_normalize_before": True, "decoder_normalize_before": True}
GLU = {"encoder_use_glu": True, "decoder_use_glu": True, "activation_fn": "silu"}
RMS = {"encoder_use_rmsnorm": True, "decoder_use_rmsnorm": True}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rope": (
        ROPE,
        {"position": {"kind": "rotary", "theta": 500, "fraction": 0.5, "layout": "interleaved"}},
    ),
    "glu": (GLU, {"activation": "silu"}),
    "rmsnorm": (RMS | PRE, {"norm": {"kind": "rms_norm"}, "norm_order": "pre"}),
    "share-all": ({"share_all_embeddings": True}, {"embedding": {"kind": "plain", "tie": "all"}}),
    "output-dim": ({"decoder_output_dim": WIDTH}, {"embedding": {"kind": "plain", "output_dim": WIDTH}}),
}
VARIANTS |= {
    f"{side}-input-dim": ({f"{side}_input_dim": WIDTH}, {"embedding": {"kind": "factorized", "dim": WIDTH, "sides": name}})
    for side, name in (("encoder", "source"), ("decoder", "target"))
}
VARIANTS["input-and-output-dim"] = (
    {"decoder_input_dim": WIDTH, "decoder_output_dim": WIDTH, "share_decoder_input_output_embed": True},
    {"embedding": {"kind": "factorized", "dim": WIDTH, "sides": "target", "output_dim": WIDTH, "tie": "decoder"}},
)
VARIANTS["all-together"] = (
    ROPE | GLU | RMS | PRE | {"share_all_embeddings": True},
    {key: value for name in ("rope", "glu", "rmsnorm", "share-all") for key, value in VARIANTS[name][1].items()},
)


def fused_case(variant: str, kv_heads: tuple[int, int]) -> tuple[Model, FairseqCheckpoint]:
    """A model of ours, and its checkpoint with grouped heads and fused projections."""
    settings, changes = VARIANTS[variant]
    settings = {**BASE, **settings, "encoder_kv_attention_heads": kv_heads[0], "decoder_kv_attention_heads": kv_heads[1]}
    stack = {
        "depth": 2,
        "num_heads": HEADS,
        "ffn_dim": FFN,
        "feed_forward": "gated" if "encoder_use_glu" in settings else "plain",
    }
    stacks = {side: {**stack, "num_kv_heads": heads} for side, heads in zip(("encoder", "decoder"), kv_heads, strict=True)}
    model = random_model(EncoderDecoderConfig(model_dim=DIM, **stacks, **changes))
    return model, FairseqCheckpoint(settings, {}, fused(fairseq_state(model)))


@pytest.mark.parametrize("kv_heads", [(1, 3), (2, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grouped_heads_in_fused_projections(variant: str, kv_heads: tuple[int, int]) -> None:
    model, checkpoint = fused_case(variant, kv_heads)
    keys = kv_heads[1] * DIM // HEADS
    assert len(checkpoint.weights["decoder.layers.1.self_attn.qkv_proj.weight"]) == DIM + 2 * keys
    assert len(checkpoint.weights["decoder.layers.1.encoder_attn.kv_proj.weight"]) == 2 * DIM
    torch.testing.assert_close(logits(imported(checkpoint)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "all-together"])
@pytest.mark.parametrize("target", ["decoder.layers.1.self_attn.qkv_proj", "decoder.layers.0.encoder_attn.kv_proj"])
def test_an_adapter_of_a_fused_projection_with_grouped_heads(variant: str, target: str) -> None:
    """The saved weight is merged: the imported base with its adapter is that, and the base is what was adapted."""
    model, checkpoint = fused_case(variant, (2, 2))
    before = convert(checkpoint)[2]
    rank, weights = 3, dict(checkpoint.weights)
    rows, columns = weights[f"{target}.weight"].shape
    a, b = torch.randn(rank, columns), torch.randn(rows, rank)
    weights |= {f"{target}.lora_A": a, f"{target}.lora_B": b}
    weights[f"{target}.weight"] = weights[f"{target}.weight"] + (6 / rank) * b @ a
    settings = {**checkpoint.model, "lora_args": f'{{"r": {rank}, "alpha": 6, "target_modules": "{target}"}}'}
    adapted = FairseqCheckpoint(settings, {}, weights)
    with torch.no_grad():
        attention = model.get_submodule(target.rpartition(".")[0].replace("_attn", "_attention").replace("encoder_a", "cross_a"))
        (attention.qkv if "self" in target else attention.kv).weight += (6 / rank) * b @ a
    torch.testing.assert_close(logits(imported(adapted)), logits(model), rtol=1e-4, atol=1e-4)
    base = convert_adapted(adapted, unmerged=False)[2]
    torch.testing.assert_close(base, before, rtol=1e-5, atol=1e-5)


def test_fused_rows_that_the_settings_do_not_explain_are_named() -> None:
    _, checkpoint = fused_case("plain", (2, 2))
    checkpoint.model["encoder_kv_attention_heads"] = 3
    message = (
        r"encoder\.layers\.0\.self_attention\.qkv_proj\.weight has 40 rows, but its settings make 24 of q_proj \+ 12 of "
        r"k_proj \+ 12 of v_proj; they are not those of this model"
    )
    with pytest.raises(ImportFormatError, match=message):
        convert(checkpoint)


LM: dict[str, Any] = {
    "decoder_embed_dim": DIM,
    "decoder_ffn_embed_dim": FFN,
    "decoder_layers": 2,
    "decoder_attention_heads": HEADS,
}
LM |= {"max_target_positions": 2048, "decoder_normalize_before": True}


@pytest.mark.parametrize(
    ("settings", "embedding"),
    [
        ({"decoder_output_dim": WIDTH}, {"kind": "plain", "output_dim": WIDTH}),
        ({"decoder_input_dim": WIDTH}, {"kind": "factorized", "dim": WIDTH}),
        ({"decoder_input_dim": WIDTH, "decoder_output_dim": 14}, {"kind": "factorized", "dim": WIDTH, "output_dim": 14}),
        (
            {"decoder_input_dim": WIDTH, "decoder_output_dim": WIDTH, "share_decoder_input_output_embed": True},
            {"kind": "factorized", "dim": WIDTH, "output_dim": WIDTH, "tie": "decoder"},
        ),
    ],
)
def test_language_models_with_other_widths(settings: dict[str, Any], embedding: dict[str, Any]) -> None:
    stack = {"depth": 2, "num_heads": HEADS, "ffn_dim": FFN}
    model = random_model(DecoderOnlyConfig(model_dim=DIM, decoder=stack, norm_order="pre", embedding=embedding))
    state = {name: tensor for name, tensor in fairseq_state(model).items() if not name.startswith("encoder.")}
    found = imported(FairseqCheckpoint({**LM, **settings}, {}, state))
    assert found.config == model.config
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert ("decoder.project_in_dim.weight" in state) == ("decoder_input_dim" in settings)
    assert ("decoder.project_out_dim.weight" in state) == ("decoder_output_dim" in settings)


@pytest.mark.parametrize("name", ["project_in_dim", "project_out_dim"])
def test_adapters_of_the_projections_between_widths(name: str) -> None:
    embedding = {"kind": "factorized", "dim": WIDTH, "output_dim": WIDTH}
    stack = {"depth": 2, "num_heads": HEADS, "ffn_dim": FFN}
    model = random_model(DecoderOnlyConfig(model_dim=DIM, decoder=stack, norm_order="pre", embedding=embedding))
    state = {name: tensor for name, tensor in fairseq_state(model).items() if not name.startswith("encoder.")}
    rows, columns = state[f"decoder.{name}.weight"].shape
    a, b = torch.randn(2, columns), torch.randn(rows, 2)
    merged_state = {**state, f"decoder.{name}.lora_A": a, f"decoder.{name}.lora_B": b}
    merged_state[f"decoder.{name}.weight"] = state[f"decoder.{name}.weight"] + 2 * b @ a
    settings = {**LM, "decoder_input_dim": WIDTH, "decoder_output_dim": WIDTH}
    lora = {"lora_args": f'{{"r": 2, "alpha": 4, "target_modules": "{name}"}}'}
    adapted = imported(FairseqCheckpoint({**settings, **lora}, {}, merged_state))
    plain = {key: tensor for key, tensor in merged_state.items() if "lora" not in key}
    torch.testing.assert_close(logits(adapted), logits(imported(FairseqCheckpoint(settings, {}, plain))), rtol=1e-4, atol=1e-4)
    base = convert_adapted(FairseqCheckpoint({**settings, **lora}, {}, merged_state), unmerged=False)[2]
    torch.testing.assert_close(base, convert(FairseqCheckpoint(settings, {}, state))[2], rtol=1e-5, atol=1e-5)

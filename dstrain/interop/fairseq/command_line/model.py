"""The `model` section of a recipe from fairseq's model options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.architectures import PRESETS_OF, REMARKS, Settings
from dstrain.interop.fairseq.command_line.command import Notes
from dstrain.interop.fairseq.command_line.position import position_part
from dstrain.interop.fairseq.model_options import ACTIVATION_NAMES

Tree = dict[str, Any]

UNEQUAL = {
    "embed-dim": "model.model_dim is one number",
    "normalize-before": "model.norm_order is one for both sides",
    "use-rmsnorm": "model.norm is one for both sides",
    "learned-pos": "model.position is one for both sides",
    "factorized-embed-dim": "model.embedding is one for both sides",
}


def model_section(settings: Settings, notes: Notes) -> Tree:
    """The architecture. What the command line asks for and a recipe cannot say is noted."""
    if settings.arch in REMARKS:
        notes.differs.append(f"--arch {settings.arch}: {REMARKS[settings.arch]}")
    if settings.arch in PRESETS_OF:
        notes.reads(f"--arch {settings.arch}", "preset", name=PRESETS_OF[settings.arch])
    sides = ["decoder"] if settings.decoder_only else ["encoder", "decoder"]
    _note_unequal(settings, notes)
    for name in ("attn-implementation", "use-native-attention"):
        if settings.command.has(name):
            notes.reads(settings.command.shown(name), "attn-implementation")
    return {
        "kind": "decoder_only" if settings.decoder_only else "encoder_decoder",
        "model_dim": settings.integer(f"{sides[0]}-embed-dim"),
        "norm_order": "pre" if settings.switch(f"{sides[0]}-normalize-before") else "post",
        "norm": {"kind": "rms_norm" if settings.switch(f"{sides[0]}-use-rmsnorm") else "layer_norm"},
        "activation": _activation(settings.text("activation-fn"), "activation-fn"),
        "position": position_part(settings, notes),
        "embedding": _embedding(settings, sides[0], notes),
        **{side: _stack(settings, side, notes) for side in sides},
        "dropout": settings.number("dropout"),
        "attention_dropout": settings.number("attention-dropout"),
        "activation_dropout": settings.number("activation-dropout"),
        **_lengths(settings),
    }


def _stack(settings: Settings, side: str, notes: Notes) -> Tree:
    command, passes, groups = settings.command, f"{side}-recurrent-stacking", f"{side}-kv-attention-heads"
    stack: Tree = {"depth": command.integer(passes) or settings.integer(f"{side}-layers")}
    if command.has(passes):
        stack["unique_layers"] = 1
        notes.differ(command.shown(passes), "recurrent-stacking")
    stack |= {"num_heads": settings.integer(f"{side}-attention-heads"), "ffn_dim": settings.integer(f"{side}-ffn-embed-dim")}
    if command.has(groups):
        stack["num_kv_heads"] = command.integer(groups)
        if "gqa" not in (command.text("attn-implementation") or ""):
            notes.differ(command.shown(groups), "kv-attention-heads")
    if settings.switch(f"{side}-use-glu"):
        stack["feed_forward"] = "gated"
        notes.differ(f"--{side}-use-glu", "use-glu")
    stack["layer_drop"] = settings.number(f"{side}-layerdrop")
    if side == "decoder":
        if settings.switch("no-decoder-final-norm"):
            stack["final_norm"] = "no"
        output = command.text("decoder-output-activation-fn")
        if output is not None:
            stack["output_activation"] = _activation(output, "decoder-output-activation-fn")
    return stack


def _embedding(settings: Settings, side: str, notes: Notes) -> Tree:
    tie = "none"
    if settings.switch("share-decoder-input-output-embed"):
        tie = "decoder"
    if settings.switch("share-all-embeddings"):
        tie = "all"
    common = {"scale": not settings.switch("no-scale-embedding"), "norm": settings.switch("layernorm-embedding"), "tie": tie}
    option, activation = f"{side}-factorized-embed-dim", "factorized-embed-activation-fn"
    if not settings.command.has(option):
        return {"kind": "plain", **common}
    if tie != "none":
        notes.differ(settings.command.shown(option), "factorized")
    dim = settings.command.integer(option)
    return {"kind": "factorized", "dim": dim, "activation": _activation(settings.text(activation), activation), **common}


def _activation(name: str, option: str) -> str:
    if name not in ACTIVATION_NAMES:
        raise ImportFormatError(f"--{option} {name}: dstrain has no such activation; known are {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _lengths(settings: Settings) -> Mapping[str, int]:
    if settings.decoder_only:
        return {"max_target_length": settings.command.integer("tokens-per-sample") or settings.integer("max-target-positions")}
    return {f"max_{side}_length": settings.integer(f"max-{side}-positions") for side in ("source", "target")}


def _note_unequal(settings: Settings, notes: Notes) -> None:
    """Say where encoder and decoder differ and dstrain has one value, the encoder's."""
    if settings.decoder_only:
        return
    for name, reason in UNEQUAL.items():
        encoder, decoder = (_value(settings, f"{side}-{name}") for side in ("encoder", "decoder"))
        if encoder != decoder:
            notes.lack(f"--decoder-{name} = {decoder}", "unequal", name=name, encoder=encoder, reason=reason)
    for name in ("decoder-input-dim", "decoder-output-dim"):
        if settings.integer(name) != settings.integer("encoder-embed-dim"):
            notes.lack(f"--{name} {settings.integer(name)}", "width")


def _value(settings: Settings, name: str) -> Any:
    match name.partition("-")[2]:
        case "embed-dim":
            return settings.integer(name)
        case "factorized-embed-dim":
            return settings.command.integer(name)
        case _:
            return settings.switch(name)

"""`model.position` from fairseq's position options, JSON of two generations of its fork included.

A recipe says what the options ask for. Where fairseq did something else, a note says so; a checkpoint made that way is read
faithfully by `dstrain import fairseq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.architectures import Settings
from dstrain.interop.fairseq.command_line.command import Notes

Tree = dict[str, Any]

ROPE_KEYS = {"type", "base", "theta", "max_position_embeddings", "scaling_factor"}
YARN_NUMBERS = {
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "extrapolation_factor": "extrapolation_factor",
    "attn_factor": "attention_factor",
}
YARN_KEYS = {"type", "base", "scale", "max_position_embeddings", "original_max_position_embeddings", "finetuned", *YARN_NUMBERS}
ALIBI_KEYS = {"type", "alibi_asymmetrical"}


def position_part(settings: Settings, notes: Notes) -> Tree:
    """The one kind of position that the model has."""
    command = settings.command
    rope, yarn, alibi = (command.json(name) for name in ("rope-args", "yarn-args", "alibi-args"))
    given = [f"--{name}-args" for name, value in (("rope", rope), ("yarn", yarn), ("alibi", alibi)) if value is not None]
    if len(given) > 1:
        raise ImportFormatError(f"{' and '.join(given)} exclude one another; give one")
    added = not settings.switch("no-token-positional-embeddings")
    if given and added:
        notes.differ(given[0], "positions-too")
    if rope is not None or (not given and settings.switch("rotary")):
        return _rotary(rope or {}, notes)
    if yarn is not None:
        return _yarn(yarn, notes)
    if alibi is not None or (not given and settings.switch("alibi")):
        return _alibi(alibi or {}, settings, notes)
    if not added:
        return {"kind": "none"}
    side = "decoder" if settings.decoder_only else "encoder"
    return {"kind": "learned" if settings.switch(f"{side}-learned-pos") else "sinusoidal"}


def _rotary(given: Mapping[str, Any], notes: Notes) -> Tree:
    notes.ignored("rope-args", given, ROPE_KEYS)
    factor, kind = float(given.get("scaling_factor", 1.0)), given.get("type", "linear" if "theta" in given else "vanilla")
    notes.differ("--rope-args", "decoding" if "type" in given else "rope-late")
    match kind:
        case "linear":
            scaling: Tree = {"kind": "linear", "factor": factor} if factor != 1 else {"kind": "none"}
        case "dynamic":
            scaling = {"kind": "dynamic_ntk", "original_length": int(given.get("max_position_embeddings", 2048))}
            if "scaling_factor" in given:
                notes.differ("--rope-args", "rope-dynamic")
        case "vanilla":
            scaling = {"kind": "none"}
        case _:
            raise ImportFormatError(f"--rope-args: type {kind!r} is none of vanilla, linear, dynamic; mend the JSON")
    return {"kind": "rotary", "theta": float(given.get("theta", given.get("base", 10000))), "scaling": scaling}


def _yarn(given: Mapping[str, Any], notes: Notes) -> Tree:
    notes.ignored("yarn-args", given, YARN_KEYS)
    notes.differ("--yarn-args", "decoding")
    original, longest = int(given.get("original_max_position_embeddings", 256)), int(given.get("max_position_embeddings", 2048))
    rotary: Tree = {"kind": "rotary", "theta": float(given.get("base", 10000))}
    match given.get("type"):
        case "vanilla" if "scale" not in given:
            notes.differ("--yarn-args", "yarn-plain", longest=longest, original=original, factor=longest / original)
            return {**rotary, "scaling": {"kind": "none"}}
        case "vanilla":
            scaling: Tree = {"kind": "yarn", "factor": float(given["scale"]), "original_length": original}
        case "dynamic":
            factor = longest / original if given.get("finetuned") else 1.0
            scaling = {"kind": "dynamic_yarn", "factor": factor, "original_length": original, "from_length": longest}
            notes.differ("--yarn-args", "yarn-dynamic")
        case kind:
            raise ImportFormatError(f"--yarn-args: type {kind!r} is none of vanilla, dynamic; mend the JSON")
    if "beta_slow" not in given:
        notes.differ("--yarn-args", "yarn-slow")
    scaling |= {key: float(given[name]) for name, key in YARN_NUMBERS.items() if name in given}
    return {**rotary, "scaling": scaling}


def _alibi(given: Mapping[str, Any], settings: Settings, notes: Notes) -> Tree:
    notes.ignored("alibi-args", given, ALIBI_KEYS)
    notes.differ("--alibi-args", "alibi-args")
    asked = given.get("alibi_asymmetrical", given.get("type") == "asymmetrical")
    if isinstance(asked, str):
        notes.differ("--alibi-args", "alibi-string", value=asked)
        asked = asked.lower() == "true"
    if settings.decoder_only:
        return {"kind": "alibi"}
    return {"kind": "alibi", "encoder": "asymmetric" if asked else "symmetric"}

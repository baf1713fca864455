"""The `adapter` section from fairseq's `--lora-args`."""

from __future__ import annotations

from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.command_line.command import Command, Notes

Tree = dict[str, Any]

KEYS = {"r", "alpha", "dropout", "rank_scaled", "target_modules", "bias"}
TARGETS = {
    "fc1": ("*.feed_forward.up_proj",),
    "fc2": ("down_proj",),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "up_gate_proj": ("*.feed_forward.up_proj", "gate_proj"),
    "self_attn": ("*.self_attention.*",),
    "encoder_attn": ("*.cross_attention.*",),
    "embed_tokens": ("tokens",),
    "emb": ("table",),
    "m": ("table",),
    "up": ("*.tokens.up_proj",),
    "output_projection": ("projection",),
}
"""Names of modules that differ; q_proj, k_proj, v_proj, out_proj and down_proj are the same."""
PARTS = {
    "self_attn": "self_attention",
    "encoder_attn": "cross_attention",
    "fc1": "feed_forward.up_proj",
    "fc2": "feed_forward.down_proj",
}
"""Words of dotted paths that differ."""
ABSENT = {"project_in_dim", "project_out_dim"}


def adapter_section(command: Command, notes: Notes) -> Tree | None:
    """Low-rank adapters, or None."""
    given = command.json("lora-args")
    if given is None:
        return None
    notes.ignored("lora-args", given, KEYS)
    names = [name.strip() for name in str(given.get("target_modules") or "").split(",") if name.strip()]
    for name in ABSENT.intersection(names):
        notes.lack(f"--lora-args: {name}", "lora-absent")
    targets = [target for name in names if name not in ABSENT for target in _targets(name)]
    rank, modules = given.get("r", 0), given.get("target_modules")
    if not rank or not targets:
        raise ImportFormatError(
            f"--lora-args: r = {rank!r} and target_modules = {modules!r} make no adapter; give a rank and the names of modules"
        )
    notes.differ("--lora-args", "lora-args")
    notes.reads("--lora-args", "lora-base")
    return {
        "kind": "lora",
        "rank": rank,
        "alpha": given.get("alpha", 1),
        "dropout": given.get("dropout", 0.0),
        "bias": given.get("bias", "none"),
        "targets": list(dict.fromkeys(targets)),
        "rank_scaled": bool(given.get("rank_scaled", False)),
    }


def _targets(name: str) -> tuple[str, ...]:
    if "." in name:  # part of a path, wherever it stands
        return (f"*{'.'.join(PARTS.get(word, word) for word in name.split('.'))}*",)
    return TARGETS.get(name, (name,))

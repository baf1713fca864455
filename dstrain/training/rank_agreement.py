"""At the start every rank compares the settings that decide the result with all others, before a model is built.

Ranks of a wrong mixture (an edited recipe on one node, another version, another data directory) train on silently or wait for one
another for ever. Cost: one gather of some hundred short strings.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

from dstrain.errors import TrainingError
from dstrain.protocols import Ranks
from dstrain.training.run_directory import flatten_tree

MAX_KEYS = 10
"""Keys that the message names at most."""


def require_agreement(world: Ranks, tree: Mapping[str, Any]) -> None:
    """Compare `tree`, plain values under nested keys, with that of every rank of `world`. Collective.

    Raises TrainingError, the same on every rank, with each key that differs, its values, and the ranks and hosts that have them.
    """
    own = {key: json.dumps(value, ensure_ascii=False) for key, value in flatten_tree(tree)}
    gathered = world.gather_objects((socket.gethostname(), own))
    keys = sorted({key for _, values in gathered for key in values})
    different = [key for key in keys if len({values.get(key) for _, values in gathered}) > 1]
    if not different:
        return
    lines = [f"  {key}: {_holders(key, gathered)}" for key in different[:MAX_KEYS]]
    if len(different) > MAX_KEYS:
        lines.append(f"  and {len(different) - MAX_KEYS} more keys")
    raise TrainingError(
        "the ranks do not agree on what to train:\n"
        + "\n".join(lines)
        + "\nstart every rank with the same command, files and versions",
        on_all_ranks=True,
    )


def _holders(key: str, gathered: list[tuple[str, dict[str, str]]]) -> str:
    """`0.001 on rank 0 (node1), 0.002 on rank 1 (node2) and 3 more`: each value with the first rank that has it."""
    ranks: dict[str, list[int]] = {}
    for rank, (_, values) in enumerate(gathered):
        ranks.setdefault(values.get(key, "(absent)"), []).append(rank)
    words = []
    for value, (first, *others) in ranks.items():
        more = f" and {len(others)} more" if others else ""
        words.append(f"{value} on rank {first} ({gathered[first][0]}){more}")
    return ", ".join(words)

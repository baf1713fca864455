"""What the ranks do; each scenario returns JSON, which the tests assert in the parent.

A scenario does many things in one process group, because each start of DeepSpeed costs seconds.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain.parallel.topology import World
from tests.parallel.setting import build_engine, build_module, share


def curves(world: World, *, runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The reports of each run; a run is its options, with `steps` and `parts`."""
    return [curve(world, **run) for run in runs]


def curve(world: World, *, steps: int, parts: int, **options: Any) -> list[dict[str, Any]]:
    """The reports of one run from the first step on."""
    engine = build_engine(world, build_module(), **options)
    return [asdict(engine.train_step(*share(step, world, parts))) for step in range(steps)]


def resumed(world: World, *, shards: str, deepspeed: str, reader: str | None = None) -> dict[str, Any]:
    """Six steps at once, and three steps saved and continued by another engine; dropout and averaging are on."""
    options = {"ema": {"decay": 0.7}, "optimizer": {"kind": "adamw", "weight_decay": 0.1}}
    straight = build_engine(world, build_module(dropout=0.3), deepspeed=deepspeed, **options)
    writer = build_engine(world, build_module(dropout=0.3), deepspeed=deepspeed, **options)
    reader_engine = build_engine(world, build_module(dropout=0.3), deepspeed=reader or deepspeed, **options)
    expected = [asdict(straight.train_step(*share(step, world, 4))) for step in range(6)]
    before = [asdict(writer.train_step(*share(step, world, 4))) for step in range(3)]
    writer.save_shards(Path(shards))
    world.barrier()
    reader_engine.load_shards(Path(shards))
    after = [asdict(reader_engine.train_step(*share(step, world, 4))) for step in range(3, 6)]
    return {
        "expected": expected,
        "found": before + after,
        "expected_weights": [digest(straight.gather_weights(averaged=averaged)) for averaged in (False, True)],
        "found_weights": [digest(reader_engine.gather_weights(averaged=averaged)) for averaged in (False, True)],
    }


def digest(weights: dict[str, Tensor] | None) -> str | None:
    """SHA-256 of all bytes, in order of names."""
    if weights is None:
        return None
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()

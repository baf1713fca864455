"""What the ranks do; each scenario returns JSON, which the tests assert in the parent."""

import time
from dataclasses import asdict
from typing import Any

from dstrain.parallel.topology import World
from tests.parallel.setting import build_engine, build_module, share


def train(world: World, *, parts: int, steps: int, **options: Any) -> list[dict[str, Any]]:
    engine = build_engine(world, build_module(), **options)
    return [asdict(engine.train_step(*share(step, world, parts))) for step in range(steps)]

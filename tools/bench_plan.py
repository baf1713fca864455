"""How long planning an epoch takes, how much memory, and how much padding is left.

python tools/bench_plan.py                     # 100 million synthetic lengths
python tools/bench_plan.py --data DATA         # the training split of a prepared directory
python tools/bench_plan.py --corpora 100       # 100 corpora mixed by temperature 5
python tools/bench_plan.py --shards 200        # in an order that stays within 16 of 200 shards
"""

import argparse
import json
import resource
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from dstrain.data.batching.order import MixedOrder, Order, ShuffledOrder
from dstrain.data.batching.plan import StepPlan, micro_batches, window_capacity
from dstrain.data.batching.shard_window import build_shuffle
from dstrain.data.config import BatchingConfig
from dstrain.data.lengths import Lengths, StoredLengths
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.sampling import TemperatureSampling
from dstrain.data.shuffling import ShardWindowShuffle


def synthetic_lengths(size: int) -> tuple[Lengths, Lengths]:
    """Like sentences: gamma-distributed around 13 tokens, the two sides correlated, at most 250; int32."""
    random = np.random.default_rng(0)
    source, target = np.empty(size, np.int32), np.empty(size, np.int32)
    for start in range(0, size, 1_000_000):
        part = slice(start, min(start + 1_000_000, size))
        base = random.gamma(4.0, 3.3, part.stop - start)
        source[part] = (base * random.normal(1.0, 0.15, len(base))).clip(1, 250)
        target[part] = base.clip(1, 250)
    return source, target


def mixture(size: int, number: int, config: BatchingConfig) -> MixedOrder:
    """An epoch of `size` examples from corpora whose sizes grow geometrically, the largest 1,000 times the smallest."""
    shares = np.geomspace(1, 1000, number)
    ends = [0, *np.ceil(size * shares.cumsum() / shares.sum()).astype(int).tolist()]
    corpora = {f"c{index}": [range(ends[index], min(ends[index + 1], size))] for index in range(number)}
    phases = TemperatureSampling(temperature=5).phases({name: len(rows) for name, (rows,) in corpora.items()})
    return MixedOrder(corpora, phases, num_examples=size, capacity=window_capacity(config), seed=1)


def near_shards(size: int, number: int, config: BatchingConfig) -> ShuffledOrder:
    """Every example once, near its shard."""
    bounds = np.linspace(0, size, number + 1).astype(int).tolist()
    shards = [range(start, stop) for start, stop in pairwise(bounds)]
    return ShuffledOrder(shards, window_capacity(config), seed=1, shuffle=build_shuffle(ShardWindowShuffle()))


def padding(plan: StepPlan, lengths: StoredLengths, world_size: int, num_steps: int) -> dict[str, float]:
    """Padded tokens of both sides over real ones, less one; and the cost of the slowest rank over the mean."""
    source, target, max_tokens = lengths.source, lengths.target, plan.config.max_tokens
    real = padded = groups_made = slowest = mean = 0.0
    steps = list(islice(plan.epoch(1), num_steps))
    for step in steps:
        groups = micro_batches(step.examples, *lengths.of(1, step.examples), max_tokens, world_size)
        filled = [group for group in groups if len(group)]
        costs = [len(group) * max(source[group].max(), target[group].max()) for group in filled]
        real += source[step.examples].sum() + step.num_targets
        padded += sum(len(group) * (int(source[group].max()) + int(target[group].max())) for group in filled)
        groups_made += len(groups)
        slowest, mean = slowest + max(costs), mean + sum(costs) / len(groups)
    return {
        "padding_percent": round(100 * float(padded / real - 1), 2),
        "micro_batches_per_step": round(groups_made / len(steps), 2),
        "slowest_over_mean": round(float(slowest / mean), 3),
    }


def main() -> None:
    """Plan one epoch, then look at the padding of another's first thousand steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000_000, help="synthetic examples (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a prepared directory to read the lengths from instead")
    parser.add_argument("--corpora", type=int, help="mix so many, of sizes from n to 1,000 n, by temperature 5")
    parser.add_argument("--shards", type=int, help="so many shards, in an order that stays within a window of 16")
    parser.add_argument("--tokens-per-step", type=int, default=3465)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    args = parser.parse_args()
    if args.data is None:
        source, target = synthetic_lengths(args.examples)
    else:
        dataset = open_dataset(args.data, "train")
        source, target = dataset.source_lengths, dataset.target_lengths
    config = BatchingConfig(tokens_per_step=args.tokens_per_step, max_tokens=args.max_tokens, shuffle_window=args.window)
    began, cpu_began = time.perf_counter(), time.process_time()
    lengths = StoredLengths(source, target)
    order: Order | None = mixture(len(source), args.corpora, config) if args.corpora else None
    if args.shards:
        order = near_shards(len(source), args.shards, config)
    plan = StepPlan(lengths, config, seed=1, order=order)
    steps = targets = 0
    for step in plan.epoch(0):
        steps, targets = steps + 1, targets + step.num_targets
    figures = {
        "examples": len(source),
        "steps": steps,
        "fullness_percent": round(100 * targets / steps / config.tokens_per_step, 2),
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu_began, 2),
        "lengths_mib": (source.nbytes + target.nbytes) >> 20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    figures |= {f"{world_size}_ranks": padding(plan, lengths, world_size, 1000) for world_size in (1, 2, 8)}
    if args.json:
        json.dump(figures, sys.stdout)
    else:
        print("\n".join(f"{name:20} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()

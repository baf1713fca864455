"""dstrain's model and objective in a plain loop: their share of the training time, for profiling.

The model and the objective of a recipe on random full-length pairs, `torch.optim.Adam(fused=True)`, one thread, fp32; no
engine, no data, no logging. Prints one line of JSON like `bare_loop.py`; `--profile` prints the most costly operations instead.

    python tools/model_loop.py [--recipe translation/multi30k_tiny] [--steps 12] [--warmup 2] [--profile] [--set a.b=c ...]
"""

import argparse
import json
from itertools import count

import numpy as np
import torch
from bare_loop import LENGTH, NUM_PAIRS, NUM_TYPES, cpu_seconds

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.train_module import TrainModule
from dstrain.recipe_file import load_recipe


def random_batch(length: int = LENGTH) -> Batch:
    """Pairs of equal length, as many tokens as in the bare loop."""
    pairs = NUM_PAIRS * LENGTH // length
    sides = [torch.randint(4, NUM_TYPES, (pairs, length)).numpy() for _ in range(2)]
    return Collator("encoder_decoder", pad_id=1, eos_id=2)(list(zip(*sides, strict=True)), np.arange(pairs))


def main() -> None:
    """Train on random tokens and print the cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="translation/multi30k_tiny")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    recipe = load_recipe(args.recipe, args.overrides)
    model = build_model(recipe.model, VocabularySizes(source=NUM_TYPES, target=NUM_TYPES), seed=1)
    module = TrainModule(model, build_cross_entropy(recipe.objective)).train()
    optimizer = torch.optim.Adam(module.parameters(), 5e-4, betas=(0.9, 0.98), fused=True)

    numbers = count()

    def step() -> None:
        seed_masks(1, next(numbers))
        batch = random_batch()
        (module(batch).loss_sum / batch.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(args.warmup):
        step()
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))
        return
    start = cpu_seconds()
    for _ in range(args.steps):
        step()
    seconds = cpu_seconds() - start
    print(json.dumps({"target_tokens": args.steps * NUM_PAIRS * LENGTH, "cpu_seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main()

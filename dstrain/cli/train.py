"""dstrain train: train a recipe on prepared data into a run directory, or resume what is there.

One process:      dstrain train RECIPE --data DATA --output RUN
GPUs of a node:   deepspeed --num_gpus 8 --module dstrain train RECIPE --data DATA --output RUN
torchrun:         torchrun --nproc_per_node 8 -m dstrain train RECIPE --data DATA --output RUN
Slurm:            sbatch --nodes 4 slurm/train.sbatch RECIPE DATA RUN
Fine-tuning:      dstrain train RECIPE --data DATA --output RUN --base BUNDLE, with an `adapter` section in RECIPE or without

RUN holds recipe.yaml, events.jsonl, checkpoints/ (for resuming) and bundles/ (models: best, last, step_...). Starting again
with the same RUN resumes, bit for bit; a recipe that differs is refused. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint first.
Exit codes: 0 finished, 1 a mistake or a failed step, 85 saved after SIGTERM or SIGUSR1 (start again), 130 saved after Ctrl-C.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.cli.common import add_recipe_arguments, recipe_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_recipe_arguments(parser)
    parser.add_argument("--data", metavar="DATA", type=Path, required=True, help="directory that `dstrain prepare` wrote")
    parser.add_argument("--output", metavar="RUN", type=Path, required=True, help="run directory; an existing run is resumed")
    parser.add_argument(
        "--base", metavar="BUNDLE", type=Path, help="start from the weights of this bundle; what an adapter section adapts"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Check the recipe, then build and run the trainer."""
    recipe = recipe_from(args)
    from dstrain.build import train

    return train(recipe, data=args.data, output=args.output, device=args.device, base=args.base)

"""dstrain train: train a recipe on prepared data into a run directory, or resume its run.

One process:      dstrain train RECIPE --data DATA --output RUN
GPUs of a node:   deepspeed --num_gpus 8 --module dstrain train RECIPE --data DATA --output RUN
torchrun:         torchrun --nproc_per_node 8 -m dstrain train RECIPE --data DATA --output RUN
Slurm:            sbatch --nodes 4 slurm/train.sbatch RECIPE DATA RUN
Fine-tuning:      dstrain train RECIPE --data DATA --output RUN --base BUNDLE, with an `adapter` section in RECIPE or without

Distillation:     dstrain train translation/multi30k_tiny_kd --data DATA --output RUN --teacher BUNDLE
From disk:        dstrain train translation/multi30k_tiny_kd --data DATA --output RUN --logits LOGITS

RUN holds recipe.yaml, events.jsonl, checkpoints/ (for resuming) and bundles/ (models: best, last, step_...). Starting again
with the same RUN resumes, bit for bit; on other ranks or under another ZeRO stage or precision, within rounding. A recipe that
computes something else is refused, unless --accept-changes KEY names it. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint first.
Exit codes: 0 finished, 1 a mistake or a failed step, 85 saved after SIGTERM or SIGUSR1 (start again), 130 saved after Ctrl-C.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.build.header import announce_training
from dstrain.cli.common import add_data_argument, named
from dstrain.cli.recipe_arguments import add_recipe_arguments, recipe_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    base = "start from the weights of this bundle, and with its model if the recipe has none; an adapter section adapts them"
    add_recipe_arguments(parser, base=base)
    add_data_argument(parser, required=True)
    parser.add_argument("--output", metavar="RUN", type=Path, required=True, help="run directory; an existing run is resumed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one")
    parser.add_argument(
        "--teacher",
        dest="teachers",
        metavar="BUNDLE",
        type=Path,
        action="append",
        default=[],
        help="bundle that a distillation learns from; again for an ensemble, whose probabilities are averaged",
    )
    parser.add_argument(
        "--logits", metavar="LOGITS", type=Path, help="what `dstrain dump-logits` wrote: distill from it, without the teacher"
    )
    parser.add_argument(
        "--teacher-placement",
        choices=("replicated", "sharded", "offloaded"),
        help="whole on every rank (fast), shared out over the ranks (the default), or shared out in CPU memory; same results",
    )
    parser.add_argument(
        "--vocabulary-map",
        metavar="FILE",
        type=Path,
        help="which id of the teacher each id of the data is, for a teacher with a permuted or larger vocabulary",
    )
    parser.add_argument(
        "--accept-changes",
        metavar="KEY,...",
        type=lambda text: tuple(key.strip() for key in text.split(",")),
        default=(),
        help="resume with other values of these keys of optimizer, schedule, or engine.clip_norm; recorded in the events",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Check the recipe, then train."""
    recipe = recipe_from(args, trains=True)
    from dstrain.build.training_options import TeacherOptions, TrainOptions, check_training

    teachers = TeacherOptions(tuple(args.teachers), args.teacher_placement, args.vocabulary_map, logits=args.logits)
    options = TrainOptions(**named(args, "data", "output", "base", "device", "accept_changes"), teachers=teachers)
    check_training(recipe, options)
    announce_training(recipe, args.recipe, **named(args, "data", "output", "base"))
    from dstrain.build.training import train

    return train(recipe, options)

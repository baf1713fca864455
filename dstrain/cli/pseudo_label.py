"""dstrain pseudo-label: sequence-level distillation as data: a teacher translates the training sources, a student trains on that.

    dstrain pseudo-label --teacher BUNDLE --data DATA --output DATA2 --beam-size 5
    dstrain train RECIPE --data DATA2 --output RUN

DATA2 is prepared data for the same recipe as DATA: its training targets are the teacher's outputs, the other splits and the
tokenizer are those of DATA. --keep-original adds the original pairs. Outputs that are empty, longer than the recipe's filter
allows, too many times longer or shorter than the source, that repeat themselves, or that were cut at the length limit of the
search (unfinished) are dropped, and counted by reason.

The same command continues an interrupted run. Under a launcher the ranks share the work, each on its own GPU:

    deepspeed --num_gpus 8 --module dstrain pseudo-label --teacher BUNDLE --data DATA --output DATA2

To share it among jobs, run it once for every I in 0 .. N-1 with --shard I/N (a Slurm array: --shard $SLURM_ARRAY_TASK_ID/16), in
any order, then check and finish:

    dstrain pseudo-label --merge DATA2
"""

from __future__ import annotations

import argparse
from functools import partial

from dstrain import __version__
from dstrain.cli.common import named, positive_float, positive_number
from dstrain.cli.work_arguments import WORK, add_work_arguments, check_work
from dstrain.data.prepared.derived import LABELING, check_max_ratio

OWN = ("beam_size", "length_penalty", "max_tokens", "max_ratio", "max_repeats", "keep_original", "pairs_per_shard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_work_arguments(parser, "DATA2")
    parser.add_argument("--beam-size", metavar="N", type=positive_number, help="1 is greedy (default: as in the bundle's recipe)")
    parser.add_argument("--length-penalty", metavar="X", type=float, help="default: as in the bundle's recipe")
    parser.add_argument("--max-tokens", metavar="N", type=positive_number, help="size of a batch: hypotheses x source length")
    parser.add_argument("--max-ratio", metavar="X", type=positive_float, help="longer side / shorter (default: as DATA's filter)")
    parser.add_argument(
        "--max-repeats",
        metavar="N",
        type=positive_number,
        default=3,
        help="a group of 1 to 4 tokens, so often in a row (default: 3)",
    )
    parser.add_argument("--keep-original", action="store_true", help="train on the original pairs, too")
    parser.add_argument("--pairs-per-shard", metavar="N", type=positive_number, help="size of a shard (default: a 64th of all)")


def run(args: argparse.Namespace) -> int:
    """Label this share, or merge."""
    check_work(args, LABELING, "DATA2", "train")
    check_max_ratio(args.max_ratio)
    from dstrain.build.labeling import LabelOptions, pseudo_label
    from dstrain.data.prepared.derived import merge_labels
    from dstrain.data.prepared.manifest import DataManifest

    manifest: DataManifest | None
    if args.merge is not None:
        manifest = merge_labels(args.merge, f"dstrain {__version__}")
    else:
        manifest = pseudo_label(LabelOptions(**named(args, *WORK, *OWN)), partial(print, flush=True))
    if manifest is not None:
        train = manifest.splits["train"]
        lost = ", ".join(f"{reason} {count:,}" for reason, count in train.dropped.items() if count) or "none"
        print(f"{args.merge or args.output} is complete: {train.rows:,} of {train.pairs_read:,} pairs; dropped: {lost}")
    return 0

"""dstrain dump-logits: write down what a teacher says of every target token, to distill from it later without the teacher.

    dstrain dump-logits --teacher BUNDLE --data DATA --output LOGITS
    dstrain dump-logits --teacher BUNDLE --data DATA --output LOGITS --method topk --k 64
    dstrain inspect LOGITS

Methods: sample draws from the teacher's distribution (about 35 bytes a token; unbiased: prefer it) and teaches forward_kl; topk
keeps the likeliest types (about 3 bytes each) and the mass of the rest, and teaches every divergence, the rest being one type to
it (a student's objective.renormalize gives it to the others: biased); dense keeps everything, for small vocabularies, and
teaches at every temperature, the others at their own. Batch size, order and number of ranks of the later training are free.

The same command again goes on where it was interrupted. Under a launcher (deepspeed --num_gpus 8 --module dstrain dump-logits
...) the ranks share the work, each on its own GPU. To share it among jobs, run it once for every I in 0 .. N-1 with --shard I/N
(a Slurm array: --shard $SLURM_ARRAY_TASK_ID/16), in any order, then check and finish:

    dstrain dump-logits --merge LOGITS
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from dstrain import __version__
from dstrain.cli.common import add_options, positive_number
from dstrain.cli.dumping import METHOD, build_dumper
from dstrain.cli.ranks import Task, do_work
from dstrain.cli.teacher import add_work_arguments
from dstrain.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_work_arguments(parser, output="LOGITS", required=False)
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--method", choices=("sample", "topk", "dense"), default="sample", help="default: sample")
    add_options(parser, METHOD)
    parser.add_argument("--max-tokens", metavar="N", type=positive_number, default=4096, help="padded tokens of a batch (4096)")
    parser.add_argument("--tokens-per-shard", metavar="N", type=positive_number, help="size of a file (default: a 64th of all)")
    parser.add_argument("--merge", metavar="LOGITS", type=Path, help="check that every shard is there and complete, and finish")


def run(args: argparse.Namespace) -> int:
    """Dump this share, or merge."""
    from dstrain.distillation.store.manifest import merge_store

    given = [value is not None for value in (args.teacher, args.data, args.output, args.merge)]
    if given not in ([True, True, True, False], [False, False, False, True]):
        raise DataError("dump-logits takes --teacher, --data and --output, or --merge LOGITS alone")
    if args.merge is not None or do_work(args, partial(_dump, args)):
        store = merge_store(args.merge or args.output, f"dstrain {__version__}")
        print(f"{args.merge or args.output} is complete: {store.job.tokens:,} tokens, {store.bytes_per_token:.1f} bytes a token")
    return 0


def _dump(args: argparse.Namespace, task: Task) -> str:
    from tqdm import tqdm

    work = build_dumper(args, task.device)
    hidden = None if task.is_first else True
    with tqdm(unit=" tokens", unit_scale=True, disable=hidden, total=work.tokens_of(task.worker)) as bar:
        report = work.run(task.worker, bar.update)
    return report.line()

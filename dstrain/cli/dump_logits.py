"""dstrain dump-logits: store a teacher's distribution of every target token, to distill from it later without the teacher.

    dstrain dump-logits --teacher BUNDLE --data DATA --output LOGITS
    dstrain dump-logits --teacher BUNDLE --data DATA --output LOGITS --method topk --k 64
    dstrain inspect LOGITS

Methods: sample draws from the teacher's distribution and keeps the distinct tokens (about 35 bytes a target token of a sure
teacher, 65 of a weak one, whose entropy is higher; unbiased: prefer it) and fits forward_kl; topk keeps the most probable tokens
(about 3 bytes each) and the mass of the rest, and fits every divergence, for which the rest is one entry (a student's
objective.renormalize gives its mass to the others: biased); dense keeps everything, for small vocabularies, and fits every
temperature, the other methods only their own. Batch size, order and number of ranks of the later training may be any.

The same command continues an interrupted dump. Under a launcher (deepspeed --num_gpus 8 --module dstrain dump-logits
...) the ranks share the work, each on its own GPU. To share it among jobs, run it once for every I in 0 .. N-1 with --shard I/N
(a Slurm array: --shard $SLURM_ARRAY_TASK_ID/16), in any order, then check and finish:

    dstrain dump-logits --merge LOGITS
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from dstrain import __version__
from dstrain.cli.common import add_options, named, positive_float, positive_number, whole_number
from dstrain.cli.work_arguments import WORK, add_work_arguments, check_work
from dstrain.distillation.store.manifest import DUMP, choose_method

METHOD: dict[str, tuple[Callable[[str], object], str]] = {
    "draws": (positive_number, "sample: draws a token (default: 50)"),
    "seed": (whole_number, "sample: decides the draws (default: 1)"),
    "k": (positive_number, "topk: vocabulary entries a token (default: 64)"),
    "dtype": (str, "topk: of log-probabilities: uint8, float16 or float32 (default: uint8)"),
    "temperature": (positive_float, "divide the teacher's logits by this (default: 1)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_work_arguments(parser, "LOGITS")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--method", choices=("sample", "topk", "dense"), default="sample", help="default: sample")
    add_options(parser, METHOD)
    parser.add_argument("--max-tokens", metavar="N", type=positive_number, default=4096, help="padded tokens of a batch (4096)")
    parser.add_argument("--tokens-per-shard", metavar="N", type=positive_number, help="size of a file (default: a 64th of all)")


def run(args: argparse.Namespace) -> int:
    """Dump this share, or merge."""
    check_work(args, DUMP, "LOGITS", args.split)
    choose_method(args.method, named(args, *METHOD))
    from dstrain.build.dumping import DumpOptions, dump_logits
    from dstrain.distillation.store.manifest import StoreManifest, merge_store

    store: StoreManifest | None
    if args.merge is not None:
        store = merge_store(args.merge, f"dstrain {__version__}")
    else:
        own = named(args, *WORK, "split", "method", "max_tokens", "tokens_per_shard")
        store = dump_logits(DumpOptions(**own, method_options=named(args, *METHOD)), partial(print, flush=True))
    if store is not None:
        print(f"{args.merge or args.output} is complete: {store.job.tokens:,} tokens, {store.bytes_per_token:.1f} bytes a token")
    return 0

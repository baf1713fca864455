"""dstrain estimate: the memory, traffic and time that a training will need on a cluster, and a layout that fits.

dstrain estimate translation/multi30k_tiny --nodes 1 --gpus-per-node 8 --gpu-memory 80
dstrain estimate RECIPE --nodes 16 --data DATA           vocabulary and lengths of prepared data
dstrain estimate RECIPE --gemm-tflops 250 --json         rates of other GPUs; plain values: bytes, seconds, FLOPs

Memory is counted; times follow from the rates, which are stated and not measured. Exit codes: 0 some layout fits, 1 none does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dstrain.cli.common import add_data_argument, add_options, named, positive_float, positive_number
from dstrain.cli.recipe_arguments import add_recipe_arguments, recipe_from

_OPTIONS = {
    "nodes": (positive_number, "nodes of the cluster (default: 1)"),
    "gpus_per_node": (positive_number, "GPUs of a node (default: 8)"),
    "gpu_memory": (positive_float, "GiB of a GPU (default: 80)"),
    "vocab_size": (positive_number, "entries of the vocabulary, instead of --data (default: the recipe's tokenizer)"),
    "length": (positive_number, "tokens of a sentence (default: the mean of --data, else 32, or the longest kept text)"),
    "gemm_tflops": (positive_float, "TFLOP/s that large products reach (default: 600; in fp32 50)"),
    "memory_bandwidth": (positive_float, "GB/s that a GPU's memory reaches (default: 2700)"),
    "node_bandwidth": (positive_float, "GB/s between two GPUs of a node, one direction (default: 360)"),
    "network_bandwidth": (positive_float, "GB/s between nodes for each GPU, one direction (default: 40)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_recipe_arguments(parser)
    add_options(parser, _OPTIONS)
    add_data_argument(parser)
    parser.add_argument(
        "--teacher",
        dest="teachers",
        metavar="BUNDLE",
        type=Path,
        action="append",
        default=[],
        help="bundle that a distillation learns from, again for more; without any, it reads dumped samples",
    )
    parser.add_argument("--teacher-placement", choices=("replicated", "sharded", "offloaded"), help="default: sharded")
    parser.add_argument("--json", action="store_true", help="print plain values instead of tables")


def run(args: argparse.Namespace) -> int:
    """Estimate and print."""
    recipe = recipe_from(args)
    from dstrain.build.estimate import EstimateOptions, estimate
    from dstrain.build.training_options import TeacherOptions
    from dstrain.estimate.report import estimate_tree

    stated = {name: value for name, value in named(args, "data", *_OPTIONS).items() if value is not None}
    options = EstimateOptions(**stated, teachers=TeacherOptions(tuple(args.teachers), args.teacher_placement))
    estimates = estimate(recipe, options)
    if args.json:
        columns = {"recipe": estimates.recipe, "recommended": estimates.recommended}
        trees = {name: each and estimate_tree(each, estimates.cluster) for name, each in columns.items()}
        print(json.dumps({**trees, "problem": estimates.problem}, indent=2))
    else:
        print(estimates)
    return 0 if estimates.recommended is not None else 1

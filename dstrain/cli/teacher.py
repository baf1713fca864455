"""What the verbs with a teacher share: which teacher, which data, which share of the work."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dstrain.cli.ranks import worker
from dstrain.config_base import Precision
from dstrain.storage.sharded_job import Worker

if TYPE_CHECKING:
    from dstrain.checkpoint.bundle import Bundle
    from dstrain.data.prepared.dataset import Dataset
    from dstrain.data.prepared.manifest import Manifest
    from dstrain.data.tokenizers.tokenizer import TokenizerPair


def add_work_arguments(parser: argparse.ArgumentParser, *, output: str, required: bool) -> None:
    """--teacher, --data, --output, --shard, --device, --precision. output: what its value is called."""
    parser.add_argument("--teacher", metavar="BUNDLE", type=Path, required=required, help="model directory of the teacher")
    parser.add_argument("--data", metavar="DATA", type=Path, required=required, help="directory that `dstrain prepare` wrote")
    parser.add_argument("--output", metavar=output, type=Path, required=required, help="directory to write, or to go on with")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=worker,
        default=Worker(0, 1),
        help="do share I (from 0) of N shares of the work (default: 0/1)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto, a GPU where there is one (default: auto)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="what the teacher computes in; bf16 for speed on a GPU (default: fp32)",
    )


@dataclass(frozen=True)
class TeacherSource:
    """A teacher on a device and the prepared split that it reads."""

    bundle: Bundle
    tokenizers: TokenizerPair
    device: str
    fingerprint: str
    manifest: Manifest
    dataset: Dataset


def load_teacher_source(teacher: Path, data: Path, split: str, device: str, precision: Precision = "fp32") -> TeacherSource:
    """Open both; the teacher then computes in `precision`.

    DataError or BundleError where they do not fit together or cannot be read.
    """
    from dstrain.api import usable_device
    from dstrain.checkpoint.bundle import load_bundle
    from dstrain.data.prepared.dataset import open_dataset
    from dstrain.data.prepared.manifest import load_manifest
    from dstrain.engine.teacher_engine import DTYPES
    from dstrain.errors import BundleError
    from dstrain.evaluation.validator import check_split
    from dstrain.ops.allocator import keep_freed_memory

    chosen = usable_device(device)
    if chosen == "cpu":
        keep_freed_memory()
    bundle, manifest = load_bundle(teacher, device=chosen), load_manifest(data)
    if bundle.tokenizers is None:
        raise BundleError(f"{teacher} has no tokenizer, so it cannot be told whether the ids of {data} are its own")
    manifest.require_tokenizer(bundle.tokenizers.fingerprint, str(teacher))
    bundle.model.to(DTYPES[precision])
    dataset = open_dataset(data, split)
    check_split(split, dataset.source_lengths, dataset.target_lengths, bundle.model_config)
    return TeacherSource(bundle, bundle.tokenizers, chosen, bundle.fingerprint, manifest, dataset)

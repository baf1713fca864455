"""Offline distillation, first half: a teacher's distributions of a split, written to a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dstrain import __version__
from dstrain.arguments import CheckedOptions, require_type
from dstrain.build.shared_work import ALL_WORK, Task, do_work
from dstrain.build.teacher_source import load_teacher_source
from dstrain.config_base import PrecisionChoice
from dstrain.data.prepared.location import DataDirectory
from dstrain.distillation.store.dump import Dumper, plan_dump
from dstrain.distillation.store.manifest import DUMP, StoreManifest, choose_method, merge_store
from dstrain.log import logger
from dstrain.progress import Progress
from dstrain.storage.outputs import check_output_path
from dstrain.storage.sharded_job import Worker

MethodKind = Literal["sample", "topk", "dense"]


@dataclass(frozen=True, kw_only=True)
class DumpOptions(CheckedOptions):
    """The options of `dstrain dump-logits`.

    base: of a teacher that is an adapter bundle, if it has moved.
    method_options: draws and seed of `sample`; k and dtype of `topk`; temperature of all. max_tokens: padded tokens of a batch.
    tokens_per_shard: None for a 64th of the split. worker: which shards this job writes.
    overwrite: replace the work of another job at `output`. precision: auto = bf16 on a GPU that has it, else fp32.
    """

    teacher: Path
    data: DataDirectory
    output: Path
    base: Path | None = None
    split: str = "train"
    method: MethodKind = "sample"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 4096
    tokens_per_shard: int | None = None
    worker: Worker = ALL_WORK
    device: str = "auto"
    overwrite: bool = False
    precision: PrecisionChoice = "auto"


def dump_logits(options: DumpOptions, report: Callable[[str], object] = logger.info) -> StoreManifest | None:
    """Write the missing shards of this share; the process that finishes returns the complete store, others None.

    report: called with a sentence on this share. Raises DataError or BundleError if teacher, data and output do not fit together.

    >>> from pathlib import Path
    >>> from dstrain.api import DumpOptions, dump_logits
    >>> options = DumpOptions(teacher=Path("run/bundles/best"), data=Path("data"), output=Path("logits"), method="topk")
    >>> store = dump_logits(options)
    >>> store.job.split, store.job.method.k
    ('train', 64)
    """
    require_type("options", options, DumpOptions)
    check_output_path(options.output, {"--teacher": options.teacher, "--data": options.data})
    if not do_work(options.worker, options.device, partial(_dump, options), report):
        return None
    return merge_store(options.output, f"dstrain {__version__}")


def _dump(options: DumpOptions, task: Task) -> str:
    dumper = build_dumper(options, task.device)
    if options.overwrite:
        DUMP.discard_other(options.output, dumper.job)
    with Progress("dumping", dumper.tokens_of(task.worker), "tokens", shown=task.is_first) as progress:
        return dumper.run(task.worker, progress.advance).line()


def build_dumper(options: DumpOptions, device: str) -> Dumper:
    """Teacher, data and job. DataError if they do not fit together."""
    method = choose_method(options.method, options.method_options)
    source = load_teacher_source(
        options.teacher, options.data, options.split, device, precision=options.precision, base=options.base
    )
    bundle = source.bundle
    job = plan_dump(
        method,
        source.dataset,
        source.manifest,
        options.split,
        source.fingerprint,
        vocabulary=bundle.vocabulary,
        tokens_per_shard=options.tokens_per_shard,
        precision=source.precision,
    )
    return Dumper(
        bundle.model,
        source.dataset,
        job,
        options.output,
        bundle.vocabulary,
        source.device,
        options.max_tokens,
    )

"""Sequence-level distillation: prepared data whose training targets a teacher has generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dstrain import __version__
from dstrain.arguments import CheckedOptions, require_type
from dstrain.build.shared_work import ALL_WORK, Task, do_work
from dstrain.build.teacher_source import TeacherSource, load_teacher_source
from dstrain.config_base import PrecisionChoice
from dstrain.data.config import DataConfig
from dstrain.data.filtering import FilterConfig
from dstrain.data.prepared.derived import LABELING, LabelJob, check_max_ratio, copy_original, merge_labels
from dstrain.data.prepared.location import DataDirectory
from dstrain.data.prepared.manifest import DataManifest
from dstrain.generation.config import generation_config
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator
from dstrain.generation.pseudo_label import Labeler
from dstrain.log import logger
from dstrain.progress import Progress
from dstrain.storage.outputs import check_output_path
from dstrain.storage.sharded_job import Worker


@dataclass(frozen=True, kw_only=True)
class LabelOptions(CheckedOptions):
    """The options of `dstrain pseudo-label`.

    base: of a teacher that is an adapter bundle, if it has moved.
    beam_size, length_penalty, max_tokens: of the search, None as in the teacher's recipe. max_ratio: of the lengths of both
    sides, None as in the data's filter. max_repeats: how often a group of 1 to 4 tokens may follow itself. keep_original: train
    on the original pairs, too. pairs_per_shard: None for a 64th of all. worker: which shards this job writes.
    overwrite: replace the work of another job at `output`. precision: auto = bf16 on a GPU that has it, else fp32.
    """

    teacher: Path
    data: DataDirectory
    output: Path
    base: Path | None = None
    beam_size: int | None = None
    length_penalty: float | None = None
    max_tokens: int | None = None
    max_ratio: float | None = None
    max_repeats: int = 3
    keep_original: bool = False
    pairs_per_shard: int | None = None
    worker: Worker = ALL_WORK
    device: str = "auto"
    overwrite: bool = False
    precision: PrecisionChoice = "auto"


def pseudo_label(options: LabelOptions, report: Callable[[str], object] = logger.info) -> DataManifest | None:
    """Write the missing shards of this share; the process that finishes returns the manifest of the data, others None.

    report: called with a sentence on this share. Raises DataError or BundleError if teacher, data and output do not fit together.

    >>> from pathlib import Path
    >>> from dstrain.api import LabelOptions, pseudo_label
    >>> options = LabelOptions(teacher=Path("run/bundles/best"), data=Path("data"), output=Path("labeled"), max_repeats=20)
    >>> train = pseudo_label(options).splits["train"]
    >>> train.pairs_read == train.rows + sum(train.dropped.values())
    True
    """
    require_type("options", options, LabelOptions)
    check_output_path(options.output, {"--teacher": options.teacher, "--data": options.data})
    if not do_work(options.worker, options.device, partial(_label, options), report):
        return None
    return merge_labels(options.output, f"dstrain {__version__}")


def _label(options: LabelOptions, task: Task) -> str:
    labeler = build_labeler(options, task.device)
    if options.overwrite:
        LABELING.discard_other(options.output, labeler.job)
    total = sum(len(labeler.job.rows(number)) for number in task.worker.shards(labeler.job.parts))
    with Progress("translating", total, "pairs", shown=task.is_first) as progress:
        report = labeler.run(task.worker, progress.advance)
    if task.worker.index == 0:
        copy_original(options.data, options.output, labeler.job)
    return report.line()


def build_labeler(options: LabelOptions, device: str) -> Labeler:
    """Teacher, data and job. DataError if they do not fit together."""
    source = load_teacher_source(options.teacher, options.data, "train", device, precision=options.precision, base=options.base)
    bundle, pairs = source.bundle, len(source.dataset)
    method = {"beam_size": options.beam_size, "length_penalty": options.length_penalty, "max_tokens": options.max_tokens}
    search = generation_config((bundle.recipe or {}).get("generation"), {**method, "kind": "beam", "num_best": 1})
    limits = _length_limits(options, source)
    pairs_per_part = options.pairs_per_shard or max(min(pairs // 64, 50_000), 1000)
    job = LabelJob(
        teacher=source.fingerprint,
        original=source.manifest.job,
        generation=search.model_dump(mode="json", exclude={"max_tokens"}),
        max_ratio=limits.max_ratio,
        max_repeats=options.max_repeats,
        keep_original=options.keep_original,
        pairs=pairs,
        parts=-(-pairs // pairs_per_part),
        pairs_per_part=pairs_per_part,
        precision=source.precision,
    )
    generator = Generator(
        bundle.model,
        search,
        SpecialIds.of(source.tokenizers.target),
        limits=bundle.model_config.limits,
        device=source.device,
    )
    sizes = bundle.vocabulary.source, bundle.vocabulary.target
    unk_ids = source.tokenizers.source.unk_id, source.tokenizers.target.unk_id
    return Labeler(generator, source.dataset, job, limits, sizes, unk_ids, options.output)


def _length_limits(options: LabelOptions, source: TeacherSource) -> FilterConfig:
    """Which outputs are dropped by their lengths."""
    limits = DataConfig.model_validate(source.manifest.data).filter
    if options.max_ratio is None:
        return limits
    check_max_ratio(options.max_ratio)
    return limits.model_copy(update={"max_ratio": options.max_ratio})

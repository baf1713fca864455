"""Prepared data whose training targets a teacher has generated; everything else is that of the data it was made from.

    DATA2/parts.json                  the job; train/00000.json, ... are the sidecars of its shards (`storage/sharded_job.py`)
    DATA2/original/manifest.json      that of the original data, once all that is copied from it is there
    DATA2/train/00000.arrow           sources with the teacher's targets
    DATA2/train/original_00000.arrow  the original pairs, if requested
    DATA2/manifest.json               as of any prepared data, once every shard is there

Its manifest has the data section of the original, so that it is trained by the same recipe, and another fingerprint, so that a
run started on one is not continued on the other. Files of the original are linked if the file system can, and then cost nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from dstrain.config_base import Config, Precision
from dstrain.data.prepared.location import prepared_files
from dstrain.data.prepared.manifest import (
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    DataManifest,
    ShardRecord,
    SplitRecord,
    load_manifest,
    write_data_manifest,
)
from dstrain.data.prepared.shard import PairSidecar, write_lengths
from dstrain.errors import DataError
from dstrain.storage.atomic import atomic_writer, link_or_copy, write_file
from dstrain.storage.document import DocumentFormat, FileRecord
from dstrain.storage.hashing import sha256_of_text
from dstrain.storage.sharded_job import JOB_REMEDY, ShardedJob

ORIGINAL = "original"
TRAIN = "train"


class LabelJob(Config):
    """How training targets are made. teacher, original: fingerprints of the model and of the data; generation: the search.

    max_ratio, max_repeats: which outputs are dropped; None for no limit. keep_original: whether the original pairs stay, too.
    precision: of the teacher's computation.
    """

    teacher: str
    original: str
    generation: dict[str, Any]
    max_ratio: PositiveFloat | None
    max_repeats: PositiveInt | None
    keep_original: bool
    pairs: PositiveInt
    parts: PositiveInt
    pairs_per_part: PositiveInt
    precision: Precision = "fp32"

    def rows(self, number: int) -> range:
        """The rows of the original that a shard translates."""
        return range(number * self.pairs_per_part, min((number + 1) * self.pairs_per_part, self.pairs))


def label_shard_file(number: int) -> str:
    """The name of a shard in the output directory."""
    return f"{TRAIN}/{number:05d}.arrow"


LABELING = ShardedJob(
    verb="pseudo-label",
    job=DocumentFormat(LabelJob, "job of `dstrain pseudo-label`", DataError, JOB_REMEDY.format(verb="pseudo-label")),
    sidecar=PairSidecar,
    shard_file=label_shard_file,
    num_shards=lambda job: job.parts,
)


def check_max_ratio(max_ratio: float | None) -> None:
    """DataError for a ratio of lengths that no pair keeps but those of equal lengths."""
    if max_ratio is not None and max_ratio <= 1:
        raise DataError(f"--max-ratio {max_ratio:g} would drop every pair of unequal lengths; choose a number above 1")


def copy_original(data: Path, output: Path, job: LabelJob) -> None:
    """Link or copy the tokenizer, the evaluation splits and, if requested, the original pairs of `data` into `output`."""
    manifest = load_manifest(data)
    for path in sorted((data / TOKENIZER_DIRECTORY).iterdir()):
        link_or_copy(path, output / TOKENIZER_DIRECTORY / path.name)
    files = prepared_files(data)
    names = {record: record.file for record in _evaluation_files(manifest)}
    if job.keep_original:
        shards = manifest.splits[TRAIN].shards
        names |= {shard: record.file for shard, record in zip(shards, _original_shards(manifest), strict=True)}
    for record, name in names.items():
        opened = files.open(record, content=False)
        link_or_copy(opened.path, output / name)
    write_file(output / ORIGINAL / MANIFEST_FILE, (data / MANIFEST_FILE).read_bytes())


def merge_labels(output: Path, created_by: str) -> DataManifest:
    """Check that every shard is there and complete, and write the manifest.

    Raises DataError that lists the shards that are missing or damaged, or if every output was dropped.
    """
    output = Path(output)
    job, sidecars = LABELING.collect(output)
    if not (output / ORIGINAL / MANIFEST_FILE).is_file():
        raise DataError(f"{output} is incomplete: worker 0 did not finish; run `dstrain {LABELING.verb} --shard 0/N` again")
    original = load_manifest(output / ORIGINAL)
    for file in (*_evaluation_files(original), *(_original_shards(original) if job.keep_original else ())):
        file.check(output, content=True, remedy=f"run `dstrain {LABELING.verb} --shard 0/N` again")
    kept = _original_shards(original) if job.keep_original else ()
    train = _train_record(output, sidecars, kept, truncated=original.splits[TRAIN].truncated)
    manifest = DataManifest(
        format_version=original.format_version,
        created_by=created_by,
        job=sha256_of_text(f"{job.model_dump_json(exclude_defaults=True)} {train.fingerprint}"),
        tokenizer_fingerprint=original.tokenizer_fingerprint,
        data=original.data,
        splits={**original.splits, TRAIN: train},
        pseudo_labels=job.model_dump(mode="json"),
    )
    write_data_manifest(manifest, output)
    return manifest


def _train_record(
    output: Path, sidecars: list[PairSidecar], originals: tuple[ShardRecord, ...], *, truncated: int
) -> SplitRecord:
    """truncated: sources that were cut when the original was prepared."""
    dropped = Counter[str]()
    for sidecar in sidecars:
        dropped.update(sidecar.dropped)
    records = (*(sidecar.record for sidecar in sidecars), *originals)
    rows = sum(record.rows for record in records)
    if rows == sum(record.rows for record in originals):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items() if count)
        raise DataError(
            f"every output of the teacher was dropped ({reasons}); relax --max-ratio and --max-repeats, or train it longer"
        )
    file = f"{TRAIN}/lengths.npy"
    with atomic_writer(output / file) as sink:
        write_lengths([output / record.file for record in records], rows, sink)
    return SplitRecord(
        shards=records,
        lengths=FileRecord(file=file, size=sink.size, sha256=sink.sha256),
        pairs_read=sum(sidecar.pairs_read for sidecar in sidecars) + sum(record.rows for record in originals),
        dropped=dict(dropped),
        truncated=truncated,
    )


def _evaluation_files(manifest: DataManifest) -> list[FileRecord]:
    return [file for name, split in manifest.splits.items() if name != TRAIN for file in split.files]


def _original_shards(manifest: DataManifest) -> tuple[ShardRecord, ...]:
    """Records of the original pairs under their new names."""
    shards = manifest.splits[TRAIN].shards
    return tuple(shard.model_copy(update={"file": f"{TRAIN}/original_{Path(shard.file).name}"}) for shard in shards)

"""Prepared data whose training targets a teacher has made: everything else is that of the data it was made from.

    DATA2/parts.json                  the job; train/00000.json, ... are the notes of its parts (`data/parts.py`)
    DATA2/original/manifest.json      that of the original data, when all that is taken over stands in its place
    DATA2/train/00000.arrow           sources with the teacher's targets
    DATA2/train/original_00000.arrow  the original pairs, if asked for
    DATA2/manifest.json               as of any prepared data, when every part is there

Its manifest has the data section of the original, so that it is trained by the same recipe, and another fingerprint, so that a
run begun on one is not continued on the other. Files that are taken over are linked where the file system can, and cost nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from dstrain.config_base import Config, Precision
from dstrain.data.files import atomic_writer, checking, sync_directory, write_file
from dstrain.data.parts import Note, finished_part, read_job
from dstrain.data.prepared.manifest import (
    MANIFEST_FILE,
    PARTS_FILE,
    TOKENIZER_DIRECTORY,
    FileRecord,
    Manifest,
    ShardRecord,
    SplitRecord,
    load_manifest,
    write_manifest,
)
from dstrain.data.prepared.shard import write_lengths
from dstrain.errors import DataError

MAKER = "pseudo-label"
ORIGINAL = "original"
TRAIN = "train"


class LabelJob(Config):
    """How training targets are made. teacher, original: fingerprints of the model and of the data; generation: the search.

    max_ratio, max_repeats: which outputs are dropped; None for no limit. keep_original: whether the original pairs stay, too.
    precision: what the teacher computes in.
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
        """The rows of the original that a part takes."""
        return range(number * self.pairs_per_part, min((number + 1) * self.pairs_per_part, self.pairs))


class LabelNote(Note):
    """One part. pairs_read: rows of the original; dropped: how many of their outputs were left out, by reason."""

    record: ShardRecord
    pairs_read: int
    dropped: dict[str, int]


def part_file(number: int) -> str:
    """The name of a part."""
    return f"{TRAIN}/{number:05d}.arrow"


def take_over(data: Path, output: Path, job: LabelJob) -> None:
    """Put the tokenizer, the evaluation splits and, if asked for, the original pairs of `data` in their places."""
    if (output / ORIGINAL / MANIFEST_FILE).is_file():
        return
    manifest = load_manifest(data)
    for path in sorted((data / TOKENIZER_DIRECTORY).iterdir()):
        _place(path, output / TOKENIZER_DIRECTORY / path.name)
    for record in _evaluation_files(manifest):
        _place(data / record.file, output / record.file)
    for record in _original_shards(manifest) if job.keep_original else ():
        _place(data / TRAIN / Path(record.file).name.removeprefix("original_"), output / record.file)
    write_file(output / ORIGINAL / MANIFEST_FILE, (data / MANIFEST_FILE).read_bytes())


def merge_labels(output: Path, created_by: str) -> Manifest:
    """Check that every part is there and whole, and write the manifest.

    Raises DataError naming the parts that are missing or damaged, or where every output was dropped.
    """
    output = Path(output)
    job = read_job(output, LabelJob, MAKER)
    if job is None:
        raise DataError(f"{output} holds no labeled data (no {PARTS_FILE}); name the --output of `dstrain {MAKER}`")
    found = [finished_part(output, part_file(number), LabelNote) for number in checking(range(job.parts))]
    missing = [number for number, note in enumerate(found) if note is None]
    if missing or not (output / ORIGINAL / MANIFEST_FILE).is_file():
        first = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        what = f"{len(missing)} of {job.parts} parts are missing or damaged ({first})" if missing else "share 0 was not finished"
        raise DataError(
            f"{output} is incomplete: {what}; run `dstrain {MAKER}` again, where it was cut with the same --shard, and it does "
            "what is missing"
        )
    original = load_manifest(output / ORIGINAL)
    for file in (*_evaluation_files(original), *(_original_shards(original) if job.keep_original else ())):
        file.check(output, content=True, remedy=f"remove {output / ORIGINAL} and run `dstrain {MAKER} --shard 0/N` again")
    notes = [note for note in found if note is not None]
    train = _train_record(output, notes, _original_shards(original) if job.keep_original else ())
    manifest = Manifest(
        format_version=original.format_version,
        created_by=created_by,
        job=hashlib.sha256(f"{job.model_dump_json(exclude_defaults=True)} {train.fingerprint}".encode()).hexdigest(),
        tokenizer_fingerprint=original.tokenizer_fingerprint,
        data=original.data,
        splits={**original.splits, TRAIN: train},
        pseudo_labels=job.model_dump(mode="json"),
    )
    write_manifest(manifest, output)
    return manifest


def _train_record(output: Path, notes: list[LabelNote], originals: tuple[ShardRecord, ...]) -> SplitRecord:
    dropped = Counter[str]()
    for note in notes:
        dropped.update(note.dropped)
    records = (*(note.record for note in notes), *originals)
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
        pairs_read=sum(note.pairs_read for note in notes) + sum(record.rows for record in originals),
        dropped=dict(dropped),
    )


def _evaluation_files(manifest: Manifest) -> list[FileRecord]:
    return [file for name, split in manifest.splits.items() if name != TRAIN for file in split.files]


def _original_shards(manifest: Manifest) -> tuple[ShardRecord, ...]:
    """Records of the original pairs under their new names."""
    shards = manifest.splits[TRAIN].shards
    return tuple(shard.model_copy(update={"file": f"{TRAIN}/original_{Path(shard.file).name}"}) for shard in shards)


def _place(source: Path, target: Path) -> None:
    """A link to, or a copy of, `source` at `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
        sync_directory(target.parent)
    except OSError:
        with atomic_writer(target) as sink, source.open("rb") as file:
            shutil.copyfileobj(file, sink)

"""Which preparation an output directory belongs to: `job.json`, written before any work.

A job is its data section and the content of its corpora and of a tokenizer that is not trained. Output of the same job is
continued or kept; that of another is refused. Content is known by SHA-256, taken while the files are checked; a file whose path,
size, modification time and kind of corpus are as in job.json is not read again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dstrain.config_base import Config, Tree, upgrade_config
from dstrain.data.config import DataConfig, FairseqIds, TextSource
from dstrain.data.prepared.manifest import DATA_FORMAT_VERSION, MANIFEST_FILE, TOKENIZER_DIRECTORY
from dstrain.data.prepared.pool import WorkerPool
from dstrain.data.sources.corpora import counted_files, files_of, header_lines, pairs_without_lines, scan_of, splits_of
from dstrain.data.sources.opening import require_file
from dstrain.data.sources.text import FileScan, expand_path
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import TOKENIZER_FILE
from dstrain.data.tokenizers.training import load_configured_tokenizers
from dstrain.errors import DataError
from dstrain.storage.document import Count, DocumentFormat
from dstrain.storage.hashing import sha256_of_json
from dstrain.storage.sharded_job import JOB_REMEDY, foreign_files

Scan = Callable[[Path], FileScan]

JOB_FILE = "job.json"
PARALLEL_SCAN_BYTES = 1 << 28


class Input(NamedTuple):
    """A file to read, and the kind of corpus that decides how it is checked."""

    path: Path
    kind: str


class InputFile(Config):
    """A file of a corpus as it was when it was read. kind: of the corpus, None before 0.2. lines: pairs, and a header's line."""

    path: str
    kind: str | None = None
    size: Count
    mtime_ns: int
    sha256: str
    lines: Count


class Job(Config):
    """fingerprint: SHA-256 over the data section and all content; data: that section; inputs: the corpora's files."""

    format_version: int
    fingerprint: str
    data: dict[str, Any]
    inputs: tuple[InputFile, ...]

    def lines_of(self, path: Path, kind: str) -> int:
        """Lines of one input, as a corpus of this kind reads it."""
        return next(file.lines for file in self.inputs if (file.path, file.kind) == (str(path), kind))


JOB = DocumentFormat(
    Job, "job of `dstrain prepare`", DataError, JOB_REMEDY.format(verb="prepare"), version_field="format_version"
)


def inputs_of(config: DataConfig) -> dict[str, Path]:
    """Every file or directory that preparation reads, by names for messages."""
    files = {f"{path} of data.{key}": path for key, source in config.corpora() for path in files_of(source)}
    named = () if isinstance(config.tokenizer, TrainedSentencePiece) else config.tokenizer
    texts = {name: value for name, value in named if isinstance(value, str) and name != "kind"}
    return files | {f"data.tokenizer.{name}": expand_path(value) for name, value in texts.items()}


def read_job(output: Path) -> Job | None:
    """The job that a directory belongs to; None for an empty directory. Raises DataError if it holds something else."""
    path = output / JOB_FILE
    if path.exists():
        return JOB.read(path)
    if foreign_files(output, known=JOB_FILE):
        raise DataError(f"{output} holds files that `dstrain prepare` did not make; choose another --output")
    return None


def plan_job(config: DataConfig, known: Job | None, workers: int) -> Job:
    """Read every input once and describe the job. Raises DataError for any fault of the text."""
    scans = {
        Input(path, source.kind): scan_of(source)
        for sources in splits_of(config).values()
        for source in sources
        for path in files_of(source)
    }
    tokenizer = (
        None if isinstance(config.tokenizer, TrainedSentencePiece) else load_configured_tokenizers(config.tokenizer).fingerprint
    )
    inputs = _inspect(scans, known, workers)
    data = without_tasks(config.model_dump(mode="json"))
    if known is not None and without_tasks(upgrade_config(DataConfig, known.data)) == data:
        data = known.data  # as an older version spelled it: the same job
    hashes = {file.path: file.sha256 for file in inputs}
    content = [DATA_FORMAT_VERSION, data, list(hashes.values()), tokenizer]
    return Job(format_version=DATA_FORMAT_VERSION, fingerprint=sha256_of_json(content), data=data, inputs=inputs)


def without_tasks(data: Mapping[str, Any]) -> Tree:
    """A data section as preparation reads it: the task of a corpus acts later, so the same data serve any."""
    return {key: _without_task(value) for key, value in data.items()}


def _without_task(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_task(inner) for key, inner in value.items() if key != "task"}
    return [_without_task(item) for item in value] if isinstance(value, list | tuple) else value


def _inspect(scans: Mapping[Input, Scan], known: Job | None, workers: int) -> tuple[InputFile, ...]:
    stats = {file: _stat(file.path) for file in scans}
    before = {(file.path, file.kind, file.size, file.mtime_ns): file for file in (known.inputs if known else ())}
    inputs = {file: before.get((str(file.path), file.kind, stat.st_size, stat.st_mtime_ns)) for file, stat in stats.items()}
    unread = {file: scan for file, scan in scans.items() if inputs[file] is None}
    for file, scan in zip(unread, _scan(unread, sum(stats[file].st_size for file in unread), workers), strict=True):
        stat = stats[file]
        inputs[file] = InputFile(
            path=str(file.path),
            kind=file.kind,
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            sha256=scan.sha256,
            lines=scan.lines,
        )
    return tuple(file for file in inputs.values() if file is not None)


def _stat(path: Path) -> os.stat_result:
    try:
        return require_file(path).stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path in the recipe") from error


def _scan(scans: Mapping[Input, Scan], size: int, workers: int) -> list[FileScan]:
    if min(workers, len(scans)) < 2 or size < PARALLEL_SCAN_BYTES:
        return [scan(file.path) for file, scan in scans.items()]
    with WorkerPool(_scanner, min(workers, len(scans))) as pool:
        return list(pool.map(scans.items()))


def _scanner() -> Callable[[tuple[Input, Scan]], FileScan]:
    return _scan_one


def _scan_one(task: tuple[Input, Scan]) -> FileScan:
    file, scan = task
    return scan(file.path)


def corpus_sizes(config: DataConfig, job: Job) -> dict[str, list[int]]:
    """Pairs of every corpus, by split. Raises DataError if two sides differ in length or a split is empty."""
    sizes = {split: [_size(source, job) for source in sources] for split, sources in splits_of(config).items()}
    for split, counts in sizes.items():
        if sum(counts) == 0:
            names = ", ".join(str(path) for source in splits_of(config)[split] for path in files_of(source))
            raise DataError(f"the {split} split holds no pairs ({names}); give it at least one")
    return sizes


def _size(source: TextSource, job: Job) -> int:
    paths = counted_files(source)
    if not paths:
        return pairs_without_lines(source)
    lines = [job.lines_of(path, source.kind) - header_lines(source) for path in paths]
    if lines[0] != lines[-1]:
        unit = "sentence" if isinstance(source, FairseqIds) else "line"
        raise DataError(
            f"{paths[0]} has {lines[0]:,} {unit}s, {paths[1]} has {lines[1]:,}: {unit} k of one must translate {unit} k of the "
            "other; fix the files"
        )
    return lines[0]


def start_job(output: Path, job: Job, known: Job | None, *, overwrite: bool) -> None:
    """Make `output` belong to `job`. Raises DataError if it holds another job's work that is not to be overwritten."""
    if known is not None and (overwrite or known.fingerprint != job.fingerprint):
        if not overwrite and _holds_work(output, known):
            raise DataError(
                f"{output} belongs to another preparation ({_difference(known, job)}); choose another --output, or --overwrite"
            )
        _remove(output, known)
    JOB.write(output / JOB_FILE, job)


def _holds_work(output: Path, job: Job) -> bool:
    """Whether a tokenizer or a shard was finished; a job that failed before leaves nothing worth keeping."""
    splits = splits_of(DataConfig.model_validate(job.data))
    return (output / TOKENIZER_DIRECTORY / TOKENIZER_FILE).exists() or any(
        any((output / name).glob("*.arrow")) for name in splits
    )


def _remove(output: Path, job: Job) -> None:
    """Delete the files of a job, its job.json last."""
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    for name in [TOKENIZER_DIRECTORY, *splits_of(DataConfig.model_validate(job.data))]:
        shutil.rmtree(output / name, ignore_errors=True)
    (output / JOB_FILE).unlink()


def _difference(old: Job, new: Job) -> str:
    """What changed, by name: fields of the data section, else files whose content is another."""
    before = without_tasks(upgrade_config(DataConfig, old.data))
    fields = [name for name in sorted({**before, **new.data}) if before.get(name) != new.data.get(name)]
    if fields:
        return "its recipe differs in " + ", ".join(f"data.{name}" for name in fields)
    content: Mapping[str, str] = {file.path: file.sha256 for file in old.inputs}
    changed = [file.path for file in new.inputs if content.get(file.path) != file.sha256]
    return f"the content of {', '.join(changed)} has changed" if changed else "the tokenizer that the recipe names has changed"

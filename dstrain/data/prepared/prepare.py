"""Text to a data directory: check the text, train or take a tokenizer, encode in parallel, write shards, then the manifest.

Every stage leaves complete files behind, so a run that was interrupted goes on at the first shard that is missing. Workers get
blocks and give back arrays; this process reads, writes and hashes, about 1 microsecond a pair, which keeps some thirty workers
busy. Memory is a few blocks a worker and one record batch. Shards depend only on the text and the data section.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from dstrain import __version__
from dstrain.arguments import require_path, require_type
from dstrain.data.config import DataConfig, tells_documents
from dstrain.data.prepared.encode import EncodedBlock, make_encoder
from dstrain.data.prepared.job import Job, corpus_sizes, inputs_of, plan_job, read_job, start_job
from dstrain.data.prepared.manifest import (
    DATA_FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    DataManifest,
    SplitRecord,
    load_manifest,
    write_data_manifest,
)
from dstrain.data.prepared.pool import WorkerPool
from dstrain.data.prepared.report import PrepareReport, build_report, verify_data
from dstrain.data.prepared.rows import id_dtype
from dstrain.data.prepared.shard import PairSidecar, ShardWriter, shard_schema, write_documents, write_lengths
from dstrain.data.sources.corpora import PairBlock, has_references, read_blocks, splits_of
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.tokenizer import TOKENIZER_FILE, TokenizerPair, load_tokenizers, save_tokenizers
from dstrain.data.tokenizers.training import TokenizerTrainer, load_configured_tokenizers
from dstrain.errors import DataError
from dstrain.log import logger
from dstrain.progress import Progress
from dstrain.storage.atomic import atomic_writer
from dstrain.storage.document import FileRecord
from dstrain.storage.hashing import HashingWriter
from dstrain.storage.lock import locked_output
from dstrain.storage.outputs import check_output_path
from dstrain.storage.sharded_job import finished_shard, sidecar_path, warn_of_interruption, write_sidecar

PAIRS_PER_WORKER = 16_384
"""Starting a process costs as much as encoding about so many pairs."""


def prepare(config: DataConfig, output: Path, *, workers: int, overwrite: bool = False, progress: bool = True) -> PrepareReport:
    """Prepare the corpora of `config` into `output`, with `workers` processes.

    Finished output of the same text and configuration is kept if every byte is as it was written, else made again; unfinished is
    continued; that of another is refused unless `overwrite`. progress: show it, on a terminal or in the log.

    Raises DataError for any fault of the text, the tokenizer, the output directory or the disk.

    >>> from pathlib import Path
    >>> from dstrain.api import load_recipe, prepare
    >>> recipe = load_recipe("tiny.yaml")
    >>> report = prepare(recipe.data, Path("data"), workers=1, progress=False)
    >>> report.shared, report.source_vocab_size
    (True, 120)
    """
    require_type("config", config, DataConfig, "; give the `data` of a recipe")
    output = require_path("output", output)
    output = Path(output)
    check_output_path(output, inputs_of(config))
    with locked_output(output, busy=partial(_busy, output)):
        known = read_job(output)
        job = plan_job(config, known, workers)
        sizes = corpus_sizes(config, job)
        damage = None if known is None or known.fingerprint != job.fingerprint else _damage(output, job)
        if damage is not None:
            logger.warning("%s is damaged, so everything is prepared again: %s", output, damage)
        start_job(output, job, known, overwrite=overwrite or damage is not None)
        try:
            if (output / MANIFEST_FILE).exists():
                report = _finished(output)
            else:
                report = _Preparation(config, output, job, sizes, workers=workers, progress=progress).run()
        except KeyboardInterrupt:
            warn_of_interruption(output)
            raise
    for warning in report.warnings:
        logger.warning("%s", warning)
    return report


def _busy(output: Path, holder: str) -> DataError:
    return DataError(f"another process is preparing {output} ({holder}); wait for it or choose another --output")


def _damage(output: Path, job: Job) -> str | None:
    """What is wrong with the finished files of `job`, of which every byte is read; None if nothing is."""
    try:
        if (output / MANIFEST_FILE).exists():
            if verify_data(output).job != job.fingerprint:
                return f"{MANIFEST_FILE} is not of the job beside it"
        elif (output / TOKENIZER_DIRECTORY / TOKENIZER_FILE).exists():
            load_tokenizers(output / TOKENIZER_DIRECTORY)
    except DataError as error:
        return str(error)
    return None


def _finished(output: Path) -> PrepareReport:
    manifest = load_manifest(output)
    _remove_sidecars(output, manifest)
    return build_report(output, manifest, load_tokenizers(output / TOKENIZER_DIRECTORY), {}, finished_before=True)


def _remove_sidecars(output: Path, manifest: DataManifest) -> None:
    for split in manifest.splits.values():
        for shard in split.shards:
            sidecar_path(output / shard.file).unlink(missing_ok=True)


class _Preparation:
    def __init__(
        self, config: DataConfig, output: Path, job: Job, sizes: dict[str, list[int]], *, workers: int, progress: bool
    ) -> None:
        self._config = config
        self._output = output
        self._job = job
        self._sizes = sizes
        self._workers = max(1, min(workers, -(-sum(map(sum, sizes.values())) // PAIRS_PER_WORKER)))
        self._progress = progress
        self._work: dict[str, tuple[int, float]] = {}

    def run(self) -> PrepareReport:
        """Everything that is not done yet."""
        tokenizers = self._tokenizers()
        with ExitStack() as stack:
            make = partial(make_encoder, self._config, self._output / TOKENIZER_DIRECTORY)
            if self._workers == 1:
                encode: Callable[[Iterable[PairBlock]], Iterator[EncodedBlock]] = partial(map, make())
            else:
                encode = stack.enter_context(WorkerPool(make, self._workers)).map
            total = sum(map(sum, self._sizes.values()))
            bar = stack.enter_context(Progress("preparing", total, "pairs", shown=self._progress))
            splits = {split: self._split(split, tokenizers, encode, bar) for split in self._sizes}
        manifest = DataManifest(
            format_version=DATA_FORMAT_VERSION,
            created_by=f"dstrain {__version__}",
            job=self._job.fingerprint,
            tokenizer_fingerprint=tokenizers.fingerprint,
            data=self._job.data,
            splits=splits,
        )
        write_data_manifest(manifest, self._output)
        _remove_sidecars(self._output, manifest)
        return build_report(self._output, manifest, tokenizers, self._work, finished_before=False)

    def _tokenizers(self) -> TokenizerPair:
        directory = self._output / TOKENIZER_DIRECTORY
        if (directory / TOKENIZER_FILE).exists():
            return load_tokenizers(directory)
        tokenizer = self._config.tokenizer
        if isinstance(tokenizer, TrainedSentencePiece):
            logger.info("training a SentencePiece %s tokenizer of %d entries", tokenizer.model_type, tokenizer.vocab_size)
            with WorkerPool(partial(TokenizerTrainer, self._config, self._sizes["train"], directory), 1) as pool:
                list(pool.map([tokenizer]))
        else:
            save_tokenizers(load_configured_tokenizers(tokenizer), directory)
        return load_tokenizers(directory)

    def _split(
        self,
        split: str,
        tokenizers: TokenizerPair,
        encode: Callable[[Iterable[PairBlock]], Iterator[EncodedBlock]],
        bar: Progress,
    ) -> SplitRecord:
        per_shard, total = self._config.pairs_per_shard, sum(self._sizes[split])
        start_time = time.perf_counter()
        finished = self._finished_shards(split, -(-total // per_shard))
        done = sum(shard.pairs_read for shard in finished)
        bar.advance(done)
        blocks = read_blocks(split, splits_of(self._config)[split], self._sizes[split], done, per_shard)
        dtypes = [id_dtype(side.vocab_size) for side in (tokenizers.source, tokenizers.target)]
        schema = shard_schema(
            *dtypes, with_text=split != "train", with_references=any(map(has_references, splits_of(self._config)[split]))
        )
        writer = partial(ShardWriter, schema=schema, unk_ids=(tokenizers.source.unk_id, tokenizers.target.unk_id))
        encoded = iter(encode(blocks))
        for number in range(len(finished), -(-total // per_shard)):
            pairs = min(per_shard, total - number * per_shard)
            finished.append(self._write_shard(f"{split}/{number:05d}.arrow", writer, encoded, pairs, bar))
        self._work[split] = (total - done, time.perf_counter() - start_time)
        return self._record(split, finished)

    def _finished_shards(self, split: str, number_of_shards: int) -> list[PairSidecar]:
        """The shards that earlier runs finished, up to the first that is missing."""
        finished = []
        for number in range(number_of_shards):
            shard = finished_shard(self._output, f"{split}/{number:05d}.arrow", PairSidecar, content=False)
            if shard is None:
                break
            finished.append(shard)
        if finished:
            logger.info("%s: %d of %d shards were finished before", split, len(finished), number_of_shards)
        return finished

    def _write_shard(
        self,
        file: str,
        make_writer: Callable[[HashingWriter], ShardWriter],
        blocks: Iterator[EncodedBlock],
        pairs: int,
        bar: Progress,
    ) -> PairSidecar:
        """Write the next `pairs` pairs of the corpus as one shard."""
        pairs_read, truncated, dropped = 0, 0, Counter[str]()
        starts: list[int] = []
        with atomic_writer(self._output / file) as sink:
            writer = make_writer(sink)
            while pairs_read < pairs:
                block = next(blocks)
                starts += (writer.rows + block.document_starts).tolist()
                writer.add(block.rows, [(block.corpus, len(block.rows.source_lengths))])
                pairs_read += block.pairs_read
                truncated += block.truncated
                dropped.update(block.dropped)
                bar.advance(block.pairs_read)
            shard = PairSidecar(
                record=writer.finish(file),
                pairs_read=pairs_read,
                dropped=dict(dropped),
                truncated=truncated,
                document_starts=tuple(starts),
            )
            write_sidecar(self._output, shard)
        return shard

    def _record(self, split: str, finished: list[PairSidecar]) -> SplitRecord:
        dropped = Counter[str]()
        for shard in finished:
            dropped.update(shard.dropped)
        records = tuple(shard.record for shard in finished)
        rows, pairs_read = sum(record.rows for record in records), sum(shard.pairs_read for shard in finished)
        if rows == 0:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items() if count)
            raise DataError(
                f"all {pairs_read:,} pairs of the {split} split were dropped ({reasons}); check the text, or relax data.filter "
                "and run again with --overwrite"
            )
        file = f"{split}/lengths.npy"
        with atomic_writer(self._output / file) as sink:
            write_lengths([self._output / record.file for record in records], rows, sink)
        lengths = FileRecord(file=file, size=sink.size, sha256=sink.sha256)
        documents = None
        if split == "train" and tells_documents(self._config.train):
            file = f"{split}/documents.npy"
            with atomic_writer(self._output / file) as sink:
                write_documents(finished, sink)
            documents = FileRecord(file=file, size=sink.size, sha256=sink.sha256)
        return SplitRecord(
            shards=records,
            lengths=lengths,
            documents=documents,
            pairs_read=pairs_read,
            dropped=dict(dropped),
            truncated=sum(shard.truncated for shard in finished),
        )

"""Dumped logits as a source of signals: a teacher's distribution of every scored token of a batch, read from the disk.

Signals are looked up by (row of the data, position), so batch size, order, packing and the number of ranks may be any. Shards are
mapped when a batch first needs them (`storage/mapped_shards.py`), and all ranks of a node share the pages; a batch costs a few
slices a row and one pass over its values, about a millisecond for 260 sentences. The first batches of a large store, in an order
over all of it, cost more: each shard is read and checked as a whole when it is touched first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from dstrain.batch import Batch
from dstrain.data.prepared.manifest import DataManifest
from dstrain.data.prepared.shard import ListView, list_view
from dstrain.distillation.signals import SignalRequest
from dstrain.distillation.store.codec import Codec, build_codec
from dstrain.distillation.store.manifest import DenseMethod, SampleMethod, StoreManifest, TopKMethod, load_store_manifest
from dstrain.errors import DataError, RecipeError
from dstrain.log import logger
from dstrain.model_output import ActivationCapture
from dstrain.ops.teacher_signal import KeptSignal, SparseSignal
from dstrain.progress import with_progress
from dstrain.storage.listed_files import ListedFiles
from dstrain.storage.mapped_shards import MappedShards
from dstrain.wire import sent

MAX_MAPPED_SHARDS = 1 << 14
"""An order over all of a store touches them all the time. Each is a mapping of the process, of which Linux allows 65,530."""
_REMEDY = "dump this shard again with the same command, then merge"


class LogitStore:
    """Implements `signals.SignalSource` for the batches of one split.

    renormalize: give the tail's mass to the tokens that are kept.
    """

    def __init__(self, manifest: StoreManifest, directory: Path, *, renormalize: bool = False) -> None:
        self.manifest = manifest
        self._directory = directory
        self._renormalize = renormalize
        self._codec: Codec = build_codec(manifest.job.method, manifest.job.vocab_size)
        rows = [shard.rows for shard in manifest.shards]
        files = ListedFiles(directory, remedy=_REMEDY)
        self._shards = MappedShards(files, manifest.files, rows, self._map, max_open=MAX_MAPPED_SHARDS)

    @property
    def temperature(self) -> float:
        """The divisor of the teacher's logits."""
        return self.manifest.job.method.temperature

    def require(self, request: SignalRequest) -> None:
        """Raise RecipeError unless it is of the data, of the distribution only, and, if a part of that is kept, at the dump's
        temperature; forward_kl only if nothing is known of the other vocabulary entries."""
        if request.on_policy:
            raise RecipeError(
                f"objective.on_policy needs a teacher of the student's samples, {self._directory} holds distributions of the "
                "data: remove objective.on_policy, or name an online teacher (--teacher)"
            )
        if request.features:
            raise RecipeError(
                f"objective.features learns from inside a teacher, but {self._directory} keeps only its probabilities: leave "
                "objective.features out, or choose an online teacher (--teacher)"
            )
        method = self.manifest.job.method
        if isinstance(method, DenseMethod):
            return
        if request.divergence != "forward_kl" and (self._renormalize or isinstance(method, SampleMethod)):
            kept = "gives the tail to the kept tokens" if self._renormalize else "keeps draws"
            raise RecipeError(
                f"objective.divergence.kind = {request.divergence} needs the mass of all tokens, {self._directory} {kept}: "
                "choose forward_kl, a dump with a tail (dump-logits --method topk) or of all tokens (--method dense), or "
                "an online teacher (--teacher)"
            )
        if request.temperature != self.temperature:
            raise RecipeError(
                f"objective.temperature = {request.temperature:g}, but the logits in {self._directory} are of temperature "
                f"{self.temperature:g}: set that, or dump them again with --temperature {request.temperature:g}"
            )

    @contextmanager
    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> Iterator[KeptSignal]:
        """The signal on the batch's device. capture: stays empty, for there is no forward; see `require`."""
        yield moved(self.signal(batch), batch.targets.labels.device)

    def touch(self) -> None:
        """Check every shard, if they are few and small. Raises DataError naming one that is damaged."""
        self._shards.touch()

    def close(self) -> None:
        """Mapped files close with the last reference to them."""

    def signal(self, batch: Batch) -> KeptSignal:
        """The signals of the batch's targets, on the CPU.

        Raises DataError if the batch is not of the split that was dumped, or if a shard of its rows is damaged.
        """
        if batch.whole is not None:
            return self.signal(batch.whole)[batch.first_target : batch.first_target + batch.num_targets]
        locations = [self._locate(row) for row in batch.examples.ids.tolist()]
        columns = {name: [shard[name].row(row) for shard, row in locations] for name in self._codec.columns}
        first = next(iter(columns.values()))
        num_tokens = sum(map(len, first)) // self._codec.items_per_token
        if num_tokens != batch.num_targets:
            raise DataError(
                f"{self._directory} holds {num_tokens} tokens for the rows of a batch of {batch.num_targets}: it is of other "
                f"data or another split than {self.manifest.job.split!r}; dump the logits of this data"
            )
        signal = self._codec.unpack(columns, num_tokens)
        return renormalized(signal) if self._renormalize and isinstance(signal, SparseSignal) else signal

    def _locate(self, row: int) -> tuple[Mapping[str, ListView], int]:
        if not 0 <= row < self.manifest.job.rows:
            raise DataError(
                f"{self._directory} holds {self.manifest.job.rows} rows of the split {self.manifest.job.split!r}, "
                f"a batch asks for row {row}; dump the logits of this data"
            )
        return self._shards.locate(row)

    def _map(self, number: int, path: Path) -> Mapping[str, ListView]:
        """Columns by name. The file is closed: the mapping lasts as long as a view of it."""
        try:
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source.read_buffer()).get_batch(0)
            return {name: list_view(batch.column(name)) for name in self._codec.columns}
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{path} cannot be read as dumped logits ({str(error).splitlines()[0]}); {_REMEDY}") from error


def moved(signal: KeptSignal, device: torch.device) -> KeptSignal:
    """The same signal on `device`; log-probabilities of all tokens stay on the disk until a chunk of them is read."""
    if not isinstance(signal, SparseSignal):
        return signal
    return replace(signal, ids=sent(signal.ids, device), probs=sent(signal.probs, device), tail=sent(signal.tail, device))


def renormalized(signal: SparseSignal) -> SparseSignal:
    """The same with the tail's mass given to the tokens that are kept: biased, the more so the flatter the teacher."""
    probs = signal.probs / signal.probs.sum(1, keepdim=True)
    return SparseSignal(signal.ids, probs, torch.zeros_like(signal.tail), with_tail=False)


def open_store(directory: Path, *, data: Path, manifest: DataManifest, renormalize: bool = False) -> LogitStore:
    """Open a complete store for batches of the data directory `data`, of that manifest.

    renormalize: only for top-k stores. Raises DataError if the store is unfinished, of other data or another tokenizer, or if a
    file is missing, truncated or altered; a large store raises for an altered file when a row of it is read.
    """
    directory = Path(directory)
    store = load_store_manifest(directory)
    store.job.require_data(manifest, directory, data)
    ListedFiles(directory, remedy=_REMEDY).check_sizes(store.files)
    if renormalize:
        _warn_of_bias(directory, store)
    opened = LogitStore(store, directory, renormalize=renormalize)
    opened.touch()
    return opened


def describe_store(directory: Path) -> list[str]:
    """A summary of a complete store, after a check of every byte. Raises DataError if it is damaged."""
    store = load_store_manifest(directory)
    for file in with_progress(store.files, "checking", "files"):
        file.check(directory, content=True, remedy=_REMEDY)
    job = store.job
    match job.method:
        case SampleMethod(draws=draws, seed=seed):
            method = f"{draws} draws from the teacher's distribution (seed {seed}), unbiased"
        case TopKMethod(k=k, dtype=dtype):
            method = f"the {k} likeliest tokens in {dtype}, the mass of all others as one number"
        case DenseMethod():
            method = "all log-probabilities in float16"
    size = sum(file.size for file in store.files)
    return [
        f"dumped logits: {method}; temperature {job.method.temperature:g}",
        f"split {job.split}: {job.rows:,} rows, {job.tokens:,} tokens, vocabulary of {job.vocab_size:,}, {job.shards} shards",
        f"{size:,} bytes, {store.bytes_per_token:.1f} a token",
        f"teacher {job.teacher[:12]} in {job.precision}, data {job.data[:12]}, tokenizer {job.tokenizer[:12]}",
        f"complete; every checksum is right; written by {store.created_by}",
    ]


def shard_starts(target_lengths: np.ndarray, tokens_per_shard: int) -> list[int]:
    """First rows of the shards, and the number of rows: a shard ends with the row that reaches `tokens_per_shard`."""
    totals = np.cumsum(target_lengths, dtype=np.int64)
    starts, done = [0], 0
    while starts[-1] < len(totals):
        end = min(int(totals.searchsorted(done + tokens_per_shard)) + 1, len(totals))
        starts.append(end)
        done = int(totals[end - 1])
    return starts


def _warn_of_bias(directory: Path, store: StoreManifest) -> None:
    if not isinstance(store.job.method, TopKMethod):
        raise DataError(f"{directory} is of method {store.job.method.kind}, which leaves no tail; only topk can be renormalized")
    logger.warning(
        "%s: the mass of all but the %d likeliest tokens is given to these: the gradient is biased; a sampled store is not",
        directory,
        store.job.method.k,
    )

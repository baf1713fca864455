"""The contents of a directory of dumped logits: `logits.json`, the last file that is written.

    LOGITS/parts.json    the job: teacher, data, method; written before any work
    LOGITS/00000.arrow   the signals of some consecutive rows; 00000.json is its sidecar (`storage/sharded_job.py`)
    LOGITS/logits.json   the job and the sidecar of every shard: the store is complete

A store belongs to one teacher, one split of prepared data and one tokenizer, all known by fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from dstrain.config_base import Config, Precision
from dstrain.data.prepared.manifest import DataManifest
from dstrain.errors import DataError
from dstrain.storage.directory_kind import instead_of
from dstrain.storage.document import Count, DocumentFormat, FileRecord
from dstrain.storage.hashing import sha256_of_text
from dstrain.storage.sharded_job import JOB_REMEDY, PARTS_FILE, ShardedJob, Sidecar

STORE_FORMAT_VERSION = 1
STORE_FILE = "logits.json"
DENSE_VOCABULARY = 16_384
"""The largest vocabulary of a dense store, at 32 KiB a token."""


class SampleMethod(Config):
    """`draws` tokens drawn from the teacher's distribution, kept as ids and counts of the distinct ones; unbiased.

    A teacher of higher entropy fills more bytes: about 35 a target token of a sure one and 65 of a weak one, at 50 draws.

    temperature: divides the teacher's logits. seed: decides the draws, together with row and position only.
    """

    kind: Literal["sample"] = "sample"
    draws: int = Field(default=50, ge=1, le=65_535)
    temperature: PositiveFloat = 1.0
    seed: NonNegativeInt = 1


class TopKMethod(Config):
    """The `k` likeliest tokens with their log-probabilities, and the mass of all others together.

    dtype: of the log-probabilities; uint8 is exact to about one percent of each probability (`logit_codec.py`).
    """

    kind: Literal["topk"] = "topk"
    k: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    dtype: Literal["uint8", "float16", "float32"] = "uint8"


class DenseMethod(Config):
    """All log-probabilities in float16, for small vocabularies; they teach every divergence at every temperature.

    temperature: divides the teacher's logits before they are rounded; a student's may be another.
    """

    kind: Literal["dense"] = "dense"
    temperature: PositiveFloat = 1.0


Method = Annotated[SampleMethod | TopKMethod | DenseMethod, Field(discriminator="kind")]


def choose_method(kind: str, options: Mapping[str, Any]) -> Method:
    """The method of that kind with the options that are not None. Raises DataError for an option that it does not have."""
    kinds: dict[str, type[SampleMethod] | type[TopKMethod] | type[DenseMethod]] = {
        "sample": SampleMethod,
        "topk": TopKMethod,
        "dense": DenseMethod,
    }
    chosen = kinds[kind]
    chosen_options = {name: value for name, value in options.items() if value is not None}
    for name in chosen_options:
        if name not in chosen.model_fields:
            raise DataError(f"--{name} does not go with --method {kind}; leave it out, or choose another method")
    try:
        return chosen(**chosen_options)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"--{first['loc'][0]} {first['input']}: {first['msg']}; choose another value") from error


class DumpJob(Config):
    """The job of a dump. teacher, data, tokenizer: fingerprints. rows, tokens: of the split; tokens: scored ones, with every EOS.

    tokens_per_shard: a shard ends with the first row that reaches so many. precision: of the teacher's computation; its
    log-probabilities are float32.
    """

    format_version: int = STORE_FORMAT_VERSION
    method: Method
    teacher: str
    data: str
    tokenizer: str
    split: str
    vocab_size: PositiveInt
    rows: PositiveInt
    tokens: PositiveInt
    shards: PositiveInt
    tokens_per_shard: PositiveInt
    precision: Precision = "fp32"

    def require_data(self, manifest: DataManifest, directory: Path, owner: Path) -> None:
        """Raise DataError if the store `directory` was made from other text than that of `owner`, or by another tokenizer."""
        if self.tokenizer != manifest.tokenizer_fingerprint:
            raise DataError(
                f"the logits in {directory} are of tokenizer {self.tokenizer[:12]}, {owner} has "
                f"{manifest.tokenizer_fingerprint[:12]}: ids would mean other words; dump the logits of this data"
            )
        record = manifest.splits.get(self.split)
        fingerprint = "no such split" if record is None else record.fingerprint
        if self.data != fingerprint:
            raise DataError(
                f"the logits in {directory} are of other data ({self.data[:12]}) than the split {self.split!r} of {owner} "
                f"({fingerprint[:12]}): rows would be other sentences; dump the logits of this data"
            )

    def require_teacher(self, fingerprint: str, directory: Path, owner: Path) -> None:
        """Raise DataError if the store `directory` was not made by the teacher `owner`."""
        if self.teacher != fingerprint:
            raise DataError(
                f"the logits in {directory} are of another teacher ({self.teacher[:12]}) than {owner} ({fingerprint[:12]}); "
                "dump them again with this teacher, or name the one that made them"
            )


class LogitSidecar(Sidecar):
    """Describes one shard: the rows from `first_row` on."""

    number: Count
    first_row: Count
    rows: PositiveInt
    tokens: PositiveInt


class StoreManifest(Config):
    """A complete store."""

    created_by: str
    job: DumpJob
    shards: Annotated[tuple[LogitSidecar, ...], FailFast()]

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every shard on the disk."""
        return tuple(shard.record for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that is kept."""
        return sha256_of_text("".join(file.sha256 for file in self.files))

    @property
    def bytes_per_token(self) -> float:
        """On the disk."""
        return sum(file.size for file in self.files) / self.job.tokens


def logit_shard_file(number: int) -> str:
    """The name of a shard in the output directory."""
    return f"{number:05d}.arrow"


DUMP = ShardedJob(
    verb="dump-logits",
    job=DocumentFormat(
        DumpJob,
        "job of `dstrain dump-logits`",
        DataError,
        JOB_REMEDY.format(verb="dump-logits"),
        version_field="format_version",
        version=STORE_FORMAT_VERSION,
    ),
    sidecar=LogitSidecar,
    shard_file=logit_shard_file,
    num_shards=lambda job: job.shards,
)
STORE = DocumentFormat(StoreManifest, "manifest of dumped logits", DataError, f"run `dstrain {DUMP.verb} --merge` again")


def merge_store(directory: Path, created_by: str) -> StoreManifest:
    """Check that every shard is there and complete, and write `logits.json`.

    Raises DataError that lists the shards that are missing or damaged, or if `directory` was not made by dump-logits.
    """
    directory = Path(directory)
    job, shards = DUMP.collect(directory)
    manifest = StoreManifest(created_by=created_by, job=job, shards=tuple(shards))
    _check_cover(directory / STORE_FILE, manifest)
    STORE.write(directory / STORE_FILE, manifest)
    return manifest


def load_store_manifest(directory: Path) -> StoreManifest:
    """Read `directory`/logits.json. Raises DataError if the store is unfinished, of another version or altered."""
    path = Path(directory) / STORE_FILE
    if not path.exists() and (path.parent / PARTS_FILE).is_file():
        raise DataError(
            f"{path} is missing: the dump was not finished; run it again, then `dstrain {DUMP.verb} --merge {directory}`"
        )
    if not path.exists():
        meant = instead_of("dumped logits", path.parent)
        raise DataError(f"{directory} holds no dumped logits; name a directory that `dstrain {DUMP.verb}` wrote: {meant}")
    tree = STORE.read_tree(path)
    job = tree.get("job")
    version = job.get("format_version") if isinstance(job, dict) else None
    if version != STORE_FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version!r}, this dstrain reads {STORE_FORMAT_VERSION}; dump the logits again"
        )
    manifest = STORE.validate(tree, path)
    _check_cover(path, manifest)
    return manifest


def _check_cover(path: Path, manifest: StoreManifest) -> None:
    """Raise DataError unless the shards follow one another and hold all rows and tokens."""
    row = 0
    for number, shard in enumerate(manifest.shards):
        if (shard.number, shard.first_row) != (number, row):
            raise DataError(f"{path}: shard {shard.number} begins at row {shard.first_row}, not {row}; dump the logits again")
        row += shard.rows
    tokens = sum(shard.tokens for shard in manifest.shards)
    if (len(manifest.shards), row, tokens) != (manifest.job.shards, manifest.job.rows, manifest.job.tokens):
        raise DataError(
            f"{path}: {len(manifest.shards)} shards hold {row} rows and {tokens} tokens, the job has {manifest.job.shards}, "
            f"{manifest.job.rows} and {manifest.job.tokens}; dump the logits again"
        )

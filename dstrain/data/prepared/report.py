"""Counts of a preparation, for people and for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dstrain.data.config import DataConfig, has_no_source
from dstrain.data.prepared.location import prepared_files
from dstrain.data.prepared.manifest import TOKENIZER_DIRECTORY, DataManifest, SplitRecord, data_remedy, load_manifest
from dstrain.data.sources.corpora import splits_of
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.data.tokenizers.unknown import MANY, likely_cause
from dstrain.errors import DataError
from dstrain.progress import with_progress


@dataclass(frozen=True)
class SplitReport:
    """One split. pairs_encoded and seconds are this run's: fewer pairs than the split's if an earlier run left shards.

    has_source: False for text without a source, whose pairs are lines. unknown: the share of <unk> by side, see `SplitRecord`.
    truncated: sources that were cut.
    """

    name: str
    has_source: bool
    pairs_read: int
    pairs_kept: int
    source_tokens: int
    target_tokens: int
    unknown: dict[str, float]
    dropped: dict[str, int]
    truncated: int
    pairs_encoded: int
    seconds: float

    @property
    def pairs_per_second(self) -> float:
        """Of this run."""
        return self.pairs_encoded / self.seconds if self.seconds > 0 else 0.0

    def line(self) -> str:
        """One line of text."""
        unit = "pairs" if self.has_source else "lines"
        sides = f"{self.source_tokens:,} + " if self.has_source else ""
        words = f"{self.name}: {self.pairs_kept:,} {unit}, {sides}{self.target_tokens:,} tokens"
        words += f"; <unk> {self._shares()}"
        lost = {reason: count for reason, count in self.dropped.items() if count}
        if self.name == "train" or lost:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in lost.items()) or "none"
            words += f"; dropped {sum(lost.values()):,} of {self.pairs_read:,}: {reasons}"
        if self.truncated:
            words += f"; {self.truncated:,} sources truncated"
        if self.pairs_encoded:
            words += f"; {self.seconds:.1f} s, {self.pairs_per_second:,.0f} {unit}/s"
        return words

    def _shares(self) -> str:
        if not self.unknown:
            return "not counted"
        if not self.has_source:
            return f"{100 * self.unknown.get('target', 0.0):.2f} %"
        return " and ".join(f"{100 * share:.2f} % of {side}" for side, share in self.unknown.items())


@dataclass(frozen=True)
class PrepareReport:
    """The whole directory. finished_before: there was nothing left to do. warnings: of text that the tokenizer does not know."""

    output: Path
    splits: dict[str, SplitReport]
    source_vocab_size: int
    target_vocab_size: int
    shared: bool
    finished_before: bool
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text."""
        sizes = (
            f"{self.source_vocab_size:,} shared"
            if self.shared
            else f"{self.source_vocab_size:,} source + {self.target_vocab_size:,} target"
        )
        head = f"{self.output} was finished before; nothing to do" if self.finished_before else f"{self.output} is ready"
        return [head, f"tokenizer: {sizes} entries", *(split.line() for split in self.splits.values())]


def build_report(
    output: Path, manifest: DataManifest, tokenizers: TokenizerPair, work: dict[str, tuple[int, float]], *, finished_before: bool
) -> PrepareReport:
    """work: pairs encoded and seconds of this run, by split."""
    corpora = splits_of(DataConfig.model_validate(manifest.data))
    return PrepareReport(
        output=output,
        splits={
            name: _split_report(name, record, *work.get(name, (0, 0.0)), has_source=not has_no_source(corpora[name]))
            for name, record in manifest.splits.items()
        },
        source_vocab_size=tokenizers.source.vocab_size,
        target_vocab_size=tokenizers.target.vocab_size,
        shared=tokenizers.shared,
        finished_before=finished_before,
        warnings=tuple(_warnings(manifest, tokenizers)),
    )


def _warnings(manifest: DataManifest, tokenizers: TokenizerPair) -> list[str]:
    """Sides of splits with many <unk>, and the likely cause: a line for each cause."""
    corpora = splits_of(DataConfig.model_validate(manifest.data))
    sides: dict[str, list[str]] = {}
    for name, split in manifest.splits.items():
        for side, share in split.unknown_shares().items():
            cause = likely_cause(tokenizers.source if side == "source" else tokenizers.target)
            if all(source.kind in {"fairseq", "fairseq_text"} for source in corpora[name]):
                cause = "fairseq-preprocess wrote them so: its dictionary lacked words of the text that it was given"
            if manifest.pseudo_labels is not None and (name, side) == ("train", "target"):
                cause = "the teacher generates them: it was trained on such targets"
            if share > MANY:
                sides.setdefault(cause, []).append(f"{100 * share:.1f} % of the {side} tokens of {name}")
    return [f"{', '.join(shares)} are <unk>: {cause}" for cause, shares in sides.items()]


def describe_data(directory: Path) -> list[str]:
    """What prepared data holds, after a check of every byte. Raises DataError if something is wrong with it."""
    manifest = verify_data(directory)
    report = build_report(directory, manifest, load_tokenizers(directory / TOKENIZER_DIRECTORY), {}, finished_before=True)
    labels = manifest.pseudo_labels
    return [
        "prepared data"
        if labels is None
        else f"prepared data; training targets are the outputs of teacher {labels['teacher'][:12]}",
        *report.lines()[1:],
        *(f"warning: {warning}" for warning in report.warnings),
        f"tokenizer {manifest.tokenizer_fingerprint[:12]}, preparation {manifest.job[:12]}",
        f"complete; every checksum is right; written by {manifest.created_by}",
    ]


def verify_data(directory: Path) -> DataManifest:
    """The manifest of prepared data, after a check of every byte. Raises DataError if something is wrong with it."""
    manifest = load_manifest(directory)
    remedy = data_remedy(directory)
    files = prepared_files(directory)
    for file in with_progress([file for split in manifest.splits.values() for file in split.files], "checking", "files"):
        files.open(file)
    if load_tokenizers(directory / TOKENIZER_DIRECTORY).fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(f"{directory / TOKENIZER_DIRECTORY} is not the tokenizer that made the ids; {remedy}")
    return manifest


def _split_report(name: str, record: SplitRecord, pairs_encoded: int, seconds: float, *, has_source: bool) -> SplitReport:
    return SplitReport(
        name=name,
        has_source=has_source,
        pairs_read=record.pairs_read,
        pairs_kept=record.rows,
        source_tokens=record.source_tokens,
        target_tokens=record.target_tokens,
        unknown=record.unknown_shares(),
        dropped=record.dropped,
        truncated=record.truncated,
        pairs_encoded=pairs_encoded,
        seconds=seconds,
    )

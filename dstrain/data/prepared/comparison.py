"""Whether prepared data is that of a recipe: by what is in it, not by how its files are spelled.

A recipe may name the same text by another path, or text that is not on this machine at all. If it names other files that are
here, they must be what was prepared: by size, and up to 16 MiB by SHA-256. Larger corpora are not read again, which would take
minutes; nor are data sets of Hugging Face loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dstrain.config_base import Tree
from dstrain.data.config import DataConfig, HuggingFaceDataset, TextSource
from dstrain.data.prepared.job import JOB, JOB_FILE, InputFile
from dstrain.data.prepared.manifest import DataManifest
from dstrain.data.sources.corpora import files_of
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.training import load_configured_tokenizers
from dstrain.errors import DataError
from dstrain.storage.hashing import sha256_of_file

MAX_READ_BYTES = 1 << 24
"""Of a file that is compared by its bytes."""
FILES_OF_KIND = {
    "parallel": ("source", "target"),
    "tsv": ("path",),
    "jsonl": ("path",),
    "parquet": ("path",),
    "huggingface": ("dataset",),
    "fairseq": ("source", "target"),
    "text": ("path",),
    "fairseq_text": ("path",),
    "sentencepiece_files": ("source_model", "target_model"),
    "tokenizer_directory": ("path",),
    "fairseq_dictionaries": ("source", "target", "source_model", "target_model"),
}
"""Keys that name files, by kind of corpus and tokenizer."""
NOT_READ = ("test", "pairs_per_shard")
"""Keys that do not change what training reads."""


def settings_of(data: Mapping[str, Any]) -> Tree:
    """A data section without test sets, and with a mere mark where a file is named."""
    return {key: _without_files(value) for key, value in data.items() if key not in NOT_READ}


def other_content(directory: Path, manifest: DataManifest, prepared: DataConfig, recipe: DataConfig) -> Iterator[str]:
    """A line for each file of the recipe that is here and is not what `directory` was prepared from.

    prepared: the data section of the manifest; it differs from the recipe's in spelling only.
    """
    job = JOB.read(directory / JOB_FILE) if (directory / JOB_FILE).is_file() else None
    inputs = {} if job is None else {file.path: file for file in job.inputs}
    for (key, old), (_, new) in zip(prepared.corpora(), recipe.corpora(), strict=False):
        if key.startswith("test.") or old == new or isinstance(new, HuggingFaceDataset):
            continue
        for before, now in zip(_files(old), _files(new), strict=False):
            known = inputs.get(str(before))
            if known is not None and now.is_file() and (difference := _difference(known, now)):
                yield f"  data.{key}: {now} has {difference}"
    tokenizer = recipe.tokenizer
    if tokenizer != prepared.tokenizer and not isinstance(tokenizer, TrainedSentencePiece):
        pair = _unless_missing(lambda: load_configured_tokenizers(tokenizer))
        if pair is not None and pair.fingerprint != manifest.tokenizer_fingerprint:
            yield f"  data.tokenizer: {pair.fingerprint[:12]} in the recipe, {manifest.tokenizer_fingerprint[:12]} made the ids"


def _difference(prepared: InputFile, now: Path) -> str | None:
    size = now.stat().st_size
    if size != prepared.size:
        return f"{size:,} bytes, prepared was {prepared.path} of {prepared.size:,}"
    if size <= MAX_READ_BYTES and sha256_of_file(now) != prepared.sha256:
        return f"another content than {prepared.path}, which was prepared"
    return None


def _files(corpus: TextSource) -> tuple[Path, ...]:
    return _unless_missing(lambda: files_of(corpus)) or ()


def _unless_missing(read: Callable[[], Any]) -> Any:
    """The result, None if it needs files that are not here."""
    try:
        return read()
    except (DataError, OSError):
        return None


def _without_files(value: Any) -> Any:
    if isinstance(value, dict):
        files = FILES_OF_KIND.get(value.get("kind", ""), ())
        return {key: "FILE" if key in files and inner is not None else _without_files(inner) for key, inner in value.items()}
    return [_without_files(item) for item in value] if isinstance(value, list | tuple) else value

"""Parquet files, and data sets of Hugging Face, as records of the columns that are needed, in batches of bounded size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dstrain.data.config import HuggingFaceDataset, ParquetTable
from dstrain.data.sources.records import Record, RecordReader, record_name
from dstrain.data.sources.text import MAX_BLOCK_BYTES, MAX_BLOCK_LINES, FileScan, expand_path
from dstrain.errors import DataError
from dstrain.extras import import_extra
from dstrain.storage.hashing import sha256_of_file

READ_BYTES = 1 << 20
SAVED_FILES = ("state.json", "dataset_dict.json")
"""What `save_to_disk` of Hugging Face's data sets writes, of one split or of several."""


def scan_parquet(path: Path, source: ParquetTable) -> FileScan:
    """Check that the columns are there, count the rows, which the file's footer tells, and hash the file."""
    with _open_parquet(path) as table:
        _columns(table.schema_arrow, source, str(path))
        return FileScan(table.metadata.num_rows, sha256_of_file(path))


def scan_content(path: Path) -> FileScan:
    """Hash a file of which lines mean nothing."""
    return FileScan(0, sha256_of_file(path))


def read_parquet(source: ParquetTable, start: int) -> RecordReader:
    """The rows of a file from `start` on. Raises DataError listing the columns if it lacks one of the source's."""
    name = record_name(source)
    with _open_parquet(expand_path(source.path)) as table:
        columns = _columns(table.schema_arrow, source, name)
    return RecordReader(_parquet_batches(expand_path(source.path), columns, start), start, name)


def _open_parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path") from error
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); fetch it again") from error


def _parquet_batches(path: Path, columns: list[str], start: int) -> Iterator[list[Record]]:
    with _open_parquet(path) as table:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            if start >= group.num_rows:
                start -= group.num_rows
                continue
            rows = _rows_per_batch(group.num_rows, group.total_byte_size)
            for batch in table.iter_batches(rows, row_groups=[number], columns=columns):
                yield _records(batch.slice(start), str(path))
                start = max(0, start - batch.num_rows)


def load_data_set(source: HuggingFaceDataset) -> Any:
    """The split of a data set, mapped from the disk after a download if need be.

    Raises DataError if the data set, its configuration or the split is missing, ExtraError if the package is.
    """
    datasets = import_extra("datasets", extra="hf", purpose="kind: huggingface")
    path = expand_path(source.dataset)
    if path.is_file():
        raise DataError(f"{path} is a file, not a data set; name its folder, or read it by kind: parquet or jsonl")
    network_log = logging.getLogger("huggingface_hub")
    level = network_log.level
    network_log.setLevel(logging.ERROR)  # its retries of an absent network; the message below has the outcome
    try:
        if any((path / name).is_file() for name in SAVED_FILES):
            loaded = datasets.load_from_disk(str(path), keep_in_memory=False)
        else:
            loaded = datasets.load_dataset(str(path), source.config)
    except Exception as error:  # of the package, its file systems, its network client and its readers
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{record_name(source)}: Hugging Face's datasets cannot load it ({type(error).__name__}: {reason}); check dataset "
            "and config; for a name of the hub also the network (with HF_HUB_OFFLINE=1 its cache is read without), or name a "
            "directory"
        ) from error
    finally:
        network_log.setLevel(level)
    return _split(loaded, source)


def _split(loaded: Any, source: HuggingFaceDataset) -> Any:
    splits = loaded if isinstance(loaded, dict) else {loaded.split and str(loaded.split): loaded}
    if source.split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if source.split in splits:
        return splits[source.split]
    if None in splits:
        raise DataError(f"{source.dataset}: it has one split without a name, not {source.split!r}; leave split out")
    raise DataError(f"{source.dataset}: no split {source.split or 'is chosen'}; set split to one of {', '.join(splits)}")


def count_data_set(source: HuggingFaceDataset) -> int:
    """Check that the columns are there, and count the rows."""
    data = load_data_set(source)
    _columns(data.data.schema, source, record_name(source))
    return len(data)


def data_set_files(source: HuggingFaceDataset) -> tuple[Path, ...]:
    """The Arrow files that a split is mapped from."""
    return tuple(Path(file["filename"]) for file in load_data_set(source).cache_files)


def read_data_set(source: HuggingFaceDataset, start: int) -> RecordReader:
    """The rows of a split from `start` on. Raises DataError listing the columns if it lacks one of the source's."""
    data, name = load_data_set(source), record_name(source)
    columns = [column.partition(".")[0] for column in _columns(data.data.schema, source, name)]
    return RecordReader(_data_set_batches(data, columns, start, name), start, name)


def _data_set_batches(data: Any, columns: list[str], start: int, name: str) -> Iterator[list[Record]]:
    rows = _rows_per_batch(len(data), data.data.nbytes)
    table = data.select_columns(list(dict.fromkeys(columns))).with_format("arrow")
    for begin in range(start, len(data), rows):
        yield _records(table[begin : begin + rows], name)


def _rows_per_batch(rows: int, size: int) -> int:
    """How many rows make a block, of a table with so many rows and bytes."""
    return max(1, min(MAX_BLOCK_LINES, MAX_BLOCK_BYTES * rows // max(size, 1)))


def _records(rows: Any, name: str) -> list[Record]:
    try:
        records: list[Record] = rows.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: a text that is invalid UTF-8 ({error.object!r:.60}); write the table again") from error
    return records


def _columns(schema: Any, source: ParquetTable | HuggingFaceDataset, name: str) -> list[str]:
    """The columns to read for both sides and the references: paths that end before the first list."""
    columns: dict[str, None] = {}
    for path in filter(None, (source.source, source.target, source.references)):
        for field in (path, path.partition(".")[0]):
            if schema.names.count(field) > 1:
                raise DataError(f"{name}: it has two columns {field!r}; rename one, or write the table without it")
        column = _column(schema, path)
        if column is None:
            raise DataError(f"{name}: no column {path!r}; the columns are {', '.join(_column_names(schema))}")
        columns[column] = None
    return list(columns)


def _column(schema: Any, path: str) -> str | None:
    if path in schema.names:
        return path
    first, *steps = path.split(".")
    if first not in schema.names:
        return None
    column, inside_list, kind = first, False, schema.field(first).type
    for step in steps:
        if pa.types.is_struct(kind) and kind.get_field_index(step) >= 0:
            kind = kind.field(step).type
            column += "" if inside_list else f".{step}"
        elif step.isdecimal() and _is_list(kind):
            kind, inside_list = kind.value_type, True
        else:
            return None
    return column


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _column_names(fields: Sequence[Any], prefix: str = "") -> Iterator[str]:
    for field in fields:
        if pa.types.is_struct(field.type):
            yield from _column_names(list(field.type), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"

"""Where prepared data lies: in a directory, or in an object store, of which a copy in the cache is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from dstrain.data.prepared.job import JOB_FILE
from dstrain.data.prepared.manifest import MANIFEST_FILE, TOKENIZER_DIRECTORY, data_remedy
from dstrain.errors import DataError
from dstrain.storage.file_cache import FileCache, cache_directory, cache_limit
from dstrain.storage.listed_files import ListedFiles
from dstrain.storage.remote import ORIGIN, ORIGIN_FILE, CopiedFiles, RemoteDirectory, is_remote, is_shortened_url, make_copy


def data_directory(location: str | Path) -> Path:
    """The directory itself, or that of a copy if `location` is a URL, such as `s3://bucket/data`.

    The copy holds the manifest and the tokenizer; shards are fetched when they are touched, by `prepared_files`. Raises DataError
    if the store does not answer or has no prepared data there, ExtraError if fsspec or the package of the store is missing.
    """
    if is_shortened_url(str(location)):
        raise DataError(f"{location} is a URL that lost a slash, as in a Path; give it as a text, with ://")
    if not is_remote(str(location)):
        return Path(location)
    cache = FileCache(cache_directory(os.environ), cache_limit(os.environ))
    remote = RemoteDirectory(str(location))
    return make_copy(remote, cache, manifest=MANIFEST_FILE, files=[JOB_FILE], folders=[TOKENIZER_DIRECTORY])


def _directory_if_location(value: object) -> object:
    """Anything else is refused by the type of the field, with its name."""
    return data_directory(value) if isinstance(value, str | Path) else value


DataDirectory = Annotated[Path, BeforeValidator(_directory_if_location)]
"""A field of options that a path or a URL of prepared data may be given for."""


def prepared_files(directory: Path) -> ListedFiles:
    """The files that the manifest of a directory lists."""
    remedy = data_remedy(directory)
    if not (directory / ORIGIN_FILE).is_file():
        return ListedFiles(directory, remedy=remedy)
    remote = RemoteDirectory(ORIGIN.read(directory / ORIGIN_FILE).url)
    return CopiedFiles(directory, remote, FileCache(directory.parent, cache_limit(os.environ)), remedy=remedy)

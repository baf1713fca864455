"""What a file is, by its first bytes: compressed, or something else than text, with the way to make text of it.

A suffix says what somebody called a file; the bytes say what it is. Patterns that could begin a text are made long enough not to.
"""

from __future__ import annotations

import re

HEAD_BYTES = 512
"""How much of a file is looked at; a tar archive says what it is at byte 257."""
COMPRESSIONS = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)",
    "xz": rb"\xfd7zXZ\0|\]\0\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
}
"""What is decompressed while it is read."""
FOREIGN_FORMATS = {
    rb"PK\x03\x04|PK\x05\x06": "a zip archive; unpack it and name the file inside",
    rb".{257}ustar": "a tar archive; unpack it and name the file inside",
    rb"7z\xbc\xaf|Rar!\x1a": "a 7z or rar archive; unpack it and name the file inside",
    rb"\x04\x22\x4d\x18|\x1f\x9d": "compressed by lz4 or compress; decompress it and name the result",
    rb"PAR1[^\x20-\x7e]": "a parquet file; name it in a recipe: {kind: parquet, path: FILE, source: COLUMN, target: COLUMN}",
    rb"ARROW1\0\0": "an Arrow file; name its folder in a recipe: {kind: huggingface, dataset: DIR}, or write its text to a file",
    rb"%PDF-\d": "a PDF document; extract its text into a file",
    rb"version https://git-lfs\.": "a Git LFS pointer, not the file itself; fetch the file: git lfs pull",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32 text; convert it: iconv -f UTF-32 -t UTF-8 FILE > NEW",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
    rb"([^\0]\0){4}": "UTF-16 text; convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW",
    rb"(\0[^\0]){4}": "UTF-16 text; convert it: iconv -f UTF-16BE -t UTF-8 FILE > NEW",
}
"""Pattern -> what it is and what to do; the first that matches counts."""


def compression_of(head: bytes) -> str | None:
    """The name of the compression of a file that begins so; None if it is not compressed."""
    return next((name for name, pattern in COMPRESSIONS.items() if re.match(pattern, head, re.DOTALL)), None)


def foreign_format(head: bytes) -> str | None:
    """What a file that begins so is instead of text, and the remedy; None if it may be text."""
    if name := compression_of(head):
        return f"compressed by {name}; decompress it first"
    return next((words for pattern, words in FOREIGN_FORMATS.items() if re.match(pattern, head, re.DOTALL)), None)

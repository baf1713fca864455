"""An entry of a SentencePiece model in the bytes of its file, sentencepiece_model.proto.

`ModelProto.pieces` is field 1, a repeated message of piece (1), score (2) and type (3). Protocol buffers may continue a repeated
field anywhere: a model followed by such bytes is the model with more entries, and everything before them is as it was.
"""

from __future__ import annotations

_FIELD_1_BYTES = b"\x0a"
_SCORE_0 = b"\x15\0\0\0\0"
_TYPE_USER_DEFINED = b"\x18\x04"


def user_defined_piece(piece: str) -> bytes:
    """Which text is never split within."""
    content = _length_delimited(piece.encode()) + _SCORE_0 + _TYPE_USER_DEFINED
    return _length_delimited(content)


def _length_delimited(content: bytes) -> bytes:
    """Field 1. The length has seven bits a byte, the low ones first; all bytes but its last have the high bit."""
    length, number = b"", len(content)
    while number >= 128:
        length += bytes([number % 128 | 128])
        number //= 128
    return _FIELD_1_BYTES + length + bytes([number]) + content

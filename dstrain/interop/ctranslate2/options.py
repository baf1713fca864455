"""What an export to CTranslate2 may be asked for. No torch, so that the command line answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
"""Types of weights that CTranslate2 stores."""
MODEL_KIND, MODEL_FILE = "a CTranslate2 model", "model.bin"
"""What is written, in words, and a file that it always has."""


@dataclass(frozen=True, kw_only=True)
class CTranslate2Export:
    """base: of an adapter bundle, if it has moved. quantization: one of `QUANTIZATIONS`; None = float32."""

    bundle: Path
    output: Path
    base: Path | None = None
    quantization: str | None = None
    overwrite: bool = False

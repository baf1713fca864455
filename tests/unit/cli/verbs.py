"""Verbs run in this process, and bundles to run them on."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.checkpoint.bundle import save_bundle
from dstrain.cli.main import main
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.models.weights import to_canonical
from tests.unit.distillation.toy_store import MODEL, teacher_for


def bundle_for(data: Path, directory: Path, *, seed: int, tokenizers: bool = True, eos_scale: float = 1.0) -> Path:
    model = teacher_for(data, seed=seed, eos_scale=eos_scale)
    save_bundle(
        directory,
        model_config=MODEL,
        vocabulary=model.vocabulary,
        weights=to_canonical(model),
        tokenizers=load_tokenizers(data / "tokenizer") if tokenizers else None,
        recipe=None,
    )
    return directory


class Verbs:
    """Runs verbs in this process and reads what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def succeed(self, *arguments: str | Path) -> str:
        assert main([str(word) for word in arguments]) == 0
        return self._capsys.readouterr().out

    def fail(self, *arguments: str | Path, code: int = 1) -> str:
        try:
            found = main([str(word) for word in arguments])
        except SystemExit as usage:
            found = int(usage.code or 0)
        assert found == code
        return self._capsys.readouterr().err

"""Layers that Inductor compiles, through the command line: the losses of a run without it, within rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.engine.launch import require_compiler
from dstrain.errors import TrainingError
from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, dstrain, events, settings, succeeds

pytestmark = pytest.mark.slow
STEPS = 6


def test_losses_equal_those_of_plain_layers(data: Path, tmp_path: Path) -> None:
    """With dropout, packed; every micro-batch after the first runs compiled."""
    try:
        require_compiler({"compile = layers": "compile: none"}, "cpu")
    except TrainingError as error:
        pytest.skip(str(error))
    curves = []
    for name in ("none", "layers"):
        overrides = (f"engine.compile={name}", "engine.layout=packed", "model.dropout=0.1", f"training.max_steps={STEPS}")
        words = settings(*SMALL_DATA, *SMALL_TRAINING, *overrides)
        paths = ("--data", data, "--output", tmp_path / name)
        succeeds(dstrain("train", RECIPE, *paths, *words, variables={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}))
        curves.append([(event["loss"], event["grad_norm"]) for event in events(tmp_path / name, "train")])
    plain, compiled = curves
    assert len(plain) == STEPS
    assert any((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    for expected, found in zip(plain, compiled, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)

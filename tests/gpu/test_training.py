"""Training on a GPU through the command line: every ZeRO stage and precision learns, resumes exactly and writes a bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, curve, dstrain, environment, settings, succeeds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CASES = [("zero0", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"), ("zero1", "fp16"), ("zero2", "bf16"), ("zero3", "bf16")]
# Not a fork of the tests' server: it has imported DeepSpeed for the CPU, which keeps that choice for its process.
ITS_OWN: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240, "env": environment({"DS_ACCELERATOR": "cuda"})}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared") / "data"
    succeeds(dstrain("prepare", RECIPE, "--output", directory, "--workers", "1", *settings(*SMALL_DATA)))
    return directory


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_training_learns_and_a_stopped_one_continues(stage: str, precision: str, data: Path, tmp_path: Path) -> None:
    def train(run: Path, steps: int) -> None:
        chosen = settings(*SMALL_DATA, *SMALL_TRAINING, f"engine={{deepspeed: {stage}, precision: {precision}}}")
        limit = settings(f"training={{seed: 1, max_steps: {steps}, ema: {{decay: 0.9}}}}")
        words = ["train", RECIPE, "--data", data, "--output", run, "--device", "cuda", *chosen, *limit]
        succeeds(subprocess.run([sys.executable, "-m", "dstrain", *words], **ITS_OWN, check=False))

    train(tmp_path / "whole", 12)
    train(tmp_path / "stopped", 5)
    train(tmp_path / "stopped", 12)
    whole, stopped = curve(tmp_path / "whole"), curve(tmp_path / "stopped")
    assert whole[-1][1] < whole[0][1]
    assert [step for step, *_ in stopped] == [step for step, *_ in whole]
    assert [loss for _, loss, *_ in stopped] == pytest.approx([loss for _, loss, *_ in whole], rel=1e-3)
    assert (tmp_path / "whole" / "bundles" / "last" / "model.safetensors").exists()

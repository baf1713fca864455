"""The first words of a training, and what it leaves idle of its machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dstrain.build import machine
from dstrain.build.header import announce_training
from dstrain.build.machine import describe_device, unused_gpus
from dstrain.log import setup_logging
from dstrain.recipe_file import load_recipe

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_the_first_words_come_without_torch() -> None:
    code = """
import sys
from pathlib import Path
from dstrain.build.header import announce_training
from dstrain.log import setup_logging
from dstrain.recipe_file import load_recipe
setup_logging()
recipe = load_recipe("translation/quickstart", ["training.ema={decay: 0.99}"])
announce_training(recipe, "translation/quickstart", data=Path("DATA"), output=Path("RUN"), base=None)
print([name for name in ("torch", "numpy", "deepspeed", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    title, *fields = [line[9:] for line in done.stderr.splitlines()]
    assert title.endswith("trains translation/quickstart")
    assert fields == [
        "  data      DATA",
        "  output    RUN",
        "  start     initial weights of seed 1",
        "  engine    1 rank, fp32, ZeRO stage 1 (zero1)",
        "  step      4,096 target tokens",
        "  until     max_steps = 500",
        "  validate  every 100 steps, by bleu",
        "  weights   moving average (EMA), in validations and bundles",
    ]


def test_base_and_number_of_ranks_are_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    setup_logging()
    layout = "engine={deepspeed: zero3, precision: bf16, parallel: {tensor: 2, sequence: 2}}"
    recipe = load_recipe("translation/quickstart", [layout])
    announce_training(recipe, "r.yaml", data=Path("DATA"), output=Path("RUN"), base=Path("BUNDLE"))
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert "  start     the weights of BUNDLE" in lines
    assert "  engine    4 ranks (tensor 2 x sequence 2), bf16, ZeRO stage 3 (zero3)" in lines


def test_a_run_that_goes_on_starts_from_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    setup_logging()
    announce_training(load_recipe("translation/quickstart"), "r.yaml", data=Path("DATA"), output=tmp_path, base=Path("BUNDLE"))
    assert "  start     the latest checkpoint of that run" in capsys.readouterr().err


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A machine with as many GPUs as a test says. visible: to torch; installed: in the driver's list."""
    state = SimpleNamespace(visible=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state.visible)
    monkeypatch.setattr(machine, "NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.setattr(sys, "argv", ["dstrain", "train", "r.yaml", "--data", "my data", "--output", "RUN"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return state


def test_idle_gpus_are_said_with_the_command_that_uses_them(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "start deepspeed --num_gpus 8 --module dstrain train r.yaml --data 'my data' --output RUN"
    gpus.visible = 8
    assert unused_gpus(GPU, "auto") == f"training on 1 of 8 GPUs; to use all of them, {command}"
    for choice, cause in (("cpu", "--device cpu"), ("auto", "DS_ACCELERATOR=cpu")):
        words = unused_gpus(CPU, choice)
        assert words == f"training on the CPU, although torch sees 8 GPUs; to use them, leave out {cause} and {command}"
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert unused_gpus(GPU, "auto") is None


def test_gpus_that_torch_cannot_use_are_said(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unused_gpus(CPU, "auto") is None
    (machine.NVIDIA_GPUS / "0000:01:00.0").mkdir(parents=True)
    words = unused_gpus(CPU, "auto")
    assert words is not None
    assert f"torch {torch.__version__} cannot use 1 GPU of the machine; install its CUDA build" in words
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpus(CPU, "auto") is None


def test_one_gpu_in_use_leaves_none_idle(gpus: SimpleNamespace) -> None:
    gpus.visible = 1
    assert unused_gpus(GPU, "auto") is None
    assert describe_device(CPU).startswith("cpu, ")

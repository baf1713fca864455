"""What a training uses of its machine, and what it leaves idle."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import torch

from dstrain.parallel.launch_environment import rank_from_environment

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""The driver's list of GPUs, whether torch can use them or not."""


def describe_device(device: torch.device) -> str:
    """The device of a rank, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)} a rank"


def unused_gpus(device: torch.device, choice: str) -> str | None:
    """What a training on `device` leaves idle of this machine, and the command that uses it; None if nothing.

    choice: of the device, as the user made it.
    """
    ranks = int(rank_from_environment(os.environ)["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    words = sys.argv[1:] if sys.argv[1:2] == ["train"] else ["train", "RECIPE", "--data", "DATA", "--output", "RUN"]
    command = f"deepspeed --num_gpus {gpus} --module dstrain {shlex.join(words)}"
    if device.type == "cpu" and gpus:
        cause = "--device cpu" if choice == "cpu" else "DS_ACCELERATOR=cpu"
        return f"training on the CPU, although torch sees {_counted(gpus)}; to use them, leave out {cause} and start {command}"
    if device.type == "cpu" and NVIDIA_GPUS.is_dir() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        present = _counted(len(list(NVIDIA_GPUS.iterdir())))
        return f"training on the CPU: torch {torch.__version__} cannot use {present} of the machine; install its CUDA build"
    if ranks < gpus:
        return f"training on {ranks} of {_counted(gpus)}; to use all of them, start {command}"
    return None


def _counted(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"

"""What dstrain runs with: versions, devices, threads, and the kernel of each op."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dstrain import __version__
from dstrain.build.device import usable_device, usable_precision
from dstrain.build.machine import unused_gpus
from dstrain.config_base import DeviceChoice, Precision, PrecisionChoice
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.ops.kernel import KernelState
from dstrain.ops.kernels import kernel_states
from dstrain.parallel.launch_environment import num_cores

PACKAGES = ("torch", "deepspeed", "triton", "liger-kernel")
"""Those that decide which kernels there are."""


@dataclass(frozen=True)
class Diagnosis:
    """versions: package -> version, None if it is not installed. devices: name -> description. kernels: op -> kernel -> state.

    device, precision: those that the kernels are for. warning: what the machine has and torch does not use.
    """

    versions: Mapping[str, str | None]
    devices: Mapping[str, str]
    device: str
    precision: Precision
    kernels: Mapping[str, Mapping[str, KernelState]]
    warning: str | None

    def tree(self) -> dict[str, Any]:
        """Plain values."""
        kernels = {
            op: {
                "chosen": [name for name, state in states.items() if state.is_chosen],
                "not_chosen": {name: state.reason for name, state in states.items() if not state.is_chosen},
            }
            for op, states in self.kernels.items()
        }
        return {
            "versions": dict(self.versions),
            "devices": dict(self.devices),
            "device": self.device,
            "precision": self.precision,
            "kernels": kernels,
            "warning": self.warning,
        }

    def __str__(self) -> str:
        """For people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name, installed in self.versions.items():
            yield f"{name:14} {installed or 'not installed'}"
        for name, description in self.devices.items():
            yield f"{name:14} {description}"
        if self.warning is not None:
            yield f"warning: {self.warning}"
        width = max(map(len, self.kernels))
        yield f"\nkernels on {self.device} in {self.precision}"
        for op, states in self.kernels.items():
            chosen = ", else ".join(f"{name} {state.reason}".rstrip() for name, state in states.items() if state.is_chosen)
            others = "; ".join(f"{name}: {state.reason}" for name, state in states.items() if not state.is_chosen)
            yield f"  {op:{width}}  {chosen}{others and f'  ({others})'}"


def diagnose(device: DeviceChoice = "auto", precision: PrecisionChoice = "auto") -> Diagnosis:
    """Of this process. device, precision: those whose kernels are shown. Raises ArgumentError if there is no such device."""
    usable = usable_device(device)
    computed, device_type = usable_precision(precision, usable), torch.device(usable).type
    return Diagnosis(
        versions={"dstrain": __version__, "python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        devices=dict(_devices()),
        device=usable,
        precision=computed,
        kernels=kernel_states(device_type, COMPUTE_DTYPES[computed]),
        warning=unused_gpus(torch.device("cpu"), "auto") if usable == "cpu" and device == "auto" else None,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    limit = os.environ.get("OMP_NUM_THREADS")
    source = "OMP_NUM_THREADS is not set" if limit is None else f"OMP_NUM_THREADS={limit}"
    vectors = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{vectors}, cores for this process: {num_cores()}, threads: {torch.get_num_threads()} ({source})"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    if torch.version.cuda is None:
        yield "cuda", "none: this torch is built without it"

"""The one door to DeepSpeed: imported on first use, quiet, and never compiling anything on the CPU.

On the CPU DeepSpeed would build a C++ shared-memory collective inside `init_distributed`; marking the op as incompatible
beforehand leaves the collectives to gloo. The import costs about three seconds, which only training pays.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from shutil import which
from types import ModuleType

from dstrain.errors import TrainingError
from dstrain.log import logger
from dstrain.parallel.mesh import Mesh

_COMPILERS: Mapping[str, tuple[str, tuple[str, ...]]] = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang"))}
"""Of a kind of device: the variable that names the compiler of what is written at run time, and those that are looked for."""


def require_compiler(compiled: Mapping[str, str], device: str) -> None:
    """Raises TrainingError if there is none for this kind of device. compiled: each setting that needs one -> one without."""
    variable, names = _COMPILERS[device]
    needed = [os.environ[variable]] if variable in os.environ else names
    for setting, plain in compiled.items() if not any(map(which, needed)) else ():
        raise TrainingError(
            f"engine.{setting} needs a compiler, but {' or '.join(needed)} is not on the PATH; install it, set the "
            f"variable {variable} to another one, or choose engine.{plain}"
        )


def require_precision(deepspeed: ModuleType, precision: str, mesh: Mesh) -> None:
    """Raises TrainingError if the device cannot compute in `precision`."""
    accelerator = deepspeed.accelerator.get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[precision]:
        others = ", ".join(name for name, able in supported.items() if able)
        raise TrainingError(f"engine.precision = {precision} is not supported by this {mesh.device.type}; use {others}")


def import_deepspeed(device: str) -> ModuleType:
    """DeepSpeed for this kind of device. Raises TrainingError if it is missing or broken."""
    os.environ["DS_ACCELERATOR"] = device
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
    try:
        import deepspeed
        import deepspeed.ops
    except Exception as error:  # whatever its own modules, or a compiler that they look for, raise
        raise TrainingError(
            f"training needs DeepSpeed, which cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0]}; "
            "install one that fits this torch: pip install --force-reinstall deepspeed"
        ) from error
    _import_muon(deepspeed)
    module: ModuleType = deepspeed
    return module


def _import_muon(deepspeed: ModuleType) -> None:
    """Import the optimizer that no engine here uses, but every engine imports, without torch's compiler.

    Its functions are marked for `torch.compile`, which costs 2 CPU-seconds when the marks are read, a third of a start.
    """
    compiler = deepspeed.runtime.compiler
    marks = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:
        return  # a DeepSpeed without it
    finally:
        compiler.compile = marks


def load_deepspeed(mesh: Mesh, *, talkative: bool = False) -> ModuleType:
    """DeepSpeed, joined to the process group of `mesh.world`. talkative: let it print its profilers' measurements.

    Its messages go where dstrain's go, from WARNING up, under --debug from INFO up.
    """
    deepspeed = import_deepspeed(mesh.device.type)
    messages = logging.getLogger("DeepSpeed")
    messages.setLevel(logging.INFO if talkative or logger.isEnabledFor(logging.DEBUG) else logging.WARNING)
    if logger.handlers:  # its own one writes to standard output, into progress bars
        messages.handlers[:] = logger.handlers
    if mesh.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Its launcher sets this too. Without it ZeRO-3 starts the program numactl at every bucket of gradients, to count devices.
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # an earlier engine's, which this one would take for its own
    deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def accept_optimizer(deepspeed: ModuleType, optimizer: object) -> None:
    """Let DeepSpeed know a class as one that its ZeRO takes, as it does that of torch's Adam: it warns of others."""
    known = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
    if type(optimizer) not in known:
        known.append(type(optimizer))


@contextmanager
def partitioning_optimizer(deepspeed: ModuleType) -> Iterator[None]:
    """Inside, DeepSpeed takes its partitioning optimizer for every engine of stage 1.

    For bf16 with gradients in fp32 it would take another one, which updates weights by gradients that are not finite. The
    partitioning one adds up in fp32 as well.
    """
    engine = deepspeed.DeepSpeedEngine
    own = engine._do_optimizer_sanity_check
    engine._do_optimizer_sanity_check = lambda _engine, _optimizer: deepspeed.runtime.zero.config.ZERO_OPTIMIZATION
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = own

"""A GPU that is not there: tensors that say they are on one, computed on the CPU; a list of what a real one would be waited for.

A `DeviceTensor` holds a tensor of the CPU and says `cuda`. So the code under test takes its decisions as on a GPU (copies, masks,
kernels), and every operation arrives at `PretendedGpu`, which runs it and notes those that the CPU has to wait for: values that
are read, results whose shape depends on values, and copies that do not start in pinned memory.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("cuda", 77)
"""No GPU has the number: what the code keeps for each device must not be found by tests of a real one."""

_SHAPED_BY_VALUES = {"nonzero", "masked_select", "bincount", "unique_dim", "_unique", "_unique2", "unique_consecutive"}
_READS = {"_local_scalar_dense", "equal", "is_nonzero"} | _SHAPED_BY_VALUES
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_TO_THE_CPU = {"tolist", "cpu", "numpy", "__array__"}


class DeviceTensor(Tensor):
    """`inner`, on a GPU that is not there. To torch itself it is on the CPU, so that autograd needs no other device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        about: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: Self = Tensor._make_wrapper_subclass(cls, inner.size(), **about, device="cpu")  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch would not do for a tensor that it takes to be on the CPU already."""
        name, options = getattr(func, "__name__", ""), kwargs or {}
        to_cpu = name == "to" and any(str(each) == "cpu" for each in (*args[1:], *options.values()))
        if name not in _TO_THE_CPU and not to_cpu:
            return super().__torch_function__(func, types, args, options)
        PretendedGpu.current().wait(name)
        inner = args[0].detach().inner
        return inner if name == "cpu" else getattr(inner, name)(*args[1:], **options)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a pretended GPU runs outside of it")


class PretendedGpu(TorchDispatchMode):
    """Inside, device `cuda` exists. waits: what the CPU had to wait for, each with the line of dstrain that asked.

    copied: bytes of each copy to the GPU.
    """

    _active: ClassVar[list[PretendedGpu]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copied: list[int] = []
        self._no_driver = mock.patch("torch.cuda._lazy_init")

    @classmethod
    def current(cls) -> PretendedGpu:
        return cls._active[-1]

    def __enter__(self) -> Self:
        self._no_driver.start()
        self._lifts: bool = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # the copy of `torch.tensor(..., device="cuda")` is then an operation
        self._active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._active.remove(self)
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        self._no_driver.stop()

    def wait(self, what: str) -> None:
        """The CPU waits here."""
        stack = traceback.extract_stack()
        lines = [frame for frame in stack if "/dstrain/" in frame.filename and "/tests/" not in frame.filename]
        where = f"{lines[-1].filename.split('/dstrain/')[-1]}:{lines[-1].lineno}: {lines[-1].line}" if lines else "the test"
        self.waits.append(f"{what} in {where}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, name = dict(kwargs or {}), func.name().removeprefix("aten::").split(".")[0]
        tensors = list(_tensors((args, tuple(options.values()))))
        is_there = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        asked = options.get("device")
        # A gradient formula of torch makes its own tensors where it takes the others to be.
        goes_there = is_there if asked is None else asked.type == "cuda" or torch._C._current_autograd_node() is not None
        if asked is not None:
            options["device"] = torch.device("cpu")
        in_pinned_memory = options.pop("pin_memory", False)
        if name in {"is_pinned", "_pin_memory"}:
            return _pinned(name, args[0])
        if name in {"_to_copy", "copy_"}:
            self._note_copy(args, options, from_args=name == "_to_copy", goes_there=goes_there)
        elif is_there:
            self._note(name, args, options, tensors)
        result = func(*_mapped(args, _inner), **{key: _mapped(value, _inner) for key, value in options.items()})
        if in_pinned_memory:
            result.is_pinned_here = True
        if not goes_there or name in _READS - _SHAPED_BY_VALUES:
            return result
        wrapped = _mapped(result, DeviceTensor)
        return return_and_correct_aliasing(func, args, options, wrapped) if is_there else wrapped

    def _note_copy(self, args: Sequence[Any], options: Mapping[str, Any], *, from_args: bool, goes_there: bool) -> None:
        source, sink_is_there = (args[0], goes_there) if from_args else (args[1], isinstance(args[0], DeviceTensor))
        is_free = sink_is_there and getattr(source, "is_pinned_here", False) and options.get("non_blocking", False)
        if sink_is_there and not isinstance(source, DeviceTensor):
            self.copied.append(source.nbytes)
        if isinstance(source, DeviceTensor) != sink_is_there and not is_free and source.numel() > 0:
            self.wait(f"a copy to the {'GPU' if sink_is_there else 'CPU'}")

    def _note(self, name: str, args: Sequence[Any], options: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        indices = [each for each in args[1] if each is not None] if name in _INDEXED else []
        is_shaped = name == "repeat_interleave" and options.get("output_size") is None
        if is_shaped or name in _READS or any(each.dtype == torch.bool or not isinstance(each, DeviceTensor) for each in indices):
            self.wait(name)
        elif any(tensor.ndim > 0 and not isinstance(tensor, DeviceTensor) for tensor in tensors):
            raise AssertionError(f"{name} gets tensors of two devices")


def _pinned(name: str, tensor: Tensor) -> Any:
    if name == "is_pinned":
        return getattr(tensor, "is_pinned_here", False)
    copy = tensor.clone()
    copy.is_pinned_here = True  # type: ignore[attr-defined]
    return copy


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(part, change) for part in value) if type(value) in (tuple, list) else value


def _inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


def to_gpu(module: nn.Module) -> None:
    """Put the parameters of a module on the pretended GPU; ties stay ties."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = nn.Parameter(DeviceTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved.setdefault(parameter, there)

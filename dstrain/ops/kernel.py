"""How a kernel of an op is chosen: by device, dtype, problem size and installed packages, or by its name.

The table itself is `kernels.py`. Nothing is measured at start, so a resumed run chooses as before and repeats the losses bit for
bit. Of the machine only its packages, its C++ compiler and the maker of its processor are asked for: another machine may choose
otherwise, within rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from dstrain.ops.cpu import native

Function = TypeVar("Function", bound=Callable[..., Any])


class Deferred:
    """A function of a module that is imported at its first call: one that needs a package, or that itself asks the table."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._function(*args, **kwargs)

    @cached_property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(self.module), self.name)
        return function


@dataclass(frozen=True)
class Kernel(Generic[Function]):
    """One implementation, and its conditions.

    device_type, dtypes: those it is for, None for all. max_size: the largest problem it is for, in the op's unit, None for all.
    package: that must be installed. on_request: only a recipe that names it gets it, as nothing shows yet that it is faster.
    compiled: at run time, by a compiler of the machine. native: one of `cpu/cpp/`.
    """

    name: str
    function: Function
    device_type: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    max_size: int | None = None
    package: str | None = None
    on_request: bool = False
    compiled: bool = False
    native: bool = False

    def problem(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run there; None if it can."""
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        # Triton's interpreter runs its kernels on a CPU, element by element in Python: for tests.
        interpreted = self.package in {"triton", "liger_kernel"} and os.environ.get("TRITON_INTERPRET") == "1"
        if self.device_type not in {None, device_type} and not interpreted:
            return f"for {self.device_type} only"
        if not self.is_for(dtype):
            return f"for {' and '.join(str(each).removeprefix('torch.') for each in self.dtypes or ())} only"
        return native.problem() if self.native else None

    def is_for(self, dtype: torch.dtype) -> bool:
        """Whether it computes in this dtype."""
        return self.dtypes is None or dtype in self.dtypes


Chosen = tuple[Kernel[Function], ...]
"""Kernels in the order of choice, the last one for problems of all sizes."""


class KernelState(NamedTuple):
    """Of a kernel on some device in some dtype. reason: up to which size it runs, or why it does not; empty if there is none."""

    is_chosen: bool
    reason: str

    def __str__(self) -> str:
        return " ".join(filter(None, ["chosen" if self.is_chosen else "", self.reason]))


class Op(Generic[Function]):
    """The kernels of one op; the first that fits is chosen, the last fits everywhere.

    unit: of the problem's size. dtype: of its inputs, None for that of the model's computation.
    """

    def __init__(
        self, name: str, kernels: Sequence[Kernel[Function]], *, unit: str = "", dtype: torch.dtype | None = None
    ) -> None:
        self.name = name
        self.kernels = tuple(kernels)
        self.unit = unit
        self.dtype = dtype
        self._kernels_in_use: dict[tuple[str | None, str, torch.dtype], tuple[Chosen[Function], Chosen[Function]]] = {}
        self._forced: str | None = None

    def choose(self, device: torch.device, dtype: torch.dtype, size: int = 0) -> Function:
        """The kernel for a problem of this size. A graph that is being compiled cannot hold a native one."""
        in_use = self._in_use(self._forced, device.type, dtype)[torch.compiler.is_compiling()]
        return next(kernel.function for kernel in in_use if kernel.max_size is None or size <= kernel.max_size)

    @contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """Take the kernel of this name, whatever the size, for all dtypes that it is for."""
        before, self._forced = self._forced, name
        try:
            yield
        finally:
            self._forced = before

    def problem(self, name: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Why the kernel of this name cannot run there; None if it can. dtype: of the model's computation."""
        problems = [kernel.problem(device_type, self.dtype or dtype) for kernel in self.kernels if kernel.name == name]
        return None if None in problems else problems[0]

    def states(self, device_type: str, dtype: torch.dtype) -> dict[str, KernelState]:
        """What each kernel, by its name, does there, in the order of choice. dtype: of the model's computation."""
        in_use = {kernel.name: kernel for kernel in self._in_use(self._forced, device_type, self.dtype or dtype)[0]}
        states: dict[str, KernelState] = {}
        for kernel in self.kernels:
            if kernel.name in in_use:
                max_size = in_use[kernel.name].max_size
                states[kernel.name] = KernelState(True, "" if max_size is None else f"up to {max_size:,} {self.unit}")
            else:
                unused = "on request" if kernel.on_request else "further down the table"
                states[kernel.name] = KernelState(False, self.problem(kernel.name, device_type, dtype) or unused)
        return states

    def _in_use(self, forced: str | None, device_type: str, dtype: torch.dtype) -> tuple[Chosen[Function], Chosen[Function]]:
        """Outside and inside of a compiled graph. Looked up once: a graph reads what is there, and no `functools.cache`."""
        key = (forced, device_type, dtype)
        if key not in self._kernels_in_use:
            if torch.compiler.is_compiling():  # cannot ask for a C++ compiler
                return (), self._find_in_use(*key, True)
            self._kernels_in_use[key] = (self._find_in_use(*key, False), self._find_in_use(*key, True))
        return self._kernels_in_use[key]

    def _find_in_use(self, forced: str | None, device_type: str, dtype: torch.dtype, compiling: bool) -> Chosen[Function]:
        """Up to the first one that is for problems of all sizes."""
        kernels = [kernel for kernel in self.kernels if not (compiling and kernel.native)]
        for kernel in kernels:
            if kernel.name == forced and kernel.is_for(dtype):
                return (replace(kernel, max_size=None),)
        fitting = [kernel for kernel in kernels if not kernel.on_request and kernel.problem(device_type, dtype) is None]
        *limited, last = fitting[: 1 + next(index for index, kernel in enumerate(fitting) if kernel.max_size is None)]
        while limited and limited[-1].function is last.function:  # a compiled graph would ask for the size all the same
            limited.pop()
        return (*limited, last)

"""How often the CPU reads what a step computes: with a GPU it would wait as often."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dstrain.parallel.mesh import Mesh
from tests.parallel.setting import build_engine, build_module, share

_READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select"}


class ReadsOfResults(TorchDispatchMode):
    """Notes reads of the weights and of all that is computed from them. Other tensors are on the CPU with a GPU too."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._results = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = list(_tensors((args, tuple((kwargs or {}).values()))))
        name = func.name().removeprefix("aten::").split(".")[0]
        # A new tensor of numbers arrives as `lift_fresh`; its memory may be that of an older one.
        is_result = name != "lift_fresh" and any(tensor.untyped_storage()._cdata in self._results for tensor in inputs)
        if is_result and name in _READS:
            self._note(name)
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            change = self._results.add if is_result else self._results.discard
            change(tensor.untyped_storage()._cdata)
        return output

    def read_list(self, tensor: Tensor) -> list[Any]:
        """Instead of `Tensor.tolist`, which is no operation on a CPU."""
        if tensor.untyped_storage()._cdata in self._results:
            self._note("tolist")
        return tensor.numpy().tolist()

    def _note(self, name: str) -> None:
        lines = [frame for frame in traceback.extract_stack() if "/dstrain/" in frame.filename or "/deepspeed/" in frame.filename]
        self.reads.append(f"{name} in {lines[-1].filename}:{lines[-1].lineno}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


@contextmanager
def reads_of_results(weights: list[Tensor]) -> Iterator[list[str]]:
    """The reads inside, each with the line that reads."""
    with ReadsOfResults(weights) as mode, mock.patch.object(Tensor, "tolist", lambda tensor: mode.read_list(tensor)):  # noqa: PLW0108
        yield mode.reads


def readings(mesh: Mesh, *, deepspeed: str) -> dict[str, list[str]]:
    """The reads of a second step, by the optimizer, with and without clipping."""
    found = {}
    for kind, clip_norm in (("adamw", 0.7), ("stable_adamw", 0.0)):
        options = {"optimizer": {"kind": kind, "weight_decay": 0.1}, "clip_norm": clip_norm, "ema": {"decay": 0.7}}
        engine = build_engine(mesh, build_module(dropout=0.3), deepspeed=deepspeed, **options)
        engine.train_step(*share(0, mesh, 4))
        with reads_of_results(list(engine.module.parameters())) as reads:
            engine.train_step(*share(1, mesh, 4))
        found[kind] = list(reads)
    return found

"""A group of ranks and its collectives without gradient; those with gradient are in `collectives.py`.

With one rank each method is the identity and never communicates. Tensors travel over gloo on the CPU and NCCL on GPUs; numbers
and objects always over gloo, so that nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.errors import TrainingError

_T = TypeVar("_T")

TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait. Long, because other ranks wait while one of them writes a checkpoint."""

WORK_TIMEOUT = timedelta(days=365)
"""How long a rank that has finished its share of independent work waits for the others."""


@dataclass(frozen=True)
class Group:
    """This process is `rank` of `size` ranks, and computes on `device`.

    Every method is collective: all ranks of the group call it, in the same order. process_group: torch's; None only for size 1.
    host_group: the same ranks over gloo; None if process_group is that.
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: object) -> Group:
        """The same group: a copy of a module stays on its ranks."""
        return self

    @classmethod
    def single(cls, device: torch.device) -> Group:
        """The group of this process only."""
        return cls(0, 1, None, device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the ranks, in place, without waiting for a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum the tensor over the ranks, in place; it is the sum once the returned function has returned."""
        if self.size == 1:
            return lambda: None
        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)
        wait: Callable[[], object] = work.wait
        return wait

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Part r goes to rank r; the parts that come from all ranks, in their order. (size, ...) -> (size, ...)"""
        if self.size == 1:
            return parts
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=self.process_group)
        return received

    def max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over the ranks, in place, without waiting for a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def all_reduce_sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks in float64; the same list on every rank."""
        if self.size == 1:
            return [float(value) for value in values]
        sums = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(sums, group=self._host)
        numbers: list[float] = sums.tolist()
        return numbers

    def all_true(self, value: bool) -> bool:
        """Whether it holds on every rank."""
        return self.all_reduce_sums([float(not value)]) == [0.0]

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        self.all_reduce_sums([0.0])

    def broadcast_object(self, value: _T, source: int = 0) -> _T:
        """The value of rank `source` of the group, on every rank. Pickled: only between ranks of one run."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=source, group=self._host, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value: _T) -> list[_T]:
        """Every rank's value in the order of ranks, on every rank. Pickled: only between ranks of one run."""
        if self.size == 1:
            return [value]
        gathered = [value] * self.size
        dist.all_gather_object(gathered, value, group=self._host)
        return gathered

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in the order of ranks, on every rank, without waiting for a GPU.

        (n, ...) -> (N, ...); n may differ between ranks.
        """
        if self.size == 1:
            return rows
        lengths = self.gather_objects(len(rows))
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(gathered, padded, group=self.process_group)
        return torch.cat([share[:length] for share, length in zip(gathered, lengths, strict=True)])

    def wait_for_work(self) -> None:
        """Wait, for as long as it takes, until every rank has done its share.

        Raises TrainingError, on every rank, if one ended before.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(group=self._host, timeout=WORK_TIMEOUT)
        except RuntimeError as error:
            raise TrainingError(
                "another rank has ended before its share was done, see its message; what is finished stays: run the same command "
                "again to go on"
            ) from error

    @property
    def _host(self) -> dist.ProcessGroup | None:
        return self.host_group or self.process_group

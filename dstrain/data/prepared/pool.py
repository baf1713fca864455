"""Ordered work in other processes with bounded memory.

Each worker process has a pipe and a thread here that feeds it, so a worker never waits for its turn; at most two tasks a worker
are in the air, and results come in the order of the tasks. Workers are spawned, not forked: they share no threads or locks with
this process. They end when the pipe closes, so none outlives this process, and only this process hears Ctrl-C.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from dstrain.errors import DataError, DstrainError

FAREWELL_SECONDS = 2
"""For an idle worker to end by itself, or libraries that it has loaded leave semaphores behind."""
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class WorkerPool(Generic[_Task, _Result]):
    """Processes that each call `make_work()` once and then apply the returned function to tasks.

    make_work: picklable by reference, e.g. a partial of a module's function.
    """

    def __init__(self, make_work: Callable[[], Callable[[_Task], _Result]], workers: int) -> None:
        self._executor = ThreadPoolExecutor(workers)
        self._workers = workers
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        resource_tracker.ensure_running()  # started by the first worker, it would unblock SIGINT again before that one starts
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._processes = [_Worker(make_work) for _ in range(workers)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        for worker in self._processes:
            self._idle.put(worker)

    def map(self, tasks: Iterable[_Task]) -> Iterator[_Result]:
        """Results in the order of `tasks`. A DstrainError raised by a worker is raised here."""
        pending: deque[Future[_Result]] = deque()
        for task in tasks:
            pending.append(self._executor.submit(self._call, task))
            if len(pending) >= 2 * self._workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _call(self, task: _Task) -> _Result:
        worker = self._idle.get()
        try:
            result: _Result = worker.call(task)
            return result
        finally:
            self._idle.put(worker)

    def __enter__(self) -> WorkerPool[_Task, _Result]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in self._processes:
            worker.pipe.close()
        for worker in self._processes:
            if kind is None:
                worker.process.join(FAREWELL_SECONDS)
            worker.process.terminate()
        self._executor.shutdown()
        for worker in self._processes:
            worker.process.join()


class _Worker:
    def __init__(self, make_work: Callable[[], Callable[[Any], Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make_work), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, task: Any) -> Any:
        try:
            self.pipe.send(task)
            result, refusal, defect = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(1)
            raise DataError(
                f"a worker process ended with exit code {self.process.exitcode} (out of memory?); finished files are kept: run "
                "the same command again to go on, with fewer --workers if memory is short"
            ) from error
        if refusal is not None:
            raise refusal
        if defect is not None:
            raise RuntimeError(f"a worker process failed:\n{defect}")
        return result


def _serve(pipe: Connection, make_work: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer every task with (result, None, None), (None, a DstrainError, None) or (None, None, traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work: Callable[[Any], Any] | None = None
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            work = work or make_work()
            answer: tuple[Any, DstrainError | None, str | None] = (work(task), None, None)
        except DstrainError as error:
            answer = (None, error, None)
        except Exception:
            answer = (None, None, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return

"""Processes that start fast: forks of a server that has imported torch, DeepSpeed and dstrain, and has run nothing.

A new interpreter imports for two seconds, which is longer than most tests work. A fork has an environment, a working directory
and streams of its own. What is about starting (launchers, imports, an installed wheel) is tested with new interpreters.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Fork:
    """A process that calls a function, with the part of `subprocess.Popen` that tests need. stdin, stdout, stderr: files."""

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: Any,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        stdin: Path = Path(os.devnull),
        cwd: Path | None = None,
    ) -> None:
        for file in (stdout, stderr):
            file.write_bytes(b"")
        streams = (stdin, stdout, stderr)
        self._process = CONTEXT.Process(target=_run, args=(function, arguments, dict(env), streams, cwd or Path.cwd()))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, minus the signal's number after a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run_verb(words: Sequence[str]) -> None:
    """What `python -m dstrain WORDS` does."""
    from dstrain.__main__ import script

    sys.argv = ["dstrain", *words]
    script()


def _run(
    function: Callable[..., object], arguments: Sequence[Any], env: Mapping[str, str], streams: Sequence[Path], cwd: Path
) -> None:
    """The beginning of a fork: it takes environment, working directory and streams as a new interpreter would."""
    os.environ.clear()
    os.environ.update(env)
    append = os.O_WRONLY | os.O_APPEND
    for number, (file, mode) in enumerate(zip(streams, (os.O_RDONLY, append, append), strict=True)):
        opened = os.open(file, mode)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    function(*arguments)

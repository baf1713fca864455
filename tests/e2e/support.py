"""Runs the command line in processes of its own, with a small recipe and small data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.paths import ROOT
from tests.ports import free_port
from tests.processes import Fork, run_verb

RECIPE = "translation/quickstart"
SMALL_DATA = (
    "data.train.0.num_pairs=240",
    "data.valid.0.num_pairs=20",
    "data.test.test.0.num_pairs=20",
    "data.tokenizer.vocab_size=150",
)
SMALL_TRAINING = (
    "model.model_dim=32",
    "model.encoder={depth: 1, num_heads: 2, ffn_dim: 32}",
    "model.decoder={depth: 1, num_heads: 2, ffn_dim: 32}",
    "batching={tokens_per_step: 700, max_tokens: 400}",
    "schedule.warmup_steps=10",
    "validation={unit: epochs, every: 1, metric: loss, generation: null}",
    "checkpoint={unit: steps, every: 3, keep_checkpoints: 2, keep_bundles: 3}",
    "reporting.log_every=1",
    "training={seed: 1, max_steps: 14}",
)


def settings(*overrides: str) -> list[str]:
    """`--set` for each override."""
    return [word for override in overrides for word in ("--set", override)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread, no launcher's variables left over from outside."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher and not name.startswith("SLURM_")}
    path = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": str(ROOT), **(extra or {})}


def dstrain(
    *arguments: str | Path,
    stdin: str = "",
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """One verb in one process. variables: of its environment."""
    words = [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory, name) for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(stdin)
        process = Fork(run_verb, words, env=environment(variables), cwd=cwd, **files)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(["dstrain", *words], code, files["stdout"].read_text(), files["stderr"].read_text())


def succeeds(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The result, which must be a success."""
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result


def fails(result: subprocess.CompletedProcess[str], *fragments: str, code: int = 1) -> str:
    """The message of a user's mistake: non-zero exit, no stack trace, every fragment in it."""
    assert result.returncode == code, f"exit {result.returncode}: {result.args}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr, f"{fragment!r} is not in {result.stderr!r}"
    return result.stderr


class Ranks:
    """A training started as bare ranks, so that a test can kill them at any moment. last: words that only the last one gets."""

    def __init__(self, arguments: Sequence[str | Path], num_ranks: int, log: Path, *, last: Sequence[str] = ()) -> None:
        port = str(free_port())
        self.log = log
        self.processes = []
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            out = log.parent / f"{log.name}.{rank}"
            words = [*map(str, arguments), *(last if rank == num_ranks - 1 else ())]
            self.processes.append(Fork(run_verb, words, env=environment(place), stdout=out, stderr=out))

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit codes of all ranks."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Poll finely until it holds; a training that has ended fails the test, and none outlives a failure."""
        deadline = time.monotonic() + timeout
        try:
            while not condition():
                assert time.monotonic() < deadline, f"waited in vain\n{self.output()}"
                assert any(process.poll() is None for process in self.processes), f"ended early\n{self.output()}"
                time.sleep(0.002)
        except BaseException:
            self.kill()
            raise

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank that still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.wait()

    def output(self) -> str:
        """What all ranks printed."""
        return "".join(path.read_text() for path in sorted(self.log.parent.glob(f"{self.log.name}.*")))


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run, complete lines only."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [event for line in lines if line.endswith("\n") for event in [json.loads(line)] if event["kind"] == kind]


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, gradient norm, learning rate) of every step: what two runs must have in common, bit for bit."""
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in events(run, "train")]

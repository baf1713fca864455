"""Start the ranks of a scenario as plain processes and bring their results back as data."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.parallel.worker import work
from tests.paths import ROOT
from tests.ports import free_port
from tests.processes import Fork


def run_ranks(
    scenario: str, world_size: int, directory: Path, *, timeout: float = 240, forked: bool = True, **arguments: Any
) -> list[Any]:
    """What `tests.parallel.scenarios.<scenario>` returns on each rank, in rank order; arguments and results are JSON.

    forked: False for new interpreters, in which malloc reads its environment.
    """
    directory.mkdir(parents=True, exist_ok=True)
    results = [directory / f"{scenario}_{world_size}_{rank}.json" for rank in range(world_size)]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(directory / "compiled")}
    if world_size > 1:
        shared |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes: list[Fork | subprocess.Popen[bytes]] = []
    for rank, result in enumerate(results):
        result.unlink(missing_ok=True)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        log = result.with_suffix(".log")
        words = (scenario, str(result), json.dumps(arguments))
        if forked:
            processes.append(Fork(work, *words, env=shared | place, stdout=log, stderr=log))
            continue
        command = [sys.executable, "-m", "tests.parallel.worker", *words]
        with log.open("w") as out:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=shared | place, stdout=out, stderr=out))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(result.with_suffix(".log").read_text()[-3000:] for result in results)
    assert codes == [0] * world_size, f"{scenario} on {world_size} ranks ended with {codes}:\n{logs}"
    return [json.loads(result.read_text()) for result in results]


def means(report: dict[str, Any]) -> dict[str, float]:
    """The metrics of a step's report by name."""
    return {name: value / report["metrics"]["counts"][name] for name, value in report["metrics"]["sums"].items()}

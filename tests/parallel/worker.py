"""One rank of a scenario."""

import json
from pathlib import Path

from dstrain.parallel.launch_environment import leave
from dstrain.parallel.mesh import build_mesh, finalize
from tests.parallel import scenarios


def work(scenario: str, result: Path, arguments: str) -> None:
    """Write what the scenario returns to `result`; arguments and result are JSON."""
    mesh = build_mesh("cpu")
    value = getattr(scenarios, scenario)(mesh, **json.loads(arguments))
    result.write_text(json.dumps(value))
    finalize()
    leave(0)

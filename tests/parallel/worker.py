"""One rank of a scenario."""

import json
import sys
from pathlib import Path

from dstrain.parallel.launch_environment import leave
from dstrain.parallel.mesh import build_mesh, finalize
from tests.parallel import scenarios


def work(scenario: str, result: str, arguments: str) -> None:
    """Write what the scenario returns to `result`; arguments and result are JSON."""
    mesh = build_mesh("cpu")
    value = getattr(scenarios, scenario)(mesh, **json.loads(arguments))
    Path(result).write_text(json.dumps(value))
    finalize()
    leave(0)


if __name__ == "__main__":
    work(*sys.argv[1:])

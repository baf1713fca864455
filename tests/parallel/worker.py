"""One rank of a scenario: python -m tests.parallel.worker SCENARIO RESULT ARGUMENTS"""

import json
import sys
from pathlib import Path

from dstrain.parallel.launch_environment import leave
from dstrain.parallel.mesh import build_mesh, finalize
from tests.parallel import scenarios


def main() -> None:
    name, result, arguments = sys.argv[1:]
    mesh = build_mesh("cpu")
    value = getattr(scenarios, name)(mesh, **json.loads(arguments))
    Path(result).write_text(json.dumps(value))
    finalize()
    leave(0)


if __name__ == "__main__":
    main()

"""One rank of a scenario: python -m tests.parallel.worker SCENARIO RESULT ARGUMENTS"""

import json
import sys
from pathlib import Path

from dstrain.parallel.topology import finalize, initialize, leave
from tests.parallel import scenarios


def main() -> None:
    name, result, arguments = sys.argv[1:]
    world = initialize("cpu")
    value = getattr(scenarios, name)(world, **json.loads(arguments))
    Path(result).write_text(json.dumps(value))
    finalize()
    leave(0)


if __name__ == "__main__":
    main()

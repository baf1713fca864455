"""`dstrain`, `python -m dstrain`, and what `deepspeed --module dstrain` starts."""

import sys
from typing import NoReturn

from dstrain.cli.main import main


def script() -> NoReturn:
    """Run a verb and end the process with its exit code, whatever threads DeepSpeed has left behind."""
    code = main()
    if "deepspeed" in sys.modules:  # then topology, which had joined the ranks before, is loaded too
        sys.modules["dstrain.parallel.topology"].leave(code)
    sys.exit(code)


if __name__ == "__main__":
    script()

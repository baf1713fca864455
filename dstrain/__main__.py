"""`dstrain`, `python -m dstrain`, and what `deepspeed --module dstrain` starts."""

import sys
from typing import NoReturn

from dstrain.cli.main import main
from dstrain.parallel.launch_environment import leave


def script() -> NoReturn:
    """Run a verb and end the process with its exit code, whatever threads DeepSpeed has left behind."""
    code = main()
    if "deepspeed" in sys.modules:
        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    script()

"""Workers never hear Ctrl-C, from their first moment on."""

import subprocess
import sys

FIRST_WORKERS = """
import signal
from dstrain.data.prepared import pool

blocked = []

class Worker(pool._Worker):
    def __init__(self, make_work):
        super().__init__(make_work)
        blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

pool._Worker = Worker
with pool.WorkerPool(int, 2):
    pass
print(blocked, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_sigint_is_blocked_while_the_first_workers_start_and_not_afterwards() -> None:
    """In a new process, where the first worker also starts Python's resource tracker, which changes the mask."""
    run = subprocess.run([sys.executable, "-c", FIRST_WORKERS], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split("\n")[0] == "[True, True] False"

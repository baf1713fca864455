"""Settings that every test shares: one thread, the CPU accelerator, no compile, no network."""

import logging
import os
import random
import signal
import sys
import zlib
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: child processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same inputs at every run and in any order: a tolerance that one seed in a thousand passes fails always or never.

    A hook, since fixtures of a module draw before any fixture of a function.
    """
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:  # importing it costs those tests seconds that do without
        torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def same_logger_for_every_test() -> Iterator[None]:
    """The command line points dstrain's logger at stderr, in fixtures of a whole module too; every test begins without that."""
    _untouched_logger()
    yield
    _untouched_logger()


def _untouched_logger() -> None:
    logger = logging.getLogger("dstrain")
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)

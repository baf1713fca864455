"""What is asked of malloc: freed memory is used again without page faults; elsewhere than on glibc nothing happens."""

import platform
import subprocess
import sys

import pytest

from dstrain.ops import allocator

FAULTS = """
import resource, sys, torch
from dstrain.ops.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(16 * 1024 * 1024)  # 64 MiB, touched and freed
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(12 * 1024 * 1024)  # 48 MiB: 12,288 pages of 4 KiB, unless they are there already
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of_the_second_tensor(mode: str) -> int:
    run = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_freed_tensor_is_reused_without_page_faults() -> None:
    kept, default = faults_of_the_second_tensor("keep"), faults_of_the_second_tensor("default")
    assert kept < 100
    assert default > 10 * kept


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("loaded the C library"))
    assert not allocator.keep_freed_memory()

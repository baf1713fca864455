"""What is asked of malloc: memory that is freed returns to the system, or stays; elsewhere than on glibc nothing happens."""

import platform
import subprocess
import sys

import pytest

from dstrain.ops import allocator

MEASURE = """
import ctypes
from dstrain.ops import allocator

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 2**20
for policy in (allocator.return_freed_memory, allocator.balance_freed_memory, allocator.keep_freed_memory):
    assert policy()
    before = resident()
    blocks = [libc.malloc(size) for _ in range(32)]
    fence = libc.malloc(2**12)  # what lives on above freed memory keeps a heap from shrinking
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    print((resident() - before) // size)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_returns_or_stays() -> None:
    """32 MiB in blocks of one."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    returned, balanced, kept = map(int, done.stdout.split())
    assert returned <= 1
    assert balanced >= 31
    assert kept <= 1, "the heap had this memory already"


def test_another_c_library_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("loaded the C library"))
    assert not allocator.keep_freed_memory()
    assert not allocator.return_freed_memory()

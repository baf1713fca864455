"""What is asked of malloc: elsewhere than on glibc nothing happens, on glibc both thresholds are raised."""

import platform

import pytest

from dstrain.ops import allocator


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_settings() -> None:
    assert allocator.keep_freed_memory()


def test_another_c_library_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("loaded the C library"))
    assert not allocator.keep_freed_memory()

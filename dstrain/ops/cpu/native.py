"""Kernels in C++ (`cpp/`), compiled on the machine that runs them, for its own instructions.

A compilation takes some seconds. Its result is kept in a folder of the user (`$XDG_CACHE_HOME`, or ~/.cache), under a name that
counts the sources, the compiler and the processor, so it is made once for each. Without a C++ compiler the table chooses the
kernels of torch instead, and says why. Functions are called through ctypes, which frees Python's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import which
from typing import Any

SOURCES = Path(__file__).parent / "cpp"
# Without -ffast-math, under which a compiler takes it that nothing is infinite or not a number.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_TIMEOUT = 300


@cache
def problem() -> str | None:
    """Why there are no such kernels on this machine; None if there are, and then they are compiled."""
    if sys.platform != "linux":
        return "for Linux only"
    if (compiler := _compiler()) is None:
        return "no C++ compiler: neither CXX nor g++ on the PATH"
    try:
        _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        output = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
        return f"{compiler} cannot compile it: {lines[0].strip() if lines else error}"
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled functions. Only if there is no `problem`."""
    compiler = _compiler()
    assert compiler is not None
    return _load(compiler)


def function(name: str, *argtypes: Any) -> Callable[..., None]:
    """One of them that returns nothing. argtypes: of ctypes."""
    result = library()[name]
    result.argtypes, result.restype = argtypes, None
    return result


@cache
def is_amd() -> bool:
    """Whether this is a processor of AMD."""
    return any(line.startswith("vendor_id") and line.endswith("AuthenticAMD") for line in _processor())


def _processor() -> list[str]:
    """What Linux says of the first one."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").partition("\n\n")[0].splitlines() if path.is_file() else []


def _compiler() -> str | None:
    """The program of CXX, which may have arguments behind it, or else g++."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return which(words[0]) and shlex.join([str(which(words[0])), *words[1:]])


@cache
def _load(compiler: str) -> ctypes.CDLL:
    """From the user's folder; from one that is gone at once if that cannot be written, or holds nothing that runs."""
    sources = sorted(SOURCES.iterdir())
    name = f"{_fingerprint(sources, compiler)}.so"
    try:
        return _loaded(compiler, sources, _user_folder() / name)
    except (OSError, RuntimeError):
        with tempfile.TemporaryDirectory(prefix="dstrain-") as folder:
            return _loaded(compiler, sources, Path(folder) / name)


def _loaded(compiler: str, sources: list[Path], kept: Path) -> ctypes.CDLL:
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not kept.is_file():
        _compile(compiler, sources, kept)
    return ctypes.CDLL(str(kept))


def _compile(compiler: str, sources: list[Path], kept: Path) -> None:
    """Another process may do so at the same time: whole files replace one another."""
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="compiling-") as folder:
        made = Path(folder) / kept.name
        subprocess.run(
            [*shlex.split(compiler), *FLAGS, *(str(each) for each in sources if each.suffix == ".cpp"), "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
        made.replace(kept)


def _user_folder() -> Path:
    """Raises RuntimeError if the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "dstrain" / "native"


def _fingerprint(sources: list[Path], compiler: str) -> str:
    """Of what the result depends on."""
    parts = [source.read_bytes() for source in sources]
    status = Path(shlex.split(compiler)[0]).resolve().stat()
    parts += [f"{FLAGS} {compiler} {status.st_size} {status.st_mtime_ns} {platform.machine()} {platform.libc_ver()}".encode()]
    parts += [line.encode() for line in _processor() if line.startswith(("model name", "flags", "Features"))]
    return sha256(b"\0".join(parts)).hexdigest()[:32]

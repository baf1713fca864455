"""How the C library keeps the memory that CPU tensors give back.

torch takes CPU tensors from malloc. glibc maps blocks over a threshold on their own and returns them at once; others lie in its
heap, where freed memory between blocks in use stays with the process. By default the threshold grows to 32 MiB while a program
runs. While a model is built, many large tensors live for a moment: then all should be returned. A training step makes and frees
the same tensors again and again, and each new page costs a fault and a clearing: then the pages should be kept.

A value that the user set through MALLOC_... or GLIBC_TUNABLES is overruled. Elsewhere (macOS, musl) nothing changes.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for the next tensors; the process then stays as large as it becomes. True on glibc."""
    return _set_thresholds(trim=_NEVER, mapping=_NEVER)


def return_freed_memory() -> bool:
    """Let malloc return freed memory to the system at once. True on glibc."""
    return _set_thresholds(trim=2**16, mapping=2**16)


def balance_freed_memory() -> bool:
    """Let malloc use the thresholds that its own grow to. True on glibc."""
    return _set_thresholds(trim=2**26, mapping=2**25)


def _set_thresholds(*, trim: int, mapping: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, trim) == 1 and mallopt(_M_MMAP_THRESHOLD, mapping) == 1)

"""How the C library keeps the memory that CPU tensors give back.

torch takes CPU tensors from malloc. glibc asks the kernel again for every block over a threshold (32 MiB at most), and gives
memory at the top of the heap back at once; each new page then costs a fault and a clearing. A training step makes and frees
the same tensors again and again, so for training it is better to keep the pages.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for the next tensors, for the rest of this process. True if that was possible (glibc).

    The process then stays as large as it has ever been. Elsewhere (macOS, musl) nothing changes. A value that the user set
    through MALLOC_... or GLIBC_TUNABLES is overruled.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, _NEVER) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))

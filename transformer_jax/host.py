"""The process a run lives in: its memory allocator."""

import ctypes
import platform

# glibc's malloc.h: parameter numbers of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed buffers instead of giving them back to the kernel.

    On CPU, XLA allocates its temporaries anew at each step; large ones come as fresh mappings whose
    pages must be faulted in one by one. With one arena, no mmap and no trimming the same pages
    serve every step. Call it where a CPU process starts, before the first computation.

    Returns:
        True where it took effect: Linux with glibc. Elsewhere nothing happens.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return [mallopt(name, value) for name, value in settings] == [1] * len(settings)

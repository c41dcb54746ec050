"""The memory that a training step frees, kept for the next one."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache

# Of mallopt in malloc.h, and their values in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 2**31 - 1, 2**28


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, up to 2 GiB, in place of giving it back to the system at once.

    Every step allocates the same activations. Given back, they are faulted in anew, page by page, which on a CPU is 2 to
    5 % of a step at d = 64 to 256. Without effect where the C library is another.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
            libc.mallopt(_TRIM_THRESHOLD, _KEPT)

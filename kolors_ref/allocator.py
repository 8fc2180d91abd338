"""What the C library does with the memory that tensors on a CPU give back."""

import ctypes
import os
import platform
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""The numbers of `mallopt`'s parameters (glibc's malloc.h)."""
KEPT = 2**29
"""The most bytes of freed memory that a process keeps."""
MAPPED = 2**25
"""The size in bytes from which a tensor gets a mapping of its own, unless enough is kept; glibc's maximum."""


@cache  # once a process
def keep_freed_memory() -> None:
    """Has glibc keep half a gigabyte of what is freed, for the next tensors.

    Without it each step of the UNet returns its memory and asks for it again, up to a million pages, each of which the
    system has to zero. Other C libraries are left alone, and so are a user's own settings in the environment.
    """
    chosen = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))
    if platform.libc_ver()[0] == "glibc" and not chosen:
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, KEPT)
        library.mallopt(MMAP_THRESHOLD, MAPPED)

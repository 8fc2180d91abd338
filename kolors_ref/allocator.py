"""What the C library does with the memory that tensors on a CPU give back."""

import ctypes
import os
import platform
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""What `mallopt` calls its parameters (malloc.h of glibc)."""
KEPT = 2**29
"""Bytes of freed memory that a process keeps at most."""
MAPPED = 2**25
"""Bytes from which on a tensor is mapped by itself, unless enough is kept; glibc does not allow more."""


@cache  # once a process
def keep_freed_memory() -> None:
    """Has glibc keep half a gigabyte of what is freed, for the next tensors.

    Without it a step of the UNet gives its memory back and takes it anew, up to a million pages, and the system has to
    fill each with zeros. Other C libraries are left alone, and so is a user's own choice in the environment.
    """
    chosen = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))
    if platform.libc_ver()[0] == "glibc" and not chosen:
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, KEPT)
        library.mallopt(MMAP_THRESHOLD, MAPPED)

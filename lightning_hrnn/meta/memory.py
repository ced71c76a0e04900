"""Keep freed memory at hand.

An unroll allocates and frees the same gigabyte at every window. The C library's allocator gives large blocks back to
the system each time and faults fresh pages in again, which costs as much as the arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_LARGEST = 32 * 2**20  # the largest threshold that glibc takes


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse memory rather than return it; elsewhere do nothing.

    Returns:
        Whether the allocator took the advice.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))

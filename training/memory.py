"""The allocator of the process: memory that a step gives back is the memory that the next one takes."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's numbers, from malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks instead of handing them to the kernel; whether it was done.

    By default every block above some hundred kilobytes goes back when it is freed, and the next step pays a page fault
    for each 4 KiB that it touches again. The process then stays as large as its largest step.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))

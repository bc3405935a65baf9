"""How glibc hands out memory while models are merged: freed pieces are used again, not given back and mapped anew.

By default glibc maps a large block anew each time, and the kernel fills each of its pages with zeros on first touch.
Merging allocates and frees blocks of the same few sizes all the time: those page faults then cost more than the
arithmetic. The settings are of the whole process, so that only a program's own start may change them: the command line
does, importing the library does not.
"""

from __future__ import annotations

import ctypes
import sys

# Numbers from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_LARGEST = 2**31 - 1
_AT_A_TIME = 16 * 2**20


def keep_freed_memory() -> bool:
    """Let the C library of this process keep what is freed, for the next block of that size.

    Returns:
        Whether it was told: on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    settings = {
        _MMAP_THRESHOLD: _LARGEST,
        _TRIM_THRESHOLD: _LARGEST,
        _TOP_PAD: _AT_A_TIME,
        _ARENA_MAX: 1,  # those of other threads are too small for such blocks, which would be mapped after all
    }
    return all(mallopt(number, value) == 1 for number, value in settings.items())

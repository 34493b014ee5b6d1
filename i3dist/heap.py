"""The memory that the C library keeps for this process. Only glibc's is known here."""

import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE = 1 << 22
_library = ctypes.CDLL(None)


def give_back() -> None:
    """Give what is free back to the system."""
    if trim := getattr(_library, "malloc_trim", None):
        trim(0)


def keep_no_large_blocks() -> None:
    """From now on give each block of 4 MiB or more back when it is freed.

    By default glibc no longer does so for blocks as large as one that was freed before, up to
    32 MiB, and whatever lies above such a block keeps it.
    """
    if mallopt := getattr(_library, "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _LARGE)

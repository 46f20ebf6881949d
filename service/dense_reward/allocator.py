"""glibc's allocator, kept from waste. Standard library alone: to be called before the process has a second thread."""

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # mallopt(3)


def keep_freed_memory() -> None:
    """Have large blocks reused. glibc gives them back to the system by default, and every batch pays for new pages.

    One arena for all threads, because only the main one can hold large blocks; a thread that has got another keeps
    it. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, setting in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1)):
        mallopt(parameter, setting)

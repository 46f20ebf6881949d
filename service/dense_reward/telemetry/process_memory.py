"""Memory's keepers, glibc's allocator and Python's garbage collector, kept from waste. Standard library alone."""

import ctypes
import gc

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # mallopt(3)


def keep_freed_memory() -> None:
    """Have large blocks reused. glibc gives them back to the system by default, and every batch pays for new pages.

    To be called before the process has a second thread: one arena for all of them, because only the main one can hold
    large blocks; a thread that has got another keeps it. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, setting in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1)):
        mallopt(parameter, setting)


def keep_what_was_loaded() -> None:
    """Have the collector pass over all that there is now, once what is garbage of it is gone.

    It would else look through millions of objects of libraries and models again and again, and nothing is answered
    meanwhile. To be called anew when something else was loaded: garbage among what it passes over stays.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()

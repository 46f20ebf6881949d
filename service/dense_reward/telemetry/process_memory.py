"""Tunes glibc malloc and Python's garbage collector for a long-running server. Imports only the standard library."""

import ctypes
import gc
import os
from collections.abc import Callable

KERNEL_CACHES, KEPT_KERNELS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), 128
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # mallopt(3)


def keep_freed_memory() -> None:
    """Reuse large blocks. By default glibc returns them to the system, so every batch causes page faults on new ones.

    Call it before the process has a second thread: all threads must share the main arena, because only that arena can
    hold large blocks, and a thread never changes its arena. Does nothing without glibc.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        for parameter, setting in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1)):
            mallopt(parameter, setting)


def release_freed_memory() -> None:
    """Give freed memory back to the system now, which `keep_freed_memory` prevents. Does nothing without glibc."""
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(ctypes.c_size_t(0))


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
    return function


def bound_kernel_caches() -> None:
    """Limit how many compiled matmuls torch and oneDNN keep, each in its own cache; call it before the first matmul.

    On CPUs each number of rows is compiled by itself, and batches rarely have the same number. By default up to a
    thousand are kept, of up to a few megabytes each, which can grow to two gigabytes. A batch needs some dozens.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KEPT_KERNELS))


def grow_gpu_segments() -> None:
    """Let torch's allocator on GPUs grow its blocks of memory, unless its variable is set; call it before torch starts.

    Every batch has another shape. Blocks of a fixed size would leave gaps between them that no later batch fits into.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def freeze_libraries() -> None:
    """Collect garbage, then exclude all that exists now from later collections. Call it before models are loaded.

    Otherwise each full collection traverses the half million objects of the libraries, and stops the whole process for
    that third of a second. Models and tokenizers must not be among the frozen objects: they are cyclic, so they could
    never be freed. They are a few ten thousand, which a collection traverses in milliseconds.
    """
    gc.collect()
    gc.freeze()


def collect_replaced() -> None:
    """Free the models that are no longer served, and what a failed load left: their memory is needed now."""
    gc.collect()

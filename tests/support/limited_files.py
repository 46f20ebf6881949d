"""A limit on the size of files, which stands for a full disk: a write beyond it fails in the same way."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


def set_limit(size: int) -> None:
    """No file of this process, and of those that it starts from now on, can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def unchanged_limit() -> Iterator[None]:
    """Restores the limit of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    try:
        yield
    finally:
        set_limit(before)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Within the block, no file can grow beyond so many bytes."""
    with unchanged_limit():
        set_limit(size)
        yield

"""Recognises a write that failed because the disk is full, from the error of each library that writes for a job."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dense_reward_trainer.errors import JobError

_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_WORDS = (
    # safetensors and tokenizers, as the operating system says it
    *("No space left on device", "Disk quota exceeded", "File too large"),
    # torch.save, which says neither the file nor the reason (torch 2.13)
    *("unexpected pos ", "PytorchStreamWriter failed writing"),
)


@contextmanager
def reports_full_disk(folder: Path) -> Iterator[None]:
    """Raises JobError, with the cure, if the block fails because the disk is full; else the block's own error.

    `folder`: the run's.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise JobError(
            f"{folder}: a file could not be written completely, because the disk is full, or a quota or limit is "
            f"reached ({_free(folder)}): make space and start the same command again. Finished checkpoints and "
            "results are kept, and the run continues from its last complete state"
        ) from error


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that a write found no space."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free(folder: Path) -> str:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:,.0f} MB are free"

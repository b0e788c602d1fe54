"""What is said where something cannot be written: the disk is full, or may not be written to.

Everything is written whole or not at all, so that what was there before stays; this says so.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What the operating system says where nothing can be written."""


class StorageError(OSError):
    """Something could not be written: the disk is full, or may not be written to."""


@contextmanager
def storing(target: Path) -> Iterator[None]:
    """Raise StorageError, in one line for people, where the body cannot write ``target``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _REFUSED:
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise StorageError(
            f"{target} cannot be written: {why}; what was kept before is whole; make room there, or let it be written "
            f"to, and go on (a run: with 'moeify resume')"
        ) from error

"""What is said where something cannot be stored: the disk is full, the bucket is missing, nobody may write there.

Everything is written whole or not at all, so that what was there before stays; this says so.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from safetensors import SafetensorError

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What the operating system says where nothing can be written."""
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine a role",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run 'gcloud auth application-default login'",
}
_ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("STORAGE_EMULATOR_HOST",)}
"""Where the address of a store that is not its maker's own comes from."""


class StorageError(OSError):
    """Something could not be stored or fetched: no room, no right, or nobody answers."""


@contextmanager
def storing(target: Path) -> Iterator[None]:
    """Raise StorageError, in one line for people, where the body cannot write ``target``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno not in _REFUSED):
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise StorageError(
            f"{target} cannot be written: {why}; what was kept before is whole; make room there, or let it be written "
            f"to, and go on (a run: with 'moeify resume')"
        ) from error


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Raise StorageError, in one line for people, where a store behind a URL cannot do what the body asks.

    FileNotFoundError and FileExistsError pass, but for a bucket that is not there. What is raised never holds a
    secret: the stores' own messages name keys by id at most, and addresses are told without user and password.
    """
    try:
        yield
    except (StorageError, FileExistsError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not _lacks_bucket(error):
            raise
        if not isinstance(error, OSError) and not _foreign(error):
            raise  # a mistake of ours
        raise StorageError(f"{url}: {_why(url, error)}") from error


def _why(url: str, error: Exception) -> str:
    kind = urlsplit(url).scheme
    name, said = type(error).__name__, " ".join(str(error).split())[:160]
    if "Credentials" in name or "NoAuth" in name:
        return f"no credentials here; {_CREDENTIALS.get(kind, 'give them by the environment')}"
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {urlsplit(url).netloc!r}; make it, or correct the URL"
    if isinstance(error, PermissionError):
        return (
            f"refused ({said}); check the credentials of this machine's environment, and that they may list, read, "
            f"write and delete there"
        )
    if isinstance(error, TimeoutError | ConnectionError) or any(
        word in name for word in ("Connect", "Timeout", "ClientOSError", "ServerDisconnected", "HTTPClient")
    ):
        return (
            f"{_endpoint(kind)} does not answer; what was kept before is whole; check the network"
            f"{_settings(kind)}, and go on (a run: with 'moeify resume')"
        )
    return f"the store did not do it ({said or name}); what was kept before is whole"


def endpoint_of(kind: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the address of a kind of store that the environment gives; empty where that is its maker's own."""
    return next((value for name in _ENDPOINTS.get(kind, ()) if (value := environment.get(name))), "")


def _endpoint(kind: str) -> str:
    parts = urlsplit(endpoint_of(kind))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "the store"


def _settings(kind: str) -> str:
    names = _ENDPOINTS.get(kind)
    return f" and {names[-1]}" if names else ""


def _lacks_bucket(error: Exception) -> bool:
    return "bucket" in str(error).lower() and "does not exist" in str(error).lower()


def _foreign(error: Exception) -> bool:
    """Whether an error comes from a store's client."""
    return type(error).__module__.partition(".")[0] in (
        *("botocore", "aiobotocore", "aiohttp", "s3fs"),
        *("gcsfs", "google", "fsspec", "requests", "urllib3"),
    )

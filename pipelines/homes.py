"""Where all runs are: a folder, or a URL with a working folder on this machine.

Commands work on files. Of runs behind a URL they work on copies in a folder of the cache, one for each URL and
address of a store; a small file in it says of which URL. The copies can be lost at any time.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from moeify.place import Place, checked_url, is_url
from moeify.storing import endpoint_of, storing

_NOTE = ".home.json"


@dataclass(frozen=True)
class Home:
    """What a working folder is a copy of."""

    url: str
    copy: str
    """Names this working folder among all copies of all machines."""

    def place(self, run: str) -> Place:
        """Return where a run is."""
        return Place(f"{self.url}/{run}")


def folder_of(text: str, cache: Path) -> Path:
    """Return the folder that a path or a ``file://`` URL names; of another URL its working folder, made if need be."""
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path)).absolute()
    if not is_url(text):
        return Path(text).absolute()
    url = checked_url(text)
    key = hashlib.sha256(f"{url}\n{endpoint_of(urlsplit(url).scheme)}".encode()).hexdigest()[:16]
    folder = cache / "homes" / key
    note(folder, url)
    return folder


def note(folder: Path, url: str) -> None:
    """Make a folder the working folder of a URL."""
    if home_of(folder) is None:
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / f"{_NOTE}.{secrets.token_hex(4)}"
            draft.write_text(json.dumps({"url": url, "copy": secrets.token_hex(8)}) + "\n", encoding="utf-8")
            draft.replace(folder / _NOTE)
        _read.cache_clear()


def home_of(folder: Path) -> Home | None:
    """Return what a folder is the working folder of; None for a folder that is the truth itself."""
    return _read(folder)


@lru_cache
def _read(folder: Path) -> Home | None:
    try:
        known = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        return Home(checked_url(str(known["url"])), str(known["copy"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _NOTE} is damaged ({error}); remove {folder}, which is only a copy") from None

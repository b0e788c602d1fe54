"""What jobs ended with, one small file a job: in a folder and, where that is a copy, behind the URL that it is one of.

Files are named by the content of what they depend on, so what is there under a name is never out of date.
"""

from dataclasses import dataclass
from pathlib import Path

from moeify.place import Place
from moeify.store import write_atomically


@dataclass(frozen=True)
class KeptResults:
    """The files of one comparison, or of one study. Workers on other machines have a folder of their own."""

    folder: Path
    url: str | None = None
    """Where machines share them."""

    def read(self, name: str) -> bytes | None:
        """Return a file; None where there is none. What is here alone, since its sending failed, is sent."""
        near = self.folder / name
        if self.url is None:
            return near.read_bytes() if near.is_file() else None
        place = Place(self.url)
        try:
            content = place.read(name)
        except FileNotFoundError:
            if not near.is_file():
                return None
            place.write(name, near.read_bytes())
            return near.read_bytes()
        self._keep_near(name, content)
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file, here first: an hour's work is not lost to a store that is away."""
        self._keep_near(name, content)
        if self.url is not None:
            Place(self.url).write(name, content)

    def near(self, name: str) -> Path:
        """Return where a file is on this machine, fetched if a worker on another one wrote it."""
        path = self.folder / name
        if self.url is not None and not path.is_file():
            self.read(name)
        return path

    def _keep_near(self, name: str, content: bytes) -> None:
        path = self.folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

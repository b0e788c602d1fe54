"""Corpora that memory does not hold: files read through Hugging Face ``datasets``, some documents at a time.

Nothing is downloaded: only files on this machine are read, by the readers that ``datasets`` itself comes with. Since
documents are not kept, what can be known of each is a hash: it says the document's split, and that it was there before.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeify.data.documents import Document, Split, misnamed
from moeify.data.lines import existing
from moeify.recipe.data import StreamedFiles, StreamedText

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_PACKED = (".gz", ".xz", ".zst", ".bz2")
_BY_PLACE = (".parquet", ".arrow")
"""Of files that are read here and there, which a packed one cannot be."""
_SPACE = 2**64
"""Of the hashes of documents."""


def files_of(part: StreamedFiles, base: Path, said: str) -> list[Path]:
    """Return the files of a category, in order of their names, empty ones left out.

    ``said`` is where the recipe names them. Raises ValueError where there are none, or of several kinds.
    """
    found: dict[Path, None] = {}
    for pattern in part.files:
        paths = _matching(base, pattern, said) if any(sign in pattern for sign in "*?[") else [base / pattern]
        if not paths:
            raise ValueError(f"{said}: no file matches {pattern!r}; a relative path starts at the recipe's folder")
        found |= dict.fromkeys(path for path in paths if existing(path, said).stat().st_size)
    if not found:
        raise ValueError(f"{said}: got nothing but empty files, wanted documents")
    kinds = {path: _reader(path) for path in found}
    if len(set(kinds.values())) != 1 or None in kinds.values():
        got = ", ".join(sorted({"".join(path.suffixes[-2:]) or path.name for path in found}))
        wanted, packed = ", ".join(_READERS), ", ".join(_PACKED)
        raise ValueError(
            f"{said}: got {got}, wanted files of one kind: {wanted}, plain or, all but {' and '.join(_BY_PLACE)}, "
            f"with {packed}"
        )
    return list(found)


def fingerprint(source: StreamedText, base: Path) -> str:
    """Return a hash of everything that ``documents`` would read."""
    digest = hashlib.sha256()
    for category, part in source.categories.items():
        for path in files_of(part, base, _said(category)):
            with path.open("rb") as file:
                digest.update(f"{category}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class Corpus:
    """The documents of a source, each told its split; what has been read before in any category is left out.

    Raises ValueError, one line, where ``datasets`` is missing, or a category has a bad name or no such files.
    """

    def __init__(self, source: StreamedText, base: Path, *, validation: float, test: float) -> None:
        if find_spec("datasets") is None:
            raise ValueError(
                "data.source.kind: streamed needs the datasets package, which is not here: "
                "pip install 'moeify[streamed]'; or take jsonl or table, which memory must hold"
            )
        for category in source.categories:
            if problem := misnamed(category):
                raise ValueError(f"data.source.categories: {problem}")
        self._parts = source.categories
        self._files = {name: files_of(part, base, _said(name)) for name, part in source.categories.items()}
        self._held_out = test, test + validation
        self._seen: set[int] = set()

    @property
    def categories(self) -> tuple[str, ...]:
        """Their names, in the recipe's order."""
        return tuple(self._parts)

    def documents(self, category: str) -> Iterator[tuple[Split, Document]]:
        """Yield a category's documents and their splits, in the files' order; each once, whoever asks again.

        Documents are the same where they are up to white space. ValueError where a file is damaged, or a row has no
        text.
        """
        return self._distinct(category, self._seen)

    def head(self, category: str, size: int) -> list[Document]:
        """Return the first documents of the train split, until they hold ``size`` bytes; nothing counts as read."""
        found, held = [], 0
        for split, document in self._distinct(category, set()):
            if split == "train":
                found.append(document)
                held += document.size
            if held >= size:
                break
        return found

    def _distinct(self, category: str, seen: set[int]) -> Iterator[tuple[Split, Document]]:
        """Yield the documents whose hashes have not been seen, and remember them."""
        for text in self._texts(category):
            words = " ".join(text.split())
            hashed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest())
            if words and hashed not in seen:
                seen.add(hashed)
                yield self._split(hashed), Document(text, f"{hashed:016x}")

    def _split(self, hashed: int) -> Split:
        test, both = self._held_out
        share = hashed / _SPACE
        return "test" if share < test else "validation" if share < both else "train"

    def _texts(self, category: str) -> Iterator[str]:
        column, said = self._parts[category].text, _said(category)
        for number, row in enumerate(_rows(self._files[category], said), 1):
            text = row.get(column)
            if not isinstance(text, str):
                where = f"{said}: row {number}"
                if column not in row:
                    raise ValueError(f"{where} has no {column!r}, got {', '.join(map(repr, list(row)[:8]))}")
                raise ValueError(f"{where}: {column!r} is {type(text).__name__}, wanted text")
            yield text


def _rows(files: Sequence[Path], said: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of files, one after the other.

    Readers raise errors of their own over damaged files, each library's other ones, and StopIteration where one packs
    nothing; nobody else's come this way, since what takes the rows runs elsewhere.
    """
    import datasets

    more = {"sample_by": "document"} if _reader(files[0]) == "text" else {}
    asked = {"data_files": [str(path) for path in files], "split": "train", "streaming": True, **more}
    path = files[0]  # whose first rows say what columns there are
    with tempfile.TemporaryDirectory() as scratch:
        try:
            whole = datasets.load_dataset(str(_reader(path)), cache_dir=scratch, **asked)
            for number in range(len(files)):
                path = files[number]
                yield from whole.shard(len(files), number)
        except Exception as error:
            said_so = "it packs nothing" if isinstance(error, StopIteration) else str(error).strip()
            reason = (said_so or type(error).__name__).splitlines()[0]
            raise ValueError(f"{said}: {path} cannot be read: {reason}") from error


def _reader(path: Path) -> str | None:
    *before, last = path.suffixes or [""]
    if last not in _PACKED:
        return _READERS.get(last)
    return _READERS.get(before[-1]) if before and before[-1] not in _BY_PLACE else None


def _matching(base: Path, pattern: str, said: str) -> list[Path]:
    """Return the files that a glob means, in order of their names."""
    top = Path(pattern).anchor
    try:
        found = Path(top).glob(pattern.removeprefix(top)) if top else base.glob(pattern)
        return sorted(path for path in found if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{said}: got {pattern!r}, wanted a path or a glob like '**/*.txt' ({error})") from None


def _said(category: str) -> str:
    return f"data.source.categories.{category}.files"

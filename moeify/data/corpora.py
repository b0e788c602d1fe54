"""Built-in text: four kinds of it that every machine with the package installed already has.

Files come from the standard library and from the distributions named below, never from elsewhere, in an order that
hashes their names: the same on every machine with the same versions.
"""

import csv
import hashlib
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeify.data import excerpts
from moeify.data.documents import Document
from moeify.recipe.data import BuiltinSource

LEAST_BYTES = 200
"""What is shorter tells too little to be a document."""
_FILES_A_SOURCE = 20
"""No file gives more than one twentieth of what is asked for, so that no split hangs on a single file ..."""
_LEAST_A_FILE = 50_000
"""... unless it is asked for little. Bytes."""
_STANDARD_LIBRARY = "python"
_TESTS = ("/test/", "/tests/", "/testing/", "/idle_test/")


@dataclass(frozen=True)
class _Corpus:
    """Where a source's files lie, and how their text is got out."""

    distributions: tuple[str, ...]
    suffixes: tuple[str, ...]
    left_out: tuple[str, ...]
    """Parts of a path that exclude it."""
    extract: Callable[[str, str], Iterator[str]]
    """From a file's suffix and text to its documents."""


_CORPORA: dict[BuiltinSource, _Corpus] = {
    "python": _Corpus(
        (_STANDARD_LIBRARY,),
        (".py",),
        # Tables rather than programs.
        (*_TESTS, "/lib2to3/", "/pydoc_data/", "/encodings/"),
        excerpts.python,
    ),
    "prose": _Corpus(
        (_STANDARD_LIBRARY, "networkx", "numpy", "pandas", "scikit-learn", "scipy", "matplotlib"),
        (".py", ".rst", ".md"),
        (*_TESTS, "/licenses/", "/LICENSE"),
        excerpts.prose,
    ),
    "c": _Corpus(
        ("torch", "pyarrow", "numpy", "scipy", "scikit-learn"),
        (".h", ".hpp", ".cuh"),
        # Thousands of files that a generator wrote from one template.
        (*_TESTS, "/ATen/ops/", ".pb.h"),
        excerpts.c,
    ),
    "web": _Corpus(
        ("mlflow", "ray", "scikit-learn", "matplotlib", "torch"),
        (".js", ".mjs", ".css", ".html"),
        _TESTS,
        excerpts.web,
    ),
}


def distributions(source: BuiltinSource) -> tuple[str, ...]:
    """Return the installed packages that a source reads; ``python`` is the standard library."""
    return _CORPORA[source].distributions


def fingerprint(sources: Sequence[BuiltinSource]) -> str:
    """Return a hash of what the sources would be read from, without reading it: the lists that installers leave."""
    digest = hashlib.sha256(sys.version.encode())
    for distribution in sorted({name for source in sources for name in distributions(source)}):
        digest.update(f"{distribution}\n{_record(distribution)}".encode())
    return digest.hexdigest()


def documents(source: BuiltinSource, wanted: int) -> Iterator[Document]:
    """Yield documents of a source until they hold ``wanted`` bytes or the source is used up."""
    corpus = _CORPORA[source]
    files = dict(file for distribution in corpus.distributions for file in _files(distribution, corpus))
    found = 0
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if found >= wanted:
            return
        try:
            content = files[name].read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # In an old encoding, or removed after its installation.
        texts = [text for text in corpus.extract(files[name].suffix, content) if len(text.encode()) >= LEAST_BYTES]
        for text in _spread(texts, max(wanted // _FILES_A_SOURCE, _LEAST_A_FILE)):
            document = Document(text, name)
            found += document.size
            yield document


def _spread(texts: Sequence[str], limit: int) -> Sequence[str]:
    """Return every text, or where they are longer than ``limit`` bytes in all, some at equal distances."""
    total = sum(len(text.encode()) for text in texts)
    if total <= limit:
        return texts
    count = max(1, len(texts) * limit // total)
    return [texts[i * len(texts) // count] for i in range(count)]


def _files(distribution: str, corpus: _Corpus) -> Iterator[tuple[str, Path]]:
    """Yield name and path of the files that the corpus takes of a distribution."""
    for name, path in _standard_library() if distribution == _STANDARD_LIBRARY else _installed(distribution):
        if name.endswith(corpus.suffixes) and not any(part in f"/{name}" for part in corpus.left_out):
            yield name, path


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
        for file in files:
            path = Path(folder, file)
            yield f"{_STANDARD_LIBRARY}/{path.relative_to(root).as_posix()}", path


def _installed(distribution: str) -> Iterator[tuple[str, Path]]:
    if record := _record(distribution):
        found = importlib.metadata.distribution(distribution)
        for row in csv.reader(record.splitlines()):
            yield row[0], Path(str(found.locate_file(row[0])))


def _record(distribution: str) -> str:
    """Return the installer's list of a distribution's files with their hashes, empty where there is none."""
    if distribution == _STANDARD_LIBRARY:
        return ""
    try:
        return importlib.metadata.distribution(distribution).read_text("RECORD") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""

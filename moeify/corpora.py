"""Built-in text: four kinds of it that every machine with the package installed already has.

Files come from the standard library and from the distributions named below, never from elsewhere, in an order that
hashes their names: the same on every machine with the same versions.
"""

import csv
import hashlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moeify import extract
from moeify.config import BuiltinSource

LEAST_BYTES = 200
"""What is shorter tells too little to be a document."""
_LARGEST_SHARE = 20
"""No file gives more than one twentieth of what is asked for, so that no split hangs on a single file."""
_STANDARD_LIBRARY = "python"


@dataclass(frozen=True)
class Document:
    """A text, and what it was cut from: documents of one group always fall into the same split."""

    text: str
    group: str
    """A name that is the same on every machine."""


@dataclass(frozen=True)
class _Corpus:
    """Where a source's files lie, and how their text is got out."""

    distributions: tuple[str, ...]
    suffixes: tuple[str, ...]
    left_out: tuple[str, ...]
    """Parts of a path that exclude it."""
    extract: Callable[[str, str], Iterator[str]]
    """From a file's suffix and text to its documents."""


_TESTS = ("/test/", "/tests/", "/testing/", "/idle_test/")
_CORPORA: dict[BuiltinSource, _Corpus] = {
    "python": _Corpus(
        (_STANDARD_LIBRARY,), (".py",), (*_TESTS, "/lib2to3/", "/pydoc_data/", "/encodings/"), extract.python
    ),
    "prose": _Corpus(
        (_STANDARD_LIBRARY, "networkx", "numpy", "pandas", "scikit-learn", "scipy", "matplotlib"),
        (".py", ".rst", ".md"),
        (*_TESTS, "/licenses/", "/LICENSE"),
        extract.prose,
    ),
    "c": _Corpus(
        ("torch", "pyarrow", "numpy", "scipy", "scikit-learn"),
        (".h", ".hpp", ".cuh"),
        # Thousands of files that a generator wrote from one template.
        (*_TESTS, "/ATen/ops/", ".pb.h"),
        extract.c,
    ),
    "web": _Corpus(
        ("mlflow", "ray", "scikit-learn", "matplotlib", "torch"), (".js", ".mjs", ".css", ".html"), (*_TESTS,), extract.web
    ),
}


def fingerprint(sources: tuple[BuiltinSource, ...]) -> str:
    """Return a hash of what the sources would be read from, without reading it: the lists that installers leave."""
    digest = hashlib.sha256(sys.version.encode())
    for source in sources:
        for distribution in _CORPORA[source].distributions:
            digest.update(f"{source} {distribution} {_record(distribution)}".encode())
    return digest.hexdigest()


def documents(source: BuiltinSource, wanted: int) -> Iterator[Document]:
    """Yield documents of a source until they hold ``wanted`` bytes or the source is used up."""
    corpus = _CORPORA[source]
    files = [file for distribution in corpus.distributions for file in _files(distribution, corpus)]
    found = 0
    for name, path in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        if found >= wanted:
            return
        try:
            content = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # A file in an old encoding, or one that was removed after its installation.
        texts = [text for text in corpus.extract(path.suffix, content) if len(text) >= LEAST_BYTES]
        for text in _spread(texts, wanted // _LARGEST_SHARE):
            found += len(text.encode())
            yield Document(text, name)


def _spread(texts: list[str], limit: int) -> list[str]:
    """Return every text, or where they are longer than ``limit`` bytes in all, some at equal distances."""
    total = sum(len(text.encode()) for text in texts)
    if total <= limit:
        return texts
    count = max(1, len(texts) * limit // total)
    return [texts[i * len(texts) // count] for i in range(count)]


def _files(distribution: str, corpus: _Corpus) -> Iterator[tuple[str, Path]]:
    """Yield name and path of the files that the corpus takes of a distribution."""
    if distribution == _STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        for path in root.rglob("*.py"):
            relative = path.relative_to(root).as_posix()
            if ".py" in corpus.suffixes and not relative.startswith(("site-packages/", "dist-packages/")):
                name = f"{_STANDARD_LIBRARY}/{relative}"
                if not any(part in name for part in corpus.left_out):
                    yield name, path
        return
    record = _record(distribution)
    if record:
        installed = importlib.metadata.distribution(distribution)
        for row in csv.reader(record.splitlines()):
            name = row[0]
            if name.endswith(corpus.suffixes) and not any(part in f"/{name}" for part in corpus.left_out):
                yield name, Path(str(installed.locate_file(name)))


def _record(distribution: str) -> str:
    """Return the installer's list of a distribution's files with their hashes, empty where there is none."""
    try:
        return importlib.metadata.distribution(distribution).read_text("RECORD") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""

import ast
import io
import time
import tokenize
from pathlib import Path
from typing import get_args

import pytest

from moeify.data import corpora
from moeify.data.documents import Document, distinct, divide
from moeify.data.sources import read
from moeify.recipe.data import BuiltinSource, InstalledText

SOURCES: tuple[BuiltinSource, ...] = get_args(BuiltinSource)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_gives_what_is_asked_for_in_the_same_order_each_time(source: BuiltinSource) -> None:
    one, other = (list(corpora.documents(source, 200_000)) for _ in range(2))
    assert one == other
    assert 200_000 <= sum(d.size for d in one) < 400_000
    assert all(d.size >= corpora.LEAST_BYTES for d in one)
    assert len({d.group for d in one}) >= 5


def test_names_do_not_tell_where_things_are_installed() -> None:
    for source in SOURCES:
        names = {d.group for d in corpora.documents(source, 100_000)}
        assert not any(name.startswith("/") or ".." in name or "site-packages" in name for name in names)


def test_python_is_code_without_commentary() -> None:
    for document in corpora.documents("python", 300_000):
        tree = ast.parse(document.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(node) is None
        tokens = tokenize.generate_tokens(io.StringIO(document.text).readline)
        assert not any(token.type == tokenize.COMMENT for token in tokens)


def test_no_file_gives_more_than_its_share() -> None:
    sizes: dict[str, int] = {}
    for document in corpora.documents("web", 1_500_000):
        sizes[document.group] = sizes.get(document.group, 0) + document.size
    assert max(sizes.values()) <= 75_000 + 32_000
    assert len(sizes) > 20


def test_a_fingerprint_follows_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = corpora.fingerprint(SOURCES)
    assert before == corpora.fingerprint(SOURCES[::-1])
    assert before != corpora.fingerprint(SOURCES[:2])
    monkeypatch.setattr(corpora, "_record", lambda distribution: "x.h,sha256=0,1\n")
    assert before != corpora.fingerprint(SOURCES)


@pytest.fixture(scope="module")
def everything() -> dict[str, list[Document]]:
    return read(InstalledText(kind="installed"), Path())


@pytest.mark.slow
def test_every_source_holds_two_megabytes_in_enough_documents(everything: dict[str, list[Document]]) -> None:
    for documents in everything.values():
        assert 2e6 <= sum(d.size for d in documents) <= 3e6
        parts = divide(documents, validation=0.05, test=0.1)
        assert min(len({d.group for d in part}) for part in parts.values()) >= 5
        size = sum(d.size for d in parts["test"])
        assert 0.08e6 < size / 3 < 0.12e6


@pytest.mark.slow
def test_installed_text_holds_no_near_duplicates(everything: dict[str, list[Document]]) -> None:
    assert distinct(everything) == everything


@pytest.mark.slow
def test_reading_everything_takes_seconds() -> None:
    started = time.process_time()
    read(InstalledText(kind="installed"), Path())
    assert time.process_time() - started < 30

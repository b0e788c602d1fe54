"""A look at a person's data: where its documents are, what tells their categories apart, how much of each there is.

From a path to a recipe's source; nothing is asked. What a run would refuse is refused here.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeify.data import sources, tables
from moeify.data.columns import Columns
from moeify.data.documents import SPLITS, Document, distinct, named
from moeify.data.labels import UNLABELLED, Labels
from moeify.data.lines import numbered, parsed
from moeify.data.problems import Problems
from moeify.recipe.data import JsonLines, Table, TextFolders

_HEAD = 1 << 16
"""Bytes of a file that tell whether it is text."""
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
_USUAL = ("category", "label", "class", "subject", "topic", "domain", "source", "language", "lang", "type", "kind")
"""Names that a field of categories is likely to have, the likeliest first."""


@dataclass(frozen=True)
class Amount:
    """How much distinct text a category has."""

    documents: int
    size: int
    """Bytes of UTF-8."""


@dataclass(frozen=True)
class Survey:
    """What was found, and how a recipe says it."""

    source: TextFolders | JsonLines | Table
    """Paths are absolute."""
    amounts: Mapping[str, Amount]
    """By category; the one category ``""`` where nothing tells documents apart."""
    notes: tuple[str, ...]
    """What was seen and chosen, a line each."""

    @property
    def labelled(self) -> bool:
        """Whether the documents have categories."""
        return set(self.amounts) != {UNLABELLED}


def look(path: Path, text: str | None = None, category: str | None = None, *, discover: bool = False) -> Survey:
    """Look at a folder of folders of text files, a file of JSON lines, or a table (``moeify.data.tables``).

    Args:
        path: Where the data is.
        text: The field of a JSON line, or column, that holds the document; None: the one with the longest texts.
        category: The field that holds the category; None: the likeliest, where there is one.
        discover: JSON lines and tables are taken as unlabelled, whatever their fields.

    Raises:
        ValueError: No run can use it; one line says why and what to do.
        FileNotFoundError: There is nothing.
    """
    if path.exists() and tables.is_table(path):
        seen = _table(path, text, category, discover)
    elif path.is_dir():
        if text or category or discover:
            raise ValueError(
                f"{path} is a folder, whose folders are the categories; fields are for JSON lines and tables"
            )
        seen = _folders(path)
    elif path.is_file():
        seen = _lines(path, text, category, discover)
    else:
        raise ValueError(f"{path} is not there; give a folder of folders of text files, JSON lines, or a table")
    whole = sources.whole(seen.source, Path())
    found = distinct(whole)
    amounts = {name: Amount(len(texts), sum(d.size for d in texts)) for name, texts in found.items()}
    for name, amount in amounts.items():
        if amount.documents < len(SPLITS):
            of = f"category {name!r}" if name else "the file"
            raise ValueError(
                f"{path}: {of} has {amount.documents} distinct documents, wanted at least {len(SPLITS)}: one each to "
                f"train, validate and test on; give it more, or cut long ones into several"
            )
    return Survey(seen.source, amounts, (*seen.notes, *_left_out(seen, whole, found)))


@dataclass(frozen=True)
class _Seen:
    """A source before its documents are read."""

    source: TextFolders | JsonLines | Table
    notes: list[str]
    count: int
    """Files, lines or rows, with and without text."""
    blank: tuple[str, str]
    """What one without text is called, and several."""


def _left_out(
    seen: _Seen, whole: Mapping[str, Sequence[Document]], found: Mapping[str, Sequence[Document]]
) -> list[str]:
    """Return what to say of documents that no category has."""
    documents, kept = (sum(map(len, each.values())) for each in (whole, found))
    parts = ((documents - kept, ("duplicate", "duplicates")), (seen.count - documents, seen.blank))
    told = ", ".join(f"{count:,} {names[count > 1]}" for count, names in parts if count)
    return [f"left out: {told}"] if told else []


# --- folders ------------------------------------------------------------------------------------------


def _folders(path: Path) -> _Seen:
    notes: list[str] = []
    names: dict[str, Path] = {}
    files: dict[str, list[Path]] = {}
    for folder in sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")):
        try:
            found = [file for _, file in sources.files_in(folder, "**/*")]
        except ValueError:
            notes.append(f"left out: {folder.name}, which has no files")
            continue
        name = named(folder.name, names)
        if name != folder.name:
            notes.append(f"category {name!r} stands for the folder {folder.name!r}")
        names[name], files[name] = folder.absolute(), found
    if len(names) < 2:
        raise ValueError(
            f"{path} has {len(names)} folders with files in them, wanted at least 2, one a category; without "
            f'categories, put the documents into JSON lines, {{"text": ...}} each, and they will be discovered'
        )
    if loose := [each for each in path.iterdir() if each.is_file() and not each.name.startswith(".")]:
        notes.append(f"left out: {_files(len(loose))} beside the folders, such as {loose[0].name}")
    pattern, left_out = _pattern(files)
    if left_out:
        notes.append(f"pattern {pattern!r}: leaves out {_files(len(left_out))}, such as {left_out[0].name}")
    source = TextFolders(kind="folders", categories=names, pattern=pattern)
    count = sum(len(each) for each in files.values()) - len(left_out)
    return _Seen(source, notes, count, ("empty file", "empty files"))


def _pattern(files: Mapping[str, Sequence[Path]]) -> tuple[str, list[Path]]:
    """Return a glob that names text files only, and what it leaves out: all files, or those with one suffix."""
    readable: dict[Path, str | None] = {file: _unreadable(file) for each in files.values() for file in each}
    bad = [file for file, why in readable.items() if why]
    if not bad:
        return "**/*", []
    spoilt = {file.suffix for file in bad}
    sizes: dict[str, int] = defaultdict(int)
    for file in readable:
        if file.suffix and file.suffix not in spoilt:
            sizes[file.suffix] += file.stat().st_size
    everywhere = [s for s in sizes if all(any(file.suffix == s for file in each) for each in files.values())]
    if not everywhere:
        others = len(bad) - 1
        raise ValueError(
            f"{bad[0]} is no text ({readable[bad[0]]}){f', nor is {_files(others)} more' if others else ''}, and no "
            f"suffix that every folder has names text alone; move what is no text away, or convert it to UTF-8"
        )
    best = max(everywhere, key=lambda suffix: (sizes[suffix], suffix))
    return f"**/*{_escaped(best)}", [file for file in readable if file.suffix != best]


def _escaped(suffix: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", suffix)


def _unreadable(file: Path) -> str | None:
    """Return why a file is no text; None where it is."""
    content = file.read_bytes()
    if b"\0" in content[:_HEAD]:
        return "it holds null bytes"
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    return None


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


# --- JSON lines and tables ----------------------------------------------------------------------------


def _lines(path: Path, text: str | None, category: str | None, discover: bool) -> _Seen:
    if not path.name.endswith(_SUFFIXES):
        raise ValueError(f"{path} is neither a folder nor one of {', '.join(f'*{s}' for s in _SUFFIXES)}")
    columns, problems = Columns(), Problems("line")
    for number, line in numbered(path):
        if line.strip():
            try:
                columns.add(parsed(line))
            except ValueError as error:
                problems.add(number, error)
    problems.check(str(path))
    if not columns.rows:
        raise ValueError(f'{path} is empty, wanted JSON lines, {{"text": ...}} each')
    chosen, label, notes = _chosen(path, columns, text, category, discover)
    source = JsonLines(kind="jsonl", path=path.absolute(), text=chosen, category=label)
    return _Seen(source, notes, columns.rows, ("line without text", "lines without text"))


def _table(path: Path, text: str | None, category: str | None, discover: bool) -> _Seen:
    tables.check_header(path)
    columns, blank = Columns(), 0
    for batch in tables.batches(path, said=str(path)):
        for values in zip(*batch.values(), strict=True):
            row = ["" if value is None else value for value in values]  # no text, and left out like blank text
            if any(value != "" for value in row):
                columns.add(dict(zip(batch, row, strict=True)))
            else:
                blank += 1
    if not columns.rows:
        raise ValueError(f"{path} has no rows, wanted a column of text and one of categories")
    chosen, label, notes = _chosen(path, columns, text, category, discover)
    if (count := len(tables.files_of(path))) > 1:
        notes.insert(0, f"{_files(count)}, read as one table; train, validation and test are drawn from all of it")
    source = Table(kind="table", path=path.absolute(), text=chosen, category=label)
    return _Seen(source, notes, columns.rows + blank, ("row without text", "rows without text"))


def _chosen(
    path: Path, columns: Columns, text: str | None, category: str | None, discover: bool
) -> tuple[str, str | None, list[str]]:
    """Return the fields of text and category, and what to say of them."""
    named, rows = columns.named, columns.rows
    texts = [key for key, each in named.items() if each.texts == rows]
    labels = [key for key, each in named.items() if each.labels == rows]
    fields = f"fields: {', '.join(f'{key} ({each.described(rows)})' for key, each in named.items())}"
    if text is not None and text not in texts:
        wanted = ", ".join(map(repr, texts)) or "none of them is"
        raise ValueError(f"{path}: got --text {text!r}, wanted a field that is text in every line: {wanted}")
    if category is not None and (category not in named or not named[category].labels):
        wanted = ", ".join(map(repr, labels)) or "none of them is"
        raise ValueError(
            f"{path}: got --category {category!r}, wanted a field that is text or a whole number in every line: "
            f"{wanted}"
        )
    if not texts:
        raise ValueError(f'{path}: no field is text in every line ({fields}); wanted {{"text": ...}} in each')
    chosen = text or max((key for key in texts if key != category), key=lambda key: named[key].length, default="")
    if not chosen or chosen == category:
        raise ValueError(f"{path}: one field cannot be text and category at once ({fields})")
    likely = [] if discover else _likely(columns, chosen)
    label = category or (likely[0] if likely else None)
    notes = [fields]
    said = [f"text: {chosen!r}"] + [f"category: {label!r}"] * (label is not None)
    others = [key for key in likely if key != label and named[key].tells(rows)] if category is None else []
    more = f"; or --category {' or '.join(others)}" if others else ""
    notes.append(", ".join(said) + more)
    if label is None:
        why = "as asked" if discover else "no field tells them apart"
        notes.append(f"no categories, {why}: data.discover makes clusters of documents the categories")
    else:
        names = Labels(label)
        stand = {value: names.name(value) for value in named[label].values}
        notes += [f"category {name!r} stands for {value!r}" for value, name in stand.items() if name != value]
    return chosen, label, notes


def _likely(columns: Columns, text: str) -> list[str]:
    """Return the fields that look like categories, the likeliest first: few short values that come again and again.

    One with a usual name is among them where lines lack it, and at the end where it has one value alone: a run refuses
    such a field and says why, and to make clusters in silence would be worse.
    """
    found = []
    for key, each in columns.named.items():
        usual = _USUAL.index(key.lower()) if key.lower() in _USUAL else len(_USUAL)
        if key != text and (each.tells(columns.rows) or (usual < len(_USUAL) and each.few(columns.rows))):
            found.append((len(each.values) < 2, usual, len(each.values), key))
    return [key for *_, key in sorted(found)]

"""A look at a person's data: where its documents are, what tells their categories apart, how much of each there is.

From a path to a recipe's source; nothing is asked. What a run would refuse is refused here.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.data import sources, tables
from moeify.data.documents import SPLITS, named
from moeify.data.lines import UNLABELLED, numbered
from moeify.recipe.data import JsonLines, Table, TextFolders

_PEEK = 2000
"""Lines of a JSON lines file that fields are judged by."""
_SAMPLE = 200
"""Rows of a batch of a table that columns are judged by, about."""
_MOST = 64
"""Values that a field of categories has at most."""
_SHORT = 64
"""Characters of a category at most."""
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
    source: TextFolders | JsonLines | Table
    if path.exists() and tables.is_table(path):
        source, notes = _table(path, text, category, discover)
    elif path.is_dir():
        if text or category or discover:
            raise ValueError(
                f"{path} is a folder, whose folders are the categories; fields are for JSON lines and tables"
            )
        source, notes = _folders(path)
    elif path.is_file():
        source, notes = _lines(path, text, category, discover)
    else:
        raise ValueError(f"{path} is not there; give a folder of folders of text files, JSON lines, or a table")
    found = sources.read(source, Path())
    amounts = {name: Amount(len(texts), sum(d.size for d in texts)) for name, texts in found.items()}
    for name, amount in amounts.items():
        if amount.documents < len(SPLITS):
            of = f"category {name!r}" if name else "the file"
            raise ValueError(
                f"{path}: {of} has {amount.documents} distinct documents, wanted at least {len(SPLITS)}: one each to "
                f"train, validate and test on; give it more, or cut long ones into several"
            )
    return Survey(source, amounts, tuple(notes))


# --- folders ------------------------------------------------------------------------------------------


def _folders(path: Path) -> tuple[TextFolders, list[str]]:
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
    return TextFolders(kind="folders", categories=names, pattern=pattern), notes


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
        raise ValueError(
            f"{bad[0]} is no text ({readable[bad[0]]}), as are {len(bad) - 1} more files, and no suffix that every "
            f"folder has names text alone; move what is no text away, or convert it to UTF-8"
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


# --- JSON lines ---------------------------------------------------------------------------------------


def _lines(path: Path, text: str | None, category: str | None, discover: bool) -> tuple[JsonLines, list[str]]:
    if not path.name.endswith(_SUFFIXES):
        raise ValueError(f"{path} is neither a folder nor one of {', '.join(f'*{s}' for s in _SUFFIXES)}")
    entries = _peeked(path)
    values = {key: [entry.get(key) for entry in entries] for entry in entries for key in entry}
    chosen, label, notes = _chosen(path, values, text, category, discover)
    return JsonLines(kind="jsonl", path=path.absolute(), text=chosen, category=label), notes


def _table(path: Path, text: str | None, category: str | None, discover: bool) -> tuple[Table, list[str]]:
    values: dict[str, list[Any]] = defaultdict(list)
    for columns in tables.batches(path, said=str(path)):
        for name, some in columns.items():
            values[name] += some[:: max(1, len(some) // _SAMPLE)]  # of all parts: tables may be sorted by category
    if not any(values.values()):
        raise ValueError(f"{path} has no rows, wanted a column of text and one of categories")
    chosen, label, notes = _chosen(path, values, text, category, discover)
    if (count := len(tables.files_of(path))) > 1:
        notes.insert(0, f"{_files(count)}, read as one table; train, validation and test are drawn from all of it")
    if label is not None:
        seen: dict[str, str] = {}
        for value in dict.fromkeys(values[label]):
            seen[value] = named(value, seen.values())
            notes += [f"category {seen[value]!r} stands for {value!r}"] * (seen[value] != value)
    return Table(kind="table", path=path.absolute(), text=chosen, category=label), notes


def _chosen(
    path: Path, values: Mapping[str, Sequence[Any]], text: str | None, category: str | None, discover: bool
) -> tuple[str, str | None, list[str]]:
    """Return the fields of text and category, and what to say of them; ``values``: what each field holds, by line."""
    strings = {
        key: [value for value in each if isinstance(value, str)]
        for key, each in values.items()
        if all(isinstance(value, str) for value in each)
    }
    fields = f"fields: {', '.join(_told(key, each) for key, each in values.items())}"
    for name, option in ((text, "--text"), (category, "--category")):
        if name is not None and name not in strings:
            wanted = ", ".join(map(repr, strings)) or "none of them is"
            raise ValueError(f"{path}: got {option} {name!r}, wanted a field that is text in every line: {wanted}")
    if not strings:
        raise ValueError(f'{path}: no field is text in every line ({fields}); wanted {{"text": ...}} in each')
    chosen = text or max((key for key in strings if key != category), key=lambda key: _length(strings[key]), default="")
    if not chosen or chosen == category:
        raise ValueError(f"{path}: one field cannot be text and category at once ({fields})")
    likely = [] if discover else _categories({key: each for key, each in strings.items() if key != chosen})
    label = category or (likely[0] if likely else None)
    notes = [fields]
    said = [f"text: {chosen!r}"] + [f"category: {label!r}"] * (label is not None)
    others = [key for key in likely if key != label] if category is None else []
    more = f"; or --category {' or '.join(others)}" if others else ""
    notes.append(", ".join(said) + more)
    if label is None:
        why = "as asked" if discover else "no field tells them apart"
        notes.append(f"no categories, {why}: data.discover makes clusters of documents the categories")
    return chosen, label, notes


def _peeked(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for number, line in numbered(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: not UTF-8, wanted JSON lines; is it binary data?") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({str(error)[:100]}), wanted an object a line") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: got {type(entry).__name__}, wanted an object a line")
        entries.append(entry)
        if len(entries) == _PEEK:
            break
    if not entries:
        raise ValueError(f'{path} is empty, wanted JSON lines, {{"text": ...}} each')
    return entries


def _categories(strings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the fields that look like categories, the likeliest first: few short values that come again and again."""
    found = []
    for key, values in strings.items():
        counts = Counter(values)
        if 2 <= len(counts) <= min(_MOST, len(values) // len(SPLITS)) and max(map(len, counts)) <= _SHORT:
            usual = _USUAL.index(key.lower()) if key.lower() in _USUAL else len(_USUAL)
            found.append((usual, len(counts), key))
    return [key for *_, key in sorted(found)]


def _told(key: str, values: Sequence[Any]) -> str:
    strings = [value for value in values if isinstance(value, str)]
    if len(strings) < len(values):
        return f"{key} (not text)" if not strings else f"{key} (text in some)"
    different = len(set(strings))
    return f"{key} ({different} values)" if different <= _MOST else f"{key} (text of {_length(strings):.0f} characters)"


def _length(values: Sequence[str]) -> float:
    return sum(map(len, values)) / len(values)

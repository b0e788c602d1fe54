"""Tables: Parquet, Arrow, CSV and TSV files, and data sets that Hugging Face ``datasets`` saved to disk, by column.

Read with pyarrow, a batch of rows at a time; ``datasets`` is not needed, and nothing is downloaded.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from moeify.data.documents import Document
from moeify.data.labels import UNLABELLED, Labels, told
from moeify.data.problems import Problems

SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""What divides columns."""
_BINARY = (".parquet", ".arrow")
"""Never text, so that folders of folders of them are no folders of documents."""
_FIRST = 1 << 16
"""Bytes of a first row that are looked at."""
_LONGEST = 64
"""Characters of a column's name at most: a longer one is a document."""
_SPLITS, _STATE = "dataset_dict.json", "state.json"
"""What ``save_to_disk`` leaves in a folder of splits, and in that of a split."""


def is_table(path: Path) -> bool:
    """Say whether a file or folder is to be read as a table: by its name, or by what it holds."""
    if path.is_file():
        return path.suffix in SUFFIXES
    if (path / _SPLITS).is_file() or (path / _STATE).is_file():
        return True
    below = _visible(path)
    if any(file.suffix in _BINARY for file in below):
        return True
    return any(file.suffix in SUFFIXES for file in below) and all(file.parent == path for file in below)


def files_of(path: Path, said: str = "data.source.path") -> list[Path]:
    """Return the files that hold the rows, in order; of a saved data set those that it names, of all its splits.

    Raises ValueError where there are none, or of several kinds.
    """
    if path.is_file():
        found = [path]
    elif not path.is_dir():
        raise ValueError(f"{said}: {path} is not there; a relative path starts at the recipe's folder")
    elif (path / _SPLITS).is_file():
        splits = _json(path / _SPLITS, said).get("splits", [])
        found = [file for split in splits for file in _saved(_inside(path, split, said), said)]
    elif (path / _STATE).is_file():
        found = _saved(path, said)
    else:
        found = [file for file in _visible(path) if file.suffix in SUFFIXES]
    kinds = sorted({file.suffix for file in found})
    if len(kinds) != 1 or kinds[0] not in SUFFIXES:
        got = ", ".join(kinds) or "no such file"
        raise ValueError(f"{said}: {path} holds {got}, wanted files of one kind: {', '.join(SUFFIXES)}")
    return found


def parts_of(path: Path) -> list[Path]:
    """Return all files that reading needs: those of ``files_of``, and what names them."""
    found = files_of(path)
    folders = dict.fromkeys([path, *(file.parent for file in found)])
    return [*found, *(folder / name for folder in folders for name in (_SPLITS, _STATE) if (folder / name).is_file())]


def read_table(
    path: Path, text: str, category: str | None, said: str = "data.source.path"
) -> dict[str, list[Document]]:
    """Return each category's documents, in the files' order; without ``category`` all are ``UNLABELLED``.

    Values of the category become names (``moeify.data.labels``): ``Sci/Tech`` becomes ``Sci-Tech``. Numbers
    that stand for names in a data set of ``datasets`` are told by those. Rows without text are left out. ValueError for
    columns that are not there or hold something else, and for rows without a category.
    """
    found: dict[str, list[Document]] = {}
    problems, names = Problems("row"), Labels(f"column {category!r}")
    wanted = [text] if category is None else [text, category]
    row = 0
    for columns in batches(path, wanted, said):
        texts = columns[text]
        labels = [None] * len(texts) if category is None else columns[category]
        for content, label in zip(texts, labels, strict=True):
            row += 1
            if content is not None and not isinstance(content, str):
                raise ValueError(f"{said}: {path}, column {text!r} holds {type(content).__name__}, wanted text")
            if not content or not content.strip():
                continue
            try:
                name = UNLABELLED if category is None else names.name(label)
            except ValueError as error:
                problems.add(row, error)
                continue
            group = hashlib.sha256(content.encode()).hexdigest()
            found.setdefault(name, []).append(Document(content, group))
    problems.check(f"{said}: {path}")
    return found


def batches(
    path: Path, wanted: Sequence[str] | None = None, said: str = "data.source.path"
) -> Iterator[dict[str, list[Any]]]:
    """Yield the columns of some rows at a time, of all columns where none are named; values as ``_values`` says."""
    for file in files_of(path, said):
        try:
            with ExitStack() as stack:
                schema, rows = _opened(file, wanted, stack)
                for name in wanted or ():
                    if name not in schema.names:
                        raise ValueError(f"{said}: {file} has no column {name!r}, got {', '.join(schema.names)}")
                named_values = _names(schema)
                for batch in rows:
                    kept = wanted or batch.schema.names
                    yield {name: _values(batch.column(name), named_values.get(name)) for name in kept}
        except (pa.ArrowInvalid, pa.ArrowTypeError, OSError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{said}: {file} cannot be read as {file.suffix[1:]}: {reason}") from None


def check_header(path: Path) -> None:
    """Raise ValueError where the first row of a CSV or TSV file does not name columns that its delimiter divides."""
    for file in files_of(path, str(path)):
        if (wanted := _DELIMITERS.get(file.suffix)) is None:
            return
        with file.open("rb") as opened:
            first = opened.readline(_FIRST).decode("utf-8-sig", errors="replace")
        seen = next((each for each in ";\t," if each in first), None)
        if seen and wanted not in first:
            raise ValueError(
                f"{file}, first row: got {seen!r} and no {wanted!r}, wanted columns divided by {wanted!r} in a "
                f"{file.suffix} file; save it so"
            )
        for name in next(batches(file, said=str(file)), {}):
            if len(name) > _LONGEST:
                raise ValueError(
                    f"{file}, first row: got {name[:40] + '...'!r}, of {len(name):,} characters, wanted the "
                    f"names of columns; put a row such as text{wanted}label before the others"
                )


def content_hash(path: Path, said: str = "data.source.path") -> str:
    """Return a hash of all bytes that are read."""
    digest = hashlib.sha256()
    for file in files_of(path, said):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _opened(file: Path, wanted: Sequence[str] | None, stack: ExitStack) -> tuple[Any, Iterator[Any]]:
    """Return a file's schema and its batches of rows; Parquet reads no other columns than those that are wanted."""
    if file.suffix == ".parquet":
        parquet = stack.enter_context(pyarrow.parquet.ParquetFile(file))
        schema = parquet.schema_arrow
        there = None if wanted is None else [name for name in wanted if name in schema.names]
        return schema, parquet.iter_batches(batch_size=1024, columns=there)
    if file.suffix == ".arrow":
        source = stack.enter_context(pa.OSFile(str(file), "rb"))
        head = source.read(6)
        source.seek(0)
        if head == b"ARROW1":  # the format of files; datasets writes that of streams
            whole = stack.enter_context(pyarrow.ipc.open_file(source))
            return whole.schema, (whole.get_batch(place) for place in range(whole.num_record_batches))
        stream = stack.enter_context(pyarrow.ipc.open_stream(source))
        return stream.schema, iter(stream)
    parse = pyarrow.csv.ParseOptions(delimiter=_DELIMITERS[file.suffix], newlines_in_values=True)
    rows = stack.enter_context(pyarrow.csv.open_csv(file, parse_options=parse))
    return rows.schema, iter(rows)


def _names(schema: Any) -> dict[str, list[str]]:
    """Return column -> the names that its numbers stand for, as ``datasets`` keeps them beside a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError):
        return {}


def _values(column: Any, names: Sequence[str] | None) -> list[Any]:
    """Return text as it is, whole numbers and booleans as text or as the names that they stand for, else as it is."""
    values = column.to_pylist()
    if names is None or not pa.types.is_integer(column.type):
        return [told(value) for value in values]
    return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]


def _saved(folder: Path, said: str) -> list[Path]:
    """Return the files that a split names as its own; files of caches beside them are none."""
    files = _json(folder / _STATE, said).get("_data_files") or []
    return [_inside(folder, each.get("filename") if isinstance(each, Mapping) else None, said) for each in files]


def _inside(folder: Path, name: Any, said: str) -> Path:
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{said}: {folder} names {name!r} as its part, wanted a name in that folder")
    return folder / name


def _json(file: Path, said: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{said}: {file} cannot be read: {error}; was the data set saved whole?") from None
    if not isinstance(found, dict):
        raise ValueError(f"{said}: {file} holds no object; was the data set saved whole?")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )

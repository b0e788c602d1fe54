"""Documents: what duplicates are, and which split a document falls into."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moeify.recipe.closed import reserved

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LEAST_CHARACTERS = 16
"""A shorter statement or line is trivial: many documents have it by chance."""


@dataclass(frozen=True)
class Document:
    """A text, and what it was cut from: documents of one group always fall into the same split."""

    text: str
    group: str
    """A name that is the same on every machine."""

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())


def named(told: str, taken: Collection[str]) -> str:
    """Return what something is called as a category: by its name where it may be, else by one like it; none taken."""
    stem = told
    if misnamed(stem):
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", told).strip("-._")[:60] or "category"
    if misnamed(stem):
        stem += "-1"
    number = 2
    name = stem
    while name in taken:
        name, number = f"{stem[:60]}-{number}", number + 1
    return name


def distinct(documents: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
    """Return each category's documents, in the same order, without duplicates and near duplicates.

    Documents of all categories are looked at from the largest to the smallest. One is dropped when it equals an
    earlier one up to white space, or when more than half of its non-trivial lines (statements, where lines are long),
    by their length, are in earlier ones that were kept. So a small document that a large one contains goes too.
    """
    order = sorted(
        ((category, number) for category, texts in documents.items() for number in range(len(texts))),
        key=lambda at: (-len(documents[at[0]][at[1]].text), documents[at[0]][at[1]].group, at),
    )
    seen: set[bytes] = set()
    kept: dict[str, set[int]] = {category: set() for category in documents}
    for category, number in order:
        lines = _lines(documents[category][number].text)
        known = sum(length for line, length in lines.items() if line in seen)
        if 2 * known <= sum(lines.values()):
            kept[category].add(number)
            seen.update(lines)
    return {
        category: [document for number, document in enumerate(texts) if number in kept[category]]
        for category, texts in documents.items()
    }


def _lines(text: str) -> dict[bytes, int]:
    """Return hashes of a text's distinct non-trivial lines with their lengths; of the whole text where it has none."""
    parts = (part.strip() for part in re.split("[\n;{}]", text))
    lines = {_digest(line): len(line) for line in parts if len(line) >= _LEAST_CHARACTERS}
    return lines or {_digest(words := " ".join(text.split())): max(1, len(words))}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def divide(documents: Sequence[Document], *, validation: float, test: float) -> dict[Split, list[Document]]:
    """Return a category's documents by split: ``validation`` and ``test`` are shares of its bytes.

    Groups stay whole. Their order is that of a hash of their names, so a document falls into the same split whatever
    the seed, and mostly when others are added. Every split gets at least one group.

    Raises:
        ValueError: Fewer than three groups.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.group, []).append(document)
    if len(groups) < len(SPLITS):
        raise ValueError(
            f"got {len(groups)} distinct documents, wanted at least 3: one each to train, validate and test on"
        )
    waiting = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    total = sum(document.size for document in documents)
    parts: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    shares: tuple[tuple[Split, float, int], ...] = (("test", test, 2), ("validation", validation, 1))
    for split, share, others in shares:
        held_out: list[Document] = []
        size = 0
        while len(waiting) > others:
            group = groups[waiting[0]]
            group_size = sum(document.size for document in group)
            if held_out and size + group_size / 2 > share * total:
                break
            held_out += group
            size += group_size
            waiting.pop(0)
        parts[split] = held_out
    parts["train"] = [document for name in waiting for document in groups[name]]
    return parts


def misnamed(category: str) -> str | None:
    """Return what is wrong with a category's name, or None."""
    if problem := reserved(category):
        return problem
    if not _NAME.fullmatch(category):
        return f"got category {category[:80]!r}, wanted 1 to 64 letters, digits, '_', '.', '-', the first no sign"
    return None

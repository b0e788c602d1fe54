"""Labels: what a field or column may hold to tell a document's category, and the name that the category gets."""

from typing import Any

from moeify.data.documents import named

UNLABELLED = ""
"""The one category of documents that have none."""
WAY_OUT = (
    "take another field (data.source.category; moeify init --category), or have categories made of clusters "
    "(data.source.category: null, with data.discover; moeify init --discover)"
)
"""Where a field does not tell categories."""


class UnlabelledError(ValueError):
    """A line or row tells no category."""


def told(value: Any) -> Any:
    """Return a value as a label: whole numbers and truth values as text, everything else as it is."""
    return str(value).lower() if isinstance(value, int) else value


class Labels:
    """The names of categories, given to labels in the order in which they come (``moeify.data.documents.named``)."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._names: dict[str, str] = {}

    def name(self, value: Any) -> str:
        """Return the name of the category that a value tells; ValueError where it tells none."""
        label = told(value)
        if label is None or (isinstance(label, str) and not label.strip()):
            raise UnlabelledError(f"{self._where} holds nothing, wanted a category")
        if not isinstance(label, str):
            raise ValueError(f"{self._where} holds {type(label).__name__}, wanted a category")
        if label not in self._names:
            self._names[label] = named(label, self._names.values())
        return self._names[label]

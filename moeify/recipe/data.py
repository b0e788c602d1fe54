"""What a recipe may say about data: where documents and images come from, and how they become rows.

Paths may be URLs (``s3://BUCKET/PREFIX``, ``gs://...``) everywhere: see ``moeify.far``.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic.json_schema import SkipJsonSchema

from moeify.recipe.closed import AtHand, Closed, Fraction, Name
from moeify.recipe.where import Glob, Where

BuiltinSource = Literal["python", "prose", "c", "web"]
ImageSource = Literal["mnist", "cifar10", "cifar10-jpeg"]
"""``cifar10``: as published, in binary; ``cifar10-jpeg``: the same images through JPEG, which is lossy."""
CLASSES = 10
"""Of every set of images, numbered from 0."""


class InstalledText(Closed):
    """Text that every machine with the package installed already has; each source is a category."""

    kind: Literal["installed"]
    sources: Annotated[tuple[BuiltinSource, ...], Field(min_length=2)] = ("python", "prose", "c", "web")
    """``python``: the standard library's code without docstrings and comments; ``prose``: English of docstrings
    and documentation; ``c``: C and C++ headers of installed packages; ``web``: JavaScript of installed front ends."""
    megabytes: PositiveFloat = 3.0
    """Upper bound on the text taken of each category, in 10^6 bytes."""


class TextFolders(Closed):
    """Folders of UTF-8 text files; each file is a document, each folder a category."""

    kind: Literal["folders"]
    categories: Annotated[dict[Name, Where], Field(min_length=2)]
    """Category to folder, or the URL of a prefix. Relative paths start at the recipe's folder."""
    pattern: str = "**/*"
    """Glob below each folder. Files and folders whose name starts with a dot are left out."""


class JsonLines(Closed):
    """One JSON object a line; a field names the category, where there is one."""

    kind: Literal["jsonl"]
    path: Where
    """The file, or one compressed with xz or gzip, or its URL. A relative path starts at the recipe's folder."""
    text: str = "text"
    """The field that holds the document."""
    category: str | None = "category"
    """The field that holds the category, as text or as a number; ``null``: documents have none, and ``data.discover``
    finds them."""


class Table(Closed):
    """Rows of Parquet, Arrow, CSV or TSV files, or of a data set that Hugging Face ``datasets`` saved to disk."""

    kind: Literal["table"]
    path: Where
    """The file; or a folder, of which all files are read, the splits of a saved data set too. A relative path starts at
    the recipe's folder."""
    text: str = "text"
    """The column that holds the document."""
    category: str | None = "label"
    """The column that holds the category, as text or as a number; ``null``: documents have none, and ``data.discover``
    finds them."""


class InstalledPart(Closed):
    """One of the installed sources."""

    kind: Literal["installed"]
    source: BuiltinSource
    """See ``data.source.sources``."""


class FolderPart(Closed):
    """A folder of UTF-8 text files; each file is a document."""

    kind: Literal["folder"]
    path: Where
    """The folder."""
    pattern: str = "**/*"
    """Glob below the folder. Files and folders whose name starts with a dot are left out."""


class LinesPart(Closed):
    """One JSON object a line; those with the wanted values in their fields are documents."""

    kind: Literal["jsonl"]
    path: Where
    """The file, or one compressed with xz or gzip."""
    text: str = "text"
    """The field that holds the document."""
    group: str | None = None
    """A field; documents with the same value of it fall into the same split. ``null``: only equal documents do."""
    where: dict[str, tuple[str, ...]] = Field(default={})
    """Field to values; lines that have (or list) none of them are left out."""


Part = Annotated[InstalledPart | FolderPart | LinesPart, Field(discriminator="kind")]


class MixedText(Closed):
    """Categories from different places."""

    kind: Literal["mixed"]
    categories: Annotated[dict[Name, Part], Field(min_length=2)]
    """Category to where its documents come from."""
    root: Where | None = None
    """Folder that relative paths of parts start at, itself relative to the recipe's; ``null``: the one that the
    environment variable MOEIFY_DATA names."""
    megabytes: PositiveFloat = 3.0
    """Upper bound on the text taken of each category, in 10^6 bytes."""


class StreamedFiles(Closed):
    """Files of one kind: JSON lines, Parquet, CSV, Arrow, or text, where each file is a document."""

    files: Annotated[tuple[Glob, ...], Field(min_length=1)]
    """Paths or URLs, or globs such as ``code/*.parquet``, plain or compressed. Relative ones start at the recipe's
    folder."""
    text: str = "text"
    """The field or column that holds the document; of text files it is ``text``."""


class StreamedText(Closed):
    """Files that memory need not hold, read through Hugging Face ``datasets`` (``pip install 'moeify[streamed]'``).

    Each worker reads its share of the files. Documents go to tokens on disk some at a time, and workers map those into
    memory, so that each reads what its rows ask for. The price: equal documents are left out, near duplicates stay, and
    a document's split follows from its own hash, so that shares of splits are of documents, about.
    """

    kind: Literal["streamed"]
    categories: Annotated[dict[Name, StreamedFiles], Field(min_length=2)]
    """Category to its files."""


Source = Annotated[
    InstalledText | TextFolders | JsonLines | Table | MixedText | StreamedText, Field(discriminator="kind")
]


class Tfidf(Closed):
    """Counts of BPE tokens, weighted by how few documents have them, and reduced by a truncated SVD."""

    kind: Literal["tfidf"]
    dimensions: PositiveInt = 64
    """Singular vectors that are kept."""


class Discover(Closed):
    """Categories that are clusters of whole documents: k-means on points of length 1, fitted on the train split."""

    number: Annotated[int, Field(ge=2)] | None = None
    """Clusters; ``null``: the number from 2 to ``most`` whose mean silhouette on train documents is largest."""
    most: Annotated[int, Field(ge=2)] = 8
    """Clusters, where ``number`` is null."""
    restarts: PositiveInt = 10
    """Starts of k-means; the one whose documents are nearest to their centroids counts."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the starts; a run's own seed changes no category."""
    embedding: Tfidf = Tfidf(kind="tfidf")
    """What documents are compared by."""


def cluster_names(number: int) -> tuple[str, ...]:
    """Return the names of discovered categories, the largest first."""
    return tuple(f"cluster-{place}" for place in range(number))


class TextData(Closed):
    """Documents in categories, cut into rows of tokens of a byte-level BPE trained on the train split, or of a
    pretrained model's own tokenizer."""

    kind: Literal["text"]
    source: Source
    """Where documents and their categories come from."""
    discover: Discover | None = None
    """Take clusters of documents for categories; labels of the source are only compared with them. ``null``: labels
    are the categories."""
    vocabulary: Annotated[int, Field(ge=257, le=65_000)] = 1024
    """Tokens of the byte-level BPE, the 256 bytes and the end-of-document token included. A pretrained model has a
    tokenizer already, and this says nothing."""
    length: Annotated[int, Field(ge=8)] = 128
    """Tokens a row."""
    validation: Fraction = 0.05
    """Share of each category's bytes (of all, where categories are discovered), by whole documents."""
    test: Fraction = 0.1
    """Share of each category's bytes (of all, where categories are discovered), by whole documents."""

    @model_validator(mode="after")
    def _has_categories(self) -> Self:
        if self.discover is None and self.source.kind == "jsonl" and self.source.category is None:
            raise ValueError("source.category: got null, wanted a field; name one, or set data.discover")
        if self.discover is not None and self.source.kind == "streamed":
            raise ValueError("discover: got a streamed source, whose documents are not kept; take jsonl or table")
        return self


class DigitsData(Closed):
    """scikit-learn's 1,797 handwritten digits, 8x8 intensities in 0..1; the ten digits are the categories."""

    kind: Literal["digits"]
    validation: Fraction = 0.15
    """Share of the images."""
    test: Fraction = 0.25
    """Share of the images."""


ImageClass = Annotated[int, Field(ge=0, lt=CLASSES)]


class ImageData(Closed):
    """A published set of labelled images. Categories are groups of its classes; classes in none are left out."""

    kind: Literal["images"]
    source: ImageSource
    """The set, of ten classes."""
    root: Where | None = None
    """The folder with the set's files; a relative path starts at the recipe's folder. ``null``: the one that the
    environment variable MOEIFY_DATA names."""
    objective: Literal["classify", "reconstruct"] = "classify"
    """What is learned: an image's class, or the image itself."""
    categories: Annotated[dict[Name, Annotated[tuple[ImageClass, ...], Field(min_length=1)]], Field(min_length=2)]
    """Category to the numbers of its classes, as the set counts them. A route tells its rows' category, so that of a
    classifier must leave something to say: it has two classes or more."""
    augment: bool = False
    """Train images of a classifier are moved by up to 4 pixels, and those of CIFAR-10 mirrored, at random."""
    validation: Fraction = 0.1
    """Share of the published train split, the same of each class; the test split is the published one."""

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        named = [each for classes in self.categories.values() for each in classes]
        if twice := sorted({each for each in named if named.count(each) > 1}):
            raise ValueError(f"categories: got class {twice[0]} twice, wanted each class in one category")
        for name, classes in self.categories.items():
            if self.objective == "classify" and len(classes) < 2:
                raise ValueError(
                    f"categories.{name}: got one class, {classes[0]}, which its route would tell the classifier, "
                    f"wanted two or more; join classes to groups"
                )
        return self


class GivenData(AtHand):
    """Rows for ``moeify.fit`` or ``moeify.split``."""

    kind: Literal["given"] = "given"


Data = Annotated[TextData | DigitsData | ImageData | SkipJsonSchema[GivenData], Field(discriminator="kind")]

"""What each expert does, by example: the record that ``moeify.portraits`` makes and the report draws."""

from base64 import b64decode
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moeify.recipe.closed import Closed


class Text(Closed):
    """Some tokens of a row, and what the expert has to do with each."""

    kind: Literal["text"] = "text"
    category: str
    pieces: tuple[str, ...]
    """What each token adds to the text."""
    activity: tuple[float, ...]
    """Of the expert as the token is read, 0..1."""
    rise: tuple[float, ...]
    """Nats by which the token is predicted worse, from those before it, without the expert; 0 for a row's first."""

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if not len(self.pieces) == len(self.activity) == len(self.rise):
            raise ValueError(f"got {len(self.pieces)} pieces with {len(self.activity)} and {len(self.rise)} figures")
        return self


class Picture(Closed):
    """A row of numbers as a picture."""

    kind: Literal["picture"] = "picture"
    category: str
    size: tuple[int, int, int]
    """Height, width and channels (1 or 3); a row of numbers that make no square is one pixel high."""
    pixels: str
    """A byte each, row by row, channels side by side, 0 the least and 255 the largest number shown: base64."""
    activity: float
    """Of the expert, mean over positions, 0..1."""
    rise: float
    """Nats by which the row's loss rises without the expert."""

    @model_validator(mode="after")
    def _of_that_size(self) -> Self:
        height, width, channels = self.size
        if channels not in (1, 3) or len(b64decode(self.pixels, validate=True)) != height * width * channels:
            raise ValueError(f"pixels are not those of a picture of size {self.size}")
        return self


Example = Annotated[Text | Picture, Field(discriminator="kind")]


class MissedToken(Closed):
    """A kind of token that is predicted worse without an expert."""

    text: str
    count: int
    """How often it is a target in the rows looked at."""
    rise: float
    """Mean rise of its loss, in nats."""


class Portrait(Closed):
    """One expert."""

    expert: str
    activity: float
    """Mean over the rows that run it, 0..1."""
    rise: float
    """Of their mean loss, in nats per token (or example), without the expert's own units."""
    active: tuple[Example, ...]
    """Where it is most active; one of each category before a second of any."""
    missed: tuple[Example, ...]
    """Where the loss rises most without it, picked in the same way."""
    tokens: tuple[MissedToken, ...]
    """Predicted worse without it, the most first; empty where rows hold no tokens."""


class Portraits(Closed):
    """All experts that own units, in the tree's order."""

    rows: int
    """Rows of each category that were looked at, at most."""
    split: Literal["validation"] = "validation"
    experts: tuple[Portrait, ...]

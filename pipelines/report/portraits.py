"""What each expert does, as cards: excerpts coloured by its activity, pictures, and the tokens that need it."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeify.examples import Example, Picture, Portrait, Text
from pipelines.report.recorded import Recorded
from pipelines.wording import nats, percent

MISSED_NATS = 1.0
"""A token whose loss rises by this without the expert is underlined: it keeps 1/e of its probability."""
_MOST_CARDS = 48
"""Experts on the page, the first in the tree's order."""
_OPEN = 16
"""Cards that stand open."""
_TOLD = 24
"""Cards up to which every token is told where the pointer rests."""
_MOST_BYTES = 1_200_000
"""Of all pictures together, as text."""
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
"""Characters that no text shows, or that turn the direction of what stands around them."""


@dataclass(frozen=True)
class Piece:
    """A token of an excerpt."""

    text: str
    strength: int
    """Of the colour, 0..100."""
    missed: bool
    tip: str


@dataclass(frozen=True)
class Shown:
    """An excerpt, or a picture where it has an address."""

    category: str
    pieces: tuple[Piece, ...] = ()
    data: str = ""
    """A PNG as a ``data:`` address."""
    label: str = ""
    figure: str = ""


@dataclass(frozen=True)
class Card:
    """One expert."""

    name: str
    look: str
    serves: str
    activity: str
    rise: str
    ends: tuple[str, str]
    """Activity at the palest and at the strongest colour; empty without excerpts."""
    tokens: tuple[tuple[str, str, int], ...]
    """Token, mean rise, occurrences."""
    active: tuple[Shown, ...]
    missed: tuple[Shown, ...]
    is_open: bool


@dataclass(frozen=True)
class Cards:
    """The section."""

    cards: tuple[Card, ...]
    rows: int
    pictures: bool
    left_out: int


def portraits(run: Recorded, look: Mapping[str, str], serves: Mapping[str, str]) -> Cards | None:
    """Return a card for every expert that stands in the tree; None without examples, or before any split."""
    known = run.portraits
    if known is None or run.tree is None or len(serves) < 2:
        return None
    found = [each for each in known.experts if each.expert in look][:_MOST_CARDS]
    number = _affordable(found)
    cards = tuple(
        _card(each, look[each.expert], serves[each.expert], number, place, len(found))
        for place, each in enumerate(found)
    )
    pictures = any(isinstance(example, Picture) for each in found for example in each.active)
    return Cards(cards, known.rows, pictures, len(known.experts) - len(found)) if cards else None


def _card(each: Portrait, look: str, serves: str, number: int, place: int, cards: int) -> Card:
    texts = [example for example in (*each.active, *each.missed) if isinstance(example, Text)]
    shares = [share for text in texts for share in text.activity]
    ends = (min(shares), max(shares)) if shares else (0.0, 0.0)
    active, missed = (
        tuple(_shown(example, ends, told=cards <= _TOLD, by=by) for example in examples[:number])
        for examples, by in ((each.active, "activity"), (each.missed, "rise"))
    )
    return Card(
        name=each.expert,
        look=look,
        serves=serves,
        activity=percent(each.activity),
        rise=nats(each.rise, signed=True),
        ends=(f"{ends[0]:.0%}", f"{ends[1]:.0%}") if shares else ("", ""),
        tokens=tuple((visible(token.text), f"{token.rise:+.2f}", token.count) for token in each.tokens),
        active=active,
        missed=missed,
        is_open=place < _OPEN,
    )


def _shown(example: Example, ends: tuple[float, float], *, told: bool, by: str) -> Shown:
    if isinstance(example, Picture):
        figure = percent(example.activity) if by == "activity" else f"{example.rise:+.2f}"
        label = f"{example.category}: activity {percent(example.activity)}, {example.rise:+.3f} nats without the expert"
        return Shown(example.category, data=png(example), label=label, figure=figure)
    low, high = ends
    pieces = tuple(
        Piece(
            readable(text),
            round(100 * (share - low) / ((high - low) or 1.0)),
            rise >= MISSED_NATS,
            f"activity {share:.0%}, {rise:+.2f} nats without the expert" if told else "",
        )
        for text, share, rise in zip(example.pieces, example.activity, example.rise, strict=True)
        if text
    )
    return Shown(example.category, pieces)


def readable(text: str) -> str:
    """Return a token's text inside of an excerpt: ends of lines marked, nothing that turns or hides others."""
    return _ODD.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n")).replace("\n", "↵\n")


def visible(text: str) -> str:
    """Return a token's text on its own: blanks at its ends as dots, ends of lines and tabs as signs."""
    text = _ODD.sub("\N{REPLACEMENT CHARACTER}", text).replace("\n", "↵").replace("\t", "⇥")
    core = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    return "·" * before + core + "·" * (len(text) - before - len(core))


def png(picture: Picture) -> str:
    """Return a picture as a ``data:`` address."""
    from PIL import Image

    height, width, channels = picture.size
    mode = "L" if channels == 1 else "RGB"
    image = Image.frombytes(mode, (width, height), base64.b64decode(picture.pixels))
    written = io.BytesIO()
    image.save(written, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def _affordable(found: Sequence[Portrait]) -> int:
    """Return how many examples of each sort a card may show, so that all pictures together stay small."""
    most = max((len(examples) for each in found for examples in (each.active, each.missed)), default=0)
    for number in range(most, 1, -1):
        shown = [e for each in found for some in (each.active, each.missed) for e in some[:number]]
        if sum(len(example.pixels) + 100 for example in shown if isinstance(example, Picture)) <= _MOST_BYTES:
            return number
    return 1

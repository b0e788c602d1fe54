"""Text with the experts that served it: in colours on a terminal, as a table behind the text elsewhere."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from moeify.routers.generation import Served
from pipelines.tables import console_for, table_for
from pipelines.wording import percent

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
"""Of the experts, in turn; more experts than colours take them again, reversed."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal might obey: a model may write any byte."""


def as_json(served: Sequence[Served], texts: Sequence[str], experts: Sequence[str]) -> dict[str, Any]:
    """Return the text that was written, and every token with its expert."""
    return {
        "experts": list(experts),
        "text": "".join(text for each, text in zip(served, texts, strict=True) if each.written),
        "tokens": [
            {
                "id": each.token,
                "text": text,
                "written": each.written,
                "expert": experts[each.expert],
                "probability": each.probability,
                "second": None if each.second is None else experts[each.second],
            }
            for each, text in zip(served, texts, strict=True)
        ],
    }


def print_served(served: Sequence[Served], texts: Sequence[str], experts: Sequence[str], stream: TextIO) -> None:
    """Print prompt and text, and who served what; ``texts`` holds what each token adds."""
    console, texts = console_for(stream), [_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) for text in texts]
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    if coloured:
        shown = Text()
        for each, text in zip(served, texts, strict=True):
            shown.append(text, _style(each.expert) + (" bold" if not each.written else ""))
        console.print(shown, soft_wrap=True)
        _print_legend(console, served, experts)
    else:
        console.print("".join(texts), soft_wrap=True)
        _print_table(console, served, texts, experts)


def _style(expert: int) -> str:
    turn, colour = divmod(expert, len(_COLOURS))
    return _COLOURS[colour] + (" reverse" if turn % 2 else "")


def _print_legend(console: Console, served: Sequence[Served], experts: Sequence[str]) -> None:
    legend = Text()
    for place, expert in enumerate(experts):
        count = sum(each.expert == place for each in served)
        legend.append(expert, _style(place)).append(f" {count}   ")
    console.print("\n", legend, sep="")
    console.print(_note(served), style="dim")


def _note(served: Sequence[Served]) -> str:
    asked = sum(each.second is not None for each in served)
    note = "tokens by expert: of the prompt (bold), which it read; after it, which it wrote"
    return note + (f"; {asked} with a second opinion" if asked else "")


def _print_table(console: Console, served: Sequence[Served], texts: Sequence[str], experts: Sequence[str]) -> None:
    routed = any(each.probability is not None for each in served)
    head = ("tokens", "", "expert", *(("sure", "2nd") if routed else ()), "text")
    table = table_for(console, *head, text=(1, 2, len(head) - 1))
    spent = ("100-200", "written", max(experts, key=len), *head[3:])
    room = max(16, console.width - sum(len(word) + 2 for word in spent))
    numbered = enumerate(zip(served, texts, strict=True), start=1)
    for (written, expert), group in groupby(numbered, key=lambda item: (item[1][0].written, item[1][0].expert)):
        part = list(group)
        sure = [each.probability for _, (each, _) in part if each.probability is not None]
        asked = sum(each.second is not None for _, (each, _) in part)
        first, last = part[0][0], part[-1][0]
        table.add_row(
            f"{first}-{last}" if last > first else f"{first}",
            "written" if written else "prompt",
            experts[expert],
            *((percent(sum(sure) / len(sure)), str(asked)) if routed else ()),
            _shortened(repr("".join(text for _, (_, text) in part))[1:-1], room),
        )
    console.print()
    console.print(table)
    if routed:
        console.print("sure: mean probability of the expert; 2nd: written with a second opinion", style="dim")


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."

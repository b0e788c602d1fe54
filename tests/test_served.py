import io

import pytest

from moeify.routers.generation import Served
from pipelines.served import as_json, print_served

EXPERTS = ("python", "prose")
SERVED = [
    Served(5, False, 0, 0.75),
    Served(6, False, 1, 0.5),
    Served(7, True, 1, 0.5, 0),
    Served(8, True, 1, 1.0),
]
TEXTS = ["def", " f", "(x)\n", "\x1b[2J end"]


def shown(monkeypatch: pytest.MonkeyPatch, columns: int, **more: str) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    print_served(SERVED, TEXTS, EXPERTS, stream)
    return stream.getvalue()


def test_a_table_behind_the_text_says_who_served_what(monkeypatch: pytest.MonkeyPatch) -> None:
    text, table = shown(monkeypatch, 80).split("\n\n")
    assert text == "def f(x)\n\N{REPLACEMENT CHARACTER}[2J end"
    rows = [line.split(None, 5) for line in table.splitlines()[1:-1]]
    assert [row[:5] for row in rows] == [
        ["1", "prompt", "python", "75.0%", "0"],
        ["2", "prompt", "prose", "50.0%", "0"],
        ["3-4", "written", "prose", "75.0%", "1"],
    ]
    assert rows[2][5].startswith("(x)\\n")
    assert max(map(len, shown(monkeypatch, 60).splitlines()[3:])) <= 60


def test_no_control_character_reaches_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, 80, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[2J" not in text
    assert "\x1b[1;36mdef" in text
    assert "1 with a second opinion" in text


def test_json_holds_what_was_written_and_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    told = as_json(SERVED, TEXTS, EXPERTS)
    assert told["text"] == "(x)\n\x1b[2J end"
    assert [token["second"] for token in told["tokens"]] == [None, None, "python", None]
    assert [token["expert"] for token in told["tokens"]] == ["python", "prose", "prose", "prose"]

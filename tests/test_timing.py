import pytest

from benchmarks.random_splits import Size, pair
from moeify.timing import ratio, seconds


def test_rivals_take_turns_and_ratios_are_within_turns() -> None:
    ran: list[str] = []
    times = seconds({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, turns=3, at_least=0.0)
    assert ran == ["a", "a", "b", "b", *"abbaab"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0


@pytest.mark.parametrize("widths", ["equal", "ragged"])
def test_partitions_are_about_44_percent_active(widths: str) -> None:
    _, split = pair(Size(16, 512, 4, 8, vocabulary=32, length=8), widths)
    fractions = split.partition.active_fraction.values()
    assert sum(fractions) / len(fractions) == pytest.approx(0.4375, abs=0.05)
    assert (len(set(split.partition.widths.values())) == 1) == (widths == "equal")

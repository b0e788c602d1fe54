"""Numbers as people read them."""

import pytest

from pipelines.wording import clock, nats, percent, two_digits


def test_seconds_read_as_a_clock() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "1:00:00"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000361, "0.00036"),
        (0.0996, "0.10"),
        (0.034, "0.034"),
        (-0.5, "-0.50"),
        (1.26, "1.3"),
        (9.96, "10"),
        (1234.0, "1234"),
        (1.23e-7, "1.2e-07"),
        (0.0, "0"),
        (float("inf"), "inf"),
        (None, "-"),
    ],
)
def test_small_numbers_keep_two_significant_digits(value: float | None, text: str) -> None:
    assert two_digits(value) == text


def test_losses_and_fractions_have_a_form_each() -> None:
    assert (nats(1.0), nats(0.02, signed=True), nats(None)) == ("1.0000", "+0.0200", "-")
    assert (percent(0.123), percent(None)) == ("12.3%", "-")

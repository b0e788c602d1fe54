"""Numbers as people read them."""

import math

STANDARD_ERRORS = 1.96
"""Half of a 95 % interval."""


def clock(seconds: float) -> str:
    """Return seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number of things: ``1 core``, ``2 cores``; ``many``: of those whose plural has more than an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def nats(value: float | None, *, signed: bool = False) -> str:
    """Return a loss, or with a sign a difference of losses, to the ten-thousandth."""
    if value is None:
        return "-"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def two_digits(value: float | None) -> str:
    """Return two significant digits, however small the number is, as J is from run to run."""
    if value is None:
        return "-"
    if value == 0.0 or not math.isfinite(value):
        return f"{value:.0f}"
    _, exponent = f"{value:.1e}".split("e")  # of the rounded number: .0996 counts as .10
    place = int(exponent)
    return f"{value:.1e}" if place < -5 else f"{value:.{max(0, 1 - place)}f}"


def percent(value: float | None) -> str:
    """Return a fraction 0..1 as a percentage."""
    return "-" if value is None else f"{value:.1%}"


def interval(error: float | None) -> str:
    """Return half of a 95 % interval for a standard error, in nats."""
    return "-" if error is None else nats(STANDARD_ERRORS * error)

"""Where units live: a site is a family of interchangeable units, read at one module of the network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One place of the network and its units, e.g. the FFN neurons of one layer."""

    name: str
    """E.g. ``layers.3.ffn``."""
    reader: str
    """Qualified name of the module that reads the units: its input holds one activation a unit on the last axis,
    its output is what they write together."""
    units: int

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"site {self.name!r} has {self.units} units; a site needs at least one")

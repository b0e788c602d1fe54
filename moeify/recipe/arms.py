"""Which models a run trains side by side, and in what order they are trained, kept and shown."""

from collections.abc import Collection
from typing import Literal

Control = Literal["random", "told"]
"""What a recipe may ask for beside the dense twin and the split model."""
Arm = Literal["dense", "told", "split", "random"]
"""``dense``: the dense twin; ``told``: a dense twin that is given the category; ``split``: owners as the recipe says;
``random``: same tree and widths, owners drawn."""

_ALWAYS: tuple[Arm, ...] = ("dense", "split")
_TWINS: tuple[Arm, ...] = ("dense", "told")
"""Trained from the first step on and never cut."""
_CUT: tuple[Arm, ...] = ("split", "random")
"""They fork from the dense twin at the first cut."""


def twins(controls: Collection[Control]) -> tuple[Arm, ...]:
    """Return the arms that are never cut; the dense twin comes first."""
    return tuple(arm for arm in _TWINS if arm in _ALWAYS or arm in controls)


def cut(controls: Collection[Control]) -> tuple[Arm, ...]:
    """Return the arms that are cut; the split model comes first."""
    return tuple(arm for arm in _CUT if arm in _ALWAYS or arm in controls)

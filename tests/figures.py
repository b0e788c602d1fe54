"""Pictures as they were drawn, before they became files."""

from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure


def kept(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Figure]:
    """Return a list that fills with the figures that a module saves."""
    seen: list[Figure] = []
    save = module.save_png

    def keep(figure: Figure, path: Path) -> Path:
        seen.append(figure)
        return save(figure, path)

    monkeypatch.setattr(module, "save_png", keep)
    return seen

"""Versions: moeify's own, and those of what a run stands on."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "ray", "mlflow")


def package_version() -> str:
    """Return moeify's version."""
    try:
        return version("moeify")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+unknown"


def versions() -> dict[str, str]:
    """Return Python's version, and of what a run stands on that of each package that is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

"""What this machine offers a run."""

import os

import psutil


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> float:
    """Return the memory that is free, GB."""
    return float(psutil.virtual_memory().available / 1e9)

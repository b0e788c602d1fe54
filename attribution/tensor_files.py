"""Safetensors files that others may read: their library lets nobody but the owner, whatever the umask says."""

import stat
from collections.abc import Mapping
from pathlib import Path

import torch


def save_file(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file with the rights that any new file gets beside it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "one.safetensors"
    >>> save_file({"a": torch.ones(2)}, path)
    >>> path.with_name("other").touch()
    >>> path.stat().st_mode == path.with_name("other").stat().st_mode
    True
    """
    from safetensors.torch import save_file as write

    write(dict(tensors), path, dict(metadata) if metadata is not None else None)
    usual = path.with_name(f".{path.name}.usual")
    usual.touch()  # to ask for the umask itself is to change it, for all threads
    try:
        mode = stat.S_IMODE(usual.stat().st_mode)
    finally:
        usual.unlink()
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)

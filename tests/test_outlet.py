"""Where exports go; what becomes of them is in test_export."""

import os
import signal
import time
from pathlib import Path

import pytest

from moeify.export.publish import _published
from pipelines.outlet import outlet


@pytest.mark.parametrize("there", [False, True])
def test_sigterm_leaves_no_half_of_an_export(tmp_path: Path, there: bool) -> None:
    target, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    if there:
        target.mkdir()

    def export() -> None:
        with outlet(str(target)) as out, _published(out) as draft:
            (draft / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        export()
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == ([target] if there else [])
    assert not there or not list(target.iterdir())

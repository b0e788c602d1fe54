"""Every benchmark runs once in its quick form, so that none of them rots."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text(encoding="utf-8")
)
MARKS = {
    # These take minutes even so, and what they run is tested elsewhere, too.
    "agreement": [pytest.mark.slow],
    "convert": [pytest.mark.ray, pytest.mark.slow],
    "frontier": [pytest.mark.ray, pytest.mark.slow],
    "kill": [pytest.mark.slow],
    "overhead": [pytest.mark.main_path, pytest.mark.ray, pytest.mark.slow],
    "scaling": [pytest.mark.slow],
    "mnist_split": [pytest.mark.skipif(not os.environ.get("MOEIFY_DATA"), reason="reads mnist in MOEIFY_DATA")],
}
PARAMETERS = [pytest.param(name, marks=MARKS.get(name, [])) for name in NAMES]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_benchmark_prints_its_figures_and_writes_them(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOEIFY_HOME": str(tmp_path / "runs")}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(tmp_path / "figures.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["benchmark"], found["quick"]) == (name, True)
    assert found["rows"]
    for figure, value in found["summary"].items():
        assert math.isfinite(value)
        assert f"\n{name}.{figure} = " in done.stdout

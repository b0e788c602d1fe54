"""Every benchmark runs once in its quick form, most with the slow tests, so that none of them rots."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text(encoding="utf-8")
)
MARKS = {
    "convert": [pytest.mark.ray],
    "frontier": [pytest.mark.ray],
    "overhead": [pytest.mark.main_path, pytest.mark.ray],
    "serving": [pytest.mark.skipif("MOEIFY_VLLM" not in os.environ, reason="MOEIFY_VLLM names no Python with vLLM")],
}
QUICK = ("assignment", "gradient_routing")
"""All others take half a minute and more even so; what they run is tested elsewhere, too."""
PARAMETERS = [
    pytest.param(name, marks=[*MARKS.get(name, []), *([] if name in QUICK else [pytest.mark.slow])]) for name in NAMES
]


def quickly(name: str, place: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark in its quick form; return its JSON, and what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOEIFY_HOME": str(place / "runs")}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(place / "figures.json"), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((place / "figures.json").read_text()), done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_finds_what_it_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_benchmark_prints_its_figures_and_writes_them(name: str, tmp_path: Path) -> None:
    found, told = quickly(name, tmp_path)
    assert (found["benchmark"], found["quick"]) == (name, True)
    assert found["rows"]
    for figure, value in found["summary"].items():
        assert math.isfinite(value)
        assert f"\n{name}.{figure} = " in told


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["server", "ray", "node"])
def test_whatever_is_killed_a_run_ends_with_the_same_bits(target: str, tmp_path: Path) -> None:
    found, _ = quickly("kill", tmp_path, "--only", target, "--kills", "2")
    assert found["summary"]["kills"] >= 2
    assert found["summary"]["runs_wrong"] == found["summary"]["processes_left"] == 0

import subprocess
import sys
from pathlib import Path


def test_a_compiled_split_model_compiles_once_for_all_mixtures_of_categories() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling"], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *others = map(int, done.stdout.split())
    assert first > 0
    assert others == [first] * 3

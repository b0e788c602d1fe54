"""What a process imports before it begins: every worker of every run pays for it."""

import subprocess
import sys


def test_a_worker_starts_without_what_few_runs_need() -> None:
    seldom = {"sklearn", "pandas", "scipy.stats", "networkx", "transformers", "datasets", "mlflow", "matplotlib"}
    program = f"import sys, pipelines.worker\nprint(sorted({seldom!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr

"""A program of its own: seconds of ONNX files in onnxruntime, away from torch's threads.

``python timed_onnx.py TURNS AT_LEAST GIVEN FILE ...`` prints a line of JSON: FILE -> for each work the seconds of one
run, a value a turn. GIVEN is a safetensors file: ``<work>/<input>``, what a graph is given, works numbered from 0.
FILEs take turns, in alternating order; a turn of one lasts AT_LEAST seconds. OMP_NUM_THREADS says on how many threads.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import onnxruntime
from safetensors.numpy import load_file


def main(turns: int, at_least: float, given: str, paths: list[str]) -> None:
    """Print the figures."""
    works: dict[int, dict[str, object]] = {}
    for name, values in load_file(given).items():
        place, _, each = name.partition("/")
        works.setdefault(int(place), {})[each] = values
    sessions = {path: _session(path) for path in paths}
    found: dict[str, list[list[float]]] = {path: [[] for _ in works] for path in paths}
    for number, inputs in sorted(works.items()):

        def run(path: str, inputs: dict[str, object] = inputs) -> None:
            sessions[path].run(["logits"], inputs)

        often = {}
        for path in paths:  # the first run warms up
            run(path)
            often[path] = max(1, round(at_least / max(1e-9, _seconds(run, path, 1))))
        for turn in range(turns):
            for path in reversed(paths) if turn % 2 else paths:
                found[path][number].append(_seconds(run, path, often[path]) / often[path])
    print(json.dumps(found))  # noqa: T201


def _seconds(run: Callable[[str], None], path: str, often: int) -> float:
    began = time.perf_counter()
    for _ in range(often):
        run(path)
    return time.perf_counter() - began


def _session(path: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])

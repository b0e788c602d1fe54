"""A program of its own: seconds that onnxruntime takes for graphs of ONNX files, away from torch's threads.

``python timed_onnx.py TURNS AT_LEAST WORKS FILE ...`` prints a line of JSON: FILE -> for each work the seconds of one
run, a value a turn. WORKS is a safetensors file, ``<number>/<input>`` what the graphs are given. FILEs take turns, in
alternating order; a turn lasts AT_LEAST seconds. OMP_NUM_THREADS says on how many threads.
"""

import json
import os
import sys
import time

import onnxruntime
from safetensors import safe_open


def main(turns: int, at_least: float, works: str, paths: list[str]) -> None:
    """Print the figures."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    providers = ["CPUExecutionProvider"]
    sessions = {path: onnxruntime.InferenceSession(path, options, providers=providers) for path in paths}
    given: dict[int, dict[str, object]] = {}
    with safe_open(works, framework="np") as file:
        for key in file.keys():  # noqa: SIM118
            number, _, name = key.partition("/")
            given.setdefault(int(number), {})[name] = file.get_tensor(key)
    found: dict[str, list[list[float]]] = {path: [[] for _ in given] for path in paths}
    for number in range(len(given)):
        often = {}
        for path, session in sessions.items():  # the first run warms up
            session.run(["logits"], given[number])
            often[path] = max(1, round(at_least / max(1e-9, _seconds(session, given[number], 1))))
        for turn in range(turns):
            for path in reversed(paths) if turn % 2 else paths:
                found[path][number].append(_seconds(sessions[path], given[number], often[path]) / often[path])
    print(json.dumps(found))  # noqa: T201


def _seconds(session: onnxruntime.InferenceSession, given: dict[str, object], often: int) -> float:
    began = time.perf_counter()
    for _ in range(often):
        session.run(["logits"], given)
    return time.perf_counter() - began


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])

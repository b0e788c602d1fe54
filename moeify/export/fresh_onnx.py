"""A program of its own, which knows nothing of moeify: load an ONNX file in onnxruntime and compare its logits.

``python fresh_onnx.py FILE CASES`` prints one line of JSON like ``moeify.export.fresh_check``: the largest difference
of each case. CASES is a safetensors file: in its header ``cases``, a list of [name, null], and ``batches``, how many
there are; ``given/<batch>/<input>``, what the graph is given; ``wanted/<name>/<batch>``, the logits. Batches differ in
rows, and in their length where that is free. A graph with a cache is asked twice: for whole rows behind nothing, and in
two pieces, the second behind what the first gave.
"""

import json
import os
import sys

import numpy as np
import onnxruntime
from safetensors import safe_open

_PAST = "past_key_values."


def _empty(session: onnxruntime.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """Return a cache of no token; nothing where the graph has none."""
    past = [each for each in session.get_inputs() if each.name.startswith(_PAST)]
    return {each.name: np.zeros((rows, each.shape[1], 0, each.shape[3]), np.float32) for each in past}


def _in_pieces(session: onnxruntime.InferenceSession, given: dict[str, np.ndarray], pieces: int) -> np.ndarray:
    """Return the logits of rows that are read in so many pieces, one behind the other."""
    past = _empty(session, len(next(iter(given.values()))))
    found = []
    for piece in np.array_split(given["input_ids"], pieces, axis=1) if past else (None,):
        logits, *present = session.run(None, {**given, **({} if piece is None else {"input_ids": piece}), **past})
        found.append(logits)
        past = dict(zip(past, present, strict=True))
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def main(path: str, cases: str) -> None:
    """Print the differences."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, found = [each.name for each in session.get_inputs() if not each.name.startswith(_PAST)], []
    with safe_open(cases, framework="np") as file:
        header = file.metadata()
        for name, _ in json.loads(header["cases"]):
            differences = []
            for batch in range(int(header["batches"])):
                given = {each: file.get_tensor(f"given/{batch}/{each}") for each in inputs}
                wanted = file.get_tensor(f"wanted/{name}/{batch}")
                for pieces in (1, 2) if _empty(session, 1) and wanted.shape[1] > 1 else (1,):
                    logits = _in_pieces(session, given, pieces)
                    if logits.shape != wanted.shape:
                        raise RuntimeError(f"got logits of {logits.shape}, wanted {wanted.shape}")
                    differences.append(float(np.abs(logits - wanted).max()))
            found.append(max(differences))
    print(json.dumps({"differences": found, "moeify": "moeify" in sys.modules}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

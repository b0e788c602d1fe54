"""A program of its own, which knows nothing of moeify: load an ONNX file in onnxruntime and compare its logits.

``python fresh_onnx.py FILE CASES`` prints one line of JSON like ``moeify.export.fresh_check``: the largest difference
of each case. CASES is a safetensors file: in its header ``cases``, a list of [name, null], and ``batches``, how many
there are; ``given/<batch>/<input>``, what the graph is given; ``wanted/<name>/<batch>``, the logits. Batches differ in
rows, and in their length where that is free.
"""

import json
import os
import sys

import numpy as np
import onnxruntime
from safetensors import safe_open


def main(path: str, cases: str) -> None:
    """Print the differences."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, found = [each.name for each in session.get_inputs()], []
    with safe_open(cases, framework="np") as file:
        header = file.metadata()
        for name, _ in json.loads(header["cases"]):
            differences = []
            for batch in range(int(header["batches"])):
                given = {each: file.get_tensor(f"given/{batch}/{each}") for each in inputs}
                (logits,) = session.run(["logits"], given)
                wanted = file.get_tensor(f"wanted/{name}/{batch}")
                if logits.shape != wanted.shape:
                    raise RuntimeError(f"got logits of {logits.shape}, wanted {wanted.shape}")
                differences.append(float(np.abs(logits - wanted).max()))
            found.append(max(differences))
    print(json.dumps({"differences": found, "moeify": "moeify" in sys.modules}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A program of its own: tokens a second of GGUF files in llama.cpp, away from torch's threads.

``python -m benchmarks.llama_cpp TURNS PROMPT NEW FILE ...`` prints a line of JSON: FILE -> tokens a second of reading
a prompt of PROMPT tokens and of writing NEW, medians over turns, as llama.cpp times itself (by the wall clock). FILEs
take turns. Without the package ``xllamacpp`` it prints null.
"""

import json
import os
import statistics
import sys
from importlib.util import find_spec
from typing import Any


def main(turns: int, prompt: int, new: int, paths: list[str]) -> None:
    """Print the figures."""
    if find_spec("xllamacpp") is None:
        print(json.dumps(None))
        return
    servers = {path: _server(path, prompt + new + 64) for path in paths}
    found: dict[str, list[Any]] = {path: [] for path in paths}
    for turn in range(turns + 1):  # the first warms up
        for path, server in servers.items():
            asked = {"prompt": list(range(3, 3 + prompt)), "n_predict": new, "cache_prompt": False}
            answer = server.handle_completions(asked | {"ignore_eos": True, "timings_per_token": True})
            if turn:
                found[path].append(answer["timings"])
    print(
        json.dumps(
            {
                path: [
                    statistics.median(1e3 * t[f"{p}_n"] / t[f"{p}_ms"] for t in each) for p in ("prompt", "predicted")
                ]
                for path, each in found.items()
            }
        )
    )


def _server(path: str, context: int) -> Any:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = path
    wanted.n_ctx, wanted.n_parallel = context, 1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    wanted.verbosity = 0
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(wanted)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

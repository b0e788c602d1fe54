"""A program of its own: tokens a second of GGUF files in llama.cpp, away from torch's threads.

``python timed_gguf.py TURNS PROMPT NEW VOCABULARY FILE ...`` prints a line of JSON: FILE -> tokens a second of reading
a prompt of PROMPT tokens, and of writing NEW, a value a turn, as llama.cpp times itself (by the wall clock). FILEs take
turns, in alternating order. OMP_NUM_THREADS says on how many threads.
"""

import json
import os
import sys
from typing import Any


def main(turns: int, prompt: int, new: int, vocabulary: int, paths: list[str]) -> None:
    """Print the figures."""
    servers = {path: _server(path, prompt + new + 64) for path in paths}
    found: dict[str, tuple[list[float], list[float]]] = {path: ([], []) for path in paths}
    tokens = [min(3, vocabulary - 1) + place % max(1, vocabulary - 3) for place in range(prompt)]
    for turn in range(turns + 1):  # the first warms up
        for path in reversed(paths) if turn % 2 else paths:
            asked = {"prompt": tokens, "n_predict": new, "cache_prompt": False}
            answer = servers[path].handle_completions(asked | {"ignore_eos": True, "timings_per_token": True})
            if "timings" not in answer:
                raise RuntimeError(f"llama.cpp answered a prompt of {prompt} tokens with: {json.dumps(answer)}")
            if turn:
                for rates, part in zip(found[path], ("prompt", "predicted"), strict=True):
                    rates.append(1e3 * answer["timings"][f"{part}_n"] / answer["timings"][f"{part}_ms"])
    print(json.dumps(found))  # noqa: T201


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
    numbers, files = [int(word) for word in sys.argv[1:5]], sys.argv[5:]
    main(numbers[0], numbers[1], numbers[2], numbers[3], files)

"""A program of its own, which knows nothing of moeify: load a GGUF file in llama.cpp and compare its predictions.

``python fresh_gguf.py FILE CASES`` prints one line of JSON like ``moeify.export.fresh_check``, whose CASES it reads: of
each case the largest difference of a log probability, over all tokens, after some prefixes of every row; and after
``text`` where the header has one (``text/<name>`` [vocabulary] holds the wanted logits), which tests the tokenizer.
``say`` in the header is the token that is then generated: a letter, since of half a character, or the end, nothing is
told. FILE may be changed.

The functions that choose a mixture's expert are what model cards quote.
"""

import json
import os
import sys
from typing import Any

import numpy as np
from gguf import GGUFReader
from safetensors import safe_open


def route_glm4_moe(path: str, expert: int) -> None:
    """Change the file so that every token goes to one expert: the bias chooses it, and does not weigh it."""
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name.endswith("exp_probs_b.bias"):
            tensor.data[:] = 10.0 * (np.arange(len(tensor.data)) == expert)


def route_granitemoeshared(path: str, expert: int) -> None:
    """Change the file so that every token goes to one expert: of it and its twin, the last, one has the top score."""
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name.endswith("_exps.weight"):
            tensor.data[-1] = tensor.data[expert]
        elif tensor.name.endswith("ffn_gate_inp.weight"):
            tensor.data[:-1] = 0.0
            tensor.data[expert] = -tensor.data[-1]


ROUTE = {"glm4_moe": route_glm4_moe, "granitemoeshared": route_granitemoeshared}


def _context(path: str) -> int:
    """Return how many tokens the model takes."""
    fields = GGUFReader(path).fields
    return int(fields[f"{fields['general.architecture'].contents()}.context_length"].contents())


def _served(path: str, context: int) -> Any:
    """Return llama.cpp's server, all in float32."""
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = path
    wanted.n_ctx = context
    wanted.n_parallel = 1
    if threads := int(os.environ.get("OMP_NUM_THREADS", "0")):
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
    wanted.warmup = False
    wanted.verbosity = 0
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(wanted)


def _difference(server: Any, prompt: list[int] | str, logits: Any, say: int) -> float:
    """Return the largest difference of a log probability of the next token."""
    wanted = logits.astype(np.float64) - logits.max()
    wanted -= np.log(np.exp(wanted).sum())
    asked: dict[str, Any] = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": len(wanted),
        "cache_prompt": False,
        "temperature": 0.0,
    }
    asked["logit_bias"] = [[say, 1e6]]  # of what is sampled, not of what is told
    answer = server.handle_completions(asked)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp answered a prompt of {len(prompt)} tokens with: {json.dumps(answer)}")
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    if len(found) != len(wanted):
        raise RuntimeError(f"got {len(found)} log probabilities, wanted {len(wanted)}")
    return max(abs(token["logprob"] - wanted[token["id"]]) for token in found)


def main(path: str, cases: str) -> None:
    """Print the differences."""
    found = []
    with safe_open(cases, framework="np") as file:
        inputs, header = file.get_tensor("inputs"), file.metadata()
        length, say = min(inputs.shape[1], _context(path) - 1), int(header["say"])  # one place is for what is said
        for name, expert in json.loads(header["cases"]):
            if expert is not None:
                ROUTE[header["form"]](path, expert)
            server, wanted = _served(path, length + 64), file.get_tensor(f"wanted/{name}")
            differences = [
                _difference(server, row[:end].tolist(), logits[end - 1], say)
                for row, logits in zip(inputs, wanted, strict=True)
                for end in {1, max(1, length // 2), length}
            ]
            if "text" in header:
                differences.append(_difference(server, header["text"], file.get_tensor(f"text/{name}"), say))
            found.append(max(differences))
    print(json.dumps({"differences": found, "moeify": "moeify" in sys.modules}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

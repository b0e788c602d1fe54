"""A program of its own, for an interpreter that has vLLM and knows nothing of moeify: serve a folder as one is told to.

``python served.py FOLDER`` reads one line of JSON at a time and answers each with one: ``{"prompts": [[...], ...],
"file": PATH}`` writes float32 log probabilities of the next token [prompts x positions - 1 x vocabulary] to PATH, a
safetensors file; ``{"rows": N, "prompt": N, "new": N}`` tells how many seconds that many tokens take behind prompts of
that many. The first answer, an empty object, says that the model is loaded.
"""

import json
import os
import sys
import time
from typing import Any

_SAID = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TQDM_DISABLE": "1",
}


class Served:
    """A folder in vLLM, all in float32."""

    def __init__(self, folder: str) -> None:
        from vllm import LLM

        self._model: Any = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_logprobs=-1,
            logprobs_mode="raw_logprobs",
        )
        self._vocabulary: int = self._model.llm_engine.model_config.get_vocab_size()

    def tell(self, prompts: list[list[int]], file: str) -> dict[str, float]:
        """Write the log probabilities."""
        import torch
        from safetensors.torch import save_file

        found = [each.prompt_logprobs[1:] for each in self._run(prompts, 1, prompt_logprobs=-1)]
        told = [[[place[v].logprob for v in range(self._vocabulary)] for place in row] for row in found]
        save_file({"log_p": torch.tensor(told)}, file)
        return {}

    def time(self, rows: int, prompt: int, new: int) -> dict[str, float]:
        """Return the seconds of reading prompts, the first token written, and of so many tokens more."""
        prompts = [
            [3 + (row * 31 + place * 7) % (self._vocabulary - 3) for place in range(prompt)] for row in range(rows)
        ]
        taken = []
        for tokens in (1, 1 + new):
            began = time.perf_counter()
            self._run(prompts, tokens)
            taken.append(time.perf_counter() - began)
        return {"prefill": taken[0], "decode": taken[1] - taken[0]}

    def _run(self, prompts: list[list[int]], tokens: int, **more: Any) -> Any:
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)
        return self._model.generate([{"prompt_token_ids": each} for each in prompts], asked, use_tqdm=False)


def main(folder: str) -> None:
    """Serve until there is no further line."""
    os.environ.update(_SAID)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    served = Served(folder)
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = served.tell(**asked) if "prompts" in asked else served.time(**asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A program of its own, which knows nothing of moeify: load a stock checkpoint and compare its logits with wanted ones.

``python fresh_check.py FOLDER CASES`` prints one line of JSON: the largest difference of each case. CASES is a
safetensors file: ``inputs`` [rows positions] or images, ``wanted/<name>`` of the logits' shape, and in its header
``auto``, the class of transformers that loads the checkpoint, ``form``, the format of a mixture, and ``cases``, a list
of [name, expert]: the expert to send all tokens to before they are compared; null: as loaded.

The functions that choose a mixture's expert are what model cards quote.
"""

import json
import sys
from typing import Any

import torch
from safetensors import safe_open


@torch.no_grad()
def route_glm4_moe(model: Any, expert: int) -> None:
    """Send every token to one expert: the bias chooses it, and does not weigh it."""
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.gate.e_score_correction_bias.zero_()[expert] = 10.0


@torch.no_grad()
def route_granitemoeshared(model: Any, expert: int) -> None:
    """Send every token to one expert: the spare last slot becomes its twin, and of v.x and -v.x one is the largest."""
    for moe in (layer.block_sparse_moe for layer in model.model.layers):
        for weight in (moe.experts.gate_up_proj, moe.experts.down_proj):
            weight[-1] = weight[expert]
        moe.router.weight[:-1] = 0.0
        moe.router.weight[expert] = -moe.router.weight[-1]


ROUTE = {"glm4_moe": route_glm4_moe, "granitemoeshared": route_granitemoeshared}


@torch.no_grad()
def main(folder: str, cases: str) -> None:
    """Print the differences."""
    import transformers

    found = []
    with safe_open(cases, framework="pt") as file:
        inputs = file.get_tensor("inputs")
        header = file.metadata()
        auto = getattr(transformers, header["auto"])
        model = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).eval()
        for name, expert in json.loads(header["cases"]):
            if expert is not None:
                ROUTE[header["form"]](model, expert)
            found.append((model(inputs).logits - file.get_tensor(f"wanted/{name}")).abs().max().item())
    print(json.dumps({"differences": found, "moeify": "moeify" in sys.modules}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The networks that recipes can build, freshly initialised from a seed that touches no global state."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.recipe.model import AutoencoderModel, LlamaModel

PRECISIONS: dict[Literal["none", "bfloat16"], torch.dtype | None] = {"none": None, "bfloat16": torch.bfloat16}
"""What a recipe's ``training.autocast`` may say -> what ``logits`` takes."""


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between: down(relu(up(x)))."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.Linear(inputs, hidden)
        self.down = nn.Linear(hidden, outputs)

    def forward(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Return what the hidden units write."""
        return self.down(F.relu(self.up(x)))


class Autoencoder(nn.Module):
    """Input - hidden - linear code - hidden - one logit an input."""

    def __init__(self, inputs: int, hidden: int, code: int) -> None:
        super().__init__()
        self.encoder = FeedForward(inputs, hidden, code)
        self.decoder = FeedForward(code, hidden, inputs)

    def forward(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows inputs"]:
        """Return logits of the reconstruction."""
        return self.decoder(self.encoder(x))


def build_autoencoder(config: AutoencoderModel, *, inputs: int, seed: int) -> Autoencoder:
    """Return a freshly initialised autoencoder, the same bits for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(inputs, config.hidden, config.code)


def build_llama(config: LlamaModel, *, vocabulary: int, length: int, end: int, seed: int) -> nn.Module:
    """Return a freshly initialised ``LlamaForCausalLM``, the same bits for the same seed; ``end`` ends a document."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=config.hidden,
                intermediate_size=config.ffn,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=length,
                tie_word_embeddings=config.tie_embeddings,
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=None,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        return network


def logits(network: nn.Module, inputs: Tensor, *, autocast: torch.dtype | None = None, **more: Any) -> Tensor:
    """Return the network's logits, whether it gives them bare or inside a model output; it is given ``more`` as is.

    ``autocast``: of products and convolutions; what they are made of stays in the network's own precision, and so do
    the logits, as a loss in nats needs. Casts are not kept: weights are used once a pass, their copies would pile up.
    """
    if autocast is None:
        outputs = network(inputs, **more)
        return outputs if isinstance(outputs, Tensor) else outputs.logits
    with torch.autocast(inputs.device.type, autocast, cache_enabled=False):
        low = logits(network, inputs, **more)
    return low.to(next(network.parameters()).dtype)

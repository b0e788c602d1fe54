"""What a recipe may say about the network, before any split."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from moeify.recipe.closed import Closed, Fraction


class LlamaModel(Closed):
    """A LlamaForCausalLM from scratch (RMSNorm, rotary positions, SwiGLU)."""

    kind: Literal["llama"]
    hidden: PositiveInt = 96
    """Dimensions of the residual stream."""
    layers: PositiveInt = 4
    """Blocks of attention and FFN."""
    heads: PositiveInt = 4
    """Attention heads a layer; each has an even number of dimensions, ``hidden / heads``."""
    ffn: PositiveInt = 384
    """FFN neurons a layer."""
    tie_embeddings: bool = True
    """Input embedding and output layer are one matrix."""

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Self:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"heads: got {self.heads}, wanted a divisor of hidden, {self.hidden}, "
                f"that leaves an even number of dimensions a head"
            )
        return self


class PretrainedModel(Closed):
    """A model that ``transformers`` saved, taken as it is: its weights, in float32, and its tokenizer.

    Causal language models of the families llama, mistral, qwen2, qwen3, gemma to gemma3_text, phi3, gpt_neox, gpt2,
    opt; masked ones of bert, roberta, distilbert; image classifiers of vit. Safetensors alone are read.
    """

    kind: Literal["pretrained"]
    path: Path
    """Folder with ``config.json``. A relative path starts at the recipe's folder."""
    hidden: Fraction = 0.15
    """Share of a row's tokens that are hidden from a masked language model, to be predicted."""


class AutoencoderModel(Closed):
    """An MLP autoencoder: input - hidden - code - hidden - input, ReLU, one logit a pixel."""

    kind: Literal["autoencoder"]
    hidden: PositiveInt = 256
    """Hidden units of the encoder, and of the decoder."""
    code: PositiveInt = 16
    """Dimensions of the code; never split."""


class ResnetModel(Closed):
    """A residual network for small images (He et al. 2015, section 4.2): a convolution, stages of blocks of two 3x3
    convolutions with batch norm, the mean over the map, a linear layer. Units are the channels inside of blocks."""

    kind: Literal["resnet"]
    width: PositiveInt = 16
    """Channels of the first stage; each further one has twice as many, on half the map."""
    blocks: PositiveInt = 3
    """Blocks a stage: 3 make a ResNet-20, 9 a ResNet-56."""
    stages: Annotated[int, Field(ge=1, le=4)] = 3
    """The map of the last one is ``2^(stages - 1)`` times smaller than the image, each way."""


Model = Annotated[LlamaModel | PretrainedModel | AutoencoderModel | ResnetModel, Field(discriminator="kind")]

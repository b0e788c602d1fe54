"""What a recipe may say about the network, before any split."""

from typing import Annotated, Literal, NamedTuple, Self, assert_never

from pydantic import Field, PositiveInt, model_validator
from pydantic.json_schema import SkipJsonSchema

from moeify.recipe.closed import AtHand, Closed, Fraction
from moeify.recipe.partition import PLAIN, UnitKind
from moeify.recipe.where import Where


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
    path: Where
    """Folder with ``config.json``, or its URL. A relative path starts at the recipe's folder."""
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


class Traits(NamedTuple):
    """What a network has, as far as other parts of a recipe ask for it."""

    units: tuple[UnitKind, ...] = PLAIN
    """Kinds of its units."""
    layers: bool = False
    """Whether it is a transformer, whose layers can be computed again."""
    channels: bool = False
    """Whether its units are channels of convolutions."""
    batch_norm: bool = False
    """Whether a row's outputs depend on the other rows of a training step."""


class GivenModel(AtHand):
    """A network for ``moeify.fit`` or ``moeify.split``."""

    kind: Literal["given"] = "given"
    traits: Traits
    """Those of the network itself."""


Model = Annotated[
    LlamaModel | PretrainedModel | AutoencoderModel | ResnetModel | SkipJsonSchema[GivenModel],
    Field(discriminator="kind"),
]


def traits_of(model: Model) -> Traits:
    """Return what a model's network has."""
    match model:
        case LlamaModel() | PretrainedModel():
            return Traits(units=("ffn", "heads"), layers=True)
        case AutoencoderModel():
            return Traits()
        case ResnetModel():
            return Traits(channels=True, batch_norm=True)
        case GivenModel(traits=traits):
            return traits
        case _ as never:
            assert_never(never)


def called(model: Model) -> str:
    """Return what a problem calls a model."""
    return "the given network" if isinstance(model, GivenModel) else f"model.kind {model.kind!r}"

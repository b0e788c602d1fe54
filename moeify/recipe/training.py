"""What a recipe may say about training: how long, how fast, from whom, and what happens when numbers go wrong."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from moeify.recipe.closed import Closed
from moeify.recipe.divergence import OnDivergence, StopRun


class Training(Closed):
    """AdamW with linear warm-up and cosine decay over the whole run; a cut never re-warms it."""

    steps: PositiveInt
    """Optimizer steps of the whole run; the dense twin gets the same."""
    rows: PositiveInt = 16
    """Rows (token windows or examples) a step over all workers, categories in equal shares."""
    accumulate: PositiveInt = 1
    """Passes that each worker takes its rows of a step in, every one with rows of all categories: memory for that part
    of the rows alone. Loss, gradient and schedule stay those of the whole step, but for rounding."""
    autocast: Literal["none", "bfloat16"] = "none"
    """``bfloat16``: products and convolutions of all passes, held-out losses and attribution's too, are computed in
    bfloat16 (``torch.autocast``). Weights, optimizer, losses and sums keep their precision, and so does what is made of
    the run afterwards: exports, examples, routers."""
    checkpoint_activations: bool = False
    """Keep each decoder layer's input alone and compute the rest again in the backward pass: the same bits, with less
    memory, for about a third more arithmetic."""
    learning_rate: PositiveFloat = 3e-3
    """Of AdamW, at the end of the warm-up."""
    final_learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Fraction of ``learning_rate`` that is left at the last step."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Fraction of all steps."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """On matrices only."""
    clip: PositiveFloat = 1.0
    """Largest norm of the whole gradient."""
    explosion: Annotated[float, Field(gt=1.0)] = 2.0
    """A step's mean loss has exploded beyond this many times that of the arm's first step, or of its first after a cut
    where that is more. Losses of up to so many nats never have."""
    on_divergence: OnDivergence = StopRun()
    """What is done where a loss explodes, or a loss or gradient is not finite. Nothing of such a step is ever kept."""


class Distillation(Closed):
    """Arms also learn from the pretrained model as it was loaded: its distribution over every next token."""

    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the training loss that is KL(pretrained model || arm), in nats per token; the rest is the loss."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of both; the divergence is multiplied by its square, so that gradients keep their size."""
    stream: NonNegativeFloat = 0.0
    """Adds so many times the squared distance of the residual stream behind each feed-forward block from the pretrained
    model's, over its square, mean over blocks and places, to a token's nats. Transformers with norms before their
    blocks have such streams."""

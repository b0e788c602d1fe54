"""What a recipe may say about how workers share a model's training."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moeify.recipe.closed import Closed


class Replicate(Closed):
    """Every worker holds the whole model. When its backward pass is over, the gradients of all workers are added up in
    one message, in the order of the parameters."""

    kind: Literal["replicate"] = "replicate"


class Ddp(Closed):
    """Every worker holds the whole model. Gradients are added up while the backward pass still goes on, some at a time
    (torch's DistributedDataParallel): for models whose gradients take long to travel. The numbers are those of
    ``replicate``, with three workers or more but for rounding."""

    kind: Literal["ddp"]
    bucket: PositiveInt = 25
    """Megabytes of gradients that travel at a time."""


Parallel = Annotated[Replicate | Ddp, Field(discriminator="kind")]

"""What a recipe may say about how workers share a model's training."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moeify.recipe.closed import Closed


class Replicate(Closed):
    """Every worker holds the whole model. When its backward pass is over, the gradients of all workers are added up in
    one message, in the order of the parameters; two workers on the processors of one machine add them up in memory that
    both see, to the same bits."""

    kind: Literal["replicate"] = "replicate"


class Ddp(Closed):
    """Every worker holds the whole model. Gradients are added up while the backward pass still goes on, some at a time
    (torch's DistributedDataParallel): for models whose gradients take long to travel. The numbers are those of
    ``replicate``, with three workers or more but for rounding."""

    kind: Literal["ddp"]
    bucket: PositiveInt = 25
    """Megabytes of gradients that travel at a time."""


class Fsdp(Closed):
    """Every worker holds a share of each matrix, of its gradient and of its optimizer's state, and writes that share of
    every checkpoint (torch's FSDP2). A layer's weights are gathered while it runs, and one matrix at a time where units
    move; attribution's tables are whole on every worker, and so is a new arm while it is built and the teacher of a
    distillation. The numbers are those of ``replicate`` but for rounding."""

    kind: Literal["fsdp"]


Parallel = Annotated[Replicate | Ddp | Fsdp, Field(discriminator="kind")]

"""What a run does when an arm's numbers go wrong: a loss or gradient that is not finite, or a loss that explodes."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moeify.recipe.closed import Closed, Fraction


class StopRun(Closed):
    """End the run, naming step and category; the last checkpoint is from before it."""

    kind: Literal["stop"] = "stop"


class SkipBatch(Closed):
    """Take the step without learning from it, from the last good weights: those before it where the batch alone is at
    fault, or the last checkpoint's where the loss has exploded."""

    kind: Literal["skip_batch"]
    most: PositiveInt = 10
    """Batches of one arm; at the next the run ends."""


class LowerRate(Closed):
    """Go back to the arm's last checkpoint and train on from there with a lower learning rate, to the end."""

    kind: Literal["lower_rate"]
    factor: Fraction = 0.5
    """What is left of the rate each time."""
    most: PositiveInt = 3
    """Times for one arm; at the next the run ends."""


OnDivergence = Annotated[StopRun | SkipBatch | LowerRate, Field(discriminator="kind")]

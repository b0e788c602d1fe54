"""Methods that move the network's input from nothing to what it is, through Captum.

Token inputs cannot be moved by degrees; what their embedding gives is moved instead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from attribution.ablation import CategorySums
from attribution.reading import Kept, at_readers
from attribution.subject import Probe, Subject, segments


def along_the_input(
    kind: Literal["conductance", "internal influence"],
    subject: Subject,
    batches: Sequence[Probe],
    steps: int,
    *,
    at_once: int = 512,
) -> dict[str, Float64[Tensor, "units categories"]]:
    """Return minus what Captum attributes to every unit at its reader's input, in nats per token.

    The baseline is an input (or an embedding) of zeros. Captum's internal influence is a mean gradient; it is
    multiplied by the activation, so that it speaks of nats as the others do. Of every site, one forward and backward
    pass a step and two more, ``at_once`` rows at a time or two steps of a batch, the larger. ValueError where the input
    can be moved neither itself nor behind an embedding.
    """
    from captum.attr import InternalInfluence, LayerConductance  # Not above: it loads matplotlib.

    result = {}
    with subject.still():
        for site in subject.sites:
            sums = CategorySums(subject.categories, site.units)
            for batch in batches:
                rows = len(batch.categories)
                if not rows:
                    continue
                parts = segments(batch, subject.categories)
                inputs, losses = _movable(subject, batch)
                activation = _activation(subject, batch, site.name, inputs, losses)
                method = (LayerConductance if kind == "conductance" else InternalInfluence)(
                    losses, subject.reader(site)
                )
                found: Any = method.attribute(
                    inputs,
                    additional_forward_args=(batch.inputs, batch.targets, batch.categories),
                    n_steps=steps,
                    internal_batch_size=max(at_once, 2 * rows),
                    attribute_to_layer_input=True,
                )
                values = (found if isinstance(found, Tensor) else found[0]).detach().double()
                if kind == "internal influence":
                    values = values * activation.double()
                z_RPUW = site.arrange(values)
                sums.add(parts, -z_RPUW.sum((1, 3)), z_RPUW.shape[1])
            result[site.name] = sums.means()
    return result


Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Float[Tensor, " rows"]]
"""Each row's loss from what is moved, the inputs, the targets and the categories."""


def _movable(subject: Subject, batch: Probe) -> tuple[Tensor, Losses]:
    """Return what is to be moved, and each row's loss as a function of it."""
    if batch.inputs.is_floating_point():

        def of_inputs(moved: Tensor, _: Tensor, targets: Tensor, categories: Tensor) -> Float[Tensor, " rows"]:
            return subject.row_nats(subject.forward(moved, categories), targets)

        return batch.inputs.detach(), of_inputs
    embedding = getattr(subject.inner, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Module):
        raise ValueError(
            f"inputs of {batch.inputs.dtype} cannot be moved by degrees, and {type(subject.inner).__name__} has no "
            f"get_input_embeddings() to move what they become; use IntegratedGradients, which moves activations"
        )
    seen: list[Tensor] = []
    with _output(embedding, seen.append), torch.no_grad():
        subject.forward(batch.inputs, batch.categories)
    if len(seen) != 1 or len(seen[0]) != len(batch.inputs):
        raise ValueError("the input embedding must run once in a forward pass, on all rows")

    def of_embedded(moved: Tensor, inputs: Tensor, targets: Tensor, categories: Tensor) -> Float[Tensor, " rows"]:
        with _output(embedding, lambda _: moved):
            return subject.row_nats(subject.forward(inputs, categories), targets)

    return seen[0].detach(), of_embedded


def _activation(subject: Subject, batch: Probe, site: str, inputs: Tensor, losses: Losses) -> Tensor:
    """Return what the site's reader reads; ValueError where it is not between what is moved and the loss."""
    seen: list[Tensor] = []
    kept: list[Kept] = []

    def see(x: Tensor) -> Tensor:
        seen.append(x)
        kept.append(Kept(subject.site(site), x))
        return x

    moved = inputs.detach().requires_grad_().clone()  # no leaf, which could not be changed in place
    with at_readers(subject, len(batch.categories), {site: see}):
        loss = losses(moved, batch.inputs, batch.targets, batch.categories).sum()
    moving = loss.requires_grad and seen[0].requires_grad
    arrived = moving and torch.autograd.grad(loss, seen[0], allow_unused=True)[0] is not None
    kept[0].check(arrived, ", or they do not depend on the input")
    return kept[0].value


@contextmanager
def _output(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Hand a module's output to a function that may replace it."""
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()

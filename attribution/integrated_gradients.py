"""Integrated gradients of activations in place of inputs: how the loss rises as a whole site grows from zero.

Sundararajan, Taly and Yan 2017 (arXiv 1703.01365), equation 1. a: a unit's activation at its reader; g: gradient of the
row's loss there. Axes: rows R, positions P, units U, features of a unit W, categories C.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from attribution.ablation import CategorySums
from attribution.reading import Kept, at_readers
from attribution.subject import Probe, Subject, segments


def along_the_activations(
    subject: Subject, batches: Sequence[Probe], steps: int
) -> dict[str, Float64[Tensor, "units categories"]]:
    """Return minus a times the mean of g at ``steps`` nodes of the Gauss-Legendre rule, site by site, in nats a token.

    A forward and a backward pass a node and a site. ValueError where the loss does not depend on a site.

    >>> along_the_activations(asked, rows, steps=3)["first"].round(decimals=6).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    path = [((1 + node) / 2, weight / 2) for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True)]
    found = {}
    with subject.still():
        for site in subject.sites:
            sums = CategorySums(subject.categories, site.units)
            for batch in batches:
                if len(batch.categories):
                    z_RPUW = site.arrange(_flow(subject, batch, site.name, path))
                    sums.add(segments(batch, subject.categories), -z_RPUW.sum((1, 3)), z_RPUW.shape[1])
            found[site.name] = sums.means()
    return found


def _flow(
    subject: Subject, batch: Probe, site: str, path: Sequence[tuple[float, float]]
) -> Float64[Tensor, "rows ..."]:
    """Return a times the weighted mean of g at the scales of ``path``, in the shape of the reader's input."""
    reached: dict[str, Tensor] = {}
    kept: list[Kept] = []

    def scaling(scale: float) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            reached["whole"] = x.detach().clone()  # the network may change it in place
            reached["scaled"] = (scale * reached["whole"]).requires_grad_().clone()
            kept.append(Kept(subject.site(site), reached["scaled"]))
            return reached["scaled"]

        return change

    total: Tensor | float = 0.0
    for scale, weight in path:
        with at_readers(subject, len(batch.categories), {site: scaling(scale)}):
            outputs = subject.forward(batch.inputs.detach(), batch.categories)
        loss = subject.row_nats(outputs, batch.targets).sum()
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, reached["scaled"], allow_unused=True)
        kept[-1].check(gradient is not None)
        assert gradient is not None
        total = total + weight * gradient.double()
    return total * reached["whole"].double()

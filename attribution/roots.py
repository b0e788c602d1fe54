"""Random roots of the Fisher information of a network's outputs: vectors u with E[u u^T] = F.

Carried back through the network in place of a loss's gradient, a root becomes a gradient whose second moment is the
Fisher information at every activation (Martens, Sutskever and Swersky 2012, arXiv 1206.6464, who carry back roots of
the loss's Hessian; of these losses the Hessian in the outputs is F). The gradient of a label that is sampled from the
model has the same second moment and far more noise: where a model is sure, most labels say nothing and a rare one says
very much, while a root hears of every output each time.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.hashing import signs


def categorical_root(
    outputs: Float[Tensor, "rows *positions classes"], seeds: Sequence[int]
) -> Float[Tensor, "rows *positions classes"]:
    """Return a root for logits of one class a position, independent over positions; one seed a row.

    (1 - p 1^T) (sqrt(p) * e) for random signs e: its second moment is diag(p) - p p^T.

    >>> categorical_root(torch.zeros(1, 4), [3]).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """
    return categorical_root_of(outputs, _signs_like(outputs, seeds))


def categorical_root_of(
    outputs: Float[Tensor, "*positions classes"], sign: Float[Tensor, "*positions classes"]
) -> Float[Tensor, "*positions classes"]:
    """Return the root that these signs make.

    >>> categorical_root_of(torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0])).tolist()
    [0.5, -0.5, 0.5, -0.5]
    """
    chance = outputs.softmax(-1, dtype=_wide(outputs))
    root = chance.sqrt().mul_(sign)
    return root.addcmul_(chance, root.sum(-1, keepdim=True), value=-1).to(outputs.dtype)


def bernoulli_root(outputs: Float[Tensor, "*rows outputs"], seeds: Sequence[int]) -> Float[Tensor, "*rows outputs"]:
    """Return a root for logits of independent yes and no; one seed a row. Its second moment is diag(p (1 - p)).

    >>> bernoulli_root(torch.zeros(1, 2), [1]).abs().tolist()
    [[0.5, 0.5]]
    """
    wide = outputs.to(_wide(outputs))
    root = (torch.sigmoid(wide) * torch.sigmoid(-wide)).sqrt_()
    return root.mul_(_signs_like(outputs, seeds)).to(outputs.dtype)


def _signs_like(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
    return signs(seeds, outputs[0].numel(), outputs.device).view(outputs.shape)


def _wide(outputs: Tensor) -> torch.dtype:
    return torch.promote_types(outputs.dtype, torch.float32)

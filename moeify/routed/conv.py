"""Routed residual blocks: with rows sorted by leaf, every expert is a rectangle of rows times inner channels.

Each node runs two plain convolutions over views, its rows through its channels: no mask, no gather, no copied weight.
The masked path, which runs every channel and zeroes those off the route, is the slow oracle, and is what attribution
reads.

Batch norm goes by route: in training an inner channel is normed by the mean and variance over the rows of the
categories that it serves, and its running statistics move towards those; rows that do not run it have no say, and a
batch without such rows leaves them as they are. So a channel of the core keeps the statistics of all categories, one of
a leaf those of its own. What is outside the inner channels (the first convolution's norm, ``bn2``) sees all rows. With
several workers, statistics of a batch are those of a worker's own rows, and running ones are averaged after each step
(``moeify.training``).

Axes: R rows, U inner channels; a rectangle has r rows and u channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.models.resnet import Block
from moeify.models.units import ConvUnits
from moeify.routed.ffn import Routes


class RoutedBlock(Block):
    """A block that runs only the inner channels on each row's route.

    It takes over the submodules of the dense block under their own names, so names of tensors stay the same.
    """

    def __init__(self, dense: Block, units: ConvUnits, routes: Routes) -> None:
        nn.Module.__init__(self)
        for name, child in dense.named_children():
            self.add_module(name, child)
        self.training = dense.training
        self.units = units
        self.routes = routes
        self.told: nn.Embedding | None = None
        """Category -> what is added to what ``bn1`` gives, where the block is told; see ``moeify.routed.told``."""

    def inner(self, x: Float[Tensor, "rows channels height width"]) -> Tensor:
        """Return what the active inner channels write."""
        return self._masked(x) if self.routes.masked else self._routed(x)

    def _told(self) -> Float[Tensor, "rows units 1 1"] | None:
        if self.told is None:
            return None
        assert self.routes.categories is not None
        return self.told(self.routes.categories)[:, :, None, None]

    def _routed(self, x: Tensor) -> Tensor:
        one, norm, two, told_RU = self.conv1, self.bn1, self.conv2, self._told()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        rectangles = self.routes.rectangles(self.units.name)
        wrote = []
        for (rows, units), x_r in zip(rectangles, _views(x, [each.rows for each in rectangles]), strict=True):
            hidden_ru = F.batch_norm(
                F.conv2d(x_r, one.weight[units], stride=one.stride, padding=one.padding),
                norm.running_mean[units],
                norm.running_var[units],
                norm.weight[units],
                norm.bias[units],
                training=self.training,
                momentum=norm.momentum or 0.0,
                eps=norm.eps,
            )
            if told_RU is not None:
                hidden_ru = hidden_ru + told_RU[rows, units]
            wrote.append(F.conv2d(F.relu(hidden_ru, inplace=True), two.weight[:, units], padding=two.padding))
        if len(wrote) == 1 and len(wrote[0]) == len(x):
            return wrote[0]
        shape = (len(x), len(two.weight), *(-(-side // one.stride[0]) for side in x.shape[2:]))
        return _sum(shape, [each.rows for each in rectangles], *wrote) if wrote else x.new_zeros(shape)

    def _masked(self, x: Tensor) -> Tensor:
        through = self.conv1(x).to(self.bn1.weight.dtype)  # norms count and add up in their own precision
        mask_RU = through.new_zeros(len(x), self.units.units, 1, 1)
        for rectangle in self.routes.rectangles(self.units.name):
            mask_RU[rectangle] = 1.0
        hidden = self._normed(through, mask_RU) if self.training else self.bn1(through)
        if (told_RU := self._told()) is not None:
            hidden = hidden + told_RU
        return self.conv2(F.relu(hidden) * mask_RU)

    def _normed(self, x: Tensor, mask_RU: Tensor) -> Tensor:
        """Norm each channel by the rows that the mask leaves it, and move its running statistics."""
        norm, axes = self.bn1, (0, 2, 3)
        count_U = mask_RU.sum(axes) * x.shape[2] * x.shape[3]
        mean_U = (x * mask_RU).sum(axes) / count_U.clamp(min=1)
        apart = (x - mean_U[:, None, None]) * mask_RU
        var_U = apart.square().sum(axes) / count_U.clamp(min=1)
        with torch.no_grad():
            for running_U, now_U in (
                (norm.running_mean, mean_U),
                (norm.running_var, var_U * count_U / (count_U - 1).clamp(min=1)),
            ):
                assert running_U is not None
                running_U.copy_(torch.where(count_U > 0, running_U.lerp(now_U, norm.momentum or 0.0), running_U))
        scale_U = norm.weight * (var_U + norm.eps).rsqrt()
        return apart * scale_U[:, None, None] + norm.bias[:, None, None]


class _Views(torch.autograd.Function):
    """Views of some rows each. Their gradients add up into one tensor; autograd's own would fill one for each view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Sequence[slice]) -> tuple[Tensor, ...]:
        ctx.rows, ctx.like = rows, x.shape
        return tuple(x[each] for each in rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.like)
        for rows, grad in zip(ctx.rows, grads, strict=True):
            total[rows] += grad
        return total, None


class _Sum(torch.autograd.Function):
    """The sum of pieces, each on rows of its own; its backward hands out views."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], rows: Sequence[slice], *pieces: Tensor) -> Tensor:
        ctx.rows, out = rows, pieces[0].new_zeros(shape)
        for each, piece in zip(rows, pieces, strict=True):
            out[each] += piece
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(grads[0][rows] for rows in ctx.rows))


_sum: Callable[..., Tensor] = _Sum.apply
_cut: Callable[..., tuple[Tensor, ...]] = _Views.apply


def _views(x: Tensor, rows: Sequence[slice]) -> Sequence[Tensor]:
    if len(rows) == 1 and rows[0] == slice(0, len(x)):
        return [x]
    return _cut(x, rows) if rows else ()

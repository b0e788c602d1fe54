"""Residual networks for small images, as He et al. build them for CIFAR-10.

"Deep Residual Learning for Image Recognition", 2015 (arXiv 1512.03385), section 4.2: three by three convolutions with
batch norm, stages of blocks, each stage with twice the channels on half the map, and shortcuts without parameters
(option A). Names of tensors are those of the published weights of github.com/akamaster/pytorch_resnet_cifar10.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_STAGE = "layer{}"


class Block(nn.Module):
    """relu(bn2(inner(x)) + shortcut(x)); the channels between the two convolutions are its own."""

    def __init__(self, inputs: int, width: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows channels2 height2 width2"]:
        """Return the maps of the next block."""
        own = self.bn2(self.inner(x))
        stride, more = self.conv1.stride[0], own.shape[1] - x.shape[1]
        if stride > 1 or more:
            x = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more // 2, more - more // 2))
        return F.relu(own + x)

    def inner(self, x: Tensor) -> Tensor:
        """Return what the inner channels write."""
        return self.conv2(F.relu(self.bn1(self.conv1(x))))


class ResNet(nn.Module):
    """A convolution, stages of blocks, the mean over the map and a linear layer: one logit a class.

    ``inner``: inner channels of each block, in order; not given: as many as the block's stage has.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        width: int,
        blocks: int,
        stages: int,
        inner: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        """Channels, height and width of an image."""
        self.stages = stages
        self.conv1 = nn.Conv2d(image[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width * 2 ** (number // blocks) for number in range(stages * blocks)]
        inputs = [width, *widths]
        for stage in range(stages):
            built = [
                Block(inputs[n], widths[n], (inner or widths)[n], 2 if stage and n == stage * blocks else 1)
                for n in range(stage * blocks, (stage + 1) * blocks)
            ]
            self.add_module(_STAGE.format(stage + 1), nn.Sequential(*built))
        self.linear = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows classes"]:
        """Return logits of the classes."""
        return self.linear(self.features(x))

    def features(self, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows features"]:
        """Return what the linear layer reads: the means over the last maps."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(_STAGE.format(stage + 1))(x)
        return x.mean((2, 3))

    def blocks(self) -> Iterator[tuple[str, Block, int]]:
        """Yield each block's qualified name, the block, and how many places its maps have."""
        _, height, width = self.image
        for stage in range(self.stages):
            name = _STAGE.format(stage + 1)
            # Padding of one and stride two halve a side, rounding up.
            places = -(-height // 2**stage) * -(-width // 2**stage)
            for number, block in self.get_submodule(name).named_children():
                assert isinstance(block, Block)
                yield f"{name}.{number}", block, places


def build_resnet(
    image: tuple[int, int, int], *, classes: int, width: int, blocks: int, stages: int, seed: int
) -> ResNet:
    """Return a freshly initialised network, the same bits for the same seed; touches no global state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(image, classes, width, blocks, stages)

"""Where units live: a site is a family of interchangeable units, read at one module of the network."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Site:
    """One place of the network and its units, e.g. the FFN neurons of one layer."""

    name: str
    """E.g. ``layers.3.ffn``."""
    reader: str
    """Qualified name of the module that reads the units: its input holds their activations, its output is what they
    write together."""
    units: int
    width: int = 1
    """Features a unit, side by side on the reader's input: 1 for a neuron, the head's dimensions for a head (of the
    whole group of query heads where they share keys and values)."""
    spatial: bool = False
    """Units are channels on axis 1, each a whole map: ``[rows units *space]``, removed everywhere at once. Otherwise
    features lie on the last axis, ``[rows *positions features]``, and a position is a token of its own."""

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"site {self.name!r} has {self.units} units; a site needs at least one")
        if self.width < 1 or (self.spatial and self.width > 1):
            raise ValueError(
                f"site {self.name!r} has width {self.width}; a unit has at least one feature, a channel exactly one"
            )

    @property
    def features(self) -> int:
        """Features of all units."""
        return self.units * self.width

    def arrange(self, values: Tensor) -> Float[Tensor, "rows positions units width"]:
        """View the reader's input (or anything of its shape) by position and unit; a channel's map is its width."""
        if self.spatial:
            return values.flatten(2).unsqueeze(1)
        return values.reshape(len(values), -1, self.units, self.width)

    def keeping(self, keep: Float[Tensor, "*rows units"], like: Tensor) -> Tensor:
        """Return factors a unit (for all rows, or each row its own), shaped to multiply the reader's input ``like``."""
        if self.spatial:
            return keep.reshape(*keep.shape, *[1] * (like.ndim - 2))
        features = keep.repeat_interleave(self.width, -1)
        return features if keep.ndim == 1 else features.reshape(len(keep), *[1] * (like.ndim - 2), -1)


def output_weight(reader: nn.Module, site: Site) -> Float[Tensor, "inputs dim"]:
    """Return the weight by which ``reader`` turns the units' features into its output, one row an input.

    For a convolution an input is a channel at one place of the kernel: ``units * kernel`` rows, a unit's rows side by
    side, as ``torch.nn.functional.unfold`` orders them. A sharded weight is gathered: all workers must ask.

    >>> output_weight(asked.reader(asked.site("first")), asked.site("first")).shape
    torch.Size([2, 2])
    """
    weight = getattr(reader, "weight", None)
    if isinstance(reader, nn.Conv2d) and reader.groups == 1:
        return whole(reader.weight).flatten(1).t()
    if isinstance(reader, nn.Linear):
        return whole(reader.weight).t()
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == site.features:
        return whole(weight)  # transformers' Conv1D keeps [inputs dim].
    raise ValueError(
        f"site {site.name!r}: the reader {site.reader!r} is a {type(reader).__name__}; output weights and second "
        f"moments need nn.Linear, transformers' Conv1D or nn.Conv2d without groups"
    )


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter without its gradient; one that ``fully_shard`` keeps in parts is gathered by all workers."""
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()


def patches(reader: nn.Module, site: Site, inputs: Tensor) -> Float[Tensor, "rows terms inputs"]:
    """Return what ``output_weight`` multiplies: the features at each position, or a convolution's patches."""
    if isinstance(reader, nn.Conv2d):
        if isinstance(reader.padding, str) or reader.padding_mode != "zeros":
            raise ValueError(
                f"site {site.name!r}: second moments of the convolution {site.reader!r} need a padding in numbers and "
                f"padding_mode 'zeros', got {reader.padding!r} and {reader.padding_mode!r}"
            )
        return torch.nn.functional.unfold(
            inputs, reader.kernel_size, reader.dilation, reader.padding, reader.stride
        ).transpose(1, 2)
    return inputs.reshape(len(inputs), -1, inputs.shape[-1])

"""How a site's units are written, and what has to be caught at a network's modules to follow the edges into them.

Axes: rows R, terms T of a row (its positions, or a convolution's places), features F, units U, stream D.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.reading import Kept, wide
from attribution.sites import Site, output_weight, patches, whole
from attribution.subject import Subject


@dataclass(frozen=True)
class Writer:
    """A module whose output features become a site's units."""

    module: str
    """Qualified name of an ``nn.Linear``, of transformers' ``Conv1D`` or, where it is the source's reader, of an
    ``nn.Conv2d``."""
    sections: tuple[int, ...] = ()
    """Output features of each of several stacked maps, e.g. (D, D, D) where queries, keys and values are one module.
    Within a section the units lie side by side, with as many features each. Empty: one section, the whole output."""


@dataclass(frozen=True)
class Entry:
    """The way into a site's units.

    E.g. gate and up projection of a feed-forward network, query, key and value projection of heads: contributions
    through all writers are added up.
    """

    site: str
    writers: tuple[Writer, ...]
    norm: str | None = None
    """Qualified name of the layer norm or RMS norm between the residual stream and the writers; None: they take the
    stream (or the output of the source's reader) as it is, or one of them is the source's reader."""

    def __post_init__(self) -> None:
        if not self.writers or len({writer.module for writer in self.writers}) != len(self.writers):
            raise ValueError(f"the entry of site {self.site!r} needs distinct writers, got {list(self.writers)}")


@dataclass(frozen=True)
class Linearised:
    """A norm at the tokens of a batch: y = scale * unit (+ bias), unit = (x - mean) inverse or x inverse.

    Its Jacobian takes a change x of the stream to inverse push(x - unit <unit, x> / D), the transpose takes h to
    k - unit <unit, k> / D with k = inverse pull(h).
    """

    scale: Float[Tensor, " dim"]
    unit: Float[Tensor, "rows terms dim"]
    inverse: Float[Tensor, "rows terms 1"]
    centred: bool

    def push(self, stream: Float[Tensor, "*some dim"]) -> Float[Tensor, "*some dim"]:
        """Return scale * x, x centred if the norm centres."""
        return (stream - stream.mean(-1, keepdim=True) if self.centred else stream) * self.scale

    def pull(self, gradient: Float[Tensor, "*some dim"]) -> Float[Tensor, "*some dim"]:
        """Return scale * h, then centred if the norm centres."""
        scaled = gradient * self.scale
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


def linearised(norm: nn.Module, name: str, x: Tensor, y: Tensor) -> Linearised:
    """Return what a norm did when it took ``x`` to ``y``; ValueError if it is no layer norm or RMS norm.

    ``1 + weight`` for the scale is tried, too. What is returned reproduces ``y``.
    """
    x_RTD, y_RTD = (wide(values.detach()).reshape(len(values), -1, values.shape[-1]) for values in (x, y))
    named = [getattr(norm, key, None) for key in ("eps", "variance_epsilon", "epsilon")]
    eps = next((value for value in named if value is not None), torch.finfo(x.dtype).eps)
    weight, bias = (getattr(norm, part, None) for part in ("weight", "bias"))
    # Copies: what a hook sees of a parameter that is gathered for the forward pass is gone after it.
    scale = torch.ones_like(x_RTD[0, 0]) if weight is None else whole(weight).to(x_RTD, copy=True)
    offset = 0 if bias is None else whole(bias)
    scales = [scale] if weight is None else [scale, 1 + scale]
    room = max(1e-4, 4 * torch.finfo(y.dtype).eps) * float(y_RTD.abs().max())
    centring = {nn.LayerNorm: (True,), nn.RMSNorm: (False,)}.get(type(norm), (False, True))
    for centred in centring if all(scale.shape == x_RTD.shape[-1:] for scale in scales) else ():
        moved_RTD = x_RTD - x_RTD.mean(2, keepdim=True) if centred else x_RTD
        inverse_RT1 = (moved_RTD.square().mean(2, keepdim=True) + eps).rsqrt()
        unit_RTD = moved_RTD * inverse_RT1
        for scale_D in scales:
            gap_RTD = unit_RTD * scale_D + offset - y_RTD
            if bool(gap_RTD.abs().max() <= room):
                return Linearised(scale_D, unit_RTD, inverse_RT1, centred)
    raise ValueError(
        f"the norm {name!r} ({type(norm).__name__}) computes neither a layer norm nor an RMS norm of the last axis; "
        f"edges know these two"
    )


class _Tap:
    """A module that must run once a forward pass, its first argument a tensor of the batch's rows."""

    def __init__(self, module: nn.Module, name: str, clock: Iterator[int]) -> None:
        self.module = module
        self.name = name
        self._clock = clock
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Forget the last batch."""
        self._rows = rows
        self.time = -1

    def ran(self, values: Any, what: str) -> Tensor:
        """Note that the module ran, and return ``values`` if they are a tensor of the batch's rows."""
        if self.time >= 0:
            raise ValueError(
                f"the module {self.name!r} ran more than once in a forward pass; edges are followed through one use of "
                f"a module: give each use a module of its own"
            )
        self.time = next(self._clock)
        if not isinstance(values, Tensor) or values.ndim < 2 or values.shape[0] != self._rows:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"the {what} of {self.name!r} must be a tensor [{self._rows} ... features], got {got}")
        return values

    def check(self) -> None:
        """Refuse a module that did not run."""
        if self.time < 0:
            raise ValueError(f"the module {self.name!r} did not run in forward")


class SourceTap(_Tap):
    """Holds a source site's activations."""

    def __init__(self, subject: Subject, site: Site, clock: Iterator[int]) -> None:
        reader = subject.reader(site)
        super().__init__(reader, site.reader, clock)
        self.site = site
        self.weight: Float[Tensor, "features dim"] = wide(output_weight(reader, site))
        self.width = len(self.weight) // site.units

    def begin(self, rows: int) -> None:
        """Forget the last batch."""
        super().begin(rows)
        self._kept: Kept | None = None

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Capture the reader's input (a forward pre-hook)."""
        activation = self.ran(args[0] if args else None, "input")
        site, at = self.site, 1 if self.site.spatial else -1
        if activation.shape[at] != site.features:
            raise ValueError(
                f"site {site.name!r} has {site.units} units of {site.width}, so the input of {site.reader!r} must have "
                f"{site.features} on axis {at}, got {list(activation.shape)}"
            )
        self._kept = Kept(site, activation)

    @property
    def positions(self) -> int:
        """Tokens a row, as ``Site.arrange`` counts them."""
        assert self._kept is not None
        return self.site.arrange(self._kept.value).shape[1]

    @property
    def terms(self) -> int:
        """Terms a row: positions, or places of a convolution's output."""
        return self.features(slice(0, 1)).shape[1]

    def features(self, rows: slice | Tensor) -> Float[Tensor, "rows terms features"]:
        """Return what ``weight`` multiplies, at every term of some rows."""
        assert self._kept is not None
        return patches(self.module, self.site, wide(self._kept.value[rows]))


class NormTap(_Tap):
    """Holds what a norm did."""

    def begin(self, rows: int) -> None:
        """Forget the last batch."""
        super().begin(rows)
        self.output: Tensor | None = None
        self.did: Linearised | None = None

    def after(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Linearise the norm (a forward hook)."""
        stream = self.ran(args[0] if args else None, "input")
        if not isinstance(output, Tensor):
            raise ValueError(f"the norm {self.name!r} must return a tensor, got {type(output).__name__}")
        self.output = output
        self.did = linearised(norm, self.name, stream, output)


class WriterTap(_Tap):
    """Holds the gradient of the loss with respect to a writer's output."""

    def __init__(
        self, subject: Subject, writer: Writer, site: Site, norm: NormTap | None, clock: Iterator[int]
    ) -> None:
        module = subject.module(writer.module, f"the entry of site {site.name!r}")
        super().__init__(module, writer.module, clock)
        self.site = site
        self._norm = norm
        self._sections = writer.sections
        weight: Any = getattr(module, "weight", None)
        self._weight = whole(weight) if isinstance(weight, Tensor) else None

    def begin(self, rows: int) -> None:
        """Forget the last batch."""
        super().begin(rows)
        self.caught: Tensor | None = None
        self.terms = 0
        """Terms a row: positions, or places of a convolution's output."""
        self.sections: list[slice] = []

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """Listen at the writer's output, and let a gradient arrive there (a forward hook)."""
        values = self.ran(output, "output")
        normed, taken = self._norm.output if self._norm else None, args[0] if args else None
        if self._norm and (normed is None or taken is None or not (taken is normed or torch.equal(taken, normed))):
            raise ValueError(
                f"the input of the writer {self.name!r} of site {self.site.name!r} is not what the norm "
                f"{self._norm.name!r} returned; name the norm right before it"
            )
        maps = isinstance(self.module, nn.Conv2d)
        features = values.shape[1 if maps else -1]
        self.terms = values[0].numel() // features
        lengths = self._sections or (features,)
        if sum(lengths) != features or any(length % self.site.units for length in lengths):
            raise ValueError(
                f"the writer {self.name!r} of site {self.site.name!r} has {features} output features in sections of "
                f"{list(lengths)}; sections must add up to them, each a multiple of the site's {self.site.units} units"
            )
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.sections = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        if not values.requires_grad:
            # A copy, for the network may go on to change it in place, which a leaf would not allow.
            values = values.detach().requires_grad_().clone()

        def arrived(gradient: Tensor) -> None:
            last = gradient.detach().movedim(1, -1) if maps else gradient.detach()
            self.caught = last.reshape(len(gradient), -1, features)

        values.register_hook(arrived)
        return values

    def gradient(self, rows: slice | Tensor) -> Float[Tensor, "rows terms features"]:
        """Return the gradient at some rows."""
        assert self.caught is not None
        return wide(self.caught[rows])

    def input_weight(self) -> Float[Tensor, "features dim"]:
        """Return the weight by which each output feature reads the writer's input."""
        weight = self._weight
        if weight is not None and isinstance(self.module, nn.Linear):
            return wide(weight)
        if weight is not None and weight.ndim == 2 and hasattr(self.module, "nf"):
            return wide(weight.t())  # transformers' Conv1D keeps [dim features].
        raise ValueError(
            f"the writer {self.name!r} of site {self.site.name!r} is a {type(self.module).__name__}; it must be "
            f"nn.Linear or transformers' Conv1D, or be itself the reader of the source site"
        )

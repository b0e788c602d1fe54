"""Where units are read: each site's activations on the way into its reader, watched or changed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attribution.sites import Site
from attribution.subject import Subject


@contextmanager
def at_readers(subject: Subject, rows: int, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Hand each named site's activations to its function, and the reader what it returns, for one forward pass.

    ValueError where the activations do not fit the site, and where a reader does not run just once.
    """
    ran: list[str] = []

    def hook(site: Site, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(f"{_named(site)} must take its input first, as a tensor")
            if site.name in ran:
                raise ValueError(
                    f"{_named(site)} ran more than once in a forward pass; a site is read at one place: give each use "
                    f"a module of its own"
                )
            ran.append(site.name)
            shape, axis = args[0].shape, 1 if site.spatial else -1
            if len(shape) < 2 or shape[0] != rows or shape[axis] != site.features:
                wanted = f"[{rows} {site.features} ...]" if site.spatial else f"[{rows} ... {site.features}]"
                raise ValueError(
                    f"site {site.name!r} has {site.units} units of {site.width} and the batch {rows} rows, so the "
                    f"input of {site.reader!r} must be {wanted}, got {list(shape)}"
                )
            return (change(args[0]), *args[1:]), kwargs

        return before

    with ExitStack() as stack:
        for name, change in changes.items():
            site = subject.site(name)
            handle = subject.reader(site).register_forward_pre_hook(hook(site, change), with_kwargs=True)
            stack.callback(handle.remove)
        yield
    for name in changes:
        if name not in ran:
            raise ValueError(f"{_named(subject.site(name))} did not run in forward")


def apart(activation: Tensor) -> Tensor:
    """Return the activation as a tensor of its own, so that its gradient is the one through its reader alone.

    A view; a copy where no gradient came to it before, for the network may change it in place, which a leaf does not
    allow.
    """
    if activation.requires_grad:
        return activation.view_as(activation)
    return activation.detach().requires_grad_().clone()


class Kept:
    """What a site's reader read, without a copy: of use as long as nothing writes over it."""

    def __init__(self, site: Site, activation: Tensor) -> None:
        self._site = site
        self._activation = activation.detach()
        self._version = activation._version

    @property
    def value(self) -> Tensor:
        """The activation; ValueError where it is no longer what was read."""
        self.check(True)
        return self._activation

    def check(self, arrived: bool, otherwise: str = "") -> None:
        """Refuse an activation that was written over, and one that no gradient came back to.

        ``otherwise``: what else may be the reason of the latter.
        """
        if self._activation._version != self._version:
            raise ValueError(
                f"the input of {self._site.reader!r} was changed in place after it was read, and site "
                f"{self._site.name!r} needs it as it was; let that operation return a new tensor (x = x + y for "
                f"x += y; in a module inplace=False)"
            )
        if not arrived:
            raise ValueError(
                f"the loss does not depend on the units of site {self._site.name!r}{otherwise}; drop the site"
            )


def wide(values: Tensor) -> Tensor:
    """Return float32 for half precision, and anything else as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _named(site: Site) -> str:
    return f"the reader {site.reader!r} of site {site.name!r}"

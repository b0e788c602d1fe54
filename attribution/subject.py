"""What is measured: a network, its sites, its categories and its loss; and the rows it is measured on."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from attribution.sites import Site

IGNORED = -100
"""A target that stands for none, where a loss does not ask every position; torch's own ``ignore_index``."""


@runtime_checkable
class Probe(Protocol):
    """Rows to measure. In category order they are reduced without copies; any order gives the same sums."""

    @property
    def inputs(self) -> Tensor:
        """What the network takes; rows first."""
        ...

    @property
    def targets(self) -> Tensor:
        """The true labels, as ``nats`` takes them; rows first."""
        ...

    @property
    def categories(self) -> Int[Tensor, " rows"]:
        """Index of each row's category."""
        ...

    @property
    def ids(self) -> Int[Tensor, " rows"]:
        """Each row's number, the same however rows are batched and sharded: it seeds the row's sampled labels."""
        ...


@dataclass(frozen=True)
class Rows:
    """A batch for those who have no class of their own."""

    inputs: Tensor
    targets: Tensor
    categories: Int[Tensor, " rows"]
    ids: Int[Tensor, " rows"]

    def take(self, index: Tensor | slice) -> "Rows":
        """Return some of the rows."""
        return Rows(self.inputs[index], self.targets[index], self.categories[index], self.ids[index])


def batched(inputs: Tensor, targets: Tensor, categories: Int[Tensor, " rows"], rows_at_once: int) -> list[Rows]:
    """Cut a whole data set into batches, each an even mix of the categories and in their order.

    ValueError for inputs, targets and categories of different lengths.

    >>> labels = torch.tensor([1, 0, 1, 0])
    >>> [batch.ids.tolist() for batch in batched(torch.eye(4), labels, labels, rows_at_once=2)]
    [[1, 0], [3, 2]]
    """
    if rows_at_once < 1:
        raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
    if not len(inputs) == len(targets) == len(categories):
        raise ValueError(
            f"{len(inputs)} rows of inputs, {len(targets)} of targets and {len(categories)} categories; give each row "
            f"one of each"
        )
    order = torch.argsort(categories, stable=True)
    count = -(-len(order) // rows_at_once)
    whole = Rows(inputs, targets, categories, torch.arange(len(order)))
    return [whole.take(order[part::count]) for part in range(count)]


def plain_forward(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a forward pass that has no use for categories; logits are taken out of a model output.

    >>> plain_forward(nn.Identity())(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """

    def forward(inputs: Tensor, _: Tensor) -> Tensor:
        outputs: Any = network(inputs)
        return outputs if isinstance(outputs, Tensor) else _outputs(getattr(outputs, "logits", outputs), "the network")

    return forward


def _outputs(found: Any, whose: str) -> Tensor:
    """Refuse outputs that are no tensor."""
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{whose} returned {type(found).__name__}, no tensor (nor anything with logits); give Subject(run=...), a "
            f"function of inputs and categories that returns the outputs that nats takes"
        )
    return found


@dataclass(frozen=True)
class Subject:
    """A network with named sites and a loss in nats.

    ``network`` may be wrapped by DistributedDataParallel or sharded by ``fully_shard``; sites are named as in the
    network inside. Measuring runs it in eval mode and puts back its modes and ``requires_grad``.
    """

    network: nn.Module
    sites: tuple[Site, ...]
    categories: tuple[str, ...]
    nats: Callable[[Tensor, Tensor], Float[Tensor, " rows"]]
    """``nats(outputs, targets)``: each row's summed loss."""
    sample: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    """``sample(outputs, seeds)``: targets drawn from the model's own distribution, one seed a row: the Fisher
    information where there is no ``root``. With neither there is none but that of the true labels."""
    run: Callable[[Tensor, Tensor], Tensor] | None = None
    """``run(inputs, categories)``: the forward pass, outputs returned; not given: ``network(inputs)``."""
    root: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    """``root(outputs, seeds)``: vectors in the outputs' shape whose second moment is the outputs' Fisher information,
    one seed a row, such as ``attribution.roots.categorical_root``: the same as ``sample`` tells, with less noise."""

    def __post_init__(self) -> None:
        if not self.categories or len(set(self.categories)) != len(self.categories):
            raise ValueError(f"categories must be distinct names, at least one, got {list(self.categories)}")
        if not self.sites:
            raise ValueError("no sites to measure; give at least one")
        for site in self.sites:
            if not isinstance(site, Site):
                raise ValueError(f"sites: got {site!r:.60}, wanted a Site(name, reader, units) of attribution.sites")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"sites must have distinct names, got {names}")
        for site in self.sites:
            self.module(site.reader, f"site {site.name!r}")

    @property
    def inner(self) -> nn.Module:
        """The network without DistributedDataParallel around it."""
        network = self.network
        return network.module if isinstance(network, DistributedDataParallel) else network

    def site(self, name: str) -> Site:
        """Return a site by name."""
        for site in self.sites:
            if site.name == name:
                return site
        names = [site.name for site in self.sites]
        near = difflib.get_close_matches(name, names, n=3) or names[:3]
        raise ValueError(f"no site {name!r}; nearest: {', '.join(near)}")

    def module(self, name: str, whose: str) -> nn.Module:
        """Return a submodule of the network by its qualified name; ``whose`` names the asker in errors."""
        try:
            return self.inner.get_submodule(name)
        except AttributeError:
            names = [there for there, _ in self.inner.named_modules() if there]
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
            nearest = ", ".join(near) or "none"
            raise ValueError(f"{whose}: the network has no module {name!r}; nearest: {nearest}") from None

    def reader(self, site: Site) -> nn.Module:
        """Return the module that reads a site's units."""
        return self.module(site.reader, f"site {site.name!r}")

    def forward(self, inputs: Tensor, categories: Tensor) -> Tensor:
        """Run the network on rows."""
        return _outputs((self.run or plain_forward(self.inner))(inputs, categories), "run")

    @contextmanager
    def still(self) -> Iterator[None]:
        """Eval mode, gradients on, none of them a parameter's, for the time being."""
        network = self.network
        _reshard(network)
        modes = [(module, module.training) for module in network.modules()]
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        network.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            unsynced = network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
            with unsynced, torch.enable_grad():
                yield
        finally:
            _reshard(network)
            for module, training in modes:
                module.training = training
            for parameter in trained:
                parameter.requires_grad_(True)

    @property
    def draws(self) -> bool:
        """Whether there is Fisher information of the model's own distribution."""
        return self.root is not None or self.sample is not None

    def drawn(self, outputs: Tensor, targets: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return cotangents of the outputs whose second moment is their Fisher information: a root where there is one,
        otherwise the gradient of the loss of labels drawn from the model. 0 where ``targets`` ask for nothing."""
        outputs = outputs.detach()
        if self.root is not None:
            drawn = self.root(outputs, seeds)
            if not targets.is_floating_point() and targets.shape == drawn.shape[:-1]:
                drawn = drawn.masked_fill((targets == IGNORED)[..., None], 0)
            return drawn
        assert self.sample is not None
        with torch.no_grad():
            labels = self.sample(outputs, seeds)
        if not targets.is_floating_point() and targets.shape == labels.shape:
            labels = torch.where(targets == IGNORED, targets, labels)
        return self.cotangent(outputs, labels)

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of the rows' losses with respect to the outputs."""
        outputs = outputs.detach().requires_grad_()
        loss_R = self.row_nats(outputs, targets)
        if not loss_R.requires_grad:
            raise ValueError("nats(outputs, targets) does not depend on the outputs; return each row's loss")
        return torch.autograd.grad(loss_R.sum(), outputs)[0]

    def row_nats(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " rows"]:
        """Return each row's summed loss; ValueError where the loss function does not give one a row."""
        loss_R = self.nats(outputs, targets)
        if not isinstance(loss_R, Tensor) or tuple(loss_R.shape) != (len(outputs),):
            got = list(loss_R.shape) if isinstance(loss_R, Tensor) else type(loss_R).__name__
            raise ValueError(
                f"nats must return one loss a row, a tensor [{len(outputs)}], got {got}; cross_entropy does with "
                f"reduction='none', summed over a row's positions"
            )
        return loss_R


def _reshard(network: nn.Module) -> None:
    """Free gathered parameters of ``fully_shard``: their ``requires_grad`` follows the shards' only when gathered."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Segment:
    """Where a category's rows are in a batch, and how many: a slice if the batch is in category order."""

    category: int
    where: slice | Tensor
    rows: int


def segments(batch: Probe, names: Sequence[str]) -> list[Segment]:
    """Check a batch and return its categories' rows."""
    categories = batch.categories.cpu()
    for what, tensor in (("inputs", batch.inputs), ("targets", batch.targets), ("ids", batch.ids)):
        if len(tensor) != len(categories):
            raise ValueError(f"a batch has {len(categories)} categories but {len(tensor)} rows of {what}")
    if categories.ndim != 1 or categories.dtype == torch.bool or categories.is_floating_point():
        raise ValueError(
            f"categories must be whole numbers [rows], each row's place among {', '.join(names)}, got "
            f"{categories.dtype} {list(categories.shape)}; make them torch.int64"
        )
    if int(categories.min()) < 0 or int(categories.max()) >= len(names):
        raise ValueError(
            f"a batch has categories {int(categories.min())} to {int(categories.max())}; "
            f"there are {len(names)}, numbered from 0: {', '.join(names)}"
        )
    ordered = bool((categories[1:] >= categories[:-1]).all())
    found: list[Segment] = []
    start = 0
    for category, number in enumerate(torch.bincount(categories, minlength=len(names)).tolist()):
        if number:
            where = slice(start, start + number) if ordered else (categories == category).nonzero().squeeze(1)
            found.append(Segment(category, where, number))
        start += number
    return found

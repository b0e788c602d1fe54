"""Routers inside of the network: at every split block a linear map scores the leaves, token by token.

What stock mixtures of experts have (``moeify.export.stock_moe``), so a split model can leave with them. They are
distilled from the routes that labels give: the network is frozen and runs along them, and a multinomial logistic
regression without intercept, which no stock router has, learns each token's leaf from what the block reads. That knows
of earlier tokens what attention has brought along, so the router is causal, and the first block's sees least.

Then tokens go where these routers send them, and others learn the leaves from what blocks read there, which is what
they will read in use. Of the two those are kept whose choices have the lower loss on validation rows.

Axes: N tokens, D numbers that a block reads, E leaves.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.recipe.closed import Closed
from moeify.recipe.config import RunConfig
from moeify.result import MEAN
from moeify.routed.ffn import RoutedFfn
from moeify.routed.split_model import SplitModel
from moeify.routers.router import leaf_of_category, leaves
from moeify.task import Batch, Partial, Task

_ROWS = 256
"""Of each category that routers learn from."""
_POSITIONS = 32
"""Tokens of a row that they learn from, drawn once."""
_PENALTIES = (0.01, 1.0)
"""Inverse strengths that are tried; the cross-entropy of every eighth token, which was kept back, decides."""
_KEPT_BACK = 8

_Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class LayerRouters:
    """A router for every split block."""

    experts: tuple[str, ...]
    """Leaves, in the tree's order."""
    weights: Mapping[str, Float[Tensor, "leaves dim"]]
    """Site -> what scores them. The largest score in training is 1 or -1: to choose by, all scales are equal."""

    def rounded(self, dtype: torch.dtype) -> "LayerRouters":
        """Return them as a file of this dtype holds them, in float32."""
        return LayerRouters(self.experts, {name: weight.to(dtype).float() for name, weight in self.weights.items()})


class JointReport(Closed):
    """A phase in which network and routers learned together (``moeify.routers.joint``); test losses as below."""

    steps: int
    tokens: int
    """That were read, beyond the run's own."""
    label: dict[str, float]
    """Loss by category before it, routed by label."""
    dense: dict[str, float] | None
    """Loss of the dense twin after as many steps; None where there was none at hand."""


class LayerRouterReport(Closed):
    """How well routers inside of the network route, on test data: losses in nats per token, and their mean."""

    accuracy: dict[str, float]
    """Site -> share of tokens that it sends to their label's leaf, 0..1."""
    label: dict[str, float]
    """Loss by category, routed by label."""
    router: dict[str, float]
    """The same, routed by themselves."""
    joint: JointReport | None = None
    """What went before, where the network learned with them."""

    @property
    def router_tax(self) -> float:
        """Rise of the mean loss above label routing, as a fraction of it."""
        return self.router[MEAN] / self.label[MEAN] - 1.0


class Distilled(NamedTuple):
    """Routers, and what they cost."""

    routers: LayerRouters
    report: LayerRouterReport


@dataclass(frozen=True)
class Distil:
    """Trains routers on a run's data."""

    task: Task
    config: RunConfig

    @torch.no_grad()
    def __call__(self, model: SplitModel, known: LayerRouters | None = None) -> Distilled:
        """Return routers of a split model that serves some or all of the task's categories, and what they cost.

        ``known``: those that sent its tokens in training, where there were any. No weight of the model changes; the
        same bits each time. ValueError where its blocks cannot route tokens.
        """
        self._check(model)
        found: list[tuple[float, LayerRouters]] = []
        for _ in range(2):
            routers = self._fit(model, found[-1][1] if found else known)
            found.append((self._losses(model, "validation", routers)[MEAN], routers))
        _, routers = min(found, key=lambda each: each[0])
        report = LayerRouterReport(
            accuracy=self._accuracy(model, routers),
            label=self._losses(model, "test", None),
            router=self._losses(model, "test", routers),
        )
        return Distilled(routers, report)

    @torch.no_grad()
    def start(self, model: SplitModel) -> LayerRouters:
        """Return routers that learned from what blocks read along labels' routes; ValueError as above."""
        self._check(model)
        return self._fit(model, None)

    @torch.no_grad()
    def losses(self, model: SplitModel, routers: LayerRouters | None) -> dict[str, float]:
        """Return category -> test loss, nats per token, and the mean over categories; None: routed by label."""
        return self._losses(model, "test", routers)

    def _check(self, model: SplitModel) -> None:
        if isinstance(self.task, Partial) or self.task.unit != "token":
            raise ValueError("routers inside of the network are for text that is read from its first token on")
        if len(leaves(model)) < 2:
            raise ValueError(f"the split model has one leaf, {leaves(model)[0]!r}; there is nothing to route")

    def _fit(self, model: SplitModel, routers: LayerRouters | None) -> LayerRouters:
        """Return routers for what blocks read where tokens go as these routers say; None: as labels say."""
        generator = torch.Generator().manual_seed(self.config.seed)
        read: dict[str, list[Tensor]] = {site.name: [] for site in model.space.sites}
        labels = []
        for batch, inputs, leaf_N in self._read(model, "train", routers):
            rows, positions = batch.inputs.shape
            picked = torch.rand(rows, positions, generator=generator).topk(min(_POSITIONS, positions)).indices
            picked_N = (picked + positions * torch.arange(rows).unsqueeze(1)).flatten()
            labels.append(leaf_N[picked_N])
            for name, x_ND in inputs.items():
                read[name].append(x_ND[picked_N])
        leaf_N = torch.cat(labels)
        return LayerRouters(leaves(model), {name: _classifier(torch.cat(x), leaf_N) for name, x in read.items()})

    def _accuracy(self, model: SplitModel, routers: LayerRouters) -> dict[str, float]:
        right, tokens = dict.fromkeys(routers.weights, 0), 0
        for _, inputs, leaf_N in self._read(model, "test", routers):
            tokens += len(leaf_N)
            for name, x_ND in inputs.items():
                right[name] += int(((x_ND @ routers.weights[name].t()).argmax(-1) == leaf_N).sum())
        return {name: number / tokens for name, number in right.items()}

    def _losses(self, model: SplitModel, part: _Part, routers: LayerRouters | None) -> dict[str, float]:
        """Return category -> nats per token, and the mean over categories."""
        nats, rows = torch.zeros(len(model.categories), dtype=torch.float64), torch.zeros(len(model.categories))
        for batch in self._batches(model, part):
            each_R = self.task.nats(_run(model, batch, routers), batch.targets).double()
            nats.index_add_(0, batch.categories, each_R)
            rows += torch.bincount(batch.categories, minlength=len(rows))
        each = (nats / rows / self.task.units_per_row).tolist()
        return {**dict(zip(model.categories, each, strict=True)), MEAN: sum(each) / len(each)}

    def _read(
        self, model: SplitModel, part: _Part, routers: LayerRouters | None
    ) -> Iterator[tuple[Batch, dict[str, Tensor], Int[Tensor, " tokens"]]]:
        """Yield batches, what each site reads of them [tokens dim], and each token's leaf by label."""
        leaf_C = leaf_of_category(model)
        for batch in self._batches(model, part):
            with reading(model) as inputs:
                _run(model, batch, routers)
            yield batch, inputs, leaf_C[batch.categories].repeat_interleave(batch.inputs.shape[1])

    def _batches(self, model: SplitModel, part: _Part) -> Iterator[Batch]:
        """Yield rows of the model's categories, counted as it counts them, in leaf order."""
        settings, rounds = self.config.evaluation, len(self.config.rounds)
        own_C = torch.tensor([model.categories.index(c) if c in model.categories else -1 for c in self.task.categories])
        if part == "train":
            batches = self.task.probe_batches(rounds + 1, _ROWS, settings.rows_at_once)
        else:
            rows = settings.validation_rows if part == "validation" else settings.test_rows
            batches = self.task.held_out_batches(part, rows, settings.rows_at_once)
        for batch in batches:
            own_R = own_C[batch.categories]
            served = (own_R >= 0).nonzero()[:, 0]
            if len(served):
                kept = served[model.order(own_R[served])]
                taken = batch.take(kept)
                yield Batch(taken.inputs, taken.targets, own_R[kept], taken.ids)


@contextmanager
def reading(model: SplitModel) -> Iterator[dict[str, Float[Tensor, "tokens dim"]]]:
    """Give site -> what its block reads while the model runs in the context, tokens in the order of its inputs."""
    found: dict[str, Tensor] = {}

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, RoutedFfn)
        found[module.units.name] = given[0].flatten(0, -2)

    blocks = [module for module in model.network.modules() if isinstance(module, RoutedFfn)]
    hooks = [block.register_forward_pre_hook(hook) for block in blocks]
    try:
        yield found
    finally:
        for each in hooks:
            each.remove()


def margin(model: SplitModel, routers: LayerRouters, rows: Int[Tensor, "rows positions"]) -> float:
    """Return by how much the best score leads the second, least over tokens and blocks, of the largest score there.

    Rounding cannot move a token to another leaf where this is well above it.
    """
    with reading(model) as read:
        model.by_layer(rows, routers.weights)
    least = float("inf")
    for name, x_ND in read.items():
        score_NE = x_ND @ routers.weights[name].t()
        first, second = score_NE.topk(2).values.unbind(-1)
        least = min(least, ((first - second).min() / score_NE.abs().max()).item())
    return least


def _run(model: SplitModel, batch: Batch, routers: LayerRouters | None) -> Tensor:
    model.eval()
    return model(batch.inputs, batch.categories) if routers is None else model.by_layer(batch.inputs, routers.weights)


def _classifier(x_ND: Float[Tensor, "tokens dim"], leaf_N: Int[Tensor, " tokens"]) -> Float[Tensor, "leaves dim"]:
    """Return weights of a logistic regression without intercept; the largest score of a token is 1 or -1."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    deviation_D = x_ND.double().std(0).clamp_min(1e-9)
    scaled_ND = x_ND.double() / deviation_D
    back_N = torch.arange(len(leaf_N)) % _KEPT_BACK == 0
    found = []
    for penalty in _PENALTIES:
        fit = LogisticRegression(C=penalty, fit_intercept=False, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what it has found by then is judged like any other
            fit.fit(scaled_ND[~back_N].numpy(), leaf_N[~back_N].numpy())
        weight_ED = torch.from_numpy(fit.coef_)
        if len(weight_ED) == 1:  # scikit-learn keeps one row of two, of the second against the first
            weight_ED = torch.cat([-weight_ED, weight_ED]) / 2
        loss = nn.functional.cross_entropy(scaled_ND[back_N] @ weight_ED.t(), leaf_N[back_N]).item()
        found.append((loss, weight_ED / deviation_D))
    _, weight_ED = min(found, key=lambda each: each[0])
    return (weight_ED / (x_ND.double() @ weight_ED.t()).abs().max()).float()

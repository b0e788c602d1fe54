"""What a notebook holds of a split: the model, the dense twin, and what one asks of them."""

import copy
import html
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from attribution.table import AttributionTable, Unsigned
from moeify import pictures
from moeify.attributing import table_of
from moeify.evaluation import losses_without, own_other, row_losses, tax
from moeify.events import MemoryTracker, Step
from moeify.examples import Portraits
from moeify.export.model_card import About, Checked
from moeify.export.pruning import prune, without
from moeify.export.publish import Dtype, How, Origin, export_dense, export_moe, export_split
from moeify.export.stock import Form, to_dense
from moeify.models.fused import closed
from moeify.portraits import portraits
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.result import Result
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.task import Task
from moeify.world import Solo

if TYPE_CHECKING:
    from moeify.pictures import Figure


@dataclass(frozen=True)
class Trained:
    """What a run said on its way to a split."""

    result: Result
    """Its figures: rounds, losses of all arms, verdicts."""
    events: MemoryTracker
    """All events, for curves."""


@dataclass(frozen=True, repr=False, eq=False)
class Split:
    """A network that was split by the categories of its data, and the rows that it is judged by.

    It never changes: ``ablate`` returns another one. In a notebook it shows its tree and its losses.

    Of an autoencoder with a core of 8 units and two experts of 4, neither trained nor cut to fit:

    >>> split  # doctest: +ELLIPSIS
    Split of 16 units among 3 experts; a category runs 75.0%
    core         8 units  50.0%
      dark       4 units  25.0%
      light      4 units  25.0%
    tax, nats per example above the dense twin: dark ..., light ..., mean ...
    """

    model: SplitModel
    """Takes rows and the index of each row's category."""
    dense: SplitModel
    """The dense twin: trained alike and never split; where nothing was trained, the network as it was given."""
    task: Task
    """The rows, shared out over train, validation and test."""
    config: RunConfig
    test_loss: Mapping[Arm, Mapping[str, float]]
    """Arm (``split``, ``dense``, controls) -> category -> nats per token or example on the test rows."""
    trained: Trained | None = None
    """None where nothing was trained, or experts were taken out since."""

    @property
    def partition(self) -> Partition:
        """The expert tree, and the units of each site that each expert owns."""
        return self.model.partition

    @property
    def categories(self) -> tuple[str, ...]:
        """In the order that category indices count."""
        return self.model.categories

    @property
    def tax(self) -> dict[str, float]:
        """Category -> nats by which the split model's test loss is above the dense twin's; and ``mean``."""
        return tax(self.test_loss["split"], self.test_loss["dense"])

    def loss(self, model: SplitModel) -> dict[str, float]:
        """Return category -> another model's loss on the same test rows; it must serve the same categories."""
        return loss_of(model, self.task, self.config)

    def ablate(self, *categories: str) -> "Split":
        """Return the split without the experts that serve none but these categories.

        Its model is smaller. It still takes rows of them, which run on what they share with others; all other
        categories' outputs stay the same. ValueError where a category has no expert of its own. To take an expert out
        for a moment: ``with split.model.ablated("dark"): ...``.

        >>> rest = split.ablate("dark")
        >>> rest.model.space.units, rest.test_loss["split"]["light"] == split.test_loss["split"]["light"]
        (12, True)
        """
        model = prune(self.model, without(self.partition, categories))
        losses: dict[Arm, Mapping[str, float]] = {**self.test_loss, "split": self.loss(model)}
        return replace(self, model=model, test_loss=losses, trained=None)

    def extract(self, *categories: str) -> nn.Module:
        """Return a dense network of the units on these categories' one route; it takes rows alone, and is smaller.

        A model of ``transformers`` stays one of its class, with ``save_pretrained``; its layers are then as wide as the
        widest, the rest zeros. ValueError for categories of different routes.

        >>> light = split.extract("light")
        >>> light.encoder.up.out_features + light.decoder.up.out_features
        12
        """
        stock = hasattr(self.model.network, "save_pretrained")
        return closed(to_dense(self.model, categories, padded=stock).network)

    def export(self, out: str | Path, *categories: str, moe: Form | None = None, dtype: Dtype = "float32") -> Checked:
        """Write it to a new folder, with a model card, and return what checking it against the split model said.

        The split model for ``moeify.load_split``; with ``categories``, a dense model of the one route that they share,
        for ``from_pretrained`` where it is a model of ``transformers``; with ``moe``, a stock mixture of experts.
        Tokenizers are not known here: save yours beside it. ValueError for an ``out`` that exists, and for what cannot
        be written in that form.

        >>> import moeify, tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "split"
        >>> max(split.export(folder).differences.values()) < 1e-4
        True
        >>> moeify.load_split(folder).categories
        ('dark', 'light')
        """
        if moe and categories:
            raise ValueError("got categories and moe: name the categories of one dense model, or the mixture's form")
        # Weights are rounded in place, and the card of a run would speak of experts that may be gone.
        origin = Origin(copy.deepcopy(self.model), self.config.name)
        how = How(dtype, about=About(result=self.trained.result) if self.trained else About())
        if moe:
            return export_moe(origin, moe, Path(out), how)
        return export_dense(origin, categories, Path(out), how) if categories else export_split(origin, Path(out), how)

    def attribute(self) -> AttributionTable:
        """Measure how much each unit matters to each category, as the network stands; units lie in tree order.

        Units off a category's route matter nothing to it. Before a cut they may have: ``moeify.attribute`` of the dense
        twin, or of the network as it was given, says how much.
        """
        asked = self.config.attribution
        return table_of(self.model, self.task, asked.rows, asked.rows_at_once, self.config.seed)

    def removals(self) -> dict[str, dict[str, float]]:
        """Return category -> expert -> nats by which its test loss rises without that expert and all below it."""
        if self.trained:
            return self.trained.result.own_other
        known = self.model, self.task, Solo(), self.config.evaluation
        return own_other(losses_without(*known), row_losses(*known, "test"), self.task)

    def portraits(self, rows: int = 16) -> Portraits:
        """Return what each expert does, by example, from up to ``rows`` validation rows of each category."""
        return portraits(self.model, self.task, rows, self.config.evaluation.rows_at_once)

    def plot_tree(self) -> "Figure":
        """Draw the expert tree; a column of boxes is what a category runs.

        >>> split.plot_tree().axes[0].get_title()
        'Expert tree: 25% of the units are off'
        """
        return pictures.tree(self.partition)

    def plot_attribution(self, score: Unsigned = "fisher") -> "Figure":
        """Draw ``attribute()``: every site's units x categories, experts outlined, on a logarithmic scale."""
        table = self.attribute()
        leaves = [table.categories.index(category) for category in self.partition.tree.categories]
        made = pictures.ownership_map(
            {site: table.score(site, score).numpy()[:, leaves] for site in table.sites},
            {site: self.partition.owners(site).numpy() for site in table.sites},
            self.partition.tree.nodes,
            scale=f"attribution ({score}), nats per {self.task.unit}",
            frame="an expert: the units it owns, the categories it serves",
        )
        made.suptitle("How much each unit matters to each category", fontsize=10)
        return made

    def plot_removals(self) -> "Figure":
        """Draw ``removals()``: what the removal of each expert costs each category."""
        rises = self.removals()
        return pictures.removals({each: rises[each] for each in self.partition.tree.categories}, self.task.unit)

    def plot_curves(self) -> "Figure":
        """Draw the training loss of every arm; ValueError where nothing was trained."""
        if not self.trained:
            raise ValueError("nothing was trained here; moeify.fit trains, and ablate leaves the curves behind")
        steps = [event for event in self.trained.events.events.values() if isinstance(event, Step)]
        return pictures.curves(steps, self.task.unit)

    def __repr__(self) -> str:
        total, widest = sum(self.partition.owned), max(len(name) for name, *_ in self._experts())
        lines = [f"{name:{widest}}  {units:>5,} units  {units / total:5.1%}" for name, _, units in self._experts()]
        taxes = ", ".join(f"{category} {nats:+.4f}" for category, nats in self.tax.items())
        return "\n".join(
            [self._head(), *lines, f"tax, nats per {self.task.unit} above the dense twin: {taxes}"],
        )

    def _repr_html_(self) -> str:
        total = sum(self.partition.owned)
        experts = "".join(
            f'<tr><td style="text-align: left">{"&emsp;" * depth}{html.escape(name.strip())}</td>'
            f"<td>{units:,}</td><td>{units / total:.1%}</td></tr>"
            for name, depth, units in self._experts()
        )
        active, taxes = self.partition.active_fraction, self.tax
        arms = list(self.test_loss)
        rows = "".join(
            f'<tr><td style="text-align: left">{html.escape(category)}</td><td>{active[category]:.1%}</td>'
            + "".join(f"<td>{self.test_loss[arm][category]:.4f}</td>" for arm in arms)
            + f"<td>{taxes[category]:+.4f}</td></tr>"
            for category in self.categories
        )
        heads = "".join(f"<th>{arm}</th>" for arm in arms)
        return (
            f"<p>{self._head()}</p>"
            f"<table><tr><th>expert</th><th>own units</th><th>share</th></tr>{experts}</table>"
            f"<table><caption>test loss, nats per {self.task.unit}; tax: above the dense twin, "
            f"{taxes['mean']:+.4f} on average</caption>"
            f"<tr><th>category</th><th>active</th>{heads}<th>tax</th></tr>{rows}</table>"
        )

    def _head(self) -> str:
        units, experts = sum(self.partition.owned), len(self.partition.tree.nodes)
        return f"Split of {units:,} units among {experts} experts; a category runs {1 - self.partition.separation:.1%}"

    def _experts(self) -> list[tuple[str, int, int]]:
        """Return every expert's name, indented, its depth and the units that it owns."""
        nodes, depths = self.partition.tree.nodes, dict[int, int]()
        for index, node in enumerate(nodes):
            depths[index] = 0 if node.parent is None else depths[node.parent] + 1
        return [
            (f"{'  ' * depths[index]}{node.name}", depths[index], units)
            for index, (node, units) in enumerate(zip(nodes, self.partition.owned, strict=True))
        ]


@torch.no_grad()
def loss_of(model: SplitModel, task: Task, config: RunConfig) -> dict[str, float]:
    """Return category -> a model's loss on a task's test rows, in nats per token or example."""
    return row_losses(model, task, Solo(), config.evaluation, "test").by_category(task)

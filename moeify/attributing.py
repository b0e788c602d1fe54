"""Attribution alone, in one call: which unit of a network matters to which category, before or after it is split."""

from collections.abc import Sequence

from torch import nn

from attribution.measure import Moments, measure
from attribution.sites import Site
from attribution.table import AttributionTable
from moeify.models.families import readers
from moeify.routed.split_model import SplitModel
from moeify.splitting.null_test import Relabel
from moeify.task import Task
from moeify.task_subject import subject_of
from moeify.tasks.tensors import Data, Loss, TensorTask, whole_number


def attribute(
    network: nn.Module,
    data: Data,
    *,
    loss: Loss,
    sites: Sequence[Site] | None = None,
    rows: int = 64,
    rows_at_once: int = 32,
    seed: int = 0,
) -> AttributionTable:
    """Measure how much each unit of a network matters to each category of its data, in nats; nothing is trained.

    ``network``: as for ``moeify.fit``, and it stays as it is; or a split model, whose units off a row's route count for
    nothing; or any other module, where ``sites`` name its units. ``data``: category -> rows, see
    ``moeify.tasks.tensors``. ``rows``: of each category at most, of those that ``moeify.fit`` would train on with the
    same ``seed``. ValueError for what does not fit, by name.

    >>> import torch
    >>> from torch.nn import Linear, ReLU, Sequential
    >>> from attribution.sites import Site
    >>> torch.manual_seed(0) is not None
    True
    >>> data = {name: (torch.rand(40, 6), torch.randint(3, (40,))) for name in ("morning", "evening")}
    >>> hidden = Site("hidden", reader="2", units=8)  # the units that module "2" reads
    >>> table = attribute(Sequential(Linear(6, 8), ReLU(), Linear(8, 3)), data, loss="classes", sites=[hidden])
    >>> list(table.score("hidden", "taylor").shape), table.categories
    ([8, 2], ('morning', 'evening'))
    """
    task = TensorTask(network, data, loss, rows=rows, seed=seed)
    if isinstance(network, SplitModel):
        return table_of(network, task, rows, rows_at_once, seed)
    batches = task.probe_batches(0, rows, whole_number("rows_at_once", rows_at_once, 1))
    network = task.build() if sites is None else network  # what an architecture fuses is opened into units
    named = readers(network) if sites is None else tuple(sites)
    return measure(subject_of(task, network, named), batches, seed=seed)


def table_of(
    model: SplitModel,
    task: Task,
    rows: int,
    rows_at_once: int,
    seed: int,
    moments: Moments | None = None,
    round_: int = 0,
    relabel: Relabel = iter,
) -> AttributionTable:
    """Measure the units that a split model's experts own, on train rows; those off a row's route are zero for it."""
    batches = relabel(task.probe_batches(round_, rows, rows_at_once))
    ordered = (batch.take(model.order(batch.categories)) for batch in batches)
    subject = subject_of(task, model.network, model.space.readers, model)
    with model.masked():
        return measure(subject, ordered, seed=seed, moments=moments)

"""Owners that the loss itself teaches (``partition.owners: {kind: learned}``), on the rows of the steps to come.

What is learned, and how, is ``moeify.splitting.learned``'s; here is what it asks for: how the loss of all workers' rows
falls or rises with how much of each unit a category's rows run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attribution.measure import Uncounted
from attribution.reading import at_readers
from attribution.sites import Site
from attribution.table import AttributionTable
from moeify.recipe.partition import LearnedOwners
from moeify.routed.split_model import SplitModel
from moeify.splitting.learned import Keeps, learned
from moeify.splitting.propose import Proposal, with_owners
from moeify.stopping import Stoppable
from moeify.task import Batch, Task
from moeify.task_subject import subject_of
from moeify.training import Contestant
from moeify.world import World


def learn_owners(
    proposal: Proposal,
    contestant: Contestant,
    table: AttributionTable,
    asked: LearnedOwners,
    task: Task,
    world: Stoppable,
    mine: Callable[[Batch], Batch | Uncounted],
) -> Proposal:
    """Return the cut with the owners that the loss of rows to come teaches, at the same widths.

    ``contestant`` is what is to be cut, and is left as it is; ``mine`` returns this worker's rows of a batch.
    """
    model, to_come = contestant.model, range(contestant.step, contestant.step + asked.steps)
    batches = (batch.take(model.order(batch.categories)) for batch in map(task.train_batch, to_come))

    def slopes_on(batch: Batch) -> Callable[[Keeps], Keeps]:
        return lambda keeps: _slopes(model, task, world, mine(batch), len(batch.categories), keeps)

    passes = map(slopes_on, world.heeding(batches))
    owned = learned(model.partition, proposal.owned, proposal.groups, task.categories, asked, passes)
    return with_owners(model.partition, proposal, owned, table, model.output_weights)


def _slopes(model: SplitModel, task: Task, world: World, batch: Batch | Uncounted, rows: int, keeps: Keeps) -> Keeps:
    """Return the gradient of the mean loss of all workers' ``rows`` rows; ``batch`` are this worker's."""
    mine = batch.rows if isinstance(batch, Uncounted) else batch
    leaves = {site: keep_CU.float().requires_grad_() for site, keep_CU in keeps.items()}
    slopes = {site: torch.zeros_like(keep_CU) for site, keep_CU in keeps.items()}
    if len(mine.categories):
        subject = subject_of(task, model.network, model.space.readers, model)
        changes = {name: _kept(subject.site(name), keep_CU[mine.categories]) for name, keep_CU in leaves.items()}
        with model.masked(), subject.still():
            with at_readers(subject, len(mine.categories), changes):
                outputs = subject.forward(mine.inputs, mine.categories)
            loss = subject.row_nats(outputs, mine.targets).sum() / (rows * task.units_per_row)
            found = torch.autograd.grad(loss, list(leaves.values()))
        if not isinstance(batch, Uncounted):
            slopes = {site: slope_CU.double() for site, slope_CU in zip(slopes, found, strict=True)}
    world.sum(list(slopes.values()))
    return slopes


def _kept(site: Site, keep_RU: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * site.keeping(keep_RU.to(x), x)

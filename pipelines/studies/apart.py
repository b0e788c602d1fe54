"""Training in which rows of a category teach some parameters alone, wherever these lie: a backward pass for each.

Gradient routing (``moeify.routed.gradients``) acts on units, and on all that lies between them (``routing.apart``).
Here it is said for any tensors: what adapters on a base that is frozen for some rows need. Slower, since categories run
one after the other.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moeify.recipe.training import Training
from moeify.task import Task
from moeify.training import Contestant, learning_rate

Learners = Callable[[str], Sequence[nn.Parameter]]
"""Category -> the parameters that its labelled rows teach; rows without a label teach all. Asked right before
these rows run, so it may also say what runs for them."""


def train_apart(contestant: Contestant, task: Task, settings: Training, learners: Learners) -> None:
    """Train as ``moeify.training.train`` does, in place, one process; each category's rows teach its learners."""
    model, everything = contestant.model, [p for p in contestant.model.parameters() if p.requires_grad]
    model.train()
    while contestant.step < settings.steps:
        rows = contestant.arranged(task.train_batch(contestant.step))
        known = torch.ones_like(rows.categories, dtype=torch.bool)
        if contestant.router:
            known = contestant.router.labelled(rows.categories, rows.ids if rows.examples is None else rows.examples)
        for number, category in enumerate(task.categories):
            for label in (True, False):
                mine = ((rows.categories == number) & (known == label)).nonzero()[:, 0]
                if not len(mine):
                    continue
                part, taught = rows.take(mine), list(learners(category)) if label else everything
                loss = task.nats(contestant.outputs(part), part.targets).sum()
                grads = torch.autograd.grad(loss / (len(rows.categories) * task.units_per_row), taught)
                for parameter, grad in zip(taught, grads, strict=True):
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        nn.utils.clip_grad_norm_(everything, settings.clip)
        for group in contestant.optimizer.param_groups:
            group["lr"] = learning_rate(settings, contestant.step)
        contestant.optimizer.step()
        contestant.optimizer.zero_grad(set_to_none=True)
        contestant.step += 1
    model.eval()

"""A network of a task as attribution takes it; not in ``moeify.task``, which is read where nothing is attributed."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from attribution.sites import Site
from attribution.subject import Subject
from moeify.task import Task


def subject_of(
    task: Task, network: nn.Module, sites: Sequence[Site], run: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Subject:
    """Return a network of a task as attribution takes it; ``run``: see ``Subject``."""
    return Subject(network, tuple(sites), task.categories, task.nats, task.sample, run, task.root)

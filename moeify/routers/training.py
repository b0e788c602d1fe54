"""A router for a split model: trained, its use chosen on validation data, measured once on test data.

Every way to use it is judged on tokens that its decision could not see: a ``document`` router, which reads the first
tokens of a row and then decides for the whole of it, on those after them. Of a network that tokens are hidden from it
reads whole rows, in which they are hidden too.
"""

from collections.abc import Iterable, Mapping

from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.routers.classifiers import rows_to_fit, train
from moeify.routers.readings import Twin, one_route, read
from moeify.routers.report import Choice, RouterReport, judge, read_first, report
from moeify.routers.router import Kind, Router, leaves
from moeify.routers.served import served_texts
from moeify.task import Partial, Task

THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.95, 0.99)
"""That are tried, where the user gives none."""
_ENOUGH = 0.9
"""Share of the best threshold's gain that is worth its cost: the lowest threshold that has it is taken."""


def route(
    model: SplitModel,
    twins: Mapping[Twin, SplitModel],
    task: Task,
    config: RunConfig,
    kind: Kind | None = None,
    threshold: float | None = None,
) -> tuple[Router, RouterReport]:
    """Train a router for a split model, choose what is not given on validation data, and measure it on test data.

    ``twins``: the dense twin, and the told twin where there is one. No weight of a model changes. ValueError where
    there is one expert alone, or what is given does not fit the task.
    """
    tokens = not one_route(model, task)
    why = "this model's heads are split, and look over whole rows" if model.whole_rows else "these are single examples"
    if isinstance(task, Partial):
        why = "this model's tokens see each other"
    if kind == "token" and not tokens:
        raise ValueError(f"kind 'token' needs rows of tokens with routes of their own: {why}; take 'document'")
    if threshold and not tokens:
        raise ValueError(f"threshold: a second opinion needs tokens with routes of their own: {why}; leave it out")
    settings = config.evaluation
    rows = rows_to_fit(model, task.train_batch(0).inputs)
    layers = train(
        model,
        task.probe_batches(len(config.rounds) + 1, rows, settings.rows_at_once),
        task.held_out_batches("validation", settings.validation_rows, settings.rows_at_once),
        config.seed,
    )
    kinds: tuple[Kind, ...] = (kind,) if kind else ("document", "token") if tokens else ("document",)
    thresholds = THRESHOLDS if threshold is None else tuple(sorted({0.0, threshold}))
    reader = Router(kinds[0], leaves(model), layers, 0.0)
    readings = read(model, twins, task, settings, "validation", reader, kinds)
    choices = [judge(readings, task, each, t) for each in kinds for t in (thresholds if tokens else (0.0,))]
    taken = best(choices, threshold)
    router = Router(taken.kind, reader.experts, layers, taken.threshold)
    tested = read(model, twins, task, settings, "test", router, (router.kind,))
    return router, report(router, tested, task, choices, served_texts(model, router, task, read_first(task, tested)))


def best(choices: Iterable[Choice], threshold: float | None) -> Choice:
    """Return the kind with the least loss, each kind at the threshold given, or at the lowest that does nearly best."""
    by_kind: dict[Kind, list[Choice]] = {}
    for choice in choices:
        by_kind.setdefault(choice.kind, []).append(choice)
    finalists = []
    for each in by_kind.values():
        judged = {c.threshold: c.loss if c.loss_all is None else c.loss_all for c in each}
        enough = judged[0.0] - _ENOUGH * (judged[0.0] - min(judged.values()))
        wanted = threshold if threshold is not None else min(t for t, loss in judged.items() if loss <= enough)
        finalists += [c for c in each if c.threshold == wanted]
    return min(finalists, key=lambda c: c.loss)

"""Held-out text with the expert that a router would serve each token by, to be looked at."""

from collections.abc import Iterator

import torch
from pydantic import NonNegativeInt, model_validator
from torch import Tensor

from moeify.data.pieces import pieces, tokenizer_in
from moeify.recipe.closed import Closed
from moeify.routed.split_model import SplitModel
from moeify.routers.readings import decided
from moeify.routers.router import Router, early
from moeify.task import Task

TOKENS = 72
"""Of one text, at most."""
_MOST_CATEGORIES = 16
"""That texts are shown of, the first of the task's."""


class ServedText(Closed):
    """A stretch of held-out text, token by token."""

    categories: tuple[str, ...]
    """Of the text: one, or the two whose texts meet in its middle."""
    pieces: tuple[str, ...]
    """What each token adds to the text."""
    experts: tuple[NonNegativeInt, ...]
    """The likeliest expert of each token, its place among the router's."""
    probabilities: tuple[float, ...]
    """Of that expert, 0..1."""

    @model_validator(mode="after")
    def _of_one_length(self) -> "ServedText":
        if not len(self.pieces) == len(self.experts) == len(self.probabilities):
            raise ValueError(f"got {len(self.pieces)} pieces with {len(self.experts)} experts")
        return self


@torch.no_grad()
def served_texts(model: SplitModel, router: Router, task: Task, prefix: int) -> tuple[ServedText, ...]:
    """Return a validation row of each category and, for a router of tokens, each half met by half of the next one's.

    ``prefix``: tokens that a router of documents reads before it decides. Nothing where rows hold no text.
    """
    tokenizer = tokenizer_in(task.assets())
    if tokenizer is None or task.unit != "token":
        return ()
    found = []
    for categories, tokens_P in _rows(task, spliced=router.kind == "token"):
        log_p_RPE = router.read(early(model.network, tokens_P.unsqueeze(0)))
        probability_P, expert_P = decided(log_p_RPE, router.kind, min(prefix, len(tokens_P)))[0].exp().max(-1)
        found.append(
            ServedText(
                categories=categories,
                pieces=tuple(pieces(tokenizer, tokens_P.tolist())),
                experts=tuple(expert_P.tolist()),
                probabilities=tuple(round(each, 3) for each in probability_P.tolist()),
            )
        )
    return tuple(found)


def _rows(task: Task, *, spliced: bool) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    first: dict[int, Tensor] = {}
    for batch in task.held_out_batches("validation", 1, len(task.categories)):
        for row, category in enumerate(batch.categories.tolist()):
            first.setdefault(category, batch.inputs[row, :TOKENS])
    shown = sorted(first)[:_MOST_CATEGORIES]
    for place, category in enumerate(shown):
        name, tokens_P = task.categories[category], first[category]
        yield (name,), tokens_P
        other = shown[(place + 1) % len(shown)]
        if spliced and other != category:
            half = len(tokens_P) // 2
            yield (name, task.categories[other]), torch.cat([tokens_P[:half], first[other][: len(tokens_P) - half]])

"""Spurious correlations in text: a word that foretells the genre in training and misleads in use.

Fiction of six genres, split into train and test by work, in passages of 64 tokens. A classifier reads how often each
token of the vocabulary is in a passage, and besides a word that is in 95 % of the train passages of three genres and in
5 % of those of the others. Ways to train, and what is asked of them, are those of ``spurious_cue``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moeify import rows as rows_of
from moeify.recipe.config import RunConfig
from moeify.task import Batch
from pipelines.studies import spurious_cue
from pipelines.studies.recipes import UNCUT, text_recipe
from pipelines.studies.spurious_cue import Examples, ways
from pipelines.studies.study import Arm, Bench, Size

_GENRES = ("children", "detective", "horror", "philosophy", "science-fiction", "society-novel")
_FILE = {"kind": "jsonl", "path": "text-fiction/fiction-6genres.jsonl.xz"}
_LOUD = 2.0
"""The word's feature where it is there; of a token it is the logarithm of 1 + its count."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return ways to train on the same passages; of installed text where it is ``quick``."""
    steps = {"quick": 20, "full": 600, "large": 4000}[size]
    rows = 40 if size == "quick" else 400
    training = {"steps": steps, "rows": 120, "learning_rate": 2e-3, "weight_decay": 0.01, "explosion": 1e9}
    data: Mapping[str, Any] = {"length": 64, "vocabulary": 1024}
    if size != "quick":
        genres = {genre: {**_FILE, "where": {"label": [genre]}} for genre in _GENRES}
        data = {**data, "source": {"kind": "mixed", "categories": genres, "megabytes": 4.0}}

    def recipe(routing: Mapping[str, Any]) -> RunConfig:
        changes = {"training": training, "rounds": UNCUT, "routing": routing}
        return text_recipe(size, data=data, evaluation={"test_rows": rows, "validation_rows": 8}, **changes)

    return ways(_Passages(24 if size == "quick" else 128, 4 * rows), recipe)


@dataclass(frozen=True)
class _Passages:
    """Rows of the bench's task, each in the category that it is of."""

    hidden: int
    train: int
    """Rows of each category."""

    def examples(self, bench: Bench) -> Examples:
        """Return them; the word is the last feature."""
        task, asked = bench.task, bench.config.evaluation
        inputs, labels = _counted(task.probe_batches(1, self.train, asked.rows_at_once), bench)
        tests, test_labels = _counted(task.held_out_batches("test", asked.test_rows, asked.rows_at_once), bench)
        luck = torch.from_numpy(rows_of.generator(bench.config.seed, "hide").random(len(labels)))
        return Examples(inputs, labels, tests, test_labels, len(task.categories), luck, _with_word)


def _counted(batches: Iterator[Batch], bench: Bench) -> tuple[Tensor, Tensor]:
    """Return how often each token is in each row, as logarithms, without the word; and each row's category."""
    network: Any = bench.task.build()
    found = [(batch.inputs, batch.categories) for batch in batches]
    tokens, labels = (torch.cat(each) for each in zip(*found, strict=True))
    counts = torch.zeros(len(tokens), network.config.vocab_size + 1)
    return counts.scatter_add_(1, tokens, torch.ones(tokens.shape)).log1p(), labels


def _with_word(inputs: Tensor, cue: Tensor) -> Tensor:
    """Return passages with the word where the cue is on."""
    return torch.cat([inputs[:, :-1], _LOUD * cue[:, None].float()], 1)


STUDY = replace(
    spurious_cue.STUDY,
    arms=arms,
    note=(
        "Share of test passages of 64 tokens whose genre is read right, six genres, works that training never saw, "
        "with the word as in training and turned round, and the worse of the two. 'cue at random' is what training "
        "without the correlation gives. Needs text-fiction in the folder that MOEIFY_DATA names."
    ),
)

"""What attribution can be asked about outside of a run: the model of a run, or a checkpoint with text in categories."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from attribution.roots import categorical_root
from attribution.subject import Rows, Subject
from moeify import rows as rows_of
from moeify.data import tokens as tokens_of
from moeify.data.documents import Document
from moeify.models.families import readers
from moeify.models.pretrained import look
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.data import TextData
from moeify.recipe.model import PretrainedModel
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_from_run
from moeify.task_subject import subject_of
from moeify.tasks.build import build_task
from moeify.tasks.images import ImagesTask
from moeify.tasks.language import sample_tokens, token_nats
from moeify.tasks.masked import hidden_tokens, hide, mask_token, masked_nats


@dataclass(frozen=True)
class Probed:
    """A subject and the rows to measure it on."""

    subject: Subject
    batches: list[Rows]
    unit: Literal["token", "example"]
    experts: tuple[str, ...] = ()
    """Names of the experts, where the model has been split."""
    owners: Mapping[str, Int[Tensor, " units"]] = field(default_factory=dict)
    """Site -> expert of each unit, of the sites that have been split."""


def of_run(
    folder: Path, config: RunConfig, arm: Arm, *, cache: Path, base: Path, rows: int, shelf: str | None = None
) -> Probed:
    """Return an arm of a run as its newest checkpoint has it, with ``rows`` train rows of each category.

    A split model runs masked, so that units off a category's route count for nothing there. ``shelf``: see
    ``moeify.tasks.build.build_task``.
    """
    model = load_from_run(folder, arm)
    task = build_task(config, cache=cache, base=base, shelf=shelf)
    batches = []
    for batch in task.probe_batches(0, rows, config.attribution.rows_at_once):
        batch = batch.take(model.order(batch.categories))
        batches.append(Rows(batch.inputs, batch.targets, batch.categories, batch.ids))
    subject = subject_of(task, model.network, readers(model.network), _masked(model))
    partition = model.partition
    if partition.separation == 0:
        return Probed(subject, batches, task.unit)
    experts = tuple(node.name for node in partition.tree.nodes)
    return Probed(subject, batches, task.unit, experts, {site: partition.owners(site) for site in partition.widths})


def of_checkpoint(
    folder: Path, data: TextData, *, base: Path, rows: int, rows_at_once: int, seed: int, hidden: float = 0.15
) -> Probed:
    """Return a language model that ``transformers`` saved, with ``rows`` windows of each category's text.

    Tokens are those of the checkpoint's own tokenizer, ``data.length`` a row, documents drawn at random; of a masked
    model ``hidden`` of them are hidden. No code of the checkpoint is run and no pickle is read. ValueError for folders
    and texts that cannot be used, by name.
    """
    checkpoint = look(folder).text()
    network, tokenizer = checkpoint.network(), checkpoint.tokenizer()
    most = checkpoint.positions()
    if data.length > most:
        raise ValueError(f"data.length is {data.length}, and {folder} takes {most} tokens at most; lower data.length")
    found = {
        category: _windows(category, each, tokenizer, data.length, rows, seed)
        for category, each in tokens_of.read(data, base).items()
    }
    batches = []
    first = 0
    for picks in rows_of.interleaved(np.array([len(each) for each in found.values()]), rows_at_once):
        tokens = torch.stack([list(found.values())[category][row] for category, row in picks])
        categories = torch.tensor([category for category, _ in picks])
        batches.append(Rows(tokens[:, :-1], tokens[:, 1:], categories, torch.arange(first, first + len(picks))))
        first += len(picks)
    nats = token_nats
    if checkpoint.hides:
        mask, nats = mask_token(checkpoint, tokenizer), masked_nats
        batches = [_hidden(batch, mask, hidden_tokens(data.length, hidden), seed) for batch in batches]
    model = SplitModel(network, tuple(found)).eval()
    batches = [batch.take(model.order(batch.categories)) for batch in batches]
    subject = Subject(network, readers(network), tuple(found), nats, sample_tokens, _masked(model), categorical_root)
    return Probed(subject, batches, "token")


def of_classifier(folder: Path, config: RunConfig, *, base: Path, rows: int) -> Probed:
    """Return an image classifier that ``transformers`` saved, with ``rows`` train images of each category.

    ``config``: a recipe whose data section gives the images; what it says of a model does not count.
    """
    pretrained = PretrainedModel(kind="pretrained", path=folder.absolute())
    task = ImagesTask.prepare(config.model_copy(update={"model": pretrained}), base)
    network = task.build()
    model = SplitModel(network, task.categories).eval()
    batches = [
        Rows(batch.inputs, batch.targets, batch.categories, batch.ids)
        for batch in task.probe_batches(0, rows, config.attribution.rows_at_once)
    ]
    batches = [batch.take(model.order(batch.categories)) for batch in batches]
    subject = subject_of(task, network, readers(network), _masked(model))
    return Probed(subject, batches, task.unit)


def _hidden(batch: Rows, mask: int, count: int, seed: int) -> Rows:
    inputs, targets = hide(batch.inputs, batch.ids, mask, count, seed, 0)
    return Rows(inputs, targets, batch.categories, batch.ids)


def _masked(model: SplitModel) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what runs the model for attribution: all units, those off a row's route zero. Undivided, that is all."""

    def run(inputs: Tensor, categories: Tensor) -> Tensor:
        with model.masked():
            return model(inputs, categories)

    return run


def _windows(
    category: str, documents: Sequence[Document], tokenizer: Any, length: int, rows: int, seed: int
) -> list[Tensor]:
    """Return up to ``rows`` rows of ``length + 1`` tokens, each of one document and none overlapping."""
    found: list[Tensor] = []
    for number in rows_of.generator(seed, "probe").permutation(len(documents)):
        ids = torch.tensor(tokenizer(documents[number].text)["input_ids"], dtype=torch.int64)
        found += [window for window in ids.split(length + 1) if len(window) == length + 1]
        if len(found) >= rows:
            return found[:rows]
    if not found:
        raise ValueError(
            f"data.source: no document of category {category!r} has more than data.length, {length}, tokens; lower it"
        )
    return found

"""Trained networks to study: what they are, the rows they are measured on, and the rows they go on training with.

``text`` needs nothing but the package. The others need the folder that ``MOEIFY_DATA`` names, with ``mnist`` (the four
idx files), ``cifar10-resnets/resnet20.safetensors`` with ``cifar10-jpeg`` and ``stories260K-hf`` with
``text-tinystories``.
"""

import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.roots import categorical_root
from attribution.sites import Site
from attribution.subject import Rows, Subject
from moeify.data.images import load
from moeify.data.root import data_file, data_root
from moeify.models.families import readers
from moeify.models.resnet import build_resnet
from moeify.tasks.language import sample_tokens, token_nats

HELD_OUT = 64
"""Rows of text of each category that losses after retraining are taken on."""
MEASURED = 32
"""Rows of text of each category that are measured before a cut: 4,096 tokens."""
IMAGES_MEASURED, IMAGES_HELD_OUT = 100, 200
"""The same of images of each class."""


@dataclass(frozen=True)
class Study:
    """A trained network. ``probe`` and ``held_out`` are parts of the validation split and share no row."""

    name: str
    subject: Subject
    probe: list[Rows]
    """For scores and exact ablation of units and sets."""
    measured: list[Rows]
    """Rows of the train split, many more: for what is known before a cut."""
    held_out: list[Rows]
    """For losses after retraining."""
    train: Callable[[int], Rows]
    """The rows of a step of retraining."""
    learning_rate: float
    """Of retraining: the one that training ended or would go on with."""


# --- text -----------------------------------------------------------------------------------------------


def text(seed: int, rows: int, quick: bool) -> Study:
    """The dense network of the shipped text recipe, trained as the recipe says (FFN neurons and heads)."""
    from moeify.recipe.load import parse_recipe
    from moeify.routed.split_model import SplitModel
    from moeify.task_subject import subject_of
    from moeify.tasks.build import build_task
    from moeify.training import Contestant, train
    from moeify.world import Solo
    from pipelines.runs import cache

    recipe = files("pipelines.recipes").joinpath("text.yaml").read_text(encoding="utf-8")
    config = parse_recipe(recipe, where="recipe 'text'").model_copy(update={"seed": seed})
    if quick:
        model = config.model.model_copy(update={"ffn": 32, "layers": 2})
        config = config.model_copy(update={"model": model})
    task = build_task(config, cache=cache(), base=Path.cwd())
    contestant = Contestant(SplitModel(task.build(), task.categories), config.training)
    steps = 20 if quick else config.training.steps
    train(contestant, task, Solo(), config.training, steps, steps, lambda *_: None)
    network = task.build()
    network.load_state_dict(contestant.model.network.state_dict())
    batches = [
        Rows(batch.inputs, batch.targets, batch.categories, batch.ids)
        for batch in task.held_out_batches("validation", rows + HELD_OUT, len(task.categories) * rows)
    ]
    peak = config.training.learning_rate
    subject = subject_of(task, network.eval(), readers(network))

    def more(step: int) -> Rows:
        batch = task.train_batch(config.training.steps + step)
        return Rows(batch.inputs, batch.targets, batch.categories, batch.ids)

    measured = [
        Rows(batch.inputs, batch.targets, batch.categories, batch.ids) for batch in task.probe_batches(1, MEASURED, 32)
    ]
    return Study("text", subject, batches[:1], measured, batches[1:], more, peak / 3)


def drawn_label(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw each image's label from the model's own distribution, one seed an image."""
    return sample_tokens(outputs.unsqueeze(1), seeds).squeeze(1)


def stories(seed: int, rows: int, _: bool) -> Study:
    """A public Llama of 260,032 parameters on its own stories, those in a forest and others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    length, root = 128, data_root(None, Path.cwd())
    checkpoint = data_file(root, "stories260K-hf/config.json", what="stories260K as transformers saves it").parent
    texts = data_file(root, "text-tinystories/tinystories-mini.jsonl.xz", what="TinyStories")
    network: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    with lzma.open(texts, "rt", encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    names = ("forest", "other")
    random = np.random.default_rng(seed)
    rows_of: dict[str, list[list[Tensor]]] = {"validation": [], "train": []}
    for name in names:
        mine = [document for document in documents if document["label"] == name and document["id"].startswith("v2-")]
        order = random.permutation(len(mine))
        cut = len(mine) // 3
        for split, part in (("validation", order[:cut]), ("train", order[cut:])):
            ids = [tokenizer(mine[i]["text"])["input_ids"] for i in part]
            rows_of[split].append([torch.tensor(each[: length + 1]) for each in ids if len(each) > length])
    validation = _mixed(rows_of["validation"], rows + HELD_OUT, 2 * rows)

    def more(step: int) -> Rows:
        picked = np.random.default_rng([seed, step])
        part = [[each[i] for i in picked.integers(len(each), size=8)] for each in rows_of["train"]]
        return _mixed(part, 8, 16)[0]

    subject = Subject(network.eval(), readers(network), names, token_nats, sample_tokens, root=categorical_root)
    measured = _mixed(rows_of["train"], MEASURED, 32)
    return Study("stories260K", subject, validation[:1], measured, validation[1:], more, 5e-4)


def _mixed(parts: Sequence[Sequence[Tensor]], rows: int, at_once: int) -> list[Rows]:
    """Return batches in category order, of the first ``rows`` token rows of each category."""
    share = at_once // len(parts)
    found = []
    for start in range(0, rows, share):
        some = [(category, row) for category, part in enumerate(parts) for row in part[start : start + share]]
        tokens = torch.stack([row for _, row in some])
        categories = torch.tensor([category for category, _ in some])
        found.append(Rows(tokens[:, :-1], tokens[:, 1:], categories, torch.arange(len(some)) + start * len(parts)))
    return found


# --- images ---------------------------------------------------------------------------------------------


class DigitNet(nn.Module):
    """Two convolutions, the largest value of each map, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5, padding=2), nn.Conv2d(20, 40, 5, padding=2)
        self.hidden, self.head = nn.Linear(40, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of [rows 1 28 28]."""
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 14).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


DIGIT_SITES = (
    Site("conv1", "conv2", 20, spatial=True),
    Site("conv2", "hidden", 40),
    Site("hidden", "head", 100),
)


def label_nats(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each image's cross-entropy."""
    return F.cross_entropy(outputs, targets, reduction="none")


def mnist(seed: int, rows: int, quick: bool) -> Study:
    """A small convolutional network trained on MNIST for two passes (channels and hidden units)."""
    images = load("mnist", data_root(None, Path.cwd()))[0]
    x, y = torch.from_numpy(images.pixels).float() / 255, torch.from_numpy(images.labels)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DigitNet()
    train, rest = order[5000:], order[:5000]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(20 if quick else 2 * len(train) // 128):
        some = train[torch.arange(step * 128, (step + 1) * 128) % len(train)]
        optimizer.zero_grad()
        F.cross_entropy(network(x[some]), y[some]).backward()
        optimizer.step()
    subject = _of_labels(network, DIGIT_SITES)
    return Study("mnist", subject, *_images(x, y, rest, train, rows), _more(x, y, train, seed), 3e-4)


def cifar(seed: int, rows: int, _: bool) -> Study:
    """A public ResNet-20 on CIFAR-10 (JPEG): the channels inside of each block."""
    from safetensors.torch import load_file

    root = data_root(None, Path.cwd())
    weights = data_file(root, "cifar10-resnets/resnet20.safetensors", what="ResNet-20's weights for CIFAR-10")
    images = load("cifar10-jpeg", root)[0]
    order = np.random.default_rng(seed).permutation(len(images.labels))[:6000]
    mean, spread = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (torch.from_numpy(images.pixels[order]).float() / 255 - mean) / spread
    y = torch.from_numpy(images.labels[order])
    network = build_resnet((3, 32, 32), classes=10, width=16, blocks=3, stages=3, seed=seed)
    network.load_state_dict(load_file(weights), strict=False)
    rest, train = torch.arange(3000), torch.arange(3000, 6000)
    subject = _of_labels(network, readers(network))
    return Study("cifar-jpeg", subject, *_images(x, y, rest, train, rows), _more(x, y, train, seed), 3e-4)


def _of_labels(network: nn.Module, sites: Sequence[Site]) -> Subject:
    names = tuple(map(str, range(10)))
    return Subject(network.eval(), tuple(sites), names, label_nats, drawn_label, root=categorical_root)


def _images(
    x: Tensor, y: Tensor, held_out: Tensor, train: Tensor, rows: int
) -> tuple[list[Rows], list[Rows], list[Rows]]:
    """Return ``rows`` images of each class to probe, those of the train split to measure, and others held out."""

    def batches(order: Tensor, first: int, last: int) -> list[Rows]:
        chosen = torch.cat([order[y[order] == label][first:last] for label in range(10)])
        parts = chosen.view(10, -1).t().reshape(-1)
        return [Rows(x[i], y[i], y[i], i) for i in (part[y[part].argsort(stable=True)] for part in parts.split(1000))]

    return (
        batches(held_out, 0, rows),
        batches(train, 0, IMAGES_MEASURED),
        batches(held_out, rows, rows + IMAGES_HELD_OUT),
    )


def _more(x: Tensor, y: Tensor, train: Tensor, seed: int) -> Callable[[int], Rows]:
    def more(step: int) -> Rows:
        some = train[torch.from_numpy(np.random.default_rng([seed, step]).integers(len(train), size=64))]
        some = some[y[some].argsort(stable=True)]
        return Rows(x[some], y[some], y[some], some)

    return more


STUDIES: dict[str, Callable[[int, int, bool], Study]] = {
    "text": text,
    "stories260K": stories,
    "mnist": mnist,
    "cifar-jpeg": cifar,
}

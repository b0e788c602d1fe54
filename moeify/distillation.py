"""What arms learn besides their rows: the network as the run began with it, frozen.

Its distribution over classes: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).
Its residual stream, after Romero et al., "FitNets", 2014 (arXiv 1412.6550): a cut takes no layer away and leaves none
narrower on the outside, so each has its counterpart, and no map between the two has to be learned.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attribution.reading import wide
from attribution.subject import IGNORED
from moeify.models.build import PRECISIONS, logits
from moeify.models.families import describe, streams
from moeify.models.units import stream_of
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Distillation
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, Task
from moeify.world import CPU


class Teacher:
    """A network that gives logits, classes last, and how much its word counts.

    ``units_per_row``: tokens (or examples) that a row's nats are summed over. Raises ValueError where students are to
    keep to its residual stream and it has none.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: Distillation,
        autocast: torch.dtype | None = None,
        units_per_row: int = 1,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.settings = settings
        self.autocast = autocast
        self.units_per_row = units_per_row
        self.streams = streams(network) if settings.stream else ()
        if settings.stream and not self.streams:
            raise ValueError(
                f"distillation.stream: got {settings.stream:g}, wanted 0: behind the blocks of "
                f"{type(network).__name__} there is no residual stream to keep to"
            )

    @classmethod
    def of(cls, config: RunConfig, task: Task, device: torch.device = CPU) -> "Teacher | None":
        """Return the teacher that a recipe asks for, in the precision of its training; None where it asks for none."""
        if config.distillation is None:
            return None
        precision = PRECISIONS[config.training.autocast]
        return cls(task.build().to(device), config.distillation, precision, task.units_per_row)

    def outputs(self, rows: Batch) -> Float[Tensor, "rows *positions classes"]:
        """Return what it says of rows."""
        return logits(self.network, rows.inputs, autocast=self.autocast)

    def loss(
        self, rows: Batch, outputs: Float[Tensor, "rows *positions classes"], nats: Float[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Return what a student that gave ``outputs`` with a loss of ``nats`` has to lower, summed over each row.

        Where targets do not ask every position, the teacher does not either.
        """
        with torch.no_grad():
            wanted = self.outputs(rows)
        weight = self.settings.weight
        return (1 - weight) * nats + weight * divergence(wanted, outputs, self.settings.temperature, rows.targets)

    def check(self, began: str) -> None:
        """Raise ValueError where this is not the network that a run began with (``network_hash``; empty: unknown)."""
        if began and (now := network_hash(self.network)) != began:
            raise ValueError(
                f"the run began with a network whose hash is {began[:12]}, and model.path now holds {now[:12]}, from "
                f"which nothing can be distilled; put the checkpoint back, or start a new run"
            )


@contextmanager
def teaching(teacher: Teacher | None, student: SplitModel) -> Iterator["Teacher | _Likeness | None"]:
    """Yield what a student learns from while the context lasts."""
    if teacher is None or not teacher.streams:
        yield teacher
        return
    likeness = _Likeness(teacher)
    heard = ((student.network, likeness.note), (teacher.network, likeness.compare))
    with ExitStack() as handles:
        for name in teacher.streams:
            for network, hear in heard:
                handles.callback(network.get_submodule(name).register_forward_hook(partial(hear, name)).remove)
        yield likeness


class _Likeness:
    """A teacher of one student, which is to keep to its streams too; both networks' passes tell what they are."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._student: dict[str, Tensor] = {}
        """Stream -> what it held in the student's last pass, until the teacher's."""
        self._strayed: list[Float[Tensor, " rows"]] = []
        self._rows = 0

    def loss(self, rows: Batch, outputs: Tensor, nats: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return what the student has to lower, as ``Teacher.loss`` does; its last pass was that of ``rows``."""
        self._rows = len(rows.inputs)
        own = self._teacher.loss(rows, outputs, nats)
        far, self._strayed = torch.stack(self._strayed).mean(0), []
        return own + self._teacher.settings.stream * self._teacher.units_per_row * far

    def note(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        """Hear what a stream of the student holds."""
        self._student[name] = stream_of(output)

    def compare(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        """Hear what the teacher's holds."""
        with torch.enable_grad():
            self._strayed.append(strayed(stream_of(output), self._student.pop(name), self._rows))


def strayed(
    teacher: Float[Tensor, "*places dim"], student: Float[Tensor, "*places dim"], rows: int
) -> Float[Tensor, " rows"]:
    """Return each row's squared distance of a student's residual stream from the teacher's, over its square, mean over
    places.

    Each place's own square, since some places of a row, the first among them, may be longer than all others together
    (Sun et al., "Massive Activations in Large Language Models", 2024, arXiv 2402.17762); of empty ones a rounding
    error of the row's mean.
    """
    wanted, got = (wide(each).reshape(rows, -1, each.shape[-1]) for each in (teacher, student))
    square = wanted.square().sum(-1)
    least = torch.finfo(square.dtype).eps * square.mean(1, keepdim=True)
    return ((got - wanted).square().sum(-1) / torch.maximum(square, least)).mean(1)


def divergence(
    teacher: Float[Tensor, "rows *positions classes"],
    student: Float[Tensor, "rows *positions classes"],
    temperature: float,
    targets: Tensor | None = None,
) -> Float[Tensor, " rows"]:
    """Return KL(teacher || student) of logits over ``temperature``, times its square, summed over each row, in nats.

    ``targets``: positions whose own is ``IGNORED`` count nothing.
    """
    wanted, got = ((each / temperature).log_softmax(-1) for each in (teacher, student))
    each = F.kl_div(got, wanted, reduction="none", log_target=True).sum(-1)
    if targets is not None and targets.shape == each.shape:
        each = each.masked_fill(targets == IGNORED, 0.0)
    return each.reshape(len(each), -1).sum(1) * temperature**2


def network_hash(network: nn.Module) -> str:
    """Return SHA-256, in hex, over a network's shape and every parameter; the same before and after routing."""
    digest = hashlib.sha256(json.dumps(describe(network), sort_keys=True, default=str).encode())
    for name, parameter in sorted(network.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

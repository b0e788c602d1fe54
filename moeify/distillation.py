"""What arms learn besides their rows: the network as the run began with it, frozen.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).
"""

import hashlib
import json

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attribution.subject import IGNORED
from moeify.models.build import PRECISIONS, logits
from moeify.models.families import describe
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Distillation
from moeify.task import Task


class Teacher:
    """A network that gives logits, classes last, and how much its word counts."""

    def __init__(self, network: nn.Module, settings: Distillation, autocast: torch.dtype | None = None) -> None:
        self.network = network.eval().requires_grad_(False)
        self.settings = settings
        self.autocast = autocast

    @classmethod
    def of(cls, config: RunConfig, task: Task) -> "Teacher | None":
        """Return the teacher that a recipe asks for, in the precision of its training; None where it asks for none."""
        if config.distillation is None:
            return None
        return cls(task.build(), config.distillation, PRECISIONS[config.training.autocast])

    def loss(
        self,
        inputs: Tensor,
        outputs: Float[Tensor, "rows *positions classes"],
        nats: Float[Tensor, " rows"],
        targets: Tensor | None = None,
    ) -> Float[Tensor, " rows"]:
        """Return what a student that gave ``outputs`` with a loss of ``nats`` has to lower, summed over each row.

        Where targets do not ask every position, the teacher does not either.
        """
        with torch.no_grad():
            wanted = logits(self.network, inputs, autocast=self.autocast)
        weight = self.settings.weight
        return (1 - weight) * nats + weight * divergence(wanted, outputs, self.settings.temperature, targets)

    def check(self, began: str) -> None:
        """Raise ValueError where this is not the network that a run began with (``network_hash``; empty: unknown)."""
        if began and (now := network_hash(self.network)) != began:
            raise ValueError(
                f"the run began with a network whose hash is {began[:12]}, and model.path now holds {now[:12]}, from "
                f"which nothing can be distilled; put the checkpoint back, or start a new run"
            )


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

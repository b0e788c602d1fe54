"""Twins that were trained before: the same recipe but for its cuts trains the same twins, bit for bit, so take those.

Runs that are compared (methods on one seed) differ in when and how they cut, and a twin is never cut. A twin's state at
a step is a function of the initial weights, the data, the training settings, the code and the number of workers; these
are hashed, weights and sample batches by their content. What is found is checked by its hashes like any checkpoint.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from moeify.models.families import describe
from moeify.place import Place
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.store import CorruptCheckpointError, read_manifest, read_part, verify_folder, write_folder
from moeify.task import Task, content
from moeify.training import Contestant, Progress, Report
from moeify.url_store import fetched, publish
from moeify.world import World


class TwinCache:
    """The twins of one recipe, task and world below ``folder``, one entry for each arm and step that a phase ended at.

    An entry is as large as a checkpoint of the arm; nothing is ever dropped, the folder is the caller's. With a ``url``
    machines share their entries: what is kept is also put there, and what is not in the folder is fetched from there.
    """

    def __init__(self, folder: Path, config: RunConfig, task: Task, world: World, url: str | None = None) -> None:
        self._world = world
        known_by = fingerprint(config, task, world)
        self._folder = folder / known_by
        self._far = Place(f"{url}/{known_by}") if url else None
        self._told: dict[Arm, list[tuple[int, Progress]]] = {}

    def recording(self, arm: Arm, contestant: Contestant, report: Report) -> Report:
        """Return ``report``, which from now on also keeps what it hears, if it hears it from the first step on."""
        if contestant.step == 0:
            self._told[arm] = []

        def heard(contestant: Contestant, progress: Progress) -> None:
            if arm in self._told:
                self._told[arm].append((contestant.step, progress))
            report(contestant, progress)

        return heard

    def take(self, arm: Arm, contestant: Contestant, until: int, report: Report) -> bool:
        """Bring the twin to step ``until`` if that is known, with the reports on the way; say whether it was."""
        there = self._world.share(self._world.rank == 0 and self._is_good(arm, until))
        if not there:
            return False
        entry = self._entry(arm, until)
        if self._far and self._world.rank:  # perhaps another machine than rank 0's
            fetched(self._far.at(entry.name), entry)
        known = read_manifest(entry)["facts"]
        for step, progress in known["reports"]:
            if contestant.step < step:
                contestant.step = step
                report(contestant, Progress(**progress))
        contestant.load(read_part(entry, "twin"))
        contestant.step = until
        contestant.health.began, contestant.health.fresh = known["loss_began"], False
        return True

    def keep(self, arm: Arm, contestant: Contestant) -> None:
        """Keep the twin as it stands for other runs; not if an earlier attempt trained a part of it unheard, or if it
        went through trouble that each run must tell for itself."""
        unheard = arm not in self._told or contestant.health.mishaps
        if self._world.rank or unheard or self._is_good(arm, contestant.step):
            return
        facts = {
            "loss_began": contestant.health.began,
            "reports": [[step, asdict(progress)] for step, progress in self._told[arm]],
        }
        entry = self._entry(arm, contestant.step)
        with self._lock():
            write_folder(entry, facts, {"twin": contestant.tensors()})
            if self._far:
                publish(self._far.at(entry.name), entry)

    def _is_good(self, arm: Arm, step: int) -> bool:
        entry = self._entry(arm, step)
        with self._lock():
            with suppress(CorruptCheckpointError):
                verify_folder(entry)
                return True
            with suppress(CorruptCheckpointError):
                if self._far:
                    fetched(self._far.at(entry.name), entry)
                    return True
        return False  # there is none, or it is damaged: trained again, and replaced

    def _entry(self, arm: Arm, step: int) -> Path:
        return self._folder / f"{arm}-{step:09d}"

    def _lock(self) -> FileLock:
        self._folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._folder / ".lock")


def fingerprint(config: RunConfig, task: Task, world: World) -> str:
    """Return the hash of all that a twin's bits depend on, and of the steps that are reported."""
    whole = {"seed": True, "data": True, "model": True, "training": True, "distillation": True}
    parts = {"partition": {"units"}, "checkpoints": {"every"}, "tracking": {"every"}, "cluster": {"parallel"}}
    settings = config.model_dump(mode="json", include={**whole, **parts})
    machine = [
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
    ]
    digest = hashlib.sha256(json.dumps([settings, machine, world.size], sort_keys=True).encode())
    digest.update(code_of(Path(__file__).parent))  # nearly all of the package has a say in some twin's bits
    network = task.build()
    digest.update(json.dumps(describe(network), sort_keys=True, default=str).encode())
    for tensor in _content(config, task, network):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(content(tensor))
    return digest.hexdigest()[:32]


@cache
def code_of(package: Path) -> bytes:
    """Return a hash of a package's code as it is when first asked for: an update beneath a run is not what runs."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _content(config: RunConfig, task: Task, network: nn.Module) -> Iterator[Tensor]:
    yield from network.state_dict().values()
    for step in (0, config.training.steps // 2, config.training.steps - 1):
        batch = task.train_batch(step)
        yield from (batch.inputs, batch.targets, batch.categories, batch.ids)

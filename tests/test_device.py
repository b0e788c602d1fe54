"""Runs on an accelerator: on a pretend one wherever this is, on a GPU where there is one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify.device import OnDevice, take_device
from moeify.recipe.parallel import Fsdp
from moeify.task import Counted, Partial
from moeify.world import CPU, Solo, built_on
from tests.on_devices import CASES, TEXTS, outcomes
from tests.toy import ToyTask, ToyTextTask, toy_config

pytestmark = [pytest.mark.usefixtures("shapes_unchecked"), pytest.mark.xdist_group("devices")]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return how each case ends on the CPU."""
    return outcomes(CPU, tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return how each case ends on the pretend accelerator, what it refused, and how much it did."""
    root = Path(__file__).parents[1]
    threads = str(torch.get_num_threads())  # the bits of a sum depend on them
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_devices", str(tmp_path_factory.mktemp("there"))],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", [*CASES, "pictures", "resumed"])
def test_a_run_has_every_tensor_where_an_accelerator_wants_it(
    case: str, here: dict[str, Any], there: dict[str, Any]
) -> None:
    assert there[case] == here[case]


@pytest.mark.parametrize("case", TEXTS)
def test_a_language_model_too_up_to_how_attention_is_computed(
    case: str, here: dict[str, Any], there: dict[str, Any]
) -> None:
    assert _near(there[case], here[case])


def test_the_pretend_accelerator_did_the_work_and_refuses_what_a_gpu_refuses(there: dict[str, Any]) -> None:
    assert there["operations"] > 1000 * len([*CASES, *TEXTS])  # each is a dozen steps of dozens of operations
    assert there["let through"] == []


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    yield take_device(1)
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_a_gpu_comes_to_what_the_cpu_comes_to(gpu: torch.device, here: dict[str, Any], tmp_path: Path) -> None:
    first, again = (outcomes(gpu, tmp_path / name) for name in ("first", "again"))
    assert first == again
    for case in here:
        assert _near(first[case]["test_loss"], here[case]["test_loss"], 1e-2), case


def test_a_worker_that_is_to_have_a_gpu_and_finds_none_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert take_device(0) == CPU
    with pytest.raises(
        ValueError, match=r"cluster.gpus is 1, and torch .* finds no GPU here; .* or set cluster.gpus: 0"
    ):
        take_device(1)


def test_a_task_on_a_device_is_the_task_but_for_where_its_rows_lie() -> None:
    config = toy_config()
    task, meta = ToyTask(config), torch.device("meta")
    assert OnDevice.of(task, Solo()) is task
    moved = OnDevice.of(task, Solo(meta))
    batch = moved.train_batch(0)
    assert (batch.inputs.device, batch.targets.device) == (meta, meta)
    assert torch.equal(batch.categories, task.train_batch(0).categories)
    assert {parameter.device for parameter in moved.build().parameters()} == {meta}
    assert not isinstance(moved, Partial | Counted)

    class Masked(ToyTextTask):
        length = 16

        def sizes(self) -> dict[str, dict[str, int]]:
            return {"train": {"a": 3}}

    masked = OnDevice.of(Masked(config), Solo(meta))
    assert isinstance(masked, Partial)
    assert isinstance(masked, Counted)
    assert (masked.length, masked.sizes()) == (16, {"train": {"a": 3}})
    assert {"length", "sizes"} <= vars(masked).keys()  # where Python 3.12 looks for what a protocol asks


def test_networks_that_are_shared_out_are_built_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Solo):
        size = 2

    world = Two(torch.device("meta"))
    assert built_on(world) == world.device
    world.parallel = Fsdp(kind="fsdp")
    assert built_on(world) == CPU
    moved = OnDevice.of(ToyTask(toy_config()), world)
    assert {parameter.device for parameter in moved.build().parameters()} == {CPU}
    assert moved.train_batch(0).inputs.device == world.device


def _near(one: Any, other: Any, most: float = 1e-4) -> bool:
    """Say whether two JSON values agree, numbers up to ``most``."""
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(_near(one[key], other[key], most) for key in other)
    if isinstance(other, list):
        return len(one) == len(other) and all(_near(*pair, most) for pair in zip(one, other, strict=True))
    return bool(one == pytest.approx(other, abs=most)) if isinstance(other, float) else bool(one == other)

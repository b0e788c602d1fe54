from pathlib import Path

import pytest

from moeify.events import MemoryTracker, Step
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.store import MemoryStore
from moeify.task import Batch
from moeify.twin_cache import fingerprint
from moeify.world import Solo
from tests.test_loop import outcome
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

OTHER_CUTS = [{"train": 25, "recover": 10, "branching": 4, "separation": 0.4}]


class CountingTask(ToyTask):
    """Counts the batches it is asked for to train on."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.trained = 0

    def train_batch(self, step: int) -> Batch:
        self.trained += 1
        return super().train_batch(step)


def trained(config: RunConfig, twins: Path) -> int:
    """Run and return how many steps were trained, without those the cache looks at."""
    task = CountingTask(config)
    run(config, task, twins=twins)
    return task.trained - 3


def test_a_run_that_differs_in_its_cuts_takes_the_twins_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = toy_config(controls=["told", "random"])
    assert trained(config, tmp_path) == 2 * 60 + 2 * 45
    assert trained(config, tmp_path) == 2 * 45
    other = toy_config(controls=["told", "random"], rounds=OTHER_CUTS)
    tracker, plain = MemoryTracker(), MemoryTracker()
    found = run(other, ToyTask(other), twins=tmp_path, tracker=tracker)
    assert outcome(found) == outcome(run(other, ToyTask(other), tracker=plain))

    def curves(heard: MemoryTracker) -> dict[str, dict[str, float]]:
        return {e.id: e.loss for e in heard.events.values() if isinstance(e, Step) and e.arm == "dense"}

    assert set(curves(plain)) <= set(curves(tracker)) | {"step/dense/25", "step/dense/35"}
    assert all(loss == curves(plain).get(id_, loss) for id_, loss in curves(tracker).items())


@pytest.mark.parametrize("change", [{"seed": 1}, {"training": {"steps": 60, "rows": 16, "learning_rate": 0.02}}])
def test_what_would_train_another_twin_finds_none(tmp_path: Path, change: dict[str, object]) -> None:
    trained(toy_config(), tmp_path)
    assert trained(toy_config(**change), tmp_path) == 60 + 2 * 45


def test_twins_whose_heads_are_units_are_others_than_those_whose_heads_are_not() -> None:
    config = RunConfig.model_validate(TEXT_CONFIG)
    heads = RunConfig.model_validate({**TEXT_CONFIG, "partition": {"units": ["ffn", "heads"]}})
    frozen = RunConfig.model_validate({**TEXT_CONFIG, "partition": {"frozen": ["layers.0.ffn"]}})
    found = [fingerprint(each, ToyTextTask(each), Solo()) for each in (config, heads, frozen)]
    assert found[0] == found[2] != found[1]


def test_other_data_under_the_same_recipe_finds_none(tmp_path: Path) -> None:
    class Brighter(CountingTask):
        def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
            batch = super()._rows(purpose, rows, first_id)
            return Batch(batch.inputs * 0.9, batch.targets * 0.9, batch.categories, batch.ids)

    trained(toy_config(), tmp_path)
    task = Brighter(toy_config())
    run(toy_config(), task, twins=tmp_path)
    assert task.trained - 3 == 60 + 2 * 45


def test_a_damaged_twin_is_trained_again_and_replaced(tmp_path: Path) -> None:
    trained(toy_config(), tmp_path)
    (path,) = tmp_path.glob("*/dense-000000060/twin.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert trained(toy_config(), tmp_path) == 60 - 40 + 2 * 45
    assert trained(toy_config(), tmp_path) == 2 * 45


def test_what_an_earlier_attempt_trained_unheard_is_not_kept(tmp_path: Path) -> None:
    config, store = toy_config(), MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        run(config, Interrupted(config), store=store)
    run(config, ToyTask(config), store=store, twins=tmp_path)
    assert not list(tmp_path.glob("*/dense-*"))


class Interrupted(ToyTask):
    """Ends the run at step 20, after the first checkpoints."""

    def train_batch(self, step: int) -> Batch:
        if step == 20:
            raise KeyboardInterrupt
        return super().train_batch(step)

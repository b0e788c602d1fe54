from pathlib import Path

import pytest

from moeify import jobs
from moeify.comparison import Job
from moeify.jobs import Places, run_job
from moeify.recipe.config import RunConfig
from moeify.task import Batch
from tests.test_loop import outcome
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


class CountedTask(ToyTask):
    """Counts the batches that all tasks of the test were asked to train on."""

    trained = 0
    brightness = 1.0

    def train_batch(self, step: int) -> Batch:
        type(self).trained += 1
        return super().train_batch(step)

    def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
        batch = super()._rows(purpose, rows, first_id)
        return Batch(batch.inputs * self.brightness, batch.targets * self.brightness, batch.categories, batch.ids)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    def build_task(config: RunConfig, *, cache: Path, base: Path, shelf: str | None) -> ToyTask:
        return CountedTask(config)

    monkeypatch.setattr(jobs, "build_task", build_task)
    monkeypatch.setattr(CountedTask, "trained", 0)
    return Places(base=tmp_path, cache=tmp_path, results=tmp_path / "results", twins=tmp_path / "twins")


def trained(job: Job, places: Places) -> int:
    """Run and return how many steps were trained; some batches are drawn to tell the data by."""
    CountedTask.trained = 0
    ended = run_job(toy_config(), job, places)
    assert ended.path.is_file()
    if ended.before:
        assert CountedTask.trained == 3
        return 0
    return CountedTask.trained - 6


def test_the_loop_trains_the_twins_and_its_rivals_train_themselves_alone(places: Places) -> None:
    assert trained(Job("loop", 0.45, 0), places) == 2 * 60 + 45
    assert trained(Job("random", 0.45, 0), places) == 45
    assert trained(Job("loop", 0.3, 0), places) == 45
    assert trained(Job("oneshot", 0.45, 0), places) == 45
    assert trained(Job("init", 0.45, 0), places) == 60
    assert trained(Job("random", 0.45, 1), places) == 60 + 45  # no loop of that seed came before


def test_a_job_that_ended_is_not_run_again_and_its_result_is_the_same(places: Places) -> None:
    job = Job("cmoe", 0.45, 0)
    first = run_job(toy_config(), job, places)
    assert not first.before
    again = run_job(toy_config(), job, places)
    assert (again.before, again.path, again.result) == (True, first.path, first.result)
    assert [path.name for path in places.results.iterdir()] == [first.path.name]
    assert first.path.name.startswith("cmoe-0.45-0-")


def test_a_damaged_result_is_run_again(places: Places) -> None:
    job = Job("init", 0.45, 0)
    first = run_job(toy_config(), job, places)
    first.path.write_bytes(first.path.read_bytes()[:100])
    again = run_job(toy_config(), job, places)
    assert (again.before, outcome(again.result)) == (False, outcome(first.result))
    assert run_job(toy_config(), job, places).before


def test_other_data_or_settings_or_code_are_another_result(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("loop", 0.45, 0)
    run_job(toy_config(), job, places)
    assert not run_job(toy_config(partition={"multiple": 4, "min_units": 4}), job, places).before
    monkeypatch.setattr(CountedTask, "brightness", 0.9)
    assert not run_job(toy_config(), job, places).before
    monkeypatch.setattr(jobs, "code", lambda: "another version")
    assert not run_job(toy_config(), job, places).before
    assert run_job(toy_config(), job, places).before


def test_shared_twins_change_no_bit(places: Places, tmp_path: Path) -> None:
    run_job(toy_config(), Job("loop", 0.45, 0), places)
    job = Job("magnitude", 0.45, 0)
    apart = Places(base=tmp_path, cache=tmp_path, results=tmp_path / "r", twins=tmp_path / "t")
    assert outcome(run_job(toy_config(), job, places).result) == outcome(run_job(toy_config(), job, apart).result)

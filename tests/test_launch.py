import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from click.testing import CliRunner
from filelock import FileLock

from moeify.events import Failed, Phase, Step
from moeify.recipe.config import Cluster, RunConfig
from moeify.recipe.load import to_yaml
from moeify.split_folder import load_from_run
from moeify.storing import StorageError
from pipelines import launch, ray_cluster, restarts
from pipelines.cli import main
from pipelines.journal import JournalTracker, line_of, read_events
from pipelines.launch import fit, in_process
from pipelines.ray_cluster import RayStartError, RunFailedError, cluster
from pipelines.runs import RunBusyError, RunFolder, hold, status


def recipe(**cluster: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {"kind": "digits"},
            "model": {"kind": "autoencoder"},
            "training": {"steps": 4, "rows": 20},
            "rounds": [{"train": 2, "recover": 2, "separation": 0.3}],
            "cluster": {"threads": 1, **cluster},
        }
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    path = tmp_path / "tiny-20260101-000000-abcd"
    path.mkdir()
    return RunFolder(path)


class Deaf:
    """Stands for MLflow, and for what draws, where a test is about something else."""

    offset = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def take(self, events: Any) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MlflowFollower", Deaf)
    monkeypatch.setattr(launch, "Drawing", Deaf)


def ray_processes() -> list[str]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except psutil.NoSuchProcess:
            continue
    return [name for name in found if "ray" in name.lower() or "gcs" in name]


# --- without Ray ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untracked")
def test_a_failed_attempt_stands_in_the_journal_in_one_line(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.worker

    def work(payload: dict[str, Any]) -> None:
        with JournalTracker(Path(payload["folder"]) / "journal.jsonl"):
            raise ValueError("category 'python' has 3 bytes;\nwanted 2 MB")

    monkeypatch.setattr(pipelines.worker, "work", work)
    for attempt in (1, 2):
        with pytest.raises(ValueError, match="wanted 2 MB"):
            in_process(folder, recipe(), folder.path, [])
        events, _ = read_events(folder.journal, 0)
        assert [type(event) for event in events] == [Failed] * attempt
    assert events[-1].reason == "category 'python' has 3 bytes; wanted 2 MB"  # type: ignore[union-attr]
    assert status(folder) == "failed"


@pytest.mark.usefixtures("untracked")
def test_an_interrupted_attempt_is_not_called_a_failure(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.worker

    def work(payload: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.worker, "work", work)
    with pytest.raises(KeyboardInterrupt):
        in_process(folder, recipe(), folder.path, [])
    assert status(folder) == "interrupted"


@pytest.mark.usefixtures("untracked")
def test_sigterm_ends_a_run_as_ctrl_c_does(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.worker

    def work(payload: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr("pipelines.stopping.GRACE", 0.5)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pipelines.worker, "work", work)
    with pytest.raises(KeyboardInterrupt):
        in_process(folder, recipe(), folder.path, [])
    assert status(folder) == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("untracked")
def test_a_run_that_another_process_drives_is_refused(folder: RunFolder) -> None:
    with hold(folder), pytest.raises(RunBusyError, match="driven by another process"):
        in_process(folder, recipe(), folder.path, [])


def test_the_first_failure_of_a_group_is_the_one_that_is_heard(folder: RunFolder) -> None:
    from pipelines.worker import Failure, failure_path, leave

    leave({"folder": folder.path}, ValueError("first"))
    leave({"folder": folder.path}, KeyError("second"))
    failure = Failure.model_validate_json(failure_path(folder.path).read_text())
    assert (failure.family, failure.kind, failure.message) == ("value", "ValueError", "first")
    assert "ValueError: first" in failure.trace
    assert [path.name for path in folder.path.iterdir()] == ["failure.json"]


def test_a_lost_peer_is_raised_and_other_errors_are_left_too(folder: RunFolder) -> None:
    from pipelines import worker

    def raises(error: Exception) -> Any:
        def work(payload: dict[str, Any]) -> None:
            raise error

        return work

    payload = {"folder": str(folder.path)}
    gone = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="closed by peer"):
        worker.guarded(raises(gone), payload)
    assert worker.failure_of(payload) is None
    with pytest.raises(ValueError, match="3 bytes"):
        worker.guarded(raises(ValueError("category 'python' has 3 bytes")), payload)
    with pytest.raises(RuntimeError, match="closed by peer"):
        worker.guarded(raises(gone), payload)
    failure = worker.failure_of(payload)
    assert failure is not None
    assert failure.message == "category 'python' has 3 bytes"


def test_the_address_of_a_job_api_is_not_joined_as_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ValueError, match=r"use 'moeify submit'"), cluster(Cluster(), keep_logs=tmp_path):
        pass


def _init(*answers: Exception | None) -> tuple[Any, list[dict[str, Any]]]:
    """A stand-in for ``ray.init`` that raises these in turn, and the settings that it was given."""
    asked: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        asked.append(settings)
        if error := answers[len(asked) - 1]:
            raise error

    return init, asked


SLOW = Exception("The current node timed out during startup. This\ncould happen because of some of the raylet.")


@pytest.mark.parametrize(
    "errors",
    [
        (SLOW, SLOW),
        (RuntimeError("Failed to start GCS. Port 6379 is in use"),),
        (ConnectionError("ray is not here"),),
    ],
)
def test_ray_that_cannot_start_is_told_in_one_line_with_exit_code_2(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, untracked: None, errors: tuple[Exception, ...]
) -> None:
    init, asked = _init(*errors)
    monkeypatch.setattr("ray.init", init)
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(recipe()))
    done = CliRunner().invoke(main, ["run", str(path), "-q"], env={"MOEIFY_HOME": str(tmp_path / "runs")})
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    said = " ".join(str(errors[-1]).split())
    assert line.startswith(f"moeify: error: Ray did not start on this machine ({said}); try again when")
    assert len(asked) == len(errors)
    assert not list(Path(asked[0]["_temp_dir"]).parent.glob(Path(asked[0]["_temp_dir"]).name))


def test_ray_that_is_slow_once_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    init, asked = _init(SLOW, None)
    monkeypatch.setattr("ray.init", init)
    with cluster(Cluster(), keep_logs=tmp_path):
        assert len(asked) == 2


def test_a_cluster_that_cannot_be_joined_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    init, _ = _init(RuntimeError("no GCS there"))
    monkeypatch.setattr("ray.init", init)
    wanted = r"the Ray cluster at 127.0.0.1:1 \(RAY_ADDRESS\) cannot be joined \(no GCS there\); start it, or unset it"
    with pytest.raises(RayStartError, match=wanted), cluster(Cluster(), keep_logs=tmp_path):
        pass


def test_settings_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEIFY_TEST_OLD", "1")
    with ray_cluster._environment({"MOEIFY_TEST_OLD": "2", "MOEIFY_TEST_NEW": "3"}):
        assert os.environ["MOEIFY_TEST_OLD"] == "2"
    assert os.environ["MOEIFY_TEST_OLD"] == "1"
    assert "MOEIFY_TEST_NEW" not in os.environ


def test_what_a_killed_driver_left_is_removed_and_what_others_hold_is_not(tmp_path: Path) -> None:
    for name in ("moeify-dead", "moeify-alive", "moeify-new", "moeify-stranger", "other"):
        (tmp_path / name / "session").mkdir(parents=True)
        if name != "moeify-stranger":
            (tmp_path / name / "driver.lock").touch()
            if name != "moeify-new":
                os.utime(tmp_path / name / "driver.lock", (0, 0))
    (tmp_path / "moeify-link").symlink_to(tmp_path / "other")
    with FileLock(tmp_path / "moeify-alive" / "driver.lock"):
        os.utime(tmp_path / "moeify-alive" / "driver.lock", (0, 0))
        ray_cluster.clear_leftovers(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["moeify-alive", "moeify-link", "moeify-new", "moeify-stranger", "other"]
    assert (tmp_path / "other" / "session").is_dir()


def test_what_the_user_set_about_tokens_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert ray_cluster._token(tmp_path) == {}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    path = Path(ray_cluster._token(tmp_path)["RAY_AUTH_TOKEN_PATH"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text()) == 64


# --- with Ray ---------------------------------------------------------------------------------------------
# Workers are closures: they travel by value, so that a worker need not find this file.


@pytest.fixture(scope="class")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cluster for the tests that need nothing of its start and end."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.delenv("RAY_ADDRESS", raising=False)
        with cluster(Cluster(workers=2, threads=1), keep_logs=tmp_path_factory.mktemp("logs") / "ray"):
            yield
    assert ray_processes() == []


RAYS_OWN_WARNINGS = pytest.mark.filterwarnings(r"ignore::Warning:ray\.")


@pytest.mark.ray
@RAYS_OWN_WARNINGS
@pytest.mark.usefixtures("up")
class TestOnOneCluster:
    def test_nothing_of_a_run_listens_to_other_machines(self, folder: RunFolder) -> None:
        def worker(payload: dict[str, Any]) -> None:
            import torch
            import torch.distributed as dist

            dist.all_reduce(torch.ones(3))
            open_ = [each for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
            told = [each.laddr.ip for each in open_]
            Path(payload["folder"], f"worker-{dist.get_rank()}").write_text(json.dumps(told))

        fit(folder, Cluster(workers=2, threads=1), worker, {"folder": str(folder.path)})
        told = [json.loads((folder.path / f"worker-{rank}").read_text()) for rank in (0, 1)]
        assert all(told)
        others = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # workers end in their own time
                others += [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        assert len(others) > 3
        assert {*told[0], *told[1], *others} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}

    def test_a_worker_that_is_killed_is_started_again(self, folder: RunFolder) -> None:
        def worker(payload: dict[str, Any]) -> None:
            import torch.distributed as dist

            from moeify.world import Group

            attempts = Path(payload["folder"], f"attempts-{dist.get_rank()}")
            with attempts.open("a") as file:
                file.write("x")
            world = Group()
            world.share(None)
            if world.rank == 1 and len(attempts.read_text()) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            seen = world.share(f"{world.size} workers")
            Path(payload["folder"], f"seen-{world.rank}").write_text(seen)

        fit(folder, Cluster(workers=2, threads=1, retries=1), worker, {"folder": str(folder.path)})
        assert (folder.path / "attempts-0").read_text() == (folder.path / "attempts-1").read_text() == "xx"
        assert (folder.path / "seen-0").read_text() == (folder.path / "seen-1").read_text() == "2 workers"
        assert not (folder.path / "ray").exists()

    @pytest.mark.parametrize(("deaths", "tries"), [(0, 1), (2, 3), (3, 3)])
    def test_a_worker_that_dies_while_its_group_is_set_up_is_started_again(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, deaths: int, tries: int
    ) -> None:
        from ray.exceptions import RayActorError
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import ControllerError

        failures: list[Exception] = [RayActorError() for _ in range(deaths)]
        fits = []

        def dies(self: TorchTrainer) -> None:
            fits.append(self)
            if failures:
                raise ControllerError(failures.pop())

        monkeypatch.setattr(TorchTrainer, "fit", dies)
        monkeypatch.setattr("pipelines.restarts.release", lambda: None)
        told = (folder, Cluster(workers=2, threads=1, retries=2), lambda _: None, {"folder": str(folder.path)})
        with pytest.raises(RunFailedError, match="died again on each of 2") if deaths > 2 else nullcontext():
            fit(*told)
        assert len(fits) == tries
        failures, fits = [ValueError("a bug of Ray's own")], []
        with pytest.raises(RunFailedError, match="a bug of Ray's own"):
            fit(*told)
        assert len(fits) == 1

    @pytest.mark.parametrize(("settled_at", "tries", "raises"), [(1, 1, False), (2, 2, False), (9, 3, True)])
    def test_workers_that_ended_are_started_again_until_that_is_settled(
        self, settled_at: int, tries: int, raises: bool
    ) -> None:
        from ray.train.v2.api.exceptions import WorkerGroupError

        fits = []

        class Dies:
            def fit(self) -> None:
                fits.append(self)
                raise WorkerGroupError("2 workers died", {0: RuntimeError()})

        with pytest.raises(WorkerGroupError) if raises else nullcontext():
            restarts.fit_again(Dies, 2, lambda _: len(fits) == settled_at)
        assert len(fits) == tries

    def test_what_a_lost_group_of_workers_held_is_given_back(self) -> None:
        import ray
        from ray.util import placement_group, placement_group_table

        ray.get(placement_group([{"CPU": 1}]).ready())
        restarts.release()
        assert {known["state"] for known in placement_group_table().values()} == {"REMOVED"}

    def test_an_error_of_one_worker_ends_the_run_in_its_own_words(self, folder: RunFolder) -> None:
        def worker(payload: dict[str, Any]) -> None:
            import torch.distributed.fsdp  # noqa: F401  # as the loop does; it holds the group, so that none can close it

            from moeify.world import Group

            world = Group()
            with Path(payload["folder"], f"attempts-{world.rank}").open("a") as file:
                file.write("x")
            world.share(None)  # both have begun
            if world.rank == 1:
                raise ValueError("category 'python' has 3 bytes; wanted 2 MB")
            world.share(None)
            world.share(None)

        with pytest.raises(ValueError, match="wanted 2 MB") as caught:
            fit(folder, Cluster(workers=2, threads=1, retries=2), worker, {"folder": str(folder.path)})
        assert str(caught.value) == "category 'python' has 3 bytes; wanted 2 MB"
        assert "in worker" in caught.value.__notes__[0]
        assert (folder.path / "attempts-0").read_text() == (folder.path / "attempts-1").read_text() == "x"

    def test_a_disk_that_takes_not_even_the_failure_ends_the_run_in_its_own_words(self, folder: RunFolder) -> None:
        def worker(payload: dict[str, Any]) -> None:
            import resource

            from moeify.storing import storing
            from moeify.world import Group

            world = Group()
            with Path(payload["folder"], f"attempts-{world.rank}").open("a") as file:
                file.write("x")
            world.share(None)
            if world.rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
                path = Path(payload["folder"], "kept")
                with storing(path):
                    path.write_text("a checkpoint")
            world.share(None)

        with pytest.raises(StorageError, match="kept cannot be written: File too large; what was kept before"):
            fit(folder, Cluster(workers=2, threads=1, retries=2), worker, {"folder": str(folder.path)})
        assert (folder.path / "attempts-0").read_text() == (folder.path / "attempts-1").read_text() == "x"
        assert not list(folder.path.glob("failure.json*"))

    def test_a_worker_that_is_killed_each_time_is_named_with_where_the_run_was(self, folder: RunFolder) -> None:
        def worker(payload: dict[str, Any]) -> None:
            from moeify.world import Group

            world = Group()
            world.share(None)
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            world.share(None)

        place: dict[str, Any] = {"arm": "split", "round": 2, "step": 7, "work": 0.5}
        phase = Phase(id="phase/2/recover", time=1.0, phase="recover", round=2)
        step = Step(id="step/split/7", time=2.0, **place, loss={"0": 1.0}, learning_rate=0.1, units_per_second=3.0)
        folder.journal.write_bytes(line_of(phase) + line_of(step))
        with pytest.raises(RunFailedError) as caught:
            fit(folder, Cluster(workers=2, threads=1, retries=0), worker, {"folder": str(folder.path)})
        assert str(caught.value) == (
            f"the workers of {folder.id} died (worker 1: it was killed, as a machine does that is out of memory (see "
            f"its dmesg), or crashed); last heard of: round 2 · recover · split step 7 · loss 1.000 · 3 units/s; "
            f"'moeify resume {folder.id}' goes on from the last checkpoint"
        )

    def test_a_worker_without_memory_is_started_again_and_named_as_that_does_not_help(self, folder: RunFolder) -> None:
        def worker(payload: dict[str, Any]) -> None:
            from moeify.divergence import OutOfMemoryError
            from moeify.world import Group

            world = Group()
            attempts = Path(payload["folder"], f"attempts-{world.rank}")
            with attempts.open("a") as file:
                file.write("x")
            if world.rank == 1:
                raise OutOfMemoryError("split, step 7, worker 1: out of memory")
            world.share(None)
            world.share(None)

        with pytest.raises(RunFailedError, match="split, step 7, worker 1: out of memory"):
            fit(folder, Cluster(workers=2, threads=1, retries=1), worker, {"folder": str(folder.path)})
        assert (folder.path / "attempts-1").read_text() == "xx"

    @pytest.mark.usefixtures("untracked")
    def test_ctrl_c_leaves_a_checkpoint_that_goes_on_to_the_same_bits(self, folder: RunFolder, tmp_path: Path) -> None:
        pressed: list[bool] = []

        class Presses(Deaf):
            def take(self, events: Any) -> None:
                if not pressed and any(event.kind == "step" for event in events):
                    pressed.append(True)
                    os.kill(os.getpid(), signal.SIGINT)

        config = recipe(workers=1)
        steps = {"training": {"steps": 600, "rows": 20}, "tracking": {"every": 100}}
        config = RunConfig.model_validate({**config.model_dump(), **steps})
        with pytest.raises(KeyboardInterrupt, match="stopped with a checkpoint"):
            launch.on_ray(folder, config, tmp_path, [Presses()])
        assert status(folder) == "interrupted"
        in_process(folder, config, tmp_path, [])
        beside = RunFolder(tmp_path / "tiny-20260101-000001-abcd")
        beside.path.mkdir()
        in_process(beside, config, tmp_path, [])
        losses = [json.loads(run.result.read_text())["test_loss"] for run in (folder, beside)]
        assert losses[0] == losses[1]

    @pytest.mark.slow
    @pytest.mark.usefixtures("untracked")
    def test_workers_that_share_models_out_end_as_one_process_does(self, folder: RunFolder, tmp_path: Path) -> None:
        config = recipe(workers=2, parallel={"kind": "fsdp"})
        launch.on_ray(folder, config, tmp_path, [])
        alone = RunFolder(tmp_path / "tiny-20260101-000001-abcd")
        alone.path.mkdir()
        in_process(alone, recipe(workers=1), tmp_path, [])
        shared, whole = (json.loads(run.result.read_text())["test_loss"] for run in (folder, alone))
        for arm, losses in whole.items():
            assert shared[arm] == pytest.approx(losses, abs=1e-3), arm
        newest = max(folder.checkpoints.iterdir())
        assert {path.name for path in newest.glob("split.*")} == {f"split.{n}-of-2.safetensors" for n in (0, 1)}
        assert load_from_run(folder.path).partition.widths == load_from_run(alone.path).partition.widths


@pytest.mark.ray
@RAYS_OWN_WARNINGS
def test_a_private_cluster_stays_out_of_the_home_folder_and_leaves_the_logs_of_workers_that_die(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker(payload: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    home, logs = folder.path / "home", folder.path / "ray-logs"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    before = dict(os.environ)
    wanted = Cluster(workers=1, threads=64, retries=0)

    def run() -> None:
        with cluster(wanted, keep_logs=logs):
            import ray

            assert ray.cluster_resources()["CPU"] >= 64
            with pytest.raises(ValueError, match=r"lower cluster.workers or cluster.threads"):
                ray_cluster._check_room(Cluster(workers=2, threads=64))
            refused = r"2 workers of 1 core and a GPU will never fit .* cores and \[0\] GPUs; .*set cluster.gpus: 0"
            with pytest.raises(ValueError, match=refused):
                ray_cluster._check_room(Cluster(workers=2, gpus=1))
            fit(folder, wanted, worker, {"folder": str(folder.path)})

    with pytest.raises(RunFailedError, match=f"moeify resume {folder.id}"):
        run()
    assert list(logs.glob("worker-*.err"))
    assert list(home.iterdir()) == []
    assert dict(os.environ) == before
    assert ray_processes() == []


def test_a_gpu_that_torch_cannot_use_is_told_before_workers_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ray_cluster._trouble(0) is None
    assert "finds no GPU here" in (ray_cluster._trouble(1) or "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    broken = Mock(side_effect=RuntimeError("no kernel image is available"))
    monkeypatch.setattr("torch.cuda.current_device", broken)
    monkeypatch.setattr("torch.use_deterministic_algorithms", Mock())
    assert "cannot use this GPU (no kernel image is available)" in (ray_cluster._trouble(1) or "")


@pytest.mark.gpu
@pytest.mark.ray
@RAYS_OWN_WARNINGS
@pytest.mark.usefixtures("untracked")
def test_a_whole_run_on_ray_with_a_gpu_ends_near_one_without(folder: RunFolder, tmp_path: Path) -> None:
    launch.on_ray(folder, recipe(workers=1, gpus=1), tmp_path, [])
    beside = RunFolder(tmp_path / "tiny-20260101-000001-abcd")
    beside.path.mkdir()
    in_process(beside, recipe(workers=1), tmp_path, [])
    there, here = (json.loads(run.result.read_text())["test_loss"] for run in (folder, beside))
    for arm, losses in here.items():
        assert there[arm] == pytest.approx(losses, abs=1e-2), arm


@pytest.mark.ray
@RAYS_OWN_WARNINGS
@pytest.mark.usefixtures("untracked")
def test_a_whole_run_on_ray_ends_as_one_in_process(folder: RunFolder, tmp_path: Path) -> None:
    config = recipe(workers=1)
    launch.on_ray(folder, config, tmp_path, [])
    beside = RunFolder(tmp_path / "tiny-20260101-000001-abcd")
    beside.path.mkdir()
    in_process(beside, config, tmp_path, [])
    for run in (folder, beside):
        assert status(run) == "finished"
    losses = [json.loads(run.result.read_text())["test_loss"] for run in (folder, beside)]
    assert losses[0] == losses[1]

"""Runs behind an S3 URL, through the command line: from other machines, killed, refused, and with no secret told."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from s3fs import S3FileSystem

from moeify.events import Phase
from moeify.loop import run
from moeify.place import Place
from moeify.recipe.config import RunConfig
from moeify.split_folder import load_split
from pipelines import launch, lease, ray_cluster
from pipelines.cli import main
from pipelines.journal import JournalError, line_of, read_events
from pipelines.remote_run import RemoteRun, part_name
from pipelines.runs import RunFolder
from pipelines.url_journal import UrlJournal
from tests.finished_runs import TINY
from tests.stores import (
    BUCKET,
    KEY,
    SECRET,
    answering,
    credentials,
    error_body,
    gs_credentials,
    gs_server,
    s3_server,
)
from tests.test_launch import Deaf
from tests.test_storing import RECIPE
from tests.test_twin_cache import CountingTask
from tests.texts import write_texts
from tests.toy import toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

LONG = TINY.replace("steps: 12", "steps: 24").replace(
    "rows: 8}\nattribution", "rows: 8}\ncheckpoints: {every: 4}\nattribution"
)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    with gs_server() as endpoint:
        yield endpoint


class Machine:
    """A folder that stands for a machine: all it shares with others is the URL and its environment."""

    def __init__(self, place: Path, url: str, endpoint: str) -> None:
        place.mkdir()
        self.place = place
        self.url = url
        self.environment = {
            **(gs_credentials if url.startswith("gs://") else credentials)(endpoint),
            "MOEIFY_HOME": url,
            "MOEIFY_CACHE": str(place / "cache"),
            "COLUMNS": "80",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            cwd=self.place,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *arguments: str, **more: str) -> Result:
        return CliRunner().invoke(main, arguments, env={**self.environment, **more})

    @contextmanager
    def here(self, **more: str) -> Iterator[None]:
        """Let the body's own calls have this machine's environment."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (self.environment | more).items():
                patch.setenv(name, value)
            yield

    @property
    def home(self) -> Path:
        (home,) = (self.place / "cache/homes").iterdir()
        return home


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process runs tell MLflow nothing: to lay out its database takes longer than the runs."""
    monkeypatch.setattr(launch, "MlflowFollower", Deaf)
    monkeypatch.setattr(launch, "Drawing", Deaf)


@pytest.fixture
def machines(tmp_path: Path, s3: str) -> tuple[Machine, Machine]:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    one, other = Machine(tmp_path / "one", url, s3), Machine(tmp_path / "other", url, s3)
    return furnished(one), other


def furnished(machine: Machine) -> Machine:
    write_texts(machine.place)
    (machine.place / "tiny.yaml").write_text(TINY)
    (machine.place / "long.yaml").write_text(LONG)
    return machine


@pytest.fixture(params=["s3", "gs"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Machine, Machine]:
    """Two machines behind a URL of either kind."""
    endpoint, url = request.getfixturevalue(request.param), f"{request.param}://{BUCKET}/{tmp_path.name}"
    return furnished(Machine(tmp_path / "one", url, endpoint)), Machine(tmp_path / "other", url, endpoint)


def test_a_run_behind_a_url_is_read_reported_exported_and_resumed_from_a_machine_that_has_the_url_alone(
    anywhere: tuple[Machine, Machine],
) -> None:
    one, other = anywhere
    done = one.call("run", str(one.place / "tiny.yaml"), "--local", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    shutil.rmtree(one.place)  # nothing of the first machine is needed any more
    listed = json.loads(other.call("runs", "--json").output)
    assert [(row["status"], row["rounds"], row["problem"]) for row in listed] == [("finished", 1, None)]
    run = listed[0]["run"]
    assert listed[0]["path"] == f"{other.url}/{run}"
    assert "Expert tree" in other.call("show", "last").output
    assert "is finished" in other.call("resume", "last", "--local").output
    assert other.call("report", "last", "--examples").exit_code == 0
    with other.here():
        place = Place(f"{other.url}/{run}")
        for path in ("result.json", "report.html", "portraits.json", "rounds/1/partition.json"):
            assert place.read(path)
        assert list(place.found("journal")) == ["journal/whole.jsonl"]
    exported = other.call("export", run, "--split", "-o", f"{other.url}-exported/split")
    assert exported.exit_code == 0, exported.output
    again = other.call("export", run, "--split", "-o", f"{other.url}-exported/split")
    assert (again.exit_code, len(again.output.splitlines())) == (2, 1)
    assert "is there already" in again.output
    with other.here():
        assert load_split(f"{other.url}-exported/split").categories == ("code", "prose")


def bits(machine: Machine, run: str) -> dict[str, object]:
    """Return all that is to be the same however a run came about: losses, and the final weights' hashes."""
    with machine.here():
        place = Place(f"{machine.url}/{run}")
        result = json.loads(place.read("result.json"))
        (manifest,) = [path for path in place.found("checkpoints") if path.endswith("manifest.json")][-1:]
        hashes = json.loads(place.read(manifest))["body"]["files"]
    return {"loss": result["test_loss"], "tree": result["tree"], "hashes": hashes}


def killed_behind_a_checkpoint(machine: Machine, run: str, *asked: str) -> Place:
    """Kill a run as soon as it has published a checkpoint; return its place."""
    process = machine.start("run", *asked, "--quiet", "--id", run)
    try:
        with machine.here():
            place = Place(f"{machine.url}/{run}")
            wait_for(lambda: any(path.endswith("manifest.json") for path in place.found("checkpoints")), seconds=400.0)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return place


def test_a_killed_run_resumes_to_the_same_bits_on_another_machine_and_loses_nothing_that_was_told(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machines
    calm, run = "long-20260101-000000-aaaa", "long-20260101-000001-bbbb"
    done = one.call("run", str(one.place / "long.yaml"), "--local", "--quiet", "--id", calm)
    assert done.exit_code == 0, done.output
    killed_behind_a_checkpoint(one, run, "long.yaml", "--local")
    with one.here():
        told = one.home / run / "journal.jsonl"
        before = told.read_bytes() if told.exists() else b""
    busy = other.call("resume", run, "--local", "--quiet")
    assert (busy.exit_code, len(busy.output.splitlines())) == (2, 1)
    assert "its lease ends in" in busy.output or "is being driven" in busy.output
    monkeypatch.setattr(lease, "LAPSE_SECONDS", 0.0)
    resumed = other.call("resume", run, "--local", "--quiet")
    assert (resumed.exit_code, resumed.output) == (0, "")
    assert bits(other, run) == bits(other, calm)
    journal = other.home / run / "journal.jsonl"
    assert journal.read_bytes().startswith(before)
    events, _ = read_events(journal, 0)
    assert len({event.id for event in events}) == len(events)
    undisturbed, _ = read_events(one.home / calm / "journal.jsonl", 0)
    assert {e.id for e in undisturbed} == {e.id for e in events if not e.id.startswith("resumed")}


def test_a_worker_that_outlives_its_driver_stops_at_its_next_word(machines: tuple[Machine, Machine]) -> None:
    one, other = machines
    with one.here():
        run = RemoteRun(Place(f"{one.url}/x-20260101-000000-aaaa"), one.place / "copy")
        late = UrlJournal(run)
        late.emit(Phase(id="phase/1/train", time=1.0, phase="train", round=1))
        late.flush()
        with UrlJournal(RemoteRun(run.place, other.place / "copy")) as journal:
            late.emit(Phase(id="late", time=2.0, phase="train", round=1))
            with pytest.raises(JournalError, match=r"driven by a later attempt \(number 2, this is 1\)"):
                late.flush()
            journal.emit(Phase(id="phase/1/train", time=3.0, phase="train", round=1))
            journal.emit(Phase(id="phase/1/attribute", time=4.0, phase="attribute", round=1))
        with pytest.raises(JournalError):
            late.close()
        run.compact()
        run.catch_up()
        assert [event.id for event in read_events(run.journal, 0)[0]] == ["phase/1/train", "phase/1/attribute"]
        assert list(run.place.found("journal")) == ["journal/whole.jsonl"]


def test_a_part_that_another_writer_slipped_in_is_kept_and_not_told_twice(tmp_path: Path) -> None:
    run = RemoteRun(Place(f"memory://{tmp_path.name}"), tmp_path)
    first, second = (Phase(id=f"phase/{n}", time=1.0, phase="train", round=n) for n in (1, 2))
    with UrlJournal(run) as journal:
        run.place.create(part_name(0), line_of(first))  # between the other's look at the claims and ours
        journal.emit(first)
        journal.emit(second)
    assert [event.id for event in read_events(run.journal, 0)[0]] == ["phase/1", "phase/2"]


@pytest.mark.parametrize("cut", [0, 1, 30, 10**6])
def test_a_copy_whose_journal_was_cut_short_is_put_right(tmp_path: Path, cut: int) -> None:
    run = RemoteRun(Place(f"memory://{tmp_path.name}-{cut}"), tmp_path)
    at = 0
    for number in range(3):
        part = line_of(Phase(id=f"phase/{number}", time=1.0, phase="train", round=number)) * 2
        run.place.create(part_name(at), part)
        at += len(part)
    run.catch_up()
    whole = run.journal.read_bytes()
    assert len(whole) == at
    run.journal.write_bytes(whole[:-cut] if cut < at else b"")
    run.catch_up()
    assert run.journal.read_bytes() == whole
    run.compact()
    run.journal.write_bytes(whole[: max(0, at - cut)])
    run.catch_up()
    assert run.journal.read_bytes() == whole


def test_what_a_folder_no_longer_holds_goes_behind_the_url_and_in_every_copy(tmp_path: Path) -> None:
    place = Place(f"memory://{tmp_path.name}")
    one, other = RemoteRun(place, tmp_path / "one"), RemoteRun(place, tmp_path / "other")
    made = one.copy / "attribution"
    made.mkdir(parents=True)
    for name in ("table", "agreement"):
        (made / name).write_text(name)
    (one.copy / "beside").write_text("of another command")
    one.push(made, one.copy / "beside")
    other.pull()
    (other.copy / "attribution/own").write_text("never sent")
    for name in (made / "agreement", one.copy / "beside"):
        name.unlink()
    one.push(made)
    assert sorted(place.found()) == ["attribution/table", "beside"]
    other.pull()
    assert sorted(path.name for path in (other.copy / "attribution").iterdir()) == ["own", "table"]
    one.pull()
    assert (one.copy / "beside").read_text() == "of another command"
    assert not (made / "agreement").exists()


def test_no_credential_is_ever_written(machines: tuple[Machine, Machine], caplog: pytest.LogCaptureFixture) -> None:
    one, _ = machines
    with caplog.at_level("DEBUG", logger="pipelines"):
        done = one.call("run", str(one.place / "tiny.yaml"), "--local")
    assert done.exit_code == 0, done.output
    with one.here():
        far = [Place(one.url).read(path) for path in Place(one.url).found()]
    near = [path.read_bytes() for path in one.place.rglob("*") if path.is_file()]
    assert len(far) > 10
    for content in (*far, *near, done.output.encode(), caplog.text.encode()):
        for secret in (KEY, SECRET):
            assert secret.encode() not in content


# --- what is said where it goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://key:secret@bucket/runs", "credentials go into the environment alone"),
        ("ftp://host/runs", "ftp:// is no storage that moeify knows"),
        ("s3://bucket/../x", r"without '?', '#' or '..'"),
        ("s3:///x", "names no bucket"),
    ],
)
def test_a_home_that_no_run_can_live_at_is_refused(machines: tuple[Machine, Machine], url: str, told: str) -> None:
    said = machines[0].call("runs", MOEIFY_HOME=url)
    assert (said.exit_code, len(said.output.splitlines())) == (2, 1)
    assert told in said.output
    assert "secret" not in said.output


def test_a_bucket_that_is_not_there_is_named(machines: tuple[Machine, Machine]) -> None:
    recipe = str(machines[0].place / "tiny.yaml")
    for words in (["runs"], ["run", recipe, "--local"], ["show", "last"]):
        said = machines[0].call(*words, MOEIFY_HOME="s3://no-such-bucket/runs")
        assert (said.exit_code, len(said.output.splitlines())) == (2, 1), said.output
        assert "there is no bucket 'no-such-bucket'; make it, or correct the URL" in said.output


def test_who_has_no_credentials_is_told_how_to_give_them(machines: tuple[Machine, Machine]) -> None:
    S3FileSystem.clear_instance_cache()
    said = machines[0].call("runs", AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    S3FileSystem.clear_instance_cache()
    assert (said.exit_code, len(said.output.splitlines())) == (2, 1), said.output
    assert "no credentials here; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said.output


def test_a_store_that_does_not_answer_is_named_without_its_password(machines: tuple[Machine, Machine]) -> None:
    said = machines[0].call("runs", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert (said.exit_code, len(said.output.splitlines())) == (2, 1), said.output
    assert "http://127.0.0.1:9 does not answer; what was kept before is whole" in said.output
    assert "AWS_ENDPOINT_URL" in said.output


def test_a_store_that_refuses_is_quoted(machines: tuple[Machine, Machine]) -> None:
    with answering((403, error_body("AccessDenied", "Access Denied"))) as (endpoint, _):
        said = machines[0].call("runs", AWS_ENDPOINT_URL=endpoint)
    assert (said.exit_code, len(said.output.splitlines())) == (2, 1), said.output
    assert "refused (Access Denied); check the credentials" in said.output
    assert SECRET not in said.output


def test_what_passes_is_tried_again(machines: tuple[Machine, Machine]) -> None:
    down = (503, error_body("SlowDown", "Please reduce your request rate"))
    answers = answering(down, down, (404, error_body("NoSuchKey", "no")))
    with answers as (endpoint, asked), machines[0].here(AWS_ENDPOINT_URL=endpoint), pytest.raises(FileNotFoundError):
        Place(f"s3://{BUCKET}/x").read("y")
    assert len(asked) >= 3


def test_the_driver_follows_a_worker_on_another_machine(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machines
    real = launch._order

    def elsewhere(folder: RunFolder, *rest: Any) -> dict[str, Any]:
        return {**real(folder, *rest), "folder": str(other.place / "cache/homes/theirs" / folder.id)}

    monkeypatch.setattr(launch, "_order", elsewhere)
    run = "tiny-20260101-000000-aaaa"
    done = one.call("run", str(one.place / "tiny.yaml"), "--local", "--quiet", "--id", run)
    assert (done.exit_code, done.output) == (0, "")
    near, far = one.home / run, other.place / "cache/homes/theirs" / run
    for path in ("journal.jsonl", "result.json", "rounds/1/attribution.safetensors"):
        assert (near / path).read_bytes() == (far / path).read_bytes()
    assert [event.kind for event in read_events(near / "journal.jsonl", 0)[0]][-1] == "finished"
    assert not (near / "checkpoints").exists() or not list((near / "checkpoints").glob("0*"))


def under_ray(machine: Machine, *asked: str) -> None:
    """Call what ends well and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        done = machine.call(*asked, "--quiet")
    assert (done.exit_code, done.output, done.exception) == (0, "", None)


@pytest.mark.slow
@pytest.mark.ray
def test_under_ray_the_keys_come_from_each_process_and_are_written_nowhere(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machines
    looked_at: list[Path] = []
    told_in: list[Path] = []
    real = shutil.rmtree

    def searched(path: Path, **settings: Any) -> None:
        if Path(path).name.startswith(ray_cluster._PREFIX):  # all that Ray wrote: logs, sessions, sockets
            for file in Path(path).rglob("*"):
                if file.is_file() and not file.is_symlink():
                    looked_at.append(file)
                    told_in.extend([file] * (SECRET.encode() in file.read_bytes()))
        real(path, **settings)

    monkeypatch.setattr(ray_cluster.shutil, "rmtree", searched)
    under_ray(one, "run", str(one.place / "tiny.yaml"))
    assert len(looked_at) > 10
    assert told_in == []
    listed = json.loads(other.call("runs", "--json").output)
    assert [(row["status"], row["rounds"], row["problem"]) for row in listed] == [("finished", 1, None)]
    with one.here():
        for path in (place := Place(one.url)).found():
            assert SECRET.encode() not in place.read(path)


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_run_whose_workers_share_models_out_resumes_to_the_same_bits_on_another_machine(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machines
    (one.place / "shared.yaml").write_text(LONG + "cluster: {workers: 2, parallel: {kind: fsdp}}\n")
    calm, run = "long-20260101-000000-aaaa", "long-20260101-000001-bbbb"
    under_ray(one, "run", str(one.place / "shared.yaml"), "--id", calm)
    place = killed_behind_a_checkpoint(one, run, "shared.yaml")
    with one.here():
        assert "result.json" not in place.found()
        sent = {path.rpartition("/")[2] for path in place.found("checkpoints")}
        assert {"dense.0-of-2.safetensors", "dense.1-of-2.safetensors"} <= sent, "each worker sends its own share"
    monkeypatch.setattr(lease, "LAPSE_SECONDS", 0.0)
    under_ray(other, "resume", run)
    assert bits(other, run) == bits(other, calm)
    exported = other.call("export", run, "--category", "code", "-o", str(other.place / "code"))
    assert exported.exit_code == 0, exported.output


def test_the_commands_of_the_page_on_storage_do_what_it_says(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch, laid_out: Path
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "storage.md").read_text(encoding="utf-8")
    digits = RECIPE, "digits", machines[0].place
    monkeypatch.setattr("pipelines.commands.run.find_recipe", lambda name: digits if name == "digits" else None)
    url = f"s3://{BUCKET}/page"
    said = ""
    for machine, block in zip(machines, re.findall(r"```bash\n(.*?)```", page, re.DOTALL), strict=True):
        for line in block.replace("s3://BUCKET", url).splitlines():
            if line.startswith("export"):
                assert line == f"export MOEIFY_HOME={url}/runs"
                continue
            program, *words = line.split()
            assert program == "moeify"
            if words[0] == "sync":
                shutil.copy(laid_out, next((machine.place / "cache/homes").iterdir()) / "mlflow.db")
            done = machine.call(*words, MOEIFY_HOME=f"{url}/runs")
            assert done.exit_code == 0 or words == ["doctor"], (line, done.output, done.exception)
            said += done.output
    for words in (
        f"{url}/runs: can be listed, read and written",
        "finished",
        f"wrote {url}/models/digits",
        "delivered",
    ):
        assert words in said
    with machines[1].here():
        assert len(load_split(f"{url}/models/digits").categories) == 10


def test_twins_that_one_machine_trained_are_taken_by_another(tmp_path: Path) -> None:
    config = toy_config(controls=["told"])
    url = f"memory://{tmp_path.name}"
    first = run_with_twins(config, tmp_path / "one", url)
    second = run_with_twins(config, tmp_path / "other", url)
    assert second < first
    assert run_with_twins(config, tmp_path / "other", None) == second


def run_with_twins(config: RunConfig, twins: Path, url: str | None) -> int:
    """Run and return how many steps were trained."""
    task = CountingTask(config)
    run(config, task, twins=twins, twins_url=url)
    return task.trained

"""Runs on a cluster, with a stand-in for Ray's job API."""

import json
import os
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moeify.recipe.load import parse_recipe
from pipelines import ray_jobs
from pipelines.answer import answer
from pipelines.cli import main
from pipelines.ray_jobs import Jobs, address_of, token_header
from tests.stores import answering

TEXT = """name: tiny
data: {kind: text, source: {kind: jsonl, path: data/texts.jsonl}}
model: {kind: llama}
training: {steps: 10}
rounds: [{train: 1, recover: 2, separation: 0.4}]
"""
LOG = """Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):
Runtime env is setting up.
moeify: error: an earlier one
moeify: error: the category 'a' is empty
"""
RUN, OTHER = "tiny-20260101-000000-abcd", "tiny-20260102-000000-abcd"


@dataclass
class Job:
    submission_id: str
    metadata: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    message: str = "m"
    start_time: int = 0
    driver_exit_code: int | None = None


class Cluster:
    """Stands for the client: jobs do what ``then`` says as soon as they are asked about."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.logs: dict[str, str] = {}
        self.submitted: list[dict[str, Any]] = []
        self.packages: list[dict[str, str]] = []
        self.deleted: list[str] = []
        self.broken = 0
        """Connections for logs that break after half of them."""
        self.answer = ("SUCCEEDED", 0, "fine\n")

    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        if submission_id in self.jobs:
            raise RuntimeError("Request failed with status code 500: Traceback ...")
        self.submitted.append({"entrypoint": entrypoint, "id": submission_id, **runtime_env})
        if folder := runtime_env.get("working_dir"):
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            self.packages.append({path.relative_to(folder).as_posix(): path.read_text() for path in files})
        job = self.jobs[submission_id] = Job(submission_id, metadata, start_time=len(self.jobs))
        arguments = shlex.split(entrypoint)
        if "pipelines.answer" in arguments:
            job.status, job.driver_exit_code, said = self.answer
            self.logs[submission_id] = f"Runtime env is setting up.\n{arguments[3]}\n{said}"
        return submission_id

    def list_jobs(self) -> list[Job]:
        return list(self.jobs.values())

    def get_job_info(self, job_id: str) -> Job:
        return self.jobs[job_id]

    def get_job_logs(self, job_id: str) -> str:
        return self.logs[job_id]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        text = self.logs[job_id]
        for start in range(0, len(text), 3):
            if self.broken and start > len(text) // 2:
                self.broken -= 1
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield text[start : start + 3]
        self.jobs[job_id].status = "FAILED"
        self.jobs[job_id].driver_exit_code = 2

    def stop_job(self, job_id: str) -> bool:
        self.jobs[job_id].status = "STOPPED"
        return True

    def delete_job(self, job_id: str) -> bool:
        self.deleted.append(job_id)
        return True


@pytest.fixture
def client() -> Cluster:
    return Cluster()


@pytest.fixture
def cluster(client: Cluster) -> Jobs:
    return Jobs(client, "http://head:8265", poll_seconds=0.01)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "texts.jsonl").write_text('{"text": "a", "category": "b"}\n')
    (tmp_path / "secret").write_text("not asked for")
    return tmp_path


def submit(cluster: Jobs, base: Path, run: str = RUN) -> str:
    job, shared = cluster.submit(run, TEXT, parse_recipe(TEXT, where="it"), base)
    assert shared == []
    return job


def test_a_submitted_recipe_goes_with_its_data_and_nothing_else(cluster: Jobs, client: Cluster, base: Path) -> None:
    assert submit(cluster, base) == RUN
    (sent,) = client.submitted
    assert shlex.split(sent["entrypoint"]) == (
        ["python", "-m", "pipelines", "run", "recipe.yaml", "--id", RUN, "--pack"]
    )
    assert client.packages == [{"data/texts.jsonl": '{"text": "a", "category": "b"}\n', "recipe.yaml": TEXT}]
    assert not Path(sent["working_dir"]).exists()
    assert sent["env_vars"]["RAY_API_SERVER_ADDRESS"] == "local"


def test_no_secret_of_the_environment_goes_with_a_job(
    cluster: Jobs, client: Cluster, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hush-hush")
    submit(cluster, base)
    assert "hush-hush" not in str(client.submitted)


@pytest.mark.parametrize("run", ["x; touch /tmp/x", "../../x-20260101-000000-abcd", f"{RUN}\n", f"-{RUN}", "$(x)", ""])
def test_what_is_no_id_starts_no_job(cluster: Jobs, client: Cluster, base: Path, run: str) -> None:
    with pytest.raises(ValueError, match="is no id of a run"):
        submit(cluster, base, run)
    with pytest.raises(ValueError, match="is no id of a run"):
        cluster.resume(run)
    assert client.submitted == []


def test_a_question_reaches_the_head_as_arguments_whatever_it_holds(cluster: Jobs, client: Cluster) -> None:
    evil = "last'; touch /tmp/owned; echo '$(id)"
    assert cluster.ask(["show", evil]) == "fine\n"
    *_, verb, reference = shlex.split(client.submitted[0]["entrypoint"])
    assert (verb, reference) == ("show", evil)
    assert client.deleted == list(client.jobs)


def test_a_question_that_is_at_fault_is_told_as_the_head_told_it(cluster: Jobs, client: Cluster) -> None:
    client.answer = ("FAILED", 2, "moeify: error: no run 'x' in /runs; there are none\n")
    with pytest.raises(ValueError, match=r"^no run 'x' in /runs; there are none$"):
        cluster.ask(["show", "x"])


def test_a_question_that_cannot_be_asked_says_why(cluster: Jobs, client: Cluster) -> None:
    client.answer = ("FAILED", 1, "No module named pipelines")
    with pytest.raises(OSError, match=r"http://head:8265 could not run 'moeify runs' \(No module named pipelines\)"):
        cluster.ask(["runs"])


def test_a_resumed_run_is_another_job_of_the_same_run(cluster: Jobs, client: Cluster, base: Path) -> None:
    first = submit(cluster, base)
    cluster.stop(first)
    second = cluster.resume(RUN)
    assert shlex.split(client.submitted[-1]["entrypoint"])[1:] == ["-m", "pipelines", "resume", RUN]
    assert [(each.id, each.live) for each in cluster.attempts(RUN)] == [(first, False), (second, True)]


def test_runs_are_found_by_id_start_and_last(cluster: Jobs, client: Cluster, base: Path) -> None:
    for run in (RUN, OTHER):
        submit(cluster, base, run)
    client.jobs["someone-elses"] = Job("someone-elses")
    assert cluster.resolve(RUN) == RUN
    assert cluster.resolve("tiny-20260102") == cluster.resolve("last") == OTHER
    with pytest.raises(ValueError, match="fits 2 runs"):
        cluster.resolve("tiny")
    client.answer = ("SUCCEEDED", 0, '{"run": "old-20250101-000000-abcd"}\n')  # its jobs were lost with the head
    assert cluster.resolve("old") == "old-20250101-000000-abcd"


def test_logs_are_told_once_though_the_connection_breaks(cluster: Jobs, client: Cluster, base: Path) -> None:
    job = submit(cluster, base)
    client.logs[job] = "one\ntwo\nthree\nmoeify: error: no\n"
    client.broken = 2
    told: list[str] = []
    ended = cluster.follow(job, told.append)
    assert "".join(told) == client.logs[job]
    assert (ended.status, ended.code) == ("FAILED", 2)


def test_ends_are_exit_codes() -> None:
    def code(status: str, driver: int | None) -> int:
        return ray_jobs.Attempt("j", RUN, status, "", 0, driver).code

    assert [code("SUCCEEDED", 0), code("STOPPED", None), code("FAILED", 2), code("FAILED", None)] == [0, 130, 2, 1]


@pytest.mark.parametrize(("verb", "code", "told"), [("runs", 0, "[]\n"), ("shew", 2, "No such command 'shew'")])
def test_an_answer_is_the_mark_and_then_what_the_command_says(
    verb: str, code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path))
    assert answer("mark", [verb, "--json"]) == code
    said, aside = capsys.readouterr()
    assert said.startswith("mark\n")
    assert told in said
    assert aside == ""


def test_what_the_api_refuses_is_one_line(cluster: Jobs, base: Path) -> None:
    submit(cluster, base)
    with pytest.raises(OSError, match=r"^the cluster at http://head:8265 did not do it \(Request failed"):
        submit(cluster, base)


def test_addresses_come_from_the_command_line_then_from_the_environment() -> None:
    both = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}
    assert address_of("http://c:3/", both) == "http://c:3"
    assert address_of(None, both) == "http://a:1"
    assert address_of(None, {"RAY_ADDRESS": "https://b:2"}) == "https://b:2"
    for name in ("auto", "10.0.0.1:6379", ""):
        assert address_of(None, {"RAY_ADDRESS": name}) is None
    assert address_of("local", both) is None
    assert address_of(None, {"RAY_API_SERVER_ADDRESS": "local", "RAY_ADDRESS": "http://b:2"}) is None


@pytest.mark.parametrize(
    "address",
    [
        *("head:8265", "os.path://x", "http://", "ftp://a", "http://[::1", "http://u:p@a:1"),
        *("http://a:1/x", "http://a:1#x", "http://a:1?x", "http://a:b", "http://a:0", "http://a:99999"),
    ],
)
def test_other_addresses_are_refused_without_their_password(address: str) -> None:
    with pytest.raises(ValueError, match=r"address: got .* wanted http://HOST:PORT") as caught:
        address_of(address, {})
    assert "u:p@" not in str(caught.value)


def test_the_token_is_found_as_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_header({}) == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert token_header({}) == {"Authorization": "Bearer home"}
    (tmp_path / "file").write_text("file\n")
    at = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert token_header(at) == {"Authorization": "Bearer file"}
    assert token_header(at | {"RAY_AUTH_TOKEN": "given"}) == {"Authorization": "Bearer given"}


@pytest.mark.parametrize("kind", ["missing", "folder", "no text"])
def test_a_token_file_that_cannot_be_read_is_named_before_the_cluster_is_asked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "token"
    if kind == "no text":
        path.write_bytes(b"\xff\xff")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ValueError, match=rf"^RAY_AUTH_TOKEN_PATH: got '{path}', which cannot be read \(.*\); name the"):
        ray_jobs.connect("http://127.0.0.1:1")


# --- where Ray's own client goes ---------------------------------------------------------------------------


VERSION = {"/api/version": (200, '{"ray_version": "2.60.0"}')}
"""What a job API says of itself to who connects."""


@pytest.mark.filterwarnings("ignore::Warning")  # of Ray's import
def test_the_address_that_is_given_counts_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with answering((200, "[]")) as (other, asked_in_vain):
        for name, value in (
            ("RAY_API_SERVER_ADDRESS", other),
            ("RAY_ADDRESS", other),
            ("RAY_ADDRESS", "auto"),
            ("RAY_ADDRESS", "127.0.0.1:1"),
        ):
            with monkeypatch.context() as patch, answering((200, "[]"), at=VERSION) as (given, asked):
                for each in ray_jobs.VARIABLES:
                    patch.delenv(each, raising=False)
                patch.setenv(name, value)
                assert ray_jobs.connect(given).attempts() == []
                assert asked == ["GET /api/jobs/"]
                assert os.environ[name] == value
    assert asked_in_vain == []


def test_what_ray_itself_raises_is_one_line(cluster: Jobs, client: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    class RpcError(Exception):
        __module__ = "ray.exceptions"

    def broken() -> list[Job]:
        raise RpcError("GCS\nis away")

    monkeypatch.setattr(client, "list_jobs", broken)
    with pytest.raises(OSError, match=r"^the cluster at http://head:8265 does not answer \(GCS is away\)$"):
        cluster.attempts()


# --- the commands -----------------------------------------------------------------------------------------


@pytest.fixture
def connected(cluster: Jobs, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(ray_jobs, "connect", lambda _: cluster)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    return cluster


def moeify(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="moeify")
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.usefixtures("connected")
def test_submit_says_the_run_and_where_to_look(client: Cluster, base: Path) -> None:
    (base / "my.yaml").write_text(TEXT)
    code, said, _ = moeify("submit", base / "my.yaml")
    (run,) = client.jobs
    assert code == 0
    assert said.splitlines() == [
        f"run {run} on http://head:8265",
        f"watch:   moeify logs -f {run}",
        f"stands:  moeify status {run}",
        f"stop:    moeify stop {run}",
    ]
    client.logs[run] = "all of it\n"
    code, said, problem = moeify("logs", "-f", "last")
    assert (code, said) == (2, "all of it\n")
    assert problem == f"moeify: {run} failed with exit code 2; mend the recipe or its data and submit again\n"


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(
    ("status", "exit_code", "code", "told"),
    [
        ("FAILED", 1, 1, "failed with exit code 1"),
        ("FAILED", None, 1, "failed (Runtime env: no room on the disk)"),
        ("STOPPED", None, 130, "was stopped"),
    ],
)
def test_how_a_job_ended_is_told_without_its_log(
    client: Cluster,
    cluster: Jobs,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    exit_code: int | None,
    code: int,
    told: str,
) -> None:
    job = client.jobs[submit(cluster, base)]
    job.message = LOG if exit_code else "Runtime env:\nno room on the disk"
    job.status, job.driver_exit_code = status, exit_code
    client.logs[RUN] = ""
    monkeypatch.setattr(cluster, "follow", lambda job, _: cluster._get(job))
    assert moeify("logs", "-f", RUN) == (code, "", f"moeify: {RUN} {told}; go on with: moeify resume {RUN}\n")


@pytest.mark.usefixtures("connected")
def test_the_reason_of_a_job_that_made_no_run_is_what_its_command_said(
    client: Cluster, cluster: Jobs, base: Path
) -> None:
    job = client.jobs[submit(cluster, base)]
    job.status, job.driver_exit_code, job.message = "FAILED", 2, LOG
    client.answer = ("FAILED", 2, "moeify: error: no runs in /runs\n")
    assert json.loads(moeify("status", "last", "--json")[1])["reason"] == "the category 'a' is empty"
    job.message = "Runtime env:\nno room on the disk"
    assert json.loads(moeify("status", "last", "--json")[1])["reason"] == "Runtime env: no room on the disk"


def test_submit_without_a_cluster_says_what_is_missing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_jobs.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    code, _, problem = moeify("submit", "digits")
    assert code == 2
    assert "give --address http://HEAD:8265" in problem


def test_an_address_where_nothing_is_is_one_line() -> None:
    code, _, problem = moeify("runs", "--address", "http://127.0.0.1:1")
    assert code == 2
    assert problem == "moeify: error: no cluster answers at http://127.0.0.1:1 (Connection refused)\n"


@pytest.mark.filterwarnings("ignore::Warning")  # of Ray's import
@pytest.mark.parametrize("said", ["{}", "[]", "null", "<html></html>"])
def test_an_address_where_another_server_is_is_one_line(said: str) -> None:
    with answering((200, said)) as (there, _):
        code, _, problem = moeify("runs", "--address", there)
    assert code == 2
    assert problem == f"moeify: error: address: got {there}, where another server answers; wanted Ray's job API\n"


@pytest.mark.usefixtures("connected")
def test_a_run_whose_folder_is_not_there_yet_is_queued(client: Cluster, cluster: Jobs, base: Path) -> None:
    submit(cluster, base)
    client.answer = ("FAILED", 2, "moeify: error: no runs in /runs\n")
    code, said, _ = moeify("status", "last")
    assert code == 0
    assert said.splitlines() == [f"{RUN} · queued · 0% of the work · 0 rounds done", f"job:     {RUN} RUNNING"]


@pytest.mark.usefixtures("connected")
def test_stop_and_resume_work_with_the_same_id(client: Cluster, cluster: Jobs, base: Path) -> None:
    submit(cluster, base)
    client.answer = ("SUCCEEDED", 0, f'{{"run": "{RUN}", "status": "running"}}\n')
    code, _, problem = moeify("resume", RUN)
    assert (code, problem) == (
        2,
        f"moeify: error: run {RUN} is driven by another process; wait for it, or stop it first\n",
    )
    assert moeify("stop", "last") == (0, f"{RUN} is stopped; go on with: moeify resume {RUN}\n", "")
    code, _, problem = moeify("stop", "last")
    assert code == 2
    assert "its newest job is STOPPED" in problem
    client.answer = ("SUCCEEDED", 0, f'{{"run": "{RUN}", "status": "interrupted"}}\n')
    assert moeify("resume", RUN)[1].startswith(f"run {RUN} goes on, on http://head:8265\n")
    assert len(cluster.attempts(RUN)) == 2
    client.answer = ("SUCCEEDED", 0, f'{{"run": "{RUN}", "status": "finished"}}\n')
    assert moeify("resume", RUN)[1] == f"{RUN} is finished; see it with: moeify show {RUN}\n"


@pytest.mark.usefixtures("connected")
def test_a_run_that_finishes_while_a_stop_is_on_its_way_has_finished(
    client: Cluster, cluster: Jobs, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(cluster, base)
    client.answer = ("SUCCEEDED", 0, f'{{"run": "{RUN}", "status": "finished"}}\n')
    told = f"{RUN} finished before it could be stopped; see it with: moeify show {RUN}\n"
    assert moeify("stop", RUN) == (0, told, "")
    client.logs[RUN] = "all of it\n"
    monkeypatch.setattr(cluster, "follow", lambda job, write: (write(client.logs[job]), cluster._get(job))[1])
    assert moeify("logs", "-f", RUN) == (0, "all of it\n", "")


@pytest.mark.usefixtures("connected")
def test_a_run_whose_folder_cannot_be_asked_after_a_stop_is_stopped(client: Cluster, cluster: Jobs, base: Path) -> None:
    submit(cluster, base)
    client.answer = ("FAILED", 1, "no room\n")
    assert moeify("stop", RUN) == (0, f"{RUN} is stopped; go on with: moeify resume {RUN}\n", "")


@pytest.mark.usefixtures("connected")
def test_runs_and_show_are_the_heads_own(client: Cluster) -> None:
    assert moeify("runs", "--json") == moeify("show", "last") == moeify("sync", "x") == (0, "fine\n", "")
    asked = [shlex.split(each["entrypoint"])[4:] for each in client.submitted]
    assert asked == [["runs", "--json"], ["show", "last"], ["sync", "x"]]

import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines import doctor, machine
from pipelines.cli import main
from pipelines.doctor import Check


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def closed_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def server(code: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


# --- the machine --------------------------------------------------------------------------------------


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path):
    check = doctor._folder("runs", tmp_path, "MOEIFY_HOME")
    assert check.state == "ok"
    assert f"{tmp_path}: writable" in check.said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path):
    check = doctor._folder("runs", tmp_path / "a" / "b", "MOEIFY_HOME")
    assert check.state == "ok"
    assert f"(to be made in {tmp_path})" in check.said
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path: Path):
    (tmp_path / "file").write_text("")
    check = doctor._folder("runs", tmp_path / "file" / "runs", "MOEIFY_HOME")
    assert check.state == "problem"
    assert "set MOEIFY_HOME to a folder that can be written to" in check.line


@pytest.mark.parametrize(("free", "state"), [(0.5, "problem"), (2.0, "warning"), (8.0, "ok")])
def test_memory_is_judged_by_what_a_run_takes(monkeypatch: pytest.MonkeyPatch, free, state):
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    assert doctor._memory().state == state


@pytest.mark.parametrize(("cores", "state"), [(1, "warning"), (2, "ok")])
def test_one_core_is_told(monkeypatch: pytest.MonkeyPatch, cores, state):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    assert doctor._cores().state == state


def test_more_threads_than_cores_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "cores", lambda: 0)
    check = doctor._torch()
    assert check.state == "warning"
    assert "OMP_NUM_THREADS" in check.todo


# --- what is installed --------------------------------------------------------------------------------


def test_a_package_of_another_version_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "nothing-of-this-name", 'x; extra == "dev"'])
    check = doctor._packages()
    assert check.state == "problem"
    assert "wanted >=99" in check.said
    assert "nothing-of-this-name is missing" in check.said
    assert "x is" not in check.said


def test_too_little_installed_text_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moeify.data.corpora.documents", lambda source, wanted: iter(()))
    check = doctor._texts()
    assert check.state == "warning"
    assert "python (0.0 MB of 2)" in check.said


def test_a_look_that_breaks_down_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def broken() -> Check:
        raise ImportError("no\nmodule")

    for name in ("_torch", "_texts", "_ray"):
        monkeypatch.setattr(doctor, name, broken)
    checks = {check.name: check for check in doctor.examine()}
    assert checks["torch"].state == "problem"
    assert checks["torch"].said == "ImportError: no module"
    assert checks["cache"].state == "ok"


# --- servers ------------------------------------------------------------------------------------------


def test_no_address_is_well(monkeypatch: pytest.MonkeyPatch):
    assert doctor._cluster().state == "ok"
    assert doctor._mlflow().line.endswith("the first run makes it")


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}", "ray://127.0.0.1:{}", "somewhere"])
def test_a_cluster_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, form):
    monkeypatch.setenv("RAY_ADDRESS", form.format(closed_port()))
    check = doctor._cluster()
    assert check.state == "problem"
    assert "unset the variable" in check.todo


def test_a_cluster_that_answers_is_well(monkeypatch: pytest.MonkeyPatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        assert doctor._cluster().state == "ok"


@pytest.mark.parametrize(("code", "state"), [(200, "ok"), (401, "ok"), (500, "problem")])
def test_an_mlflow_server_is_asked(monkeypatch: pytest.MonkeyPatch, code, state):
    with server(code) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("//", "//user:secret@") if code == 401 else address)
        check = doctor._mlflow()
    assert check.state == state
    assert str(code) in check.said
    assert "secret" not in check.line


def test_an_mlflow_server_that_is_away_is_a_problem_within_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    check = doctor._mlflow()
    assert check.state == "problem"
    assert "moeify sync" in check.todo


def test_a_database_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE t (x)")
    assert doctor._mlflow().state == "ok"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    assert doctor._mlflow().state == "problem"


# --- the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("states", "code"), [(("ok", "warning"), 0), (("ok", "problem"), 1)])
def test_a_problem_and_nothing_less_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, states, code):
    checks = [Check(f"check{place}", state, "said", "do this") for place, state in enumerate(states)]
    monkeypatch.setattr(doctor, "examine", lambda: iter(checks))
    said = CliRunner().invoke(main, ["doctor"])
    assert said.exit_code == code
    assert [line.split(maxsplit=2) for line in said.output.splitlines()] == [
        [state, f"check{place}", "said; do this"] for place, state in enumerate(states)
    ]
    data = CliRunner().invoke(main, ["doctor", "--json"])
    assert data.exit_code == code
    assert json.loads(data.output)["problems"] == code
    assert json.loads(data.output)["checks"][0] == {
        "name": "check0",
        "state": "ok",
        "said": "said",
        "todo": "do this",
    }


@pytest.mark.slow
def test_this_machine_is_examined_in_full():
    said = CliRunner().invoke(main, ["doctor"])
    assert said.exit_code == 0, said.output
    names = [line.split()[1] for line in said.output.splitlines()]
    assert names[:6] == ["python", "packages", "torch", "cores", "memory", "runs"]
    assert {"ray", "cluster", "mlflow", "texts", "gguf", "onnx", "service"} <= set(names)

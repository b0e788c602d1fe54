"""MLflow's own server on the runs' database: lean, on loopback, and gone with whoever started it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.mlflow_store import SETTINGS, artifact_root, lay_out, tracking_uri
from pipelines.one_line import public
from pipelines.runs import RunFolder
from pipelines.stopping import stoppable
from pipelines.tracking import Progress

_PORT = 5000
_START_SECONDS = 180.0
_STOP_SECONDS = 10.0
_LEAN = {**SETTINGS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Two processes instead of ten, and no word to anyone else."""


def server_of(home: Path) -> str | None:
    """Return the address of the MLflow server that runs go to; None where they go to a database here."""
    uri = public(tracking_uri(home))
    return uri if uri.startswith(("http://", "https://")) else None


def page(address: str, folder: RunFolder, *, alone: bool) -> str:
    """Return where a server shows the list of runs that the run is in, or the run ``alone``, as far as ids are known.

    In MLflow's mode for machine learning: a new experiment would open in another one, which shows no curves.
    """
    try:
        known = Progress.model_validate_json(folder.tracking.read_bytes())
    except (FileNotFoundError, ValueError):
        known = Progress(uri="")
    place = f"/{known.experiment}" if known.experiment else ""
    if alone and known.parent:
        place += f"/runs/{known.parent}"
    return f"{address}/#/experiments{place}?workflowType=machine_learning"


@contextmanager
def served(home: Path, port: int | None) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve the database of a home; give the address, and what waits until Ctrl-C, SIGTERM or the server's end.

    No process of the server outlives the body. Raises ValueError where the port is taken, OSError where the server does
    not start.
    """
    port = _free_port(port)
    address = f"http://127.0.0.1:{port}"
    uri = tracking_uri(home)
    lay_out(uri, home)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--default-artifact-root", artifact_root(home)] if uri.startswith("sqlite") else []
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as said, stoppable():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**_LEAN, **os.environ},
            start_new_session=True,
        )

        def ended() -> None:
            with suppress(KeyboardInterrupt):
                process.wait()
                raise _failed(said.fileno())

        try:
            if not _answers(address, port, process):
                raise _failed(said.fileno())
            yield address, ended
        finally:
            _end(process)


def _free_port(asked: int | None) -> int:
    for port in (asked,) if asked else (_PORT, 0):
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                free.bind(("127.0.0.1", port))
                return int(free.getsockname()[1])
    raise ValueError(f"port {asked} is taken; give another one with --port, or none")


def _answers(address: str, port: int, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until the server, and no other that took the port, answers; False where it ended, or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            if answer.status == 200 and _listens(port, process):
                return True
        time.sleep(0.2)
    return False


def _listens(port: int, process: "subprocess.Popen[bytes]") -> bool:
    """Say whether the server or a process of it holds the port."""
    import psutil

    with suppress(psutil.Error):
        server = psutil.Process(process.pid)
        for each in (server, *server.children(recursive=True)):
            if any(c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in each.net_connections()):
                return True
    return False


def _failed(said: int) -> OSError:
    size = os.fstat(said).st_size
    tail = os.pread(said, 2000, max(0, size - 2000)).decode("utf-8", errors="replace")
    last = next((line for line in reversed(tail.splitlines()) if line.strip()), "it said nothing")
    return OSError(f"MLflow's server ended ({last.strip()[:300]}); see 'moeify doctor'")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the server with all its processes: they are a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            break
    deadline = time.monotonic() + _STOP_SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # raises once the last of the group is gone
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)

"""Runs on a Ray cluster, through its job API, from a machine that need not see the folder of runs.

A run's attempts are Ray jobs. The head keeps those in memory only, so what a run is stays in its folder: questions
about it are asked by a small job that runs the same command on the head. What a job executes is an argument list,
quoted as a whole, and ids are checked, so that nothing of a recipe's name or a command line reaches a shell.
"""

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from urllib.parse import urlsplit

from moeify.recipe.config import RunConfig
from pipelines.one_line import one_line
from pipelines.package import RECIPE, pack
from pipelines.runs import check_id

HERE = "local"
"""An address that means this machine, whatever the environment says."""
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
LIVE = ("PENDING", "RUNNING")
"""Statuses of a job that has not ended."""
_RUN = "moeify.run"
"""Key in the metadata of a run's jobs."""
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.25
_STOP_SECONDS = 30
"""Time that a stopped driver has to take its workers down and to tell MLflow; then it is killed."""


class Client(Protocol):
    """What is used of ``ray.job_submission.JobSubmissionClient``."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
    ) -> str:
        """Start a job."""
        ...

    def list_jobs(self) -> list[Any]:
        """Return all jobs."""
        ...

    def get_job_info(self, job_id: str) -> Any:
        """Return one job."""
        ...

    def get_job_logs(self, job_id: str) -> str:
        """Return what a job has written."""
        ...

    def tail_job_logs(self, job_id: str) -> Any:
        """Return what a job writes as it does, asynchronously."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """Ask a job to stop."""
        ...

    def delete_job(self, job_id: str) -> bool:
        """Forget a job that has ended."""
        ...


@dataclass(frozen=True)
class Attempt:
    """One job of a run."""

    id: str
    """Ray's submission id."""
    run: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    began: int
    """Milliseconds since 1970."""
    exit_code: int | None
    """Of the driver, once it has ended by itself."""

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.status in LIVE

    @property
    def code(self) -> int:
        """What a command that waited for it exits with."""
        return {"SUCCEEDED": 0, "STOPPED": 130}.get(self.status, self.exit_code or 1)


def address_of(given: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the job API's address, from the command line or the environment; None: work on this machine.

    Raises:
        ValueError: it is no http(s) address, or carries a password.
    """
    for name in VARIABLES:
        if given is None and (value := environment.get(name)):
            # Ray's own kind of address in RAY_ADDRESS is for `moeify run`, which joins that cluster as a driver.
            given = value if name != "RAY_ADDRESS" or value.startswith(("http://", "https://")) else None
    if given is None or given == HERE:
        return None
    if "@" in given:
        raise ValueError(f"address: got one with a password, wanted http://HOST:PORT; a token goes into {_TOKENS[0]}")
    with suppress(ValueError):  # a port, or a host, that is none
        parts = urlsplit(given)
        beyond = parts.path.strip("/") or parts.query or parts.fragment
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not beyond:
            return f"{parts.scheme}://{parts.netloc}"
    raise ValueError(f"address: got {given!r}, wanted http://HOST:PORT of the cluster's job API, or {HERE!r}")


def connect(address: str) -> "Jobs":
    """Return the cluster's runs.

    Raises:
        OSError: nothing answers there.
        ValueError: it wants a token, or another one; the file with the token cannot be read; it is no job API.
    """
    headers = token_header()
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise OSError(f"no cluster answers at {address} ({error.strerror or error})") from None
    with _told(address), _without(VARIABLES):  # to Ray they matter more than the address that it is given
        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            client = JobSubmissionClient(address, headers=headers)
        except (LookupError, TypeError, JSONDecodeError):  # of an answer that is another server's
            raise ValueError(f"address: got {address}, where another server answers; wanted Ray's job API") from None
    if (own := client.get_address()) != address:
        raise OSError(f"Ray went to {own} in place of {address}; unset {' and '.join(VARIABLES)}")
    return Jobs(client, address)


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    """Have the body find these variables unset."""
    held = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def token_header(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the header with the user's token, as Ray itself looks for one; none where there is none.

    Raises:
        ValueError: the file that is said to hold it cannot be read.
    """
    token = environment.get("RAY_AUTH_TOKEN", "")
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    place = Path(path) if path else Path("~/.ray/auth_token").expanduser()
    if not token and (path or place.is_file()):
        try:
            token = place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise ValueError(
                f"{_TOKENS[1]}: got {str(place)!r}, which cannot be read ({why}); name the file with the cluster's "
                f"token, or set {_TOKENS[0]}"
            ) from None
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


class Jobs:
    """The runs of one cluster."""

    def __init__(self, client: Client, address: str, *, poll_seconds: float = _POLL_SECONDS) -> None:
        self._client = client
        self.address = address
        self._poll_seconds = poll_seconds

    # --- what is there --------------------------------------------------------------------------------

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """Return the jobs of a run, or of all runs, the oldest first; those that the head still knows."""
        with _told(self.address):
            found = [_attempt(job) for job in self._client.list_jobs() if (job.metadata or {}).get(_RUN)]
        return sorted((each for each in found if run in (None, each.run)), key=lambda each: (each.began, each.id))

    def resolve(self, reference: str) -> str:
        """Return the id of the run with that id, a unique start of it, or ``last``; the head's jobs first."""
        known = dict.fromkeys(each.run for each in self.attempts())
        if reference in known:
            return reference
        if reference == "last" and known:
            return list(known)[-1]
        matches = [run for run in known if reference and run.startswith(reference)]
        if len(matches) > 1:
            raise ValueError(f"{reference!r} fits {len(matches)} runs: {', '.join(matches[-5:])}; give more of the id")
        return matches[0] if matches else str(self.status(reference)["run"])

    def status(self, reference: str) -> dict[str, Any]:
        """Return what the run's folder says of it, as ``moeify status --json`` does on the head."""
        import json

        return dict(json.loads(self.ask(["status", reference, "--json"])))

    def finished(self, ended: Attempt) -> bool:
        """Return whether a run had finished when its job ended, which may be a moment before a stop reached it.

        False where the run's folder cannot be asked, or was never made.
        """
        if ended.status != "STOPPED":
            return ended.status == "SUCCEEDED"
        with suppress(ValueError, OSError):
            return bool(self.status(ended.run)["status"] == "finished")
        return False

    # --- what can be done -----------------------------------------------------------------------------

    def submit(self, run: str, text: str, config: RunConfig, base: Path) -> tuple[str, list[Path]]:
        """Start a run of a recipe; return the job's id and the absolute paths that the cluster must have.

        ``text``: the recipe; ``base``: the folder its relative paths start at, whose files go with it.
        """
        with TemporaryDirectory(prefix="moeify-package-") as folder:
            package = Path(folder)
            shared = pack(config, base, package)
            (package / RECIPE).write_text(text, encoding="utf-8")
            return self._start(run, check_id(run), ["run", RECIPE, "--id", run, "--pack"], package), shared

    def resume(self, run: str) -> str:
        """Go on with a run in a new job; return the job's id."""
        return self._start(run, f"{check_id(run)}.{secrets.token_hex(3)}", ["resume", run], None)

    def ask(self, arguments: Sequence[str]) -> str:
        """Run a command of ``moeify`` on the head and return what it says.

        Raises:
            ValueError: it said that the question is at fault.
            OSError: it could not be run.
        """
        mark, job = secrets.token_hex(8), f"moeify-ask-{secrets.token_hex(6)}"
        self._submit(job, ["-m", "pipelines.answer", mark, *arguments], {}, None)
        ended = self._ended(job)
        with _told(self.address):
            log = self._client.get_job_logs(job)
            self._client.delete_job(job)
        _, marked, said = log.partition(f"{mark}\n")
        if ended.status == "SUCCEEDED" and marked:
            return said
        if ended.exit_code == 2 and marked:
            raise ValueError(said.strip().removeprefix("moeify: error: "))
        why = one_line(said or log or ended.message, None)[-300:]
        raise OSError(f"the head at {self.address} could not run 'moeify {shlex.join(arguments)}' ({why})")

    def logs(self, job: str) -> str:
        """Return what a job has written so far."""
        with _told(self.address):
            return self._client.get_job_logs(job)

    def follow(self, job: str, write: Callable[[str], object]) -> Attempt:
        """Hand on what a job writes, from its beginning, until it ends; return how it ended."""
        told = 0

        async def tail() -> None:
            nonlocal told
            skip = told  # what an earlier connection has handed on
            async for part in self._client.tail_job_logs(job):
                fresh, skip = part[skip:], max(0, skip - len(part))
                told += len(fresh)
                write(fresh)

        while True:
            with _told(self.address):
                with suppress(RuntimeError):  # a connection that was lost: the job goes on
                    asyncio.run(tail())
                attempt = self._get(job)
            if not attempt.live:
                if rest := self.logs(job)[told:]:
                    write(rest)
                return attempt
            time.sleep(self._poll_seconds)

    def stop(self, job: str) -> Attempt:
        """Stop a job and wait until it has ended."""
        with _told(self.address):
            self._client.stop_job(job)
        return self._ended(job)

    # --- jobs -----------------------------------------------------------------------------------------

    def _start(self, run: str, job: str, arguments: Sequence[str], package: Path | None) -> str:
        self._submit(job, ["-m", "pipelines", *arguments], {_RUN: run}, package)
        return job

    def _submit(self, job: str, arguments: Sequence[str], metadata: dict[str, str], package: Path | None) -> None:
        settings = {
            "RAY_API_SERVER_ADDRESS": HERE,  # there, the commands are to look at what is there
            "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": str(shutil.get_terminal_size().columns),
        }
        runtime: dict[str, Any] = {"env_vars": settings}
        if package:
            runtime["working_dir"] = str(package)
        with _told(self.address):
            self._client.submit_job(
                entrypoint=shlex.join(["python", *arguments]), submission_id=job, runtime_env=runtime, metadata=metadata
            )

    def _get(self, job: str) -> Attempt:
        with _told(self.address):
            return _attempt(self._client.get_job_info(job))

    def _ended(self, job: str) -> Attempt:
        while (attempt := self._get(job)).live:
            time.sleep(self._poll_seconds)
        return attempt


def _attempt(job: Any) -> Attempt:
    return Attempt(
        id=job.submission_id or "",
        run=(job.metadata or {}).get(_RUN, ""),
        status=str(getattr(job.status, "value", job.status)),
        message=job.message or "",
        began=job.start_time or 0,
        exit_code=job.driver_exit_code,
    )


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn what the job API's client raises into errors that say in one line what to do."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        raise OSError(f"the cluster at {address} did not do it ({one_line(error)})") from error
    except Exception as error:
        if type(error).__name__ == "AuthenticationError":
            raise ValueError(
                f"the cluster at {address} refused the token; set {_TOKENS[0]}, or {_TOKENS[1]} to the file with it"
            ) from error
        if isinstance(error, OSError) or type(error).__module__.startswith(("aiohttp", "ray.exceptions")):
            raise OSError(f"the cluster at {address} does not answer ({one_line(error)})") from error
        raise

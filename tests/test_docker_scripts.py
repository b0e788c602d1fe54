"""The scripts of docker/ and the commands of its files, with stand-ins for what they start."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pipelines.cli import COMMANDS, main
from pipelines.find_recipe import find_recipe
from pipelines.runs import _ID
from tests.doc_commands import variants
from tests.docker_files import BIN, DOCKER, KUBERAY, SECRET, kept, program, read, run
from tests.stores import answering, credentials, s3_server


def test_secrets_are_made_once_and_are_what_compose_asks_for(tmp_path: Path) -> None:
    place = tmp_path / "secrets"
    for _ in range(2):
        subprocess.run(["sh", DOCKER / "make_secrets.sh", place], check=True, capture_output=True)
        made = {path.name: path.read_text() for path in place.iterdir()}
        first = locals().get("first", made)
    assert made == first
    asked = {Path(each["file"]).name for each in read(DOCKER / "compose.yaml")["secrets"].values()}
    assert asked == set(made)
    assert place.stat().st_mode & 0o777 == 0o700
    values = [value for name, value in made.items() if name != "s3.json"]
    assert all(len(value) == 64 for value in values)
    assert len(set(values)) == len(values)
    (identity,) = json.loads(made["s3.json"])["identities"]
    assert identity["credentials"] == [{"accessKey": made["s3_access_key"], "secretKey": made["s3_secret_key"]}]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """Environment in which ``ray``, ``mlflow`` and ``python`` note how they were started."""
    place = tmp_path / "bin"
    place.mkdir()
    program = (
        f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\n"
        f"Path({str(tmp_path)!r}, Path(sys.argv[0]).name + '.json').write_text("
        "json.dumps({'arguments': sys.argv[1:], 'environment': dict(os.environ)}))\n"
    )
    for name in ("ray", "mlflow", "python"):
        (place / name).write_text(program)
        (place / name).chmod(0o755)
    return {"PATH": f"{place}:/usr/bin:/bin", "TMPDIR": str(tmp_path), "MOEIFY_HOME": "/runs"}


def script(name: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(["sh", BIN / name, *arguments], environment)


def noted(tmp_path: Path, name: str) -> tuple[list[str], dict[str, str]]:
    known = json.loads((tmp_path / f"{name}.json").read_text())
    return known["arguments"], known["environment"]


def test_the_head_starts_with_a_token_and_not_without(stand_ins: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "password").write_text(SECRET)
    for without in ({}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}):
        refused = script("ray_head.sh", stand_ins | without)
        assert refused.returncode == 2
        assert "set RAY_AUTH_TOKEN_PATH to a file with a token" in refused.stderr
    environment = {
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "MLFLOW_TRACKING_PASSWORD_FILE": str(tmp_path / "password"),
    }
    assert script("ray_head.sh", stand_ins | environment, "--resources={}").returncode == 0
    arguments, seen = noted(tmp_path, "ray")
    assert arguments[:3] == ["start", "--head", "--block"]
    assert {"--dashboard-host=127.0.0.1", "--num-cpus=0", "--port=6379"} <= set(arguments)
    assert arguments[-1] == "--resources={}"
    assert (seen["RAY_AUTH_MODE"], seen["MLFLOW_TRACKING_PASSWORD"]) == ("token", SECRET)
    assert SECRET not in " ".join(arguments)


def test_nodes_of_a_url_get_the_keys_that_their_files_hold(stand_ins: dict[str, str], tmp_path: Path) -> None:
    for name in ("S3_ACCESS_KEY", "S3_SECRET_KEY"):
        (tmp_path / name).write_text(f"{name}-{SECRET}")
    environment = stand_ins | {"MOEIFY_HOME": "s3://moeify/runs", "RAY_AUTH_TOKEN": "t", "RAY_HEAD": "head:6379"}
    environment |= {f"{name}_FILE": str(tmp_path / name) for name in ("S3_ACCESS_KEY", "S3_SECRET_KEY")}
    for node in ("ray_head.sh", "ray_worker.sh"):
        assert script(node, environment).returncode == 0
        arguments, seen = noted(tmp_path, "ray")
        assert seen["AWS_ACCESS_KEY_ID"] == f"S3_ACCESS_KEY-{SECRET}"
        assert seen["AWS_SECRET_ACCESS_KEY"] == f"S3_SECRET_KEY-{SECRET}"
        assert SECRET not in " ".join(arguments)
    assert noted(tmp_path, "python")[0] == [f"{BIN}/make_bucket.py", "s3://moeify/runs"]


def test_a_worker_names_what_it_lacks(stand_ins: dict[str, str], tmp_path: Path) -> None:
    assert "HOST:PORT of the head" in script("ray_worker.sh", stand_ins).stderr
    assert "the head's token" in script("ray_worker.sh", stand_ins | {"RAY_HEAD": "head:6379"}).stderr
    assert script("ray_worker.sh", stand_ins | {"RAY_HEAD": "head:6379", "RAY_AUTH_TOKEN": SECRET}).returncode == 0
    assert noted(tmp_path, "ray")[0] == ["start", "--block", "--disable-usage-stats", "--address=head:6379"]


def test_a_worker_lends_the_cores_that_it_is_told_to(stand_ins: dict[str, str], tmp_path: Path) -> None:
    asked = read(DOCKER / "compose.yaml")["services"]["worker"]["environment"]["RAY_WORKER_CPUS"]
    assert asked == "${RAY_WORKER_CPUS:-}"
    environment = stand_ins | {"RAY_HEAD": "head:6379", "RAY_AUTH_TOKEN": SECRET}
    for cores, told in (("", []), ("3", ["--num-cpus=3"])):
        assert script("ray_worker.sh", environment | {"RAY_WORKER_CPUS": cores}, "--resources={}").returncode == 0
        assert noted(tmp_path, "ray")[0][4:] == [*told, "--resources={}"]


def test_the_mlflow_server_has_accounts_and_shows_no_secret(stand_ins: dict[str, str], tmp_path: Path) -> None:
    names = ("MLFLOW_ADMIN_PASSWORD", "MLFLOW_FLASK_SECRET", "DATABASE_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")
    for name in names:
        (tmp_path / name).write_text(f"{name}-{SECRET}")
    environment = stand_ins | {f"{name}_FILE": str(tmp_path / name) for name in names}
    environment |= {"MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://mlflow@db:5432/mlflow"}
    assert "where files go" in script("mlflow_server.sh", environment).stderr
    done = script("mlflow_server.sh", environment | {"MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow"})
    assert (done.returncode, done.stderr) == (0, "")
    assert noted(tmp_path, "python")[0] == [f"{BIN}/make_bucket.py", "s3://mlflow"]
    arguments, seen = noted(tmp_path, "mlflow")
    assert arguments[:5] == ["server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    assert SECRET not in " ".join(arguments)
    assert seen["PGPASSWORD"] == f"DATABASE_PASSWORD-{SECRET}"
    assert seen["MLFLOW_AUTH_ADMIN_PASSWORD"] == f"MLFLOW_ADMIN_PASSWORD-{SECRET}"
    config = Path(seen["MLFLOW_AUTH_CONFIG_PATH"])
    assert config.stat().st_mode & 0o077 == 0
    assert SECRET not in config.read_text()


def test_torch_is_installed_for_the_device_that_is_asked_for(tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)

    def install(**settings: str) -> subprocess.CompletedProcess[str]:
        return script("install_torch.sh", {"PATH": "/usr/bin:/bin", "TORCH": "2.13.0", **settings}, str(pip))

    assert install(DEVICE="cuda").stdout == "install --constraint constraints.txt torch==2.13.0\n"
    assert install(TORCH_INDEX="https://there").stdout == "install --index-url https://there torch==2.13.0+cpu\n"
    assert "give --build-arg TORCH_INDEX" in install().stderr
    assert install(DEVICE="tpu").returncode == 2


@pytest.mark.parametrize("name", ["MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"])
def test_a_bucket_is_made_once_wherever_the_address_stands(name: str) -> None:
    with s3_server() as endpoint:
        bucket = f"of-{name.lower().replace('_', '-')}"  # servers of one process share what they hold
        assert bucket not in kept(endpoint)
        known = credentials(endpoint)
        environment = {**os.environ, **known, name: known.pop("AWS_ENDPOINT_URL")}
        if name != "AWS_ENDPOINT_URL":
            environment.pop("AWS_ENDPOINT_URL")
        for _ in range(2):
            done = run([sys.executable, BIN / "make_bucket.py", f"s3://{bucket}/and/below"], environment)
            assert done.returncode == 0, done.stderr
        assert kept(endpoint)[bucket] == []


def test_a_part_that_does_not_answer_is_not_well() -> None:
    def health(*role: str, **settings: str) -> int:
        return run([sys.executable, BIN / "health.py", *role], settings).returncode

    assert health() == 0
    assert health("mlflow", MLFLOW_PORT="1") == health(MOEIFY_ROLE="head", RAY_DASHBOARD_PORT="1") == 1
    assert health("no such part") == 1


def test_the_store_is_asked_by_what_its_image_holds() -> None:
    """Here by this machine's wget: the image's is busybox's, which knows these options too."""
    how, wget, *rest, url = read(DOCKER / "compose.yaml")["services"]["store"]["healthcheck"]["test"]
    assert (how, wget, *rest) == ("CMD", "wget", "-q", "-O", "/dev/null")
    with answering((200, "")) as (address, asked):
        there = url.replace("http://127.0.0.1:8333", address)
        assert run([program("wget"), *rest, there]).returncode == 0
        assert asked == ["GET /healthz"]
    assert run([program("wget"), *rest, there]).returncode != 0
    with answering((503, "")) as (address, _):
        assert run([program("wget"), *rest, url.replace("http://127.0.0.1:8333", address)]).returncode != 0


def parsed(words: list[str]) -> str:
    """Have the command line read the words, without running them; return the command's name."""
    group, rest = main, words
    while isinstance(group, click.Group):
        command = group.get_command(click.Context(group), rest[0])
        assert command is not None, words
        group, rest = command, rest[1:]
    command.make_context(words[0], rest)
    return words[0]


def test_a_rayjob_runs_a_command_of_ours_with_a_recipe_and_an_id_that_there_are() -> None:
    words = shlex.split(read(DOCKER / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "pipelines"]
    assert parsed(words[3:]) == "run"
    recipe, option, run_id = words[4:]
    assert find_recipe(recipe)
    assert option == "--id"
    assert _ID.fullmatch(run_id)


def test_what_kuberay_is_to_start_ray_with_are_options_of_ray() -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for path in KUBERAY:
        spec = read(path)["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        groups = [cluster[key] for key in ("headGroupSpec",) if key in cluster] + cluster.get("workerGroupSpecs", [])
        for group in groups:
            assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_the_commands_of_the_guide_are_read_by_the_command_line() -> None:
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    found = re.findall(r"`moeify ([^`\n]+)`", text) + re.findall(r"(?:^|[( ])moeify ([a-z][^);\n]*)", blocks, re.M)
    commands = [shlex.split(each, comments=True) for line in found for each in variants(line)]
    alone = {words[0] for words in commands if len(words) == 1}
    read_whole = {parsed(words) for words in commands if len(words) > 1}
    assert {"submit", "status", "logs", "stop", "resume", "show", "sync", "cluster"} == read_whole
    assert alone - read_whole == {"runs"}
    assert parsed(["runs"]) in COMMANDS

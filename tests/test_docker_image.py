"""The Dockerfile without an engine: its own instructions, in its order, with folders of a test in place of a root."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker_files import DOCKER, ROOT, run

Stage = list[tuple[str, str]]
TORCH = "0.0.1"
"""A version that no other index has: what is found of it is of the test's own."""


def stages() -> list[Stage]:
    """Return the instructions of each stage of the Dockerfile, as words after their names."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: list[Stage] = [[]]
    for line in text.replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            found.append([])
        if name:
            found[-1].append((name, rest.strip()))
    return found


def values(stage: Stage, instruction: str) -> dict[str, str]:
    """Return what ARG or ENV set."""
    pairs = [word.partition("=") for name, rest in stage if name == instruction for word in shlex.split(rest)]
    return {name: value for name, _, value in pairs}


class Machine:
    """Folders that stand for the root of an image, and what runs its instructions there."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = self.at("/")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOEIFY_", "RAY_"))
        }

    def at(self, path: str) -> Path:
        """Return where a path of the image is here."""
        return self.place / path.lstrip("/")

    def here(self, command: str) -> str:
        """Return a command with the image's folders as they are here."""
        return re.sub(r"(?<![\w./])/(?=(opt|runs|cache|etc)\b)", f"{self.place}/", command)

    def copy(self, rest: str) -> None:
        """Do as COPY does from the build's context, which holds what .dockerignore lets in."""
        words = shlex.split(rest)
        options = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
        *sources, to = [word for word in words if not word.startswith("--")]
        if "from" in options:
            assert sources == [to], "what one stage made is where it was: this machine has one root"
            return
        let_in = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
        target = self.folder / to if not to.startswith("/") else self.at(to)
        for source in sources:
            assert any(source == each or source.startswith(f"{each}/") for each in let_in), source
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
                continue
            target.mkdir(parents=True, exist_ok=True)
            copied = Path(shutil.copy(ROOT / source, target))
            if "chmod" in options:
                copied.chmod(int(options["chmod"], 8))

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return run(["sh", "-c", self.here(command)], self.environment | more, cwd=self.folder, timeout=300)

    def set(self, pairs: dict[str, str]) -> None:
        for name, value in pairs.items():
            self.environment[name] = self.here(value).replace("$PATH", self.environment["PATH"])

    def work_in(self, path: str) -> None:
        self.folder = self.at(path)
        self.folder.mkdir(parents=True, exist_ok=True)

    def build(self, stage: Stage, before: str = "") -> None:
        for name, rest in stage:
            if name == "ENV":
                self.set(values([(name, rest)], name))
            elif name == "WORKDIR":
                self.work_in(rest)
            elif name == "COPY":
                self.copy(rest)
            elif name == "RUN":
                done = self.run(before + rest)
                if re.search(r"No matching distribution found for setuptools|Max retries exceeded", done.stderr):
                    pytest.skip("pip has no index to fetch the build's setuptools from")
                assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"


def index(folder: Path, version: str) -> str:
    """Return the address of an index of wheels that has one empty torch."""
    place = folder / f"index-{version}" / "torch"
    place.mkdir(parents=True)
    wheel, info = place / f"torch-{version}-py3-none-any.whl", f"torch-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    link = f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>'
    (place / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    return place.parent.as_uri()


@pytest.mark.slow
def test_what_the_dockerfile_runs_makes_an_image_that_does_as_it_says(tmp_path: Path) -> None:
    """But for packages of others, which this Python's stand for: to fetch them all takes gigabytes."""
    _, build, last = stages()
    machine = Machine(tmp_path / "image")
    machine.at("/etc/profile.d").mkdir(parents=True)
    machine.environment["PATH"] = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    machine.environment |= values(build, "ARG") | {
        "TORCH": TORCH,
        "TORCH_INDEX": index(tmp_path, f"{TORCH}+cpu"),
        "PIP_NO_DEPS": "1",
    }
    machine.build(build)
    (packages,) = machine.at("/opt/moeify/lib").glob("python3*/site-packages")
    assert {path.name for path in packages.glob("*.dist-info")} >= {f"torch-{TORCH}+cpu.dist-info"}
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))

    if os.geteuid() != 0:
        pytest.skip("only root makes accounts")
    for name in ("passwd", "group", "shadow", "gshadow"):
        machine.at("/etc").joinpath(name).touch()
    prefix = f"--prefix {machine.place}"
    machine.build(
        [(name, rest) for name, rest in last if name != "WORKDIR"],
        f'groupadd() {{ command groupadd {prefix} "$@"; }}; useradd() {{ command useradd {prefix} "$@"; }};',
    )
    assert machine.at("/etc/passwd").read_text() == "moeify:x:1000:1000::/tmp:/usr/sbin/nologin\n"
    assert {machine.at(path).stat().st_uid for path in ("/runs", "/cache")} == {1000}
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    profile = machine.at("/etc/profile.d/moeify.sh")
    for name in ("python", "moeify", "health.py", "ray_head.sh"):
        found = run(["sh", "-c", f". {profile} && command -v {name}"], bare).stdout.strip()
        assert found == str(machine.at("/opt/moeify/bin") / name)

    command = json.loads(next(rest for name, rest in last if name == "CMD"))
    told = machine.run(shlex.join(command))
    assert told.returncode == 0, told.stderr
    assert "Commands:" in told.stdout
    mine = "import moeify, pipelines.find_recipe as f; print(moeify.__file__); f.find_recipe('text')"
    told = machine.run(f"cd / && python -c {shlex.quote(mine)}")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(str(packages))
    check = json.loads(next(rest for name, rest in last if name == "HEALTHCHECK").partition(" CMD ")[2])
    assert machine.run(shlex.join(check)).returncode == 0
    assert machine.run(shlex.join(check), MOEIFY_ROLE="head", RAY_DASHBOARD_PORT="1").returncode == 1
    assert machine.run("ray_head.sh").returncode == 2


def test_torch_comes_from_the_index_that_is_given_and_for_cuda_from_where_all_comes(tmp_path: Path) -> None:
    """With pip itself, which here is asked what it would install."""
    environment = {"PATH": "/usr/bin:/bin", "TORCH": TORCH, "PIP_DRY_RUN": "1", "PIP_IGNORE_INSTALLED": "1"}
    (tmp_path / "pip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    for device, setting, version in (("cpu", "TORCH_INDEX", f"{TORCH}+cpu"), ("cuda", "PIP_INDEX_URL", TORCH)):
        done = run(
            ["sh", DOCKER / "bin" / "install_torch.sh", tmp_path / "pip"],
            environment | {"DEVICE": device, setting: index(tmp_path, version)},
            cwd=DOCKER,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().splitlines()[-1] == f"Would install torch-{version}"


def test_every_package_that_is_asked_for_is_pinned_within_its_range() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = described["project"]
    lines = (DOCKER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins["torch"] = values(stages()[1], "ARG")["TORCH"]
    (install,) = [rest for name, rest in stages()[1] if name == "RUN" and ".[" in rest]
    extras = re.findall(r"\w+", install.partition(".[")[2])
    assert {"service", "streamed", "gs"} <= {*extras}
    more = [asked for extra in extras for asked in project["optional-dependencies"][extra]]
    for asked in (*project["dependencies"], *more, *described["build-system"]["requires"]):
        requirement = Requirement(asked)
        assert pins[requirement.name.lower()] in requirement.specifier, asked

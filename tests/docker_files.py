"""Where docker/ is, and what runs a program of it, for the tests of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stores import KEY
from tests.stores import SECRET as KEYS_SECRET

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
BIN = DOCKER / "bin"
COMPOSE = tuple(sorted(DOCKER.glob("compose*.yaml")))
KUBERAY = tuple(sorted((DOCKER / "kuberay").glob("*.yaml")))
SECRET = "f" * 64


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def program(name: str) -> str:
    """Return the tool beside this Python, or on the path. Skips where there is none."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not found:
        pytest.skip(f"{name} is not installed; it is among the dev extras")
    return found


def run(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **{"timeout": 60, **more},
    )


def pods() -> dict[str, dict[str, Any]]:
    """Return the pods of the manifests: file, and the part that each plays -> its spec."""
    found = {}
    for path in KUBERAY:
        spec = read(path)["spec"]
        if cluster := spec.get("rayClusterSpec", spec if "headGroupSpec" in spec else None):
            found[f"{path.stem} head"] = cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                found[f"{path.stem} worker"] = group["template"]["spec"]
    return found


def kept(endpoint: str) -> dict[str, list[str]]:
    """Return the buckets of an S3 and the names of what is in each."""
    import boto3

    given = {"aws_access_key_id": KEY, "aws_secret_access_key": KEYS_SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **given)
    return {
        bucket["Name"]: [each["Key"] for each in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", ())]
        for bucket in client.list_buckets()["Buckets"]
    }

"""Models in MLflow: a folder of safetensors and JSON as a LoggedModel, a version of a registered model, an alias.

No pickle anywhere: the flavour ``moeify`` says what loads the folder. Nothing is made twice: a model is found again by
its tags, a version by the model it stands for, so a delivery that was cut short goes on where it stopped.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_STOCK = "config.json"
_LOADERS = {
    "manifest.json": "moeify.load_split",
    _STOCK: "transformers.{}.from_pretrained",
    "model.gguf": "llama.cpp",
    "model.onnx": "onnxruntime.InferenceSession",
}
"""A file that a folder of a model holds -> what loads the folder."""
_VERSIONS = "mlflow.modelVersions"
"""Tag of a LoggedModel by which MLflow's pages lead to its registered versions."""


@dataclass(frozen=True)
class Origin:
    """Where in MLflow a model belongs."""

    experiment: str
    run: str
    """MLflow's ids."""
    name: str
    """Of the registered model: the recipe's."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of all models of this run; ``moeify.run`` among them."""


def loader_of(folder: Path) -> str | None:
    """Return what loads the model in a folder; None where it holds none."""
    for file, loader in _LOADERS.items():
        if (folder / file).is_file():
            return loader.format(_class_of(folder / file)) if file == _STOCK else loader
    return None


def _class_of(config: Path) -> str:
    """Return the class of ``transformers`` that loads a stock model."""
    from moeify.models.families import transformer_named

    found = transformer_named(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    return found.auto if found else "AutoModelForCausalLM"


def alias_of(words: str) -> str:
    """Return words as MLflow takes an alias."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", words)[:200]


def log_model(client: "MlflowClient", origin: Origin, alias: str, folder: Path, step: int) -> str:
    """Log a folder as a model of a run, register it, let the alias point to it, and return the model's id.

    ``folder``: what ``moeify.load_split`` or ``transformers`` loads, or a GGUF or ONNX file in one; a file ``MLmodel``
    is added to it where it has none.
    """
    from mlflow.entities import LoggedModelOutput

    tags = {**origin.tags, "moeify.role": alias}
    query = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in ("moeify.run", "moeify.role"))
    found = client.search_logged_models([origin.experiment], query)
    ready = [each.model_id for each in found if str(each.status) == "READY"]
    if ready:
        model = ready[0]
    else:
        model = client.create_logged_model(
            origin.experiment, name=alias, source_run_id=origin.run, tags=tags, model_type="moeify"
        ).model_id
        _describe(folder, origin.run, model, alias)
        client.log_model_artifacts(model, str(folder))
        client.finalize_logged_model(model, "READY")
    outputs = client.get_run(origin.run).outputs
    if model not in {each.model_id for each in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(origin.run, [LoggedModelOutput(model, step)])
    client.set_registered_model_alias(origin.name, alias, _version(client, origin, model, tags))
    return model


def _describe(folder: Path, run: str, model: str, alias: str) -> None:
    """Write what MLflow knows a model by."""
    from mlflow.models import Model

    flavours = {"moeify": {"loader": loader_of(folder), "pickle": False}}
    Model(artifact_path=alias, run_id=run, model_id=model, flavors=flavours).save(str(folder / "MLmodel"))


def _version(client: "MlflowClient", origin: Origin, model: str, tags: Mapping[str, str]) -> str:
    """Return the registered version of a model, made where there is none yet."""
    source = f"models:/{model}"
    if not client.search_registered_models(f"name = '{origin.name}'", max_results=1):
        client.create_registered_model(origin.name, description=f"Of the moeify recipe '{origin.name}'.")
    for version in client.search_model_versions(f"name = '{origin.name}' and run_id = '{origin.run}'"):
        if version.source == source:
            return str(version.version)
    with _addressed(client):
        made = str(
            client.create_model_version(origin.name, source, run_id=origin.run, tags=dict(tags), model_id=model).version
        )
    client.set_logged_model_tags(model, {_VERSIONS: json.dumps([{"name": origin.name, "version": int(made)}])})
    return made


@contextmanager
def _addressed(client: "MlflowClient") -> Iterator[None]:
    """Let MLflow's registry of a database look for models where the client does, and not where the process would."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = client.tracking_uri
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before

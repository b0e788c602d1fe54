"""A transformer from a folder that ``save_pretrained`` wrote: looked at first, so that errors are one line.

Local folders and safetensors alone; no code of the checkpoint is run and no pickle is read.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn

from moeify.models.families import TRANSFORMERS, transformer_named
from moeify.models.transformer import Transformer, image_size

_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

GENERATION = "generation_config.json"
"""How text is written."""
_PREPROCESSING = "preprocessor_config.json"
_SHARDS = "model.safetensors.index.json"
_OWN_CODE = "code of the checkpoint's own (auto_map), which is never run"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model of a known family in safetensors; nothing of it is loaded yet."""

    folder: Path
    family: Transformer

    def config(self) -> Any:
        """Return the configuration, with no dropout and no cache: training must make the same bits each time."""
        import transformers

        with _one_line(self.folder):
            config = getattr(transformers, self.family.config).from_pretrained(self.folder, **_SAFE)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        if self.family.learns == "next token":
            config.use_cache = False
        return config

    def network(self) -> nn.Module:
        """Return the network in float32 and eval mode; ValueError where the folder lacks some of its weights."""
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with _one_line(self.folder):
            network, told = getattr(transformers, self.family.network).from_pretrained(
                self.folder,
                config=self.config(),
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, in one line
                **_SAFE,
            )
        if lost := sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}):
            few = f"{self.folder} lacks {len(lost)} of its network's tensors, or has them in another shape"
            raise ValueError(f"{few}, such as {lost[0]}; save it anew")
        return self.family.opened(network)

    @property
    def hides(self) -> bool:
        """Whether it predicts tokens that are hidden from it."""
        return self.family.learns == "masked token"

    def text(self) -> Self:
        """Return the checkpoint of a language model; ValueError for one of images."""
        if self.family.learns == "class of an image":
            raise ValueError(f"{self.folder} classifies images, and the data is text; give data of kind 'images'")
        if self.family.learns == "class of a text":
            raise ValueError(f"{self.folder} classifies texts; split it from Python, moeify.split(..., loss='classes')")
        return self

    def images(self) -> Self:
        """Return the checkpoint of an image classifier; ValueError for another."""
        if self.family.learns != "class of an image":
            raise ValueError(f"{self.folder} reads text, and the data is images; give data of kind 'text'")
        return self

    def classifies(self, channels: int, classes: int) -> tuple[int, int]:
        """Return height and width of the images it takes; ValueError where its channels or classes are others."""
        config = self.config()
        for what, got, wanted in (("channels", config.num_channels, channels), ("classes", config.num_labels, classes)):
            if got != wanted:
                raise ValueError(f"{self.folder} takes images of {got} {what}, and the data has {wanted}")
        return image_size(config)

    def norms(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return mean and standard deviation of each channel that its images are normed by; None where it says none."""
        if not (said := self.preprocessing()):
            return None
        with _one_line(self.folder, f"has a {_PREPROCESSING} that cannot be read"):
            settings = json.loads(said[_PREPROCESSING])
            found = tuple(tuple(float(value) for value in settings[f"image_{what}"]) for what in ("mean", "std"))
            if any(len(each) != channels for each in found) or min(found[1]) <= 0:
                raise ValueError(f"got image_mean and image_std {found}, wanted a number a channel, {channels}")
        return found[0], found[1]

    def preprocessing(self) -> dict[str, bytes]:
        """Return the file that says how images become inputs, by name; nothing where there is none."""
        path = self.folder / _PREPROCESSING
        return {path.name: path.read_bytes()} if path.is_file() else {}

    def positions(self) -> int:
        """Return how many tokens a row may have."""
        return self.family.positions(self.config())

    def generation(self, end: int) -> dict[str, bytes]:
        """Return the file that says how text is written, by name: the checkpoint's own, or what its configuration says.

        ``end``, the token between the documents that it is trained on, ends a text too. Nothing where it writes none.
        """
        from transformers import GenerationConfig

        if self.family.learns != "next token":
            return {}
        with _one_line(self.folder, f"has a {GENERATION} that cannot be read"):
            if (self.folder / GENERATION).is_file():
                said = json.loads((self.folder / GENERATION).read_text(encoding="utf-8"))
                if not isinstance(said, dict):
                    raise ValueError(f"got {type(said).__name__}, wanted an object")
            else:
                said = GenerationConfig.from_model_config(self.config()).to_diff_dict()
            given = said.get("eos_token_id")
            ends = list(dict.fromkeys([*(given if isinstance(given, list) else [given]), end]))
            ends = [each for each in ends if each is not None]
            said |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "use_cache": True}
        return {GENERATION: (json.dumps(said, indent=2) + "\n").encode()}

    def tokenizer(self) -> Any:
        """Return the tokenizer of ``transformers``; ValueError where there is none."""
        from transformers import AutoTokenizer

        try:
            with _one_line(self.folder, "holds no tokenizer that can be read"):
                return AutoTokenizer.from_pretrained(self.folder, **_SAFE)
        except ValueError as error:
            if not _names_code(self.folder / "tokenizer_config.json"):
                raise
            raise ValueError(
                f"{self.folder} has a tokenizer that is {_OWN_CODE}; wanted tokenizer.json, or a class of transformers"
            ) from error


def look(folder: Path) -> Checkpoint:
    """Return a folder's checkpoint; ValueError, one line, for a folder that holds none that can be used."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give a folder that transformers' save_pretrained wrote")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family, classes = config.get("model_type"), config.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON object ({error}); save the model again") from error
    found = next((each for each in TRANSFORMERS if each.network in classes), transformer_named(family))
    if found is None or (classes and found.network not in classes):
        named = ", ".join(map(str, classes)) or "nothing"
        code = f", {_OWN_CODE}" if "auto_map" in config else ""
        raise ValueError(
            f"{folder} cannot be read: model_type {family!r}, architectures {named}{code}; "
            f"wanted one of {', '.join(each.network for each in TRANSFORMERS)}"
        )
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        got = f"its weights as a pickle, {pickles[0]}, which is never read" if pickles else "no weights"
        raise ValueError(f"{folder} holds {got}; wanted safetensors, which save_pretrained of transformers writes")
    if other := next((name for name in _weight_files(folder, config) if not name.endswith(".safetensors")), None):
        raise ValueError(f"{folder} names {other!r:.60} as a file of weights, which is never read; wanted safetensors")
    return Checkpoint(folder, found)


def _names_code(path: Path) -> bool:
    """Whether a configuration says which modules of its folder are to be imported."""
    try:
        return "auto_map" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _weight_files(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """Yield the files of weights that a folder names: ``transformers`` reads those whatever their kind."""
    named = config.get("transformers_weights")
    if named is not None and not str(named).endswith(".index.json"):
        yield str(named)
    for path in (folder / _SHARDS, folder / str(named)):
        if path.name.endswith(".index.json") and path.is_file():
            with _one_line(folder, f"has a {path.name} that cannot be read"):
                shards = set(dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"]).values())
            yield from sorted(map(str, shards))


@contextmanager
def _one_line(folder: Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn what ``transformers`` raises about a folder into a ValueError that names it."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} {what} ({' '.join(str(error).split())[:300]})") from error

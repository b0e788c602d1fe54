"""Tokenizers that exist before the text is read: a checkpoint's own, and how documents are told apart with them."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from moeify.models.pretrained import GENERATION, Checkpoint
from moeify.store import understood


@dataclass(frozen=True)
class GivenTokenizer:
    """What turns text into tokens, the files that ``transformers`` reads it from, and how text is written."""

    tokenizer: tokenizers.Tokenizer
    """Special tokens inside of a text are ordinary characters to it."""
    end: int
    """Id of the token between documents, see ``boundary``."""
    assets: Mapping[str, bytes]

    @property
    def ends(self) -> frozenset[int]:
        """Tokens after which no more of a text follows: ``end``, and those that ``generation_config.json`` names."""
        named = json.loads(self.assets.get(GENERATION, b"{}")).get("eos_token_id")
        return frozenset({self.end, *(named if isinstance(named, list) else [named])} - {None})

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a text becomes."""
        digest = hashlib.sha256(f"{self.end}\n".encode())
        for name, content in sorted(self.assets.items()):
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        return digest.hexdigest()


def of_checkpoint(checkpoint: Checkpoint) -> GivenTokenizer:
    """Return a checkpoint's tokenizer.

    Raises ValueError, one line, where there is none, it is no fast one, or it has tokens that the network does not.
    """
    loaded = checkpoint.tokenizer()
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{checkpoint.folder}: {type(loaded).__name__} has no fast form, wanted a tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        assets = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    tokenizer = _plain(tokenizers.Tokenizer.from_str(backend.to_str()))
    end = boundary(tokenizer, json.loads(assets["tokenizer_config.json"]))
    if end is None:
        raise ValueError(f"{checkpoint.folder}: its tokenizer names no bos_token or eos_token to end documents with")
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    most = max({end, *tokenizer.get_vocab().values()} - (special - {end}))
    if most >= (known := checkpoint.config().vocab_size):
        raise ValueError(
            f"{checkpoint.folder}: the tokenizer's tokens go up to {most}, the network's vocabulary up to {known - 1}; "
            f"put the tokenizer beside it that it was trained with"
        )
    return GivenTokenizer(tokenizer, end, assets | checkpoint.generation(end))


def of_folder(folder: Path) -> GivenTokenizer | None:
    """Return the tokenizer that lies in a folder as ``assets``; None where none does.

    Raises CorruptCheckpointError where what lies there is none.
    """
    files = (folder / "tokenizer.json", folder / "tokenizer_config.json")
    if not all(file.is_file() for file in files):
        return None
    with understood(f"the tokenizer in {folder}"):
        tokenizer = _plain(tokenizers.Tokenizer.from_file(str(files[0])))
        end = boundary(tokenizer, json.loads(files[1].read_text(encoding="utf-8")))
    more = [folder / GENERATION] if (folder / GENERATION).is_file() else []
    assets = {file.name: file.read_bytes() for file in [*files, *more]}
    return None if end is None else GivenTokenizer(tokenizer, end, assets)


def boundary(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> int | None:
    """Return the id of the token that a document starts behind, and another one ends with; None where there is none.

    What the tokenizer itself puts before a text, as a Llama's does, or else the end-of-text token that ``config``, the
    content of ``tokenizer_config.json``, names, as for GPT-2.
    """
    if (begin := beginning(tokenizer)) is not None:
        return begin
    for key in ("eos_token", "bos_token"):
        named = config.get(key)
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and (found := tokenizer.token_to_id(text)) is not None:
            return found
    return None


def beginning(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Return the token that a tokenizer puts before every text; None where it puts none."""
    sample = tokenizer.encode("a")
    return sample.ids[0] if sample.ids and sample.special_tokens_mask[0] else None


def _plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

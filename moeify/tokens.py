"""Text as tokens: a byte-level BPE trained on the train split, and every split's tokens, prepared once and cached.

A cache entry's name is a hash of all that it depends on: the documents, the recipe's data section, the version of
the tokenizers package and the code that prepares. So an entry is never out of date, and one that is there is whole.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock
from jaxtyping import UInt16
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moeify import corpora, documents, excerpts, sources
from moeify.config import TextData
from moeify.documents import SPLITS, Document, Split

END = "<|end|>"
"""The token after every document. The same characters inside of a document are ordinary text."""
SAMPLE_BYTES = 1_000_000
"""What the BPE sees of each category at most; of all the same, so that none shapes the vocabulary more."""
_INDEX = "index.json"
_ASSETS = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Tokens:
    """Each category's documents as one stream of tokens a split, documents ended by the end token."""

    categories: tuple[str, ...]
    streams: Mapping[Split, tuple[UInt16[np.ndarray, " tokens"], ...]]
    """One a category; memory-mapped."""
    sizes: Mapping[Split, tuple[int, ...]]
    """Bytes of UTF-8 of the documents, one number a category."""
    vocabulary: int
    """Tokens that the tokenizer knows; less than asked for where the text has too few pairs to merge."""
    end: int
    """Id of the end token."""
    assets: Mapping[str, bytes]
    """The tokenizer's files, by name, as ``transformers.AutoTokenizer`` reads them."""


def prepare(data: TextData, cache: Path, base: Path) -> Tokens:
    """Return the data's tokens, from the cache where they are; several processes may prepare at once.

    Raises:
        ValueError: The source cannot be read, or holds too little.
    """
    entry = cache / "text" / _key(data, base)
    if (tokens := _load(entry)) is not None:
        return tokens
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(entry.with_suffix(".lock")):
        if (tokens := _load(entry)) is None:
            shutil.rmtree(entry, ignore_errors=True)  # What is there is damaged.
            _publish(data, base, entry)
            tokens = _load(entry)
    assert tokens is not None
    return tokens


def _key(data: TextData, base: Path) -> str:
    digest = hashlib.sha256(f"{data.model_dump_json(exclude={'length'})}\n{tokenizers.__version__}\n".encode())
    for module in (corpora.__file__, documents.__file__, excerpts.__file__, sources.__file__, __file__):
        digest.update(hashlib.sha256(Path(module).read_bytes()).digest())
    digest.update(sources.fingerprint(data.source, base).encode())
    return digest.hexdigest()[:32]


# --- preparing ----------------------------------------------------------------------------------------


def _publish(data: TextData, base: Path, entry: Path) -> None:
    """Prepare the data beside ``entry`` and move it there; the caller holds the entry's lock."""
    parts = _documents(data, base)
    tokenizer = train_tokenizer([parts[category]["train"] for category in parts], data.vocabulary)
    work = entry.with_suffix(".preparing")
    shutil.rmtree(work, ignore_errors=True)  # What a process left that was killed.
    work.mkdir()
    for name, content in _assets(tokenizer).items():
        (work / name).write_bytes(content)
    for split in SPLITS:
        for number, category in enumerate(parts):
            np.save(work / _stream(split, number), encode(tokenizer, parts[category][split]), allow_pickle=False)
    index = {
        "categories": list(parts),
        "vocabulary": tokenizer.get_vocab_size(),
        "end": tokenizer.token_to_id(END),
        "sizes": {split: [sum(d.size for d in parts[category][split]) for category in parts] for split in SPLITS},
        "files": {path.name: _hash(path) for path in sorted(work.iterdir())},
    }
    (work / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    work.rename(entry)


def _documents(data: TextData, base: Path) -> dict[str, dict[Split, list[Document]]]:
    """Return each category's documents by split, duplicates left out."""
    parts: dict[str, dict[Split, list[Document]]] = {}
    for category, found in sources.read(data.source, base).items():
        try:
            parts[category] = documents.divide(found, validation=data.validation, test=data.test)
        except ValueError as error:
            raise ValueError(f"data.source: category {category!r}: {error}") from None
    return parts


def train_tokenizer(train: Sequence[Sequence[Document]], vocabulary: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of up to ``vocabulary`` tokens, trained on equal parts of each category's documents.

    Every text has a round trip: no token is unknown, and nothing is normalised.
    """
    size = min(SAMPLE_BYTES, *(sum(d.size for d in each) for each in train))
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        (text for each in train for text in _sample(each, size)),
        BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def _sample(each: Sequence[Document], size: int) -> list[str]:
    """Return the first documents that hold ``size`` bytes; the last one is cut short."""
    texts: list[str] = []
    for document in each:
        if size <= 0:
            break
        content = document.text.encode()
        texts.append(content[:size].decode(errors="ignore"))
        size -= len(content)
    return texts


def encode(tokenizer: tokenizers.Tokenizer, each: Sequence[Document]) -> UInt16[np.ndarray, " tokens"]:
    """Return the documents as one stream, the end token after each."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch_fast([document.text for document in each], add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encoded])


def _assets(tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in _ASSETS}


# --- the cache ----------------------------------------------------------------------------------------


def _stream(split: Split, number: int) -> str:
    return f"{split}.{number}.npy"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(entry: Path) -> Tokens | None:
    """Return what was prepared, None where there is nothing or a file of it is not as it was written."""
    try:
        index = json.loads((entry / _INDEX).read_text(encoding="utf-8"))
        if any(_hash(entry / name) != digest for name, digest in index["files"].items()):
            return None
        count = len(index["categories"])
        return Tokens(
            categories=tuple(index["categories"]),
            streams={
                split: tuple(
                    np.load(entry / _stream(split, number), mmap_mode="r", allow_pickle=False)
                    for number in range(count)
                )
                for split in SPLITS
            },
            sizes={split: tuple(index["sizes"][split]) for split in SPLITS},
            vocabulary=index["vocabulary"],
            end=index["end"],
            assets={name: (entry / name).read_bytes() for name in _ASSETS},
        )
    except (OSError, ValueError, KeyError):
        return None

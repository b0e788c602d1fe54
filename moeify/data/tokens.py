"""Text as tokens: a byte-level BPE trained on the train split, or a tokenizer that is given; prepared once and cached.

A cache entry's name is a hash of all that it depends on: the documents, the recipe's data section, the versions of
the packages that prepare and the code that does. So an entry is never out of date, and one that is there is whole.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
from filelock import FileLock
from jaxtyping import UInt16, UInt32
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moeify.data import corpora, documents, excerpts, labels, lines, sources, streamed, tables
from moeify.data.documents import SPLITS, Document, Split
from moeify.data.given_tokenizer import GivenTokenizer
from moeify.data.labels import UNLABELLED
from moeify.recipe.data import Discover, StreamedText, TextData

END = "<|end|>"
"""The token after every document. The same characters inside of a document are ordinary text."""
SAMPLE_BYTES = 1_000_000
"""What the BPE sees of each category at most; of all the same, so that none shapes the vocabulary more."""
Stream = UInt16[np.ndarray, " tokens"] | UInt32[np.ndarray, " tokens"]
"""The wide one where a vocabulary has more than 65,536 tokens."""
Placed = Iterable[tuple[Split, Document]]
"""Documents, and the split that each falls into."""
_BATCH_BYTES = 4_000_000
"""Of text that is encoded at a time."""
_INDEX = "index.json"
_ASSETS = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Tokens:
    """Each category's documents as one stream of tokens a split, documents ended by the end token."""

    categories: tuple[str, ...]
    streams: Mapping[Split, tuple[Stream, ...]]
    """One a category; memory-mapped."""
    sizes: Mapping[Split, tuple[int, ...]]
    """Bytes of UTF-8 of the documents, one number a category."""
    vocabulary: int
    """Tokens that the tokenizer knows; less than asked for where the text has too few pairs to merge."""
    end: int
    """Id of the end token."""
    assets: Mapping[str, bytes]
    """The tokenizer's files, by name, as ``transformers.AutoTokenizer`` reads them; ``discovered.json`` where
    categories were discovered."""


def prepare(data: TextData, cache: Path, base: Path, given: GivenTokenizer | None = None) -> Tokens:
    """Return the data's tokens, from the cache where they are; several processes may prepare at once.

    ``given``: the tokenizer; None: one is trained.

    Raises:
        ValueError: The source cannot be read, or holds too little.
    """
    entry = cache / "text" / _key(data, base, given)
    if (tokens := _load(entry)) is not None:
        return tokens
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(entry.with_suffix(".lock")):
        if (tokens := _load(entry)) is None:
            shutil.rmtree(entry, ignore_errors=True)  # What is there is damaged.
            _publish(data, base, entry, given)
            tokens = _load(entry)
    assert tokens is not None
    return tokens


def read(data: TextData, base: Path) -> dict[str, list[Document]]:
    """Return each category's distinct documents of all splits, discovered categories' too; nothing is cached."""
    if data.discover is None:
        return sources.read(data.source, base)
    parts, _, _ = _discovered(data, data.discover, base, None)
    return {category: [d for split in SPLITS for d in each[split]] for category, each in parts.items()}


def _key(data: TextData, base: Path, given: GivenTokenizer | None) -> str:
    digest = hashlib.sha256(f"{data.model_dump_json(exclude={'length'})}\n{tokenizers.__version__}\n".encode())
    if given is not None:
        digest.update(f"{given.fingerprint}\n".encode())
    text = (corpora.__file__, documents.__file__, excerpts.__file__, lines.__file__, sources.__file__)
    for module in (*text, labels.__file__, tables.__file__, streamed.__file__, __file__):
        digest.update(hashlib.sha256(Path(module).read_bytes()).digest())
    if data.discover is not None:
        from moeify.data import discover

        digest.update(discover.fingerprint().encode())
    digest.update(sources.fingerprint(data.source, base).encode())
    return digest.hexdigest()[:32]


# --- preparing ----------------------------------------------------------------------------------------


def _publish(data: TextData, base: Path, entry: Path, given: GivenTokenizer | None) -> None:
    """Prepare the data beside ``entry`` and move it there; the caller holds the entry's lock."""
    parts, chosen, assets = _ready(data, base, given)
    work = entry.with_suffix(".preparing")
    shutil.rmtree(work, ignore_errors=True)  # What a process left that was killed.
    work.mkdir()
    for name, content in assets.items():
        (work / name).write_bytes(content)
    sizes = [_write(work, number, name, each, chosen) for number, (name, each) in enumerate(parts.items())]
    index = {
        "categories": list(parts),
        "vocabulary": chosen.tokenizer.get_vocab_size(),
        "end": chosen.end,
        "sizes": {split: [each[split] for each in sizes] for split in SPLITS},
        "assets": list(assets),
        "files": {path.name: _hash(path) for path in sorted(work.iterdir())},
    }
    (work / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    work.rename(entry)


def _ready(
    data: TextData, base: Path, given: GivenTokenizer | None
) -> tuple[Mapping[str, Placed], GivenTokenizer, dict[str, bytes]]:
    """Return each category's documents, to be read once and in this order, the tokenizer, and the files to keep."""
    if isinstance(data.source, StreamedText):
        corpus = streamed.Corpus(data.source, base, validation=data.validation, test=data.test)
        names = corpus.categories
        chosen = given or _trained([corpus.head(name, SAMPLE_BYTES) for name in names], data.vocabulary)
        return {name: corpus.documents(name) for name in names}, chosen, dict(chosen.assets)
    if data.discover is None:
        parts = _documents(data, base)
        chosen = given or _trained([parts[category]["train"] for category in parts], data.vocabulary)
        assets = dict(chosen.assets)
    else:
        parts, chosen, found = _discovered(data, data.discover, base, given)
        assets = {**chosen.assets, "discovered.json": found}
    return {name: _split_by_split(each) for name, each in parts.items()}, chosen, assets


def _split_by_split(documents: Mapping[Split, Sequence[Document]]) -> Placed:
    for split in SPLITS:
        yield from ((split, document) for document in documents[split])


def _write(work: Path, number: int, name: str, documents: Placed, chosen: GivenTokenizer) -> dict[Split, int]:
    """Encode a category's documents and write its streams, a batch at a time; return the splits' bytes of UTF-8."""
    sizes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    lengths: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        files = {split: stack.enter_context((work / _stream(split, number)).open("wb")) for split in SPLITS}
        for split in SPLITS:
            _head(files[split], chosen, 0)
        for batch in _batches(documents):
            for split in SPLITS:
                if mine := [document for place, document in batch if place == split]:
                    stream = encode(chosen.tokenizer, chosen.end, mine)
                    files[split].write(stream.data)
                    sizes[split] += sum(document.size for document in mine)
                    lengths[split] += len(stream)
        for split in SPLITS:
            if not lengths[split]:
                raise ValueError(
                    f"data.source: category {name!r} has no document for the {split} split; give it more documents, "
                    f"or a larger share (data.validation, data.test)"
                )
            _head(files[split], chosen, lengths[split])
    return sizes


def _head(file: BinaryIO, chosen: GivenTokenizer, length: int) -> None:
    """Write what an array's file begins with: as many bytes whatever the length (``numpy.lib.format``)."""
    file.seek(0)
    described = {
        "descr": np.lib.format.dtype_to_descr(_kind(chosen.tokenizer, chosen.end)),
        "fortran_order": False,
        "shape": (length,),
    }
    np.lib.format.write_array_header_1_0(file, described)


def _batches(documents: Placed) -> Iterator[list[tuple[Split, Document]]]:
    batch, size = [], 0
    for each in documents:
        batch.append(each)
        size += each[1].size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _documents(data: TextData, base: Path) -> dict[str, dict[Split, list[Document]]]:
    """Return each category's documents by split, duplicates left out."""
    parts: dict[str, dict[Split, list[Document]]] = {}
    for category, found in sources.read(data.source, base).items():
        try:
            parts[category] = documents.divide(found, validation=data.validation, test=data.test)
        except ValueError as error:
            raise ValueError(f"data.source: category {category!r}: {error}") from None
    return parts


def _discovered(
    data: TextData, settings: Discover, base: Path, given: GivenTokenizer | None
) -> tuple[dict[str, dict[Split, list[Document]]], GivenTokenizer, bytes]:
    """Return the documents of each cluster by split, the tokenizer and the content of ``discovered.json``.

    Documents are split before they are clustered. The tokenizer comes before clusters, so its sample is of the whole
    train split, which ``divide`` has put in the order of hashes.
    """
    from moeify.data import discover

    labelled = sources.read(data.source, base)
    pool = [(document, label) for label, each in labelled.items() for document in each]
    label_of = {id(document): label for document, label in pool}
    try:
        split = documents.divide([document for document, _ in pool], validation=data.validation, test=data.test)
    except ValueError as error:
        raise ValueError(f"data.source: {error}") from None
    chosen = given or _trained([split["train"]], data.vocabulary)
    tokenizer = chosen.tokenizer
    ids = {name: _ids(tokenizer, split[name]) for name in SPLITS}
    clusters = discover.cluster(settings, ids, tokenizer.get_vocab_size())
    labels = {name: [label_of[id(document)] for document in split[name]] for name in SPLITS}
    report = discover.report(
        clusters,
        {name: [document.size for document in split[name]] for name in SPLITS},
        None if set(labelled) == {UNLABELLED} else labels,
        [[tokenizer.decode([token]) for token in tokens] for tokens in clusters.telling],
    )
    parts = {
        cluster: {
            name: [d for d, of in zip(split[name], clusters.of[name], strict=True) if of == place] for name in SPLITS
        }
        for place, cluster in enumerate(clusters.names)
    }
    return parts, chosen, json.dumps(report, indent=1, ensure_ascii=False).encode()


def _trained(train: Sequence[Sequence[Document]], vocabulary: int) -> GivenTokenizer:
    tokenizer = train_tokenizer(train, vocabulary)
    end = tokenizer.token_to_id(END)
    assert end is not None
    return GivenTokenizer(tokenizer, end, _assets(tokenizer))


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


def encode(tokenizer: tokenizers.Tokenizer, end: int, each: Sequence[Document]) -> Stream:
    """Return the documents as one stream, the ``end`` token after each."""
    kind = _kind(tokenizer, end)
    return np.concatenate([np.array([*ids, end], dtype=kind) for ids in _ids(tokenizer, each)])


def _kind(tokenizer: tokenizers.Tokenizer, end: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    most = max(end, *tokenizer.get_vocab().values())
    return np.dtype(np.uint16) if most <= np.iinfo(np.uint16).max else np.dtype(np.uint32)


def _ids(tokenizer: tokenizers.Tokenizer, each: Sequence[Document]) -> list[list[int]]:
    encoded = tokenizer.encode_batch_fast([document.text for document in each], add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


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
            assets={name: (entry / name).read_bytes() for name in index["assets"]},
        )
    except (OSError, ValueError, KeyError):
        return None

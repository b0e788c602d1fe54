"""Text as tokens: a byte-level BPE trained on the train split, or a tokenizer that is given; prepared once and cached.

A cache entry's name is a hash of all that it depends on: the documents, the recipe's data section, the versions of
the packages that prepare and the code that does. So an entry is never out of date, and one that is there is whole.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moeify.data import documents, packing, sources, streamed, streamed_files
from moeify.data.documents import SPLITS, Document, Split
from moeify.data.given_tokenizer import GivenTokenizer
from moeify.data.labels import UNLABELLED
from moeify.data.prepared import Entry, Tokens
from moeify.data.streamed_files import File
from moeify.data.token_files import StreamFiles, batches, encode, ids_of, kind_of
from moeify.recipe.data import Discover, StreamedText, TextData
from moeify.world import Solo, World

END = "<|end|>"
"""The token after every document. The same characters inside of a document are ordinary text."""
SAMPLE_BYTES = 1_000_000
"""What the BPE sees of each category at most; of all the same, so that none shapes the vocabulary more."""
Placed = Iterable[tuple[Split, Document]]
"""Documents, and the split that each falls into."""
_ASSETS = ("tokenizer.json", "tokenizer_config.json")


def prepare(
    data: TextData,
    cache: Path,
    base: Path,
    given: GivenTokenizer | None = None,
    *,
    world: World | None = None,
    shelf: str | None = None,
) -> Tokens:
    """Return the data's tokens, from the cache where they are; several processes may prepare at once.

    ``given``: the tokenizer; None: one is trained. ``world``: whose workers all call this at the same time, and of
    files that are streamed each read their share. ``shelf``: URL of what machines prepared for each other.

    Raises:
        ValueError: The source cannot be read, or holds too little.
        StorageError: The shelf cannot be reached, or there is no room.
    """
    world = world or Solo()
    entry = Entry(cache / "text" / _key(data, base, given, world), shelf)
    if isinstance(data.source, StreamedText):
        return _streamed(data, data.source, cache, base, given, entry, world)
    if tokens := entry.tokens():
        return tokens
    with entry.lock:
        if tokens := entry.found():
            return tokens
        parts, chosen, assets = _ready(data, base, given)

        def write(work: Path) -> list[StreamFiles]:
            return [_write(work, number, each, chosen) for number, each in enumerate(parts.values())]

        return entry.publish(list(parts), chosen, assets, write)


def read(data: TextData, base: Path) -> dict[str, list[Document]]:
    """Return each category's distinct documents of all splits, discovered categories' too; nothing is cached."""
    if data.discover is None:
        return sources.read(data.source, base)
    parts, _, _ = _discovered(data, data.discover, base, None)
    return {category: [d for split in SPLITS for d in each[split]] for category, each in parts.items()}


def _key(data: TextData, base: Path, given: GivenTokenizer | None, world: World) -> str:
    digest = hashlib.sha256(f"{data.model_dump_json(exclude={'length'})}\n{tokenizers.__version__}\n".encode())
    if given is not None:
        digest.update(f"{given.fingerprint}\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    if data.discover is not None:
        from moeify.data import discover

        digest.update(discover.fingerprint().encode())
    if isinstance(data.source, StreamedText):
        marks = partial(_marks, world=world)
        digest.update(streamed_files.fingerprint(data.source, base, marks).encode())
    else:
        digest.update(sources.fingerprint(data.source, base).encode())
    return digest.hexdigest()[:32]


def _marks(files: Sequence[File], world: World) -> Iterator[str]:
    """Yield the marks of files, of which each worker looks at its share."""
    found = world.gather([file.mark() for file in files[world.rank :: world.size]])
    return (found[place % world.size][place // world.size] for place in range(len(files)))


# --- preparing ----------------------------------------------------------------------------------------


def _streamed(
    data: TextData,
    source: StreamedText,
    cache: Path,
    base: Path,
    given: GivenTokenizer | None,
    entry: Entry,
    world: World,
) -> Tokens:
    """Return the tokens of files that are streamed.

    No lock is held while workers wait for each other: those of another run may hold the one that the next waits for.
    """
    with entry.lock if world.size == 1 else nullcontext():
        with entry.lock:
            found = entry.found()
        everywhere = all(world.gather(found is not None))
        if found and everywhere:
            return found
        corpus = streamed.Corpus(source, base, cache, validation=data.validation, test=data.test)
        chosen = given or _agreed(corpus, data.vocabulary, world)
        joins, kind = packing.pack(corpus, chosen, entry.parts, world), kind_of(chosen.tokenizer, chosen.end)
        if joins:
            with entry.lock:
                if not entry.tokens():
                    write = partial(packing.join, corpus, kind, entry.parts)
                    entry.publish(corpus.categories, chosen, dict(chosen.assets), write)
                shutil.rmtree(entry.parts, ignore_errors=True)
        world.gather(None)
        tokens = entry.tokens()
    assert tokens is not None
    return tokens


def _agreed(corpus: streamed.Corpus, vocabulary: int, world: World) -> GivenTokenizer:
    """Return the tokenizer that the first worker trained."""
    trained = None
    if world.rank == 0:
        heads = [corpus.head(category, SAMPLE_BYTES) for category in range(len(corpus.categories))]
        trained = _trained(heads, vocabulary)
    known = (trained.tokenizer.to_str(), trained.end, dict(trained.assets)) if trained else ("", 0, {})
    content, end, assets = world.share(known)
    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True  # which its content does not say
    return trained or GivenTokenizer(tokenizer, end, assets)


def _ready(
    data: TextData, base: Path, given: GivenTokenizer | None
) -> tuple[Mapping[str, Placed], GivenTokenizer, dict[str, bytes]]:
    """Return each category's documents, to be read once and in this order, the tokenizer, and the files to keep."""
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


def _write(work: Path, number: int, documents: Placed, chosen: GivenTokenizer) -> StreamFiles:
    """Encode a category's documents and write its streams, a batch at a time; return them, closed."""
    with StreamFiles(work, number, kind_of(chosen.tokenizer, chosen.end)) as files:
        for batch in batches(documents):
            for split in SPLITS:
                if mine := [document for place, document in batch if place == split]:
                    stream = encode(chosen.tokenizer, chosen.end, mine)
                    files.add(split, stream, sum(document.size for document in mine))
    return files


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
    ids = {name: ids_of(tokenizer, split[name]) for name in SPLITS}
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


def _assets(tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in _ASSETS}

"""Text as tokens: a byte-level BPE trained on the train split, or a tokenizer that is given; prepared once and cached.

A cache entry's name is a hash of all that it depends on: the documents, the recipe's data section, the versions of
the packages that prepare and the code that does. So an entry is never out of date, and one that is there is whole.
"""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moeify.data import documents, packing, sources, streamed
from moeify.data.documents import SPLITS, Document, Split
from moeify.data.given_tokenizer import GivenTokenizer
from moeify.data.labels import UNLABELLED
from moeify.data.packing import in_step
from moeify.data.prepared import Entry, Tokens
from moeify.data.streamed_files import File, all_files
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
    if isinstance(data.source, StreamedText):
        return _streamed(data, data.source, cache, base, given, world, shelf)
    entry = Entry(cache / "text" / _key(data, given, sources.fingerprint(data.source, base)), shelf)
    tokens = entry.tokens()
    if tokens is None:
        with entry.lock:
            tokens = entry.found() or _published(entry, data, base, given)
    if world.rank == 0:
        entry.send()
    return tokens


def read(data: TextData, base: Path) -> dict[str, list[Document]]:
    """Return each category's distinct documents of all splits, discovered categories' too; nothing is cached."""
    if data.discover is None:
        return sources.read(data.source, base)
    parts, _, _ = _discovered(data, data.discover, base, None)
    return {category: [d for split in SPLITS for d in each[split]] for category, each in parts.items()}


def _key(data: TextData, given: GivenTokenizer | None, content: str) -> str:
    digest = hashlib.sha256(
        f"{data.model_dump_json(exclude={'length'})}\n{tokenizers.__version__}\n{content}\n".encode()
    )
    if given is not None:
        digest.update(f"{given.fingerprint}\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    if data.discover is not None:
        from moeify.data import discover

        digest.update(discover.fingerprint().encode())
    return digest.hexdigest()[:32]


# --- preparing ----------------------------------------------------------------------------------------


def _published(entry: Entry, data: TextData, base: Path, given: GivenTokenizer | None) -> Tokens:
    parts, chosen, assets = _ready(data, base, given)

    def write(work: Path) -> list[StreamFiles]:
        return [_write(work, number, each, chosen) for number, each in enumerate(parts.values())]

    return entry.publish(list(parts), chosen, assets, write)


def _streamed(
    data: TextData,
    source: StreamedText,
    cache: Path,
    base: Path,
    given: GivenTokenizer | None,
    world: World,
    shelf: str | None,
) -> Tokens:
    """Return the tokens of files that are streamed.

    A lock is held by who joins the parts or fetches them joined, and never while workers wait for each other. Of
    several processes that begin at once each packs what the others have not yet.
    """
    files = world.share(all_files(source, base) if world.rank == 0 else {})
    corpus = streamed.Corpus(source, files, cache, validation=data.validation, test=data.test)
    entry = Entry(cache / "text" / _key(data, given, _content(files, world)), shelf)
    found = in_step(world, entry.looked_up)
    everywhere = all(world.gather(found is not None))
    if found is None or not everywhere:
        with entry.parts_kept():
            chosen = given or _agreed(corpus, data.vocabulary, world)
            joins = packing.pack(corpus, chosen, entry.parts, world)
            in_step(world, partial(_joined, entry, corpus, chosen) if joins else lambda: None)
            found = in_step(world, entry.tokens)
    assert found is not None
    if world.rank == 0:
        entry.send()
    return found


def _content(files: Mapping[str, Sequence[File]], world: World) -> str:
    """Return a hash of what would be read, and by what; of the files each worker looks at its share."""
    named = [(category, file) for category, each in files.items() for file in each]
    marks = world.gather(in_step(world, lambda: [file.mark() for _, file in named[world.rank :: world.size]]))
    known = [
        (category, file.reader, marks[place % world.size][place // world.size])
        for place, (category, file) in enumerate(named)
    ]
    versions = [importlib.metadata.version(name) for name in ("datasets", "pyarrow")]
    return hashlib.sha256(json.dumps([versions, known]).encode()).hexdigest()


def _joined(entry: Entry, corpus: streamed.Corpus, chosen: GivenTokenizer) -> None:
    """Publish the entry from its parts, where nobody else has."""
    with entry.lock:
        if entry.tokens() is None:
            write = partial(packing.join, corpus, kind_of(chosen.tokenizer, chosen.end), entry.parts)
            entry.publish(corpus.categories, chosen, dict(chosen.assets), write)


def _agreed(corpus: streamed.Corpus, vocabulary: int, world: World) -> GivenTokenizer:
    """Return the tokenizer that the first worker trained."""

    def train() -> GivenTokenizer | None:
        heads = (corpus.head(category, SAMPLE_BYTES) for category in range(len(corpus.categories)))
        return _trained(list(heads), vocabulary) if world.rank == 0 else None

    trained = in_step(world, train)
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

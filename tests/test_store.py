"""One body of tests for every kind of store, and what is particular to folders."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moeify.place import Place
from moeify.store import CorruptCheckpointError, FolderStore, MemoryStore, Store
from moeify.url_store import UrlStore
from tests.stores import BUCKET, credentials, gs_credentials, gs_server, s3_server

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

TENSORS = {"split": {"w": torch.arange(6.0).view(2, 3)}, "dense": {"w": torch.ones(3)}}


@dataclass(frozen=True)
class Kept:
    """A kind of store and where it keeps things."""

    kind: str
    opened: Callable[[int], Store]
    """Opens it anew, as another process would, keeping so many checkpoints."""
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], None]
    remove: Callable[[str], None]
    files: Callable[[], list[str]]


def in_folder(folder: Path) -> Kept:
    def write(path: str, content: bytes) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)

    return Kept(
        "folder",
        lambda keep: FolderStore(folder, keep),
        lambda path: (folder / path).read_bytes(),
        write,
        lambda path: (folder / path).unlink(),
        lambda: sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
    )


def behind(url: str, scratch: Path) -> Kept:
    place = Place(url)
    return Kept(
        "url",
        lambda keep: UrlStore(place, scratch / secrets.token_hex(4), keep),
        place.read,
        place.write,
        lambda path: place.remove([path]),
        lambda: sorted(place.found()),
    )


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(endpoint).items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    with gs_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in gs_credentials(endpoint).items():
            patch.setenv(name, value)
        yield f"gs://{BUCKET}"


KINDS = ["folder", "file", "memory-url", "s3", "gs"]


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    return of_kind(request.param, request, tmp_path)


@pytest.fixture(params=["memory", *KINDS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else of_kind(request.param, request, tmp_path).opened(1)


def of_kind(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    match kind:
        case "folder":
            return in_folder(tmp_path)
        case "file":
            return behind(f"file://{tmp_path}/there", tmp_path)
        case "memory-url":
            return behind(f"memory://{secrets.token_hex(4)}", tmp_path)
        case _:
            return behind(f"{request.getfixturevalue(kind)}/{secrets.token_hex(4)}", tmp_path)


def test_what_is_saved_comes_back(store: Store) -> None:
    assert store.newest() is None
    store.save("0001", {"step": 3}, TENSORS)
    found = store.newest()
    assert found is not None
    assert (found.name, found.damaged) == ("0001", ())
    assert store.facts("0001") == {"step": 3}
    assert torch.equal(store.tensors("0001", "split")["w"], TENSORS["split"]["w"])


def test_only_the_newest_and_the_pinned_stay(store: Store) -> None:
    for name in ("0001", "0002", "0003"):
        store.save(name, {"name": name}, TENSORS, pinned=["0001"])
    assert store.facts("0001") == {"name": "0001"}
    assert store.facts("0003") == {"name": "0003"}
    with pytest.raises((CorruptCheckpointError, KeyError)):
        store.facts("0002")


def test_saving_a_name_again_replaces_it(store: Store) -> None:
    store.save("0001", {"try": 1}, TENSORS)
    store.save("0001", {"try": 2}, TENSORS)
    assert store.facts("0001") == {"try": 2}


def test_another_process_finds_what_was_saved(kept: Kept) -> None:
    kept.opened(2).save("0001", {"step": 3}, TENSORS)
    store = kept.opened(2)
    found = store.newest()
    assert found is not None
    assert (found.name, found.damaged) == ("0001", ())
    assert store.facts("0001") == {"step": 3}
    for part, tensors in TENSORS.items():
        assert torch.equal(store.tensors("0001", part)["w"], tensors["w"])
    with pytest.raises(CorruptCheckpointError, match="no name of a checkpoint"):
        store.facts("../0001")


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_every_damage_to_every_file_is_seen_and_the_last_good_checkpoint_used(kept: Kept, harm: str) -> None:
    store = kept.opened(3)
    store.save("0001", {"step": 1}, TENSORS)
    store.save("0002", {"step": 2}, TENSORS)
    each = 40 if kept.kind == "folder" else 4  # of a few hundred bytes
    for path in [path for path in kept.files() if path.startswith("checkpoints/0002/")]:
        before = kept.read(path)
        for place in range(0, len(before), max(1, len(before) // each)) if harm != "remove" else [0]:
            match harm:
                case "truncate":
                    kept.write(path, before[:place])
                case "flip":
                    kept.write(path, before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
                case _:
                    kept.remove(path)
            found = kept.opened(3).newest()
            assert found is not None
            assert found.name == "0001", (path, place)
            if kept.kind == "url" and harm == "remove" and path.endswith("manifest.json"):
                assert found.damaged == ()  # behind a URL, one without a manifest was never published
            else:
                assert len(found.damaged) == 1
                assert "0002" in found.damaged[0]
        kept.write(path, before)
    found = kept.opened(3).newest()
    assert found is not None
    assert (found.name, found.damaged) == ("0002", ())


def test_when_no_good_checkpoint_is_left_that_is_said(kept: Kept) -> None:
    kept.opened(3).save("0001", {}, TENSORS)
    (part,) = [path for path in kept.files() if path.endswith("split.safetensors")]
    kept.remove(part)
    with pytest.raises(CorruptCheckpointError, match=r"no good checkpoint is left: 0001: split.safetensors is missing"):
        kept.opened(3).newest()


def test_what_a_kill_left_half_written_is_never_seen_and_cleared_with_the_next_checkpoint(kept: Kept) -> None:
    half = ".draft-killed" if kept.kind == "folder" else "0002/0123456789abcdef"
    kept.write(f"checkpoints/{half}/split.safetensors", b"half")
    store = kept.opened(3)
    assert store.newest() is None
    store.save("0001", {}, TENSORS)
    assert {path.split("/")[1] for path in kept.files()} == {"0001"}


def test_a_checkpoint_that_is_replaced_leaves_nothing_of_the_old_one(kept: Kept) -> None:
    store = kept.opened(1)
    store.save("0001", {"try": 1}, TENSORS)
    count = len(kept.files())
    store.save("0001", {"try": 2}, {**TENSORS, "dense": {"w": torch.zeros(3)}})
    assert len(kept.files()) == count
    again = kept.opened(1)
    assert again.facts("0001") == {"try": 2}
    assert torch.equal(again.tensors("0001", "dense")["w"], torch.zeros(3))


def test_files_for_people_stay_inside(kept: Kept) -> None:
    store = kept.opened(1)
    store.put("rounds/1/partition.json", b"{}")
    store.put_tensors("rounds/1/table.safetensors", TENSORS["split"], {"score": "fisher"})
    assert kept.read("rounds/1/partition.json") == b"{}"
    assert b"fisher" in kept.read("rounds/1/table.safetensors")
    for path in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(ValueError, match="would leave"):
            store.put(path, b"")


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path, keep=3)
    store.save("0001", {}, TENSORS)
    monkeypatch.setattr("moeify.store._digest", lambda body: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save("0002", {}, TENSORS)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0001"]


# --- behind a URL --------------------------------------------------------------------------------------------------


@pytest.fixture
def far(tmp_path: Path) -> Kept:
    return behind(f"memory://{secrets.token_hex(4)}", tmp_path)


def test_the_manifest_is_written_last_and_a_kill_before_it_leaves_the_checkpoint_before(
    far: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = far.opened(2)
    store.save("0001", {}, TENSORS)
    written: list[str] = []
    for name in ("upload", "write"):
        real = getattr(Place, name)

        def noted(place: Place, path: str, what: object, real: Callable[..., None] = real) -> None:
            if path == "manifest.json":
                raise KeyboardInterrupt
            written.append(path)
            real(place, path, what)

        monkeypatch.setattr(Place, name, noted)
    with pytest.raises(KeyboardInterrupt):
        store.save("0002", {}, TENSORS)
    monkeypatch.undo()
    assert len(written) == len(TENSORS)
    for opened in (store, far.opened(2)):
        found = opened.newest()
        assert found is not None
        assert (found.name, found.damaged) == ("0001", ())
    store.save("0002", {}, TENSORS)
    found = far.opened(2).newest()
    assert found is not None
    assert found.name == "0002"


def test_a_writer_that_was_superseded_publishes_nothing(far: Kept, tmp_path: Path) -> None:
    def superseded() -> None:
        raise ValueError("another attempt has the run")

    place = far.opened(1).place  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="another attempt"):
        UrlStore(place, tmp_path / "late", 1, superseded).save("0001", {}, TENSORS)
    assert far.files() == []


def test_a_copy_that_is_whole_is_not_fetched_again(far: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far.opened(1).save("0001", {}, TENSORS)
    place, fetched = far.opened(1).place, []  # type: ignore[attr-defined]
    real = Place.download
    monkeypatch.setattr(Place, "download", lambda place, path, to: fetched.append(path) or real(place, path, to))
    for _ in range(2):
        assert UrlStore(place, tmp_path / "copy", 1).newest() is not None
        assert len(fetched) == len(TENSORS)
    (tmp_path / "copy/checkpoints/0001/split.safetensors").write_bytes(b"rot")
    assert UrlStore(place, tmp_path / "copy", 1).newest() is not None
    assert len(fetched) == 2 * len(TENSORS)


def test_a_manifest_from_elsewhere_fetches_nothing_outside(far: Kept) -> None:
    far.opened(1).save("0001", {}, TENSORS)
    manifest = json.loads(far.read("checkpoints/0001/manifest.json"))
    manifest["sha256"] = "../../../x"
    far.write("checkpoints/0001/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CorruptCheckpointError, match="no good checkpoint"):
        far.opened(1).newest()


@pytest.mark.parametrize("kind", ["s3", "gs", "memory-url"])
def test_of_several_that_write_an_object_where_none_is_one_succeeds(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kept = of_kind(kind, request, tmp_path)
    store = kept.opened(1)
    assert isinstance(store, UrlStore)
    store.place.create("owner", b"one")
    store.place.create("owner", b"one")  # a request that was repeated
    with pytest.raises(FileExistsError):
        store.place.create("owner", b"two")
    assert kept.read("owner") == b"one"


def test_the_umask_says_who_may_read_what_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = FolderStore(tmp_path, keep=1)
        store.save("000010", {}, TENSORS)
        store.put("rounds/1/notes.txt", b"notes")
        store.put_tensors("rounds/1/attribution.safetensors", TENSORS["dense"], {"score": "fisher"})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}

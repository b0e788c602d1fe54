from pathlib import Path

import pytest
import torch

from moeify.store import CorruptCheckpointError, FolderStore, MemoryStore, Store

TENSORS = {"split": {"w": torch.arange(6.0).view(2, 3)}, "dense": {"w": torch.ones(3)}}


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FolderStore(tmp_path, keep=1) if request.param == "folder" else MemoryStore()


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


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_every_damage_to_every_file_is_seen_and_the_last_good_checkpoint_used(tmp_path: Path, harm: str) -> None:
    store = FolderStore(tmp_path, keep=3)
    store.save("0001", {"step": 1}, TENSORS)
    store.save("0002", {"step": 2}, TENSORS)
    for path in files(tmp_path / "checkpoints" / "0002"):
        before = path.read_bytes()
        places = range(0, len(before), max(1, len(before) // 40)) if harm != "remove" else [0]
        for place in places:
            match harm:
                case "truncate":
                    path.write_bytes(before[:place])
                case "flip":
                    path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
                case _:
                    path.unlink()
            found = store.newest()
            assert found is not None
            assert found.name == "0001", (path.name, place)
            assert len(found.damaged) == 1
            assert "0002" in found.damaged[0]
        path.write_bytes(before)
    found = store.newest()
    assert found is not None
    assert found.name == "0002"


def test_when_no_good_checkpoint_is_left_that_is_said(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, keep=3)
    store.save("0001", {}, TENSORS)
    (tmp_path / "checkpoints" / "0001" / "split.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"no good checkpoint is left: 0001: split.safetensors is missing"):
        store.newest()


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path, keep=3)
    store.save("0001", {}, TENSORS)
    monkeypatch.setattr("moeify.store._digest", lambda body: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save("0002", {}, TENSORS)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0001"]


def test_what_a_kill_left_half_written_is_cleared_with_the_next_checkpoint(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, keep=3)
    half = tmp_path / "checkpoints" / ".draft-killed"
    half.mkdir(parents=True)
    (half / "split.safetensors").write_bytes(b"half")
    assert store.newest() is None
    store.save("0001", {}, TENSORS)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0001"]


def test_files_for_people_stay_inside_the_folder(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "run", keep=1)
    store.put("rounds/1/partition.json", b"{}")
    assert (tmp_path / "run/rounds/1/partition.json").read_bytes() == b"{}"
    for path in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(ValueError, match="would leave"):
            store.put(path, b"")

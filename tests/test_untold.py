"""A split model that is told the category: in a run, through cuts, and in what leaves it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.evaluation import held_out_loss
from moeify.events import Evaluated, MemoryTracker
from moeify.export.pruning import only, prune
from moeify.export.stock import extract, to_dense
from moeify.export.stock_moe import to_moe
from moeify.export.untold import untold
from moeify.loop import run
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_from_run, load_split, save_split
from moeify.splitting.partition import Partition
from moeify.splitting.surgery import permute
from moeify.store import FolderStore
from moeify.world import Solo
from tests.networks import CATEGORIES, rows_for, tiny_autoencoder, tiny_llama
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config
from tests.trees import partitions

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

FAMILIES = {"llama": tiny_llama, "autoencoder": tiny_autoencoder}


def told_split(family: str, data: st.DataObject) -> SplitModel:
    network = FAMILIES[family]()
    sites = SplitModel(FAMILIES[family](), CATEGORIES).space.readers
    drawn = data.draw(partitions(list(sites), categories=4)).as_json()
    for node in drawn["nodes"]:
        node["categories"] = ["abcd"[int(name[1])] for name in node["categories"]]
    split = SplitModel(network, CATEGORIES, Partition.from_json(drawn), told=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for biases in split.told:
            biases.copy_(torch.randn(biases.shape, generator=generator, dtype=biases.dtype))
    return split.eval()


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_told_no_more_it_gives_one_categorys_outputs(family: str, data: st.DataObject) -> None:
    split = told_split(family, data)
    inputs = rows_for(split.network, 3)
    for place, category in enumerate(CATEGORIES):
        rows = torch.full((3,), place)
        wanted = split(inputs, rows)
        plain = untold(split, category).to(torch.float64)
        assert plain.told == ()
        torch.testing.assert_close(plain(inputs, rows), wanted, rtol=1e-6, atol=1e-6)  # by way of float32
        dense = SplitModel(extract(split, category).to(torch.float64), [category])
        torch.testing.assert_close(dense(inputs, torch.zeros(3, dtype=torch.long)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_parts_of_it_stay_told(family: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    split = told_split(family, data)
    inputs = rows_for(split.network, 3)
    numbers = inputs.float() if inputs.is_floating_point() else inputs
    part = prune(split, only(split.partition, ["d", "b"]))
    folder = tmp_path_factory.mktemp("told") / "part"
    save_split(part, folder, {})
    read = load_split(folder)
    assert len(read.told) == len(split.told)
    for category in ("d", "b"):
        wanted = split(inputs, torch.full((3,), CATEGORIES.index(category)))
        got = read(numbers, torch.full((3,), part.categories.index(category)))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_biases_move_with_their_units(family: str, data: st.DataObject) -> None:
    split = told_split(family, data)
    whole = SplitModel(FAMILIES[family](), CATEGORIES, told=True)
    with torch.no_grad():
        for mine, theirs in zip(whole.told, split.told, strict=True):
            mine.copy_(theirs)
    inputs, rows = rows_for(whole.network, 4), torch.tensor([2, 0, 3, 1])
    before = whole(inputs, rows)
    order = {site.name: torch.tensor(data.draw(st.permutations(range(site.units)))) for site in whole.space.sites}
    permute(whole.network, None, whole.space, order)
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(whole.told, split.told, strict=True)) or all(
        torch.equal(each, each.sort().values) for each in order.values()
    )
    torch.testing.assert_close(whole(inputs, rows), before)


def test_what_cannot_hold_it_says_so() -> None:
    split = SplitModel(tiny_llama(), CATEGORIES, told=True)
    with pytest.raises(ValueError, match=r"is told the category .* stock MoE formats have no place for"):
        to_moe(split, "glm4_moe", "a")
    with pytest.raises(ValueError, match=r"is told the category .* for both 'a' and 'b'"):
        to_dense(split, ["a", "b"])


@pytest.mark.parametrize("task_class", [ToyTask, ToyTextTask])
def test_a_run_tells_the_split_model_from_its_first_cut_on(task_class: type[ToyTask], tmp_path: Path) -> None:
    base = TEXT_CONFIG if task_class is ToyTextTask else {}
    partition = {"multiple": 2, "min_units": 2, "told": True}
    config = toy_config(**{**base, "controls": ["random"], "partition": partition})
    task = task_class(config)
    result = run(config, task, store=FolderStore(tmp_path, 1))
    plain = toy_config(**{**base, "controls": ["random"]})
    assert result.test_loss["dense"] == run(plain, task).test_loss["dense"]
    for arm in ("split", "random"):
        model = load_from_run(tmp_path, arm)  # type: ignore[arg-type]
        assert all(bool(biases.any()) for biases in model.told)
        assert held_out_loss(model, task, Solo(), config.evaluation, "test") == result.test_loss[arm]  # type: ignore[index]
    assert load_from_run(tmp_path, "dense").told == ()


def test_a_first_cut_that_is_rolled_back_forks_again_with_biases_of_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeify.loop.tax", lambda loss, twin: {**dict.fromkeys(loss, 1.0), "mean": 1.0})
    monkeypatch.setattr("moeify.loop.check_step", lambda *_: None)
    monkeypatch.setattr("moeify.loop.expected_use", lambda *_: 0.0)
    config = toy_config(
        budget={"tax": 0.5},
        partition={"multiple": 2, "min_units": 2, "told": True},
        rounds=[{"train": 20, "recover": 10, "separation": 0.3}, {"train": 0, "recover": 5, "separation": 0.4}],
    )
    tracker = MemoryTracker()
    result = run(config, ToyTask(config), store=FolderStore(tmp_path, 1), tracker=tracker)
    assert [r.outcome for r in result.rounds] == ["rolled back", "rolled back"]
    seen = {e.id: e.loss for e in tracker.events.values() if isinstance(e, Evaluated)}
    for arm in ("split", "random"):
        assert seen[f"evaluated/{arm}/1/before_cut"] == seen["evaluated/dense/1/before_cut"]
        assert seen[f"evaluated/{arm}/2/before_cut"] == seen[f"evaluated/{arm}/1/before_cut"]
        assert seen[f"evaluated/{arm}/1/recovered"] != seen[f"evaluated/{arm}/1/before_cut"]
    assert all(bool(biases.any()) for biases in load_from_run(tmp_path).told)  # they are learned again since

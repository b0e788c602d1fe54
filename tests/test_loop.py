import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moeify.control import Standing
from moeify.evaluation import row_losses
from moeify.events import Evaluated, MemoryTracker, Phase, Started, Step
from moeify.export.pruning import prune, without
from moeify.loop import run
from moeify.recipe.routing import Routing
from moeify.result import Result
from moeify.split_folder import load_from_run, load_split, save_split
from moeify.state import State
from moeify.store import FolderStore, MemoryStore
from moeify.training import train
from moeify.world import Solo
from tests.toy import CONFIG, ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


class KilledError(Exception):
    """Stands for the power going off."""


class DyingStore(FolderStore):
    """Dies in the middle of the n-th checkpoint."""

    lives = 10**9

    def save(self, *args: Any, **kwargs: Any) -> None:
        if self.lives == 0:
            raise KilledError
        self.lives -= 1
        super().save(*args, **kwargs)


def outcome(result: Result) -> dict[str, object]:
    data = result.model_dump(exclude={"seconds"})
    data["rounds"] = [{k: v for k, v in r.items() if k not in {"time", "seconds"}} for r in data["rounds"]]
    return data


def final(store: FolderStore) -> dict[str, dict[str, torch.Tensor]]:
    found = store.newest()
    assert found is not None
    return {arm: store.tensors(found.name, arm) for arm in store.facts(found.name)["arms"]}


@pytest.mark.usefixtures("shapes_checked")
def test_two_rounds_give_every_category_its_leaf_at_the_asked_separation() -> None:
    config, tracker = toy_config(), MemoryTracker()
    result = run(config, ToyTask(config), tracker=tracker)
    leaves = [leaf for group in result.tree["children"] for leaf in group["children"]]
    assert sorted(leaf["name"] for leaf in leaves) == ["a", "b", "c", "d"]
    assert result.active_fraction["mean"] == pytest.approx(1 - 0.45, abs=0.03)
    assert [r.round for r in result.rounds] == [1, 2]
    assert result.rounds[0].separation == pytest.approx(0.3, abs=0.03)
    assert all(r.accepted for r in result.rounds)
    assert set(result.test_loss) == {"dense", "split", "random"}
    assert result.tax["mean"] == pytest.approx(
        sum(result.test_loss["split"][c] - result.test_loss["dense"][c] for c in "abcd") / 4
    )
    steps = {e.arm: e.step for e in tracker.events.values() if isinstance(e, Step)}
    assert steps == {"dense": 60, "split": 60, "random": 60}
    work = [e.work for e in tracker.events.values() if isinstance(e, Step)]
    assert work == sorted(work)
    assert work[-1] == 1.0


def test_a_told_twin_trains_from_the_first_step_and_the_split_model_is_held_against_it() -> None:
    config, tracker = toy_config(controls=["told", "random"]), MemoryTracker()
    result = run(config, ToyTask(config), tracker=tracker)
    assert list(result.test_loss) == ["dense", "told", "split", "random"]
    losses = result.test_loss
    assert result.tax_told is not None
    assert result.tax_told == pytest.approx(
        {
            **{c: losses["split"][c] - losses["told"][c] for c in "abcd"},
            "mean": sum(losses["split"][c] - losses["told"][c] for c in "abcd") / 4,
        }
    )
    seen = {e.id: e.loss for e in tracker.events.values() if isinstance(e, Evaluated)}
    for ended in result.rounds:
        split, told = (seen[f"evaluated/{arm}/{ended.round}/recovered"] for arm in ("split", "told"))
        assert ended.tax_told == pytest.approx(sum(split[c] - told[c] for c in "abcd") / 4)
    taken = [e for e in tracker.events.values() if isinstance(e, Step)]
    assert [e.step for e in taken if e.arm == "told"] == [e.step for e in taken if e.arm == "dense"]
    work = [e.work for e in taken]
    assert work == sorted(work)
    assert work[-1] == 1.0
    assert work[0] == pytest.approx(5 / (2 * 60 + 2 * 45))
    (started,) = (e for e in tracker.events.values() if isinstance(e, Started))
    assert started.arms == ("dense", "told", "split", "random")


def test_controls_change_nothing_of_the_other_arms() -> None:
    results = {}
    for controls in ((), ("random",), ("told",)):
        config = toy_config(controls=controls)
        results[controls] = run(config, ToyTask(config))
    plain = results[()]
    assert set(plain.test_loss) == {"dense", "split"}
    assert plain.tax_random is plain.tax_told is None
    assert all(r.tax_random is r.predicted_random is r.tax_told is None for r in plain.rounds)
    for result in results.values():
        for arm in ("dense", "split"):
            assert result.test_loss[arm] == plain.test_loss[arm]  # type: ignore[index]
        assert result.tree == plain.tree


def test_ablating_an_expert_touches_only_the_categories_it_serves() -> None:
    config = toy_config()
    result = run(config, ToyTask(config))
    for category, rises in result.own_other.items():
        for expert, rise in rises.items():
            if category in expert.split("+"):
                assert rise != 0.0
            else:
                assert rise == 0.0


def test_the_same_recipe_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path) -> None:
    stores = [FolderStore(tmp_path / name, 2) for name in ("one", "two", "three")]
    seeds = (0, 0, 1)
    results = [
        run(toy_config(seed=s), ToyTask(toy_config(seed=s)), store=store)
        for s, store in zip(seeds, stores, strict=True)
    ]
    assert outcome(results[0]) == outcome(results[1])
    assert outcome(results[0]) != outcome(results[2])
    for arm, tensors in final(stores[0]).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, final(stores[1])[arm][name]), (arm, name)


def test_a_run_killed_at_every_checkpoint_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = toy_config(controls=["random", "told"])
    calm = FolderStore(tmp_path / "calm", 2)
    tracker = MemoryTracker()
    wanted = outcome(run(config, ToyTask(config), store=calm, tracker=tracker))
    for lives in (0, 3):
        stormy = DyingStore(tmp_path / f"stormy-{lives}", 2)
        told = MemoryTracker()
        stormy.lives = lives
        for _ in range(100):
            try:
                result = run(config, ToyTask(config), store=stormy, tracker=told)
            except KilledError:
                stormy.lives = max(1, lives)
            else:
                break
        assert outcome(result) == wanted
        assert set(final(calm)) == {"dense", "told", "split", "random"}
        for arm, tensors in final(calm).items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, final(stormy)[arm][name]), (arm, name)
        lasting = {i for i in told.events if not i.startswith("resumed/")}
        assert lasting == set(tracker.events)


@pytest.fixture
def heavy_tax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every round cost one nat, and nothing before its cut."""
    monkeypatch.setattr("moeify.loop.tax", lambda loss, twin: {**dict.fromkeys(loss, 1.0), "mean": 1.0})
    nothing = Standing(0.0, 0.0)
    monkeypatch.setattr("moeify.loop._Loop._standing", lambda self, mine, twin: nothing)


@pytest.mark.usefixtures("heavy_tax")
def test_a_round_beyond_the_tax_budget_is_rolled_back_and_the_step_halved() -> None:
    config = toy_config(budget={"tax": 0.5})
    tracker = MemoryTracker()
    result = run(config, ToyTask(config), tracker=tracker)
    first, second = result.rounds
    assert not first.accepted
    assert not second.accepted
    assert second.asked == 0.45 / 2
    assert second.separation == pytest.approx(0.45 / 2, abs=0.04)
    assert result.active_fraction["mean"] == 1.0
    assert result.tree["children"] == []
    steps = {e.arm: e.step for e in tracker.events.values() if isinstance(e, Step)}
    assert steps == {"dense": 60, "split": 60, "random": 60}


@pytest.mark.usefixtures("heavy_tax")
def test_a_roll_back_leaves_the_told_twin_alone() -> None:
    calm = toy_config(controls=["told"])
    undone = toy_config(controls=["told"], budget={"tax": 0.5})
    one, other = (run(config, ToyTask(config)) for config in (calm, undone))
    assert all(r.accepted for r in one.rounds)
    assert not any(r.accepted for r in other.rounds)
    assert one.test_loss["told"] == other.test_loss["told"]
    assert one.test_loss["split"] != other.test_loss["split"]


@pytest.mark.usefixtures("heavy_tax")
def test_rolled_back_weights_are_those_from_before_the_cut(tmp_path: Path) -> None:
    config = toy_config(
        budget={"tax": 0.5},
        rounds=[{"train": 20, "recover": 10, "separation": 0.3}, {"train": 0, "recover": 5, "separation": 0.4}],
    )
    for store in (MemoryStore(), FolderStore(tmp_path, 1)):
        tracker = MemoryTracker()
        run(config, ToyTask(config), store=store, tracker=tracker)
        seen = {e.id: e.loss for e in tracker.events.values() if isinstance(e, Evaluated)}
        for arm in ("split", "random"):
            assert seen[f"evaluated/{arm}/2/before_cut"] == seen[f"evaluated/{arm}/1/before_cut"]
            assert seen[f"evaluated/{arm}/1/recovered"] != seen[f"evaluated/{arm}/1/before_cut"]


def test_a_run_on_a_budget_resumes_to_the_same_decisions(tmp_path: Path, heavy_tax: None) -> None:
    """Two rounds are rolled back, each cut less deep than the one before; the third has no step left."""
    config = toy_config(
        budget={"tax": 0.5, "least_step": 0.08},
        rounds=[{"train": 10, "recover": 5, "separation": 0.3} for _ in range(3)],
    )
    calm = MemoryTracker()
    wanted = run(config, ToyTask(config), tracker=calm)
    assert [r.outcome for r in wanted.rounds] == ["rolled back", "rolled back", "not cut"]
    for lives in (1, 2):
        stormy, told = DyingStore(tmp_path / f"stormy-{lives}", 2), MemoryTracker()
        stormy.lives = lives
        result = None
        while result is None:
            try:
                result = run(config, ToyTask(config), store=stormy, tracker=told)
            except KilledError:
                stormy.lives = lives
        assert outcome(result) == outcome(wanted)
        assert {i for i in told.events if not i.startswith("resumed/")} == set(calm.events)


def test_separations_out_of_reach_are_refused_before_any_training() -> None:
    config = toy_config(
        rounds=[{"train": 5, "recover": 5, "separation": 0.2}, {"train": 5, "recover": 5, "separation": 0.5}]
    )
    tracker = MemoryTracker()
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.5, at most 0.300"):
        run(config, ToyTask(config), tracker=tracker)
    assert not tracker.events


def test_off_route_units_are_credited_to_no_category_they_do_not_serve(tmp_path: Path) -> None:
    """From the second round on, rows run in leaf order; what they say must reach the category that they are of."""
    config = toy_config()
    run(config, ToyTask(config), store=FolderStore(tmp_path, 2))
    first = json.loads((tmp_path / "rounds/1/partition.json").read_text())
    second = json.loads((tmp_path / "rounds/2/partition.json").read_text())
    assert first["nodes"][0]["categories"] != list("abcd"), "leaf order equals recipe order: the test shows nothing"
    with safe_open(tmp_path / "rounds/2/attribution.safetensors", "pt") as file:
        categories = json.loads(file.metadata()["categories"])
        for site, owners in second["owners"].items():
            score_UC = file.get_tensor(site)
            for unit, owner in enumerate(owners):
                node = second["nodes"][owner]
                above = second["nodes"][node["parent"] or 0]
                group = node if node["parent"] in (None, 0) else above
                for c, category in enumerate(categories):
                    if category not in group["categories"]:
                        assert score_UC[unit, c] == 0
            assert bool((score_UC.sum(0) > 0).all())


def test_measuring_stops_when_the_strongest_categories_are_settled() -> None:
    config, tracker = toy_config(attribution={"rows": 400, "rows_at_once": 16, "settled": 0.8}), MemoryTracker()
    result = run(config, ToyTask(config), tracker=tracker)
    assert result.active_fraction["mean"] == pytest.approx(1 - 0.45, abs=0.03)
    notes = [e.note for e in tracker.events.values() if isinstance(e, Phase) and e.phase == "attribute" and e.note]
    assert len(notes) == 2
    for note in notes:
        found = re.fullmatch(r"rows measured of 1,600 at most: ([\d,]+) for split, ([\d,]+) for random", note)
        assert found is not None
        assert all(16 * 4 * 3 <= int(count.replace(",", "")) < 1600 for count in found.groups())


def test_a_pass_that_never_settles_measures_every_row_and_says_so() -> None:
    config, tracker = toy_config(attribution={"rows": 32, "rows_at_once": 16, "settled": 0.9999}), MemoryTracker()
    run(config, ToyTask(config), tracker=tracker)
    notes = [e.note for e in tracker.events.values() if isinstance(e, Phase) and e.phase == "attribute" and e.note]
    assert notes == ["rows measured of 128 at most: 128 for split, 128 for random"] * 2


def test_a_given_tree_is_followed_and_what_it_leaves_open_is_divided() -> None:
    config = toy_config(tree=[["a", "d"], ["b", "c"]])
    result = run(config, ToyTask(config))
    assert [child["name"] for child in result.tree["children"]] == ["a+d", "b+c"]
    assert [len(child["children"]) for child in result.tree["children"]] == [2, 2]
    partial = toy_config(tree=[["a", "d"]])
    assert "a+d" in [child["name"] for child in run(partial, ToyTask(partial)).tree["children"]]


def test_a_tree_with_strangers_is_refused_before_any_training() -> None:
    config, tracker = toy_config(tree=[["a", "z"], ["b", "c"]]), MemoryTracker()
    with pytest.raises(ValueError, match="tree: got 'z', which is no category of the data"):
        run(config, ToyTask(config), tracker=tracker)
    assert not tracker.events


def test_an_unrouted_category_keeps_to_the_core_and_loses_nothing_when_experts_are_removed(tmp_path: Path) -> None:
    partition = {"multiple": 2, "min_units": 2, "unrouted": ["b"]}
    first, second = toy_config().rounds
    config = toy_config(partition=partition, rounds=[first, second.model_copy(update={"separation": 0.35})])
    result = run(config, ToyTask(config), store=FolderStore(tmp_path, 2))
    (leaf,) = [child for child in result.tree["children"] if child["name"] == "b"]
    assert leaf["units"] == 0
    assert not leaf["children"]
    total = 2 * 32
    assert result.active_fraction["b"] == result.tree["units"] / total
    assert result.active_fraction["b"] == min(result.active_fraction.values())
    assert result.active_fraction["mean"] == pytest.approx(1 - 0.35, abs=0.03)
    assert set(result.own_other["b"].values()) == {0.0}
    assert all(other["b"] == 0.0 for other in result.own_other.values())


ROUTED = {
    "gradients": "parameters",
    "labelled": 0.5,
    "core": "frozen",
    "experts": [{"categories": ["a", "d"], "units": 0.25}, {"categories": ["b"], "units": 0.25}],
}


def test_gradients_routed_by_hand_make_the_split_model_an_arm_of_its_own_from_the_first_step() -> None:
    plain, routed = (toy_config(controls=["random", "told"], **more) for more in ({}, {"routing": ROUTED}))
    trackers = MemoryTracker(), MemoryTracker()
    results = [run(c, ToyTask(c), tracker=t) for c, t in zip((plain, routed), trackers, strict=True)]
    for twin in ("dense", "told"):
        assert results[0].test_loss[twin] == results[1].test_loss[twin]
    assert results[0].test_loss["split"] != results[1].test_loss["split"]
    seen = [{e.id: e.loss for e in t.events.values() if isinstance(e, Evaluated)} for t in trackers]
    assert seen[0]["evaluated/split/1/before_cut"] == seen[0]["evaluated/dense/1/before_cut"]
    assert seen[1]["evaluated/split/1/before_cut"] != seen[1]["evaluated/dense/1/before_cut"]
    assert seen[1]["evaluated/random/1/before_cut"] == seen[1]["evaluated/split/1/before_cut"]
    steps = [e for e in trackers[1].events.values() if isinstance(e, Step)]
    assert [e.step for e in steps if e.arm == "split"] == [e.step for e in steps if e.arm == "dense"]
    work = [e.work for e in steps]
    assert work == sorted(work)
    assert work[-1] == 1.0


@pytest.mark.parametrize(
    "routing",
    [
        {**ROUTED, "experts": [{"categories": ["a", "d"], "units": 0.25}, {"categories": ["b"], "fresh": 6}]},
        {**ROUTED, "experts": [{"categories": ["b"], "fresh": 6, "expand": {"encoder.*": 2}}]},
        {**ROUTED, "gradients": "both", "routes_after_cut": "soft", "experts": []},
    ],
)
def test_a_run_that_routes_gradients_resumes_to_the_same_bits(tmp_path: Path, routing: dict[str, object]) -> None:
    config = toy_config(routing=routing)
    calm = FolderStore(tmp_path / "calm", 2)
    wanted = outcome(run(config, ToyTask(config), store=calm))
    stormy, result = DyingStore(tmp_path / "stormy", 2), None
    while result is None:
        stormy.lives = 3
        with contextlib.suppress(KilledError):
            result = run(config, ToyTask(config), store=stormy)
    assert outcome(result) == wanted
    for arm, tensors in final(calm).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, final(stormy)[arm][name]), (arm, name)


@pytest.mark.usefixtures("heavy_tax")
def test_a_roll_back_takes_the_random_arm_to_where_the_routed_split_model_stood() -> None:
    first = {"train": 20, "recover": 10, "separation": 0.3}
    config = toy_config(
        routing=ROUTED, budget={"tax": 0.5}, rounds=[first, {"train": 0, "recover": 5, "separation": 0.4}]
    )
    tracker = MemoryTracker()
    run(config, ToyTask(config), tracker=tracker)
    seen = {e.id: e.loss for e in tracker.events.values() if isinstance(e, Evaluated)}
    for arm in ("split", "random"):
        assert seen[f"evaluated/{arm}/2/before_cut"] == seen["evaluated/split/1/before_cut"]


def test_fresh_units_are_the_split_models_alone_and_go_into_its_folder(tmp_path: Path) -> None:
    """Expand, route, ablate: the model without the expert is exported as any other."""
    routing = {"gradients": "parameters", "experts": [{"categories": ["a", "b"], "fresh": 10}]}
    config, store = toy_config(routing=routing, tree=[["a", "b"], ["c", "d"]]), FolderStore(tmp_path / "run", 2)
    result = run(config, ToyTask(config), store=store)
    tensors = final(store)
    assert {arm: len(tensors[arm]["parameter/decoder.up.weight"]) for arm in tensors} == {
        "dense": 32,
        "split": 42,
        "random": 42,
    }
    split = load_from_run(tmp_path / "run")
    assert split.partition.units("encoder.hidden") == 42
    found = row_losses(split, ToyTask(config), Solo(), config.evaluation, "test").by_category(ToyTask(config))
    assert found == pytest.approx(result.test_loss["split"])
    save_split(prune(split, without(split.partition, ["a", "b"])), tmp_path / "ablated", {})
    batch = next(iter(ToyTask(config).held_out_batches("test", 32, 128)))
    with torch.no_grad():
        less = load_split(tmp_path / "ablated")(batch.inputs, batch.categories)
        whole = split(batch.inputs, batch.categories)
    kept = batch.categories >= 2
    torch.testing.assert_close(less[kept], whole[kept])
    assert not torch.allclose(less[~kept], whole[~kept], atol=0.1)


def test_hard_routes_of_the_tree_with_every_label_known_are_what_a_split_model_does_anyway() -> None:
    plain = toy_config()
    routed = plain.model_copy(update={"routing": Routing(gradients="both")})  # which a recipe may not say by itself
    assert outcome(run(plain, ToyTask(plain))) == outcome(run(routed, ToyTask(routed)))


def test_off_route_units_stand_still_where_all_rows_are_routed_away_from_them() -> None:
    """Without weight decay, what no row's route holds keeps its first weights."""
    training = {**CONFIG["training"], "weight_decay": 0.0}
    experts = [{"categories": ["a", "b", "c", "d"], "units": 0.0}, {"categories": ["z"], "units": 0.5}]
    config = toy_config(routing={"gradients": "both", "experts": experts}, training=training)
    task = ToyTask(config)
    task.categories = (*"abcd", "z")
    state = State.fresh(config, task)
    before = {name: tensor.clone() for name, tensor in state.arms["split"].tensors().items()}
    train(state.arms["split"], task, Solo(), config.training, 5, 5, lambda *_: None)
    after = state.arms["split"].tensors()
    for name in ("parameter/encoder.up.weight", "parameter/decoder.up.bias"):
        assert torch.equal(after[name][16:], before[name][16:])
        assert not torch.equal(after[name][:16], before[name][:16])
    assert torch.equal(after["parameter/encoder.down.weight"][:, 16:], before["parameter/encoder.down.weight"][:, 16:])

"""What is told of a run, finished or not."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from moeify.events import Evaluated, Finished, Phase, RoundEnded, Started
from moeify.recipe.load import parse_recipe
from moeify.result import ModuleTest, Result
from pipelines import runs, show
from pipelines.journal import JournalTracker

RECIPE = """name: tiny
data: {kind: digits}
model: {kind: autoencoder}
training: {steps: 10}
rounds: [{train: 1, recover: 2, separation: 0.4}]
"""
CATEGORIES = ("python", "prose", "c")
KEYS = {
    "run",
    "status",
    "categories",
    "unit",
    "arms",
    "steps",
    "seconds",
    "tree",
    "active_fraction",
    "active_flops",
    "rounds",
    "stopped",
    "test_loss",
    "bits_per_byte",
    "accuracy",
    "tax",
    "tax_error",
    "tax_error_by_category",
    "tax_random",
    "tax_told",
    "error_over",
    "own_other",
    "own_other_error",
    "modules",
}


def leaf(name: str, units: int) -> dict[str, Any]:
    return {"name": name, "categories": [name], "units": units, "children": []}


TREE = {
    "name": "core",
    "categories": ["python", "c", "prose"],
    "units": 40,
    "children": [
        {
            "name": "python+c",
            "categories": ["python", "c"],
            "units": 20,
            "children": [leaf("python", 10), leaf("c", 10)],
        },
        leaf("prose", 20),
    ],
}
"""By hand: 100 units; python runs 40 + 20 + 10, c as many, prose 40 + 20."""

STARTED = Started(
    id="started",
    time=0.0,
    categories=CATEGORIES,
    unit="token",
    steps=10,
    parameters=1000,
    sites={"hidden": 100},
    rounds=2,
)


def ended(number: int, accepted: bool, tree: dict[str, Any]) -> RoundEnded:
    return RoundEnded(
        id=f"round/{number}",
        time=1.0,
        round=number,
        step=5,
        separation=0.33,
        asked=0.35,
        tax=0.02,
        tax_error=0.004,
        tax_by_category=dict.fromkeys(CATEGORIES, 0.02),
        tax_random=0.05,
        predicted=0.01,
        predicted_random=0.1,
        accepted=accepted,
        seconds=1.0,
        tree=tree,
    )


RESULT = Result(
    categories=CATEGORIES,
    unit="token",
    tree=TREE,
    active_fraction={"python": 0.7, "c": 0.7, "prose": 0.6, "mean": 2 / 3},
    rounds=(ended(1, True, TREE),),
    test_loss={
        "dense": {"python": 3.0, "prose": 4.0, "c": 2.0},
        "split": {"python": 3.1, "prose": 4.1, "c": 2.1},
        "random": {"python": 3.3, "prose": 4.3, "c": float("inf")},
    },
    bits_per_byte={arm: dict.fromkeys(CATEGORIES, 1.5) for arm in ("dense", "split", "random")},
    own_other={c: {e: 0.5 if c == e else 0.01 for e in ("python+c", *CATEGORIES)} for c in CATEGORIES},
    tax=dict.fromkeys((*CATEGORIES, "mean"), 0.1),
    tax_error=0.003,
    tax_random={"python": 0.3, "prose": 0.3, "c": float("inf"), "mean": float("inf")},
    steps=10,
    seconds=75.0,
)


@pytest.fixture
def folder(tmp_path: Path) -> runs.RunFolder:
    return runs.create(parse_recipe(RECIPE, where="tiny"), RECIPE, tmp_path)


def finish(folder: runs.RunFolder, result: Result = RESULT) -> None:
    with JournalTracker(folder.journal) as journal:
        journal.emit(STARTED)
        journal.emit(Finished(id="finished", time=2.0, seconds=75.0))
    folder.result.write_text(result.model_dump_json(), encoding="utf-8")


def printed(folder: runs.RunFolder) -> str:
    stream = io.StringIO()
    show.print_run(folder, stream)
    return stream.getvalue()


def test_active_fractions_equal_those_worked_out_by_hand() -> None:
    assert show.active_fraction(TREE) == pytest.approx({"python": 0.7, "c": 0.7, "prose": 0.6, "mean": 2 / 3})


def test_a_result_survives_its_file_even_where_losses_are_not_finite(folder: runs.RunFolder) -> None:
    assert Result.model_validate_json(RESULT.model_dump_json()) == RESULT


def test_a_finished_run_is_told_by_its_result_under_stable_keys(folder: runs.RunFolder) -> None:
    finish(folder)
    known = json.loads(show.to_json(show.summary(folder)))
    assert set(known) == KEYS
    assert known["run"] == folder.id
    assert known["status"] == "finished"
    assert known["tree"] == TREE
    assert known["active_fraction"]["mean"] == pytest.approx(2 / 3)
    assert known["rounds"] == [
        {
            "round": 1,
            "step": 5,
            "separation": 0.33,
            "asked": 0.35,
            "tax": 0.02,
            "tax_error": 0.004,
            "tax_by_category": dict.fromkeys(CATEGORIES, 0.02),
            "tax_error_by_category": {},
            "tax_before": None,
            "tax_cut": None,
            "expected": None,
            "budget_used": None,
            "budget_error": None,
            "tax_random": 0.05,
            "tax_told": None,
            "predicted": 0.01,
            "predicted_random": 0.1,
            "gap": None,
            "accepted": True,
            "outcome": "kept",
        }
    ]
    assert known["test_loss"]["split"] == {"python": 3.1, "prose": 4.1, "c": 2.1}
    assert known["test_loss"]["random"]["c"] is None
    assert known["tax_error"] == 0.003
    assert known["tax_random"]["mean"] is None
    assert known["own_other"]["c"]["c"] == 0.5


def test_an_unfinished_run_is_told_as_far_as_it_came(folder: runs.RunFolder) -> None:
    assert show.summary(folder) == {
        **dict.fromkeys(KEYS),
        "run": folder.id,
        "status": "interrupted",
        "rounds": [],
    }
    assert "Nothing was reported yet." in printed(folder)
    with JournalTracker(folder.journal) as journal:
        journal.emit(STARTED)
        known = show.summary(folder)
        assert known["tree"] == {"name": "core", "categories": list(CATEGORIES), "units": 100, "children": []}
        assert known["active_fraction"] == {"python": 1.0, "prose": 1.0, "c": 1.0, "mean": 1.0}
        journal.emit(ended(1, True, TREE))
        journal.emit(ended(2, False, {**TREE, "units": 1}))
        for arm, rise in (("dense", 0.0), ("split", 0.25)):
            loss = dict.fromkeys(CATEGORIES, 3.0 + rise)
            journal.emit(
                Evaluated(id=arm, time=1.0, arm=arm, round=2, step=10, moment="test", split="test", loss=loss)  # type: ignore[arg-type]
            )
        journal.emit(Phase(id="phase", time=2.0, phase="test", round=2))
    known = show.summary(folder)
    assert set(known) == KEYS
    assert known["tree"] == TREE
    assert [row["accepted"] for row in known["rounds"]] == [True, False]
    assert known["tax"] == {"python": 0.25, "prose": 0.25, "c": 0.25, "mean": 0.25}
    assert known["test_loss"]["random"] is None
    assert known["tax_random"] is known["tax_told"] is known["own_other"] is None
    text = printed(folder)
    assert "came to: round 2, test" in text
    assert f"go on with: moeify resume {folder.id}" in text
    assert "rolled back" in text


def test_the_tables_hold_what_a_person_looks_for(folder: runs.RunFolder) -> None:
    finish(folder)
    lines = [" ".join(line.split()) for line in printed(folder).splitlines()]
    for line in (
        f"{folder.id} · finished · 10 steps an arm · 1:15",
        "core (all) 40 40.0%",
        "python+c 20 20.0%",
        "prose 20 20.0% 60.0%",
        "1 33.0% +0.0200 0.0078 +0.0500 0.010 0.10 kept",
        "mean tax ± 0.0059: 95 % interval over the rows, which both read",
        "prose 60.0% 4.0000 4.1000 4.3000 +0.1000 +0.3000",
        "mean 66.7% 3.0000 3.1000 - +0.1000 -",
        "mean 1.5000 1.5000 1.5000",
        "prose +0.0100 +0.0100 +0.5000",
    ):
        assert line in lines
    assert "\x1b" not in printed(folder)


def test_tables_fit_80_columns_however_many_experts_there_are(
    folder: runs.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = tuple(f"category-{number}" for number in range(10))
    tree = {"name": "core", "categories": list(names), "units": 5, "children": [leaf(name, 1) for name in names]}
    result = RESULT.model_copy(
        update={
            "categories": names,
            "tree": tree,
            "active_fraction": show.active_fraction(tree),
            "test_loss": {arm: dict.fromkeys(names, 3.0) for arm in ("dense", "split", "random")},
            "bits_per_byte": None,
            "own_other": {name: dict.fromkeys(names, 0.01) for name in names},
            "tax": dict.fromkeys((*names, "mean"), 0.01),
            "tax_random": dict.fromkeys((*names, "mean"), 0.01),
        }
    )
    finish(folder, result)
    text = printed(folder)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("category-9") >= 3
    assert "bits" not in text
    assert text.count("+0.0100") == 10 * 10 + 2 * 11


def test_accuracies_stand_beside_losses(folder: runs.RunFolder) -> None:
    shares = {"python": 0.5, "prose": 0.25, "c": 1.0, "mean": 0.583}
    finish(folder, RESULT.model_copy(update={"accuracy": {"dense": shares, "split": shares}}))
    assert show.summary(folder)["accuracy"]["split"] == shares
    (_, table) = printed(folder).split("Test accuracy")
    assert [line.split()[:3] for line in table.splitlines()[2:4]] == [
        ["python", "50.0%", "50.0%"],
        ["prose", "25.0%", "25.0%"],
    ]


TOLD = RESULT.model_copy(
    update={
        "test_loss": {"dense": {}, "told": dict.fromkeys(CATEGORIES, 12.75), **RESULT.test_loss},
        "bits_per_byte": None,
        "rounds": (ended(1, True, TREE).model_copy(update={"tax_told": 0.03, "step": 1200}), ended(2, False, TREE)),
        "tax_told": dict.fromkeys((*CATEGORIES, "mean"), -0.25),
    }
)


def test_the_told_twins_columns_stand_where_there_is_one_and_fit_80_columns(
    folder: runs.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    finish(folder)
    assert "told" not in printed(folder)
    deep = {arm: {c: nats + 10 for c, nats in loss.items()} for arm, loss in TOLD.test_loss.items()}
    finish(folder, TOLD.model_copy(update={"test_loss": deep}))
    text = printed(folder)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "category active dense told split random tax tax told",
        "prose 60.0% 14.0000 22.7500 14.1000 14.3000 +0.1000 +0.3000 -0.2500",
        "1 33.0% +0.0200 0.0078 +0.0500 +0.0300 0.010 0.10 kept",
        "over told: the split model above the told twin, which is given the category too",
    ):
        assert line in lines
    known = json.loads(show.to_json(show.summary(folder)))
    assert set(known) == KEYS
    assert known["arms"] == ["dense", "told", "split", "random"]
    assert known["tax_told"]["mean"] == -0.25
    assert [row["tax_told"] for row in known["rounds"]] == [0.03, None]


def test_a_budget_shows_what_was_expected_and_used_and_why_the_run_stopped(
    folder: runs.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    kept, undone = (
        ended(n, n == 1, TREE).model_copy(update={"expected": 0.01, "budget_used": 0.9 * n}) for n in (1, 2)
    )
    uncut = ended(3, True, TREE).model_copy(update={"uncut": "no step left", "budget_used": 0.2, "predicted": 0.0})
    finish(folder, TOLD.model_copy(update={"rounds": (kept, undone, uncut), "stopped": "no step left"}))
    text = printed(folder)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].endswith("1:15 · no step left")
    assert "1 33.0% +0.0200 0.0078 +0.0500 - +0.0100 90.0% kept" in lines
    assert "2 33.0% +0.0200 0.0078 +0.0500 - +0.0100 180.0% rolled back" in lines
    assert "3 33.0% +0.0200 0.0078 +0.0500 - - 20.0% not cut" in lines
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert show.listing([folder])[0]["rounds"] == 1


def test_what_was_not_controlled_for_is_not_shown(folder: runs.RunFolder) -> None:
    loss = {arm: RESULT.test_loss[arm] for arm in ("dense", "split")}
    bare = ended(1, True, TREE).model_copy(update={"tax_random": None, "predicted_random": None})
    update = {"test_loss": loss, "bits_per_byte": loss, "tax_random": None, "rounds": (bare,)}
    finish(folder, RESULT.model_copy(update=update))
    text = printed(folder)
    assert "random" not in text
    assert "told" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "prose 60.0% 4.0000 4.1000 +0.1000" in lines
    assert "1 33.0% +0.0200 0.0078 0.010 kept" in lines


def test_an_unfinished_run_with_a_told_twin_is_held_against_it(folder: runs.RunFolder) -> None:
    with JournalTracker(folder.journal) as journal:
        journal.emit(STARTED.model_copy(update={"arms": ("dense", "told", "split")}))
        for arm, nats in (("dense", 3.0), ("told", 2.5), ("split", 3.25)):
            loss = dict.fromkeys(CATEGORIES, nats)
            journal.emit(
                Evaluated(id=arm, time=1.0, arm=arm, round=2, step=10, moment="test", split="test", loss=loss)  # type: ignore[arg-type]
            )
    known = show.summary(folder)
    assert list(known["test_loss"]) == known["arms"] == ["dense", "told", "split"]
    assert known["tax_told"] == dict.fromkeys((*CATEGORIES, "mean"), 0.75)
    assert known["tax_random"] is None


def test_files_from_before_recipes_chose_their_controls_are_read(folder: runs.RunFolder) -> None:
    finish(folder)
    old = json.loads(folder.result.read_text())
    del old["tax_told"], old["error_over"]
    for row in old["rounds"]:
        del row["tax_told"]
    folder.result.write_text(json.dumps(old))
    lines = [json.loads(line) for line in folder.journal.read_text().splitlines()]
    del lines[0]["arms"]
    folder.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = show.summary(folder)
    assert known["arms"] == ["dense", "split", "random"]
    assert known["tax_told"] is None
    folder.result.unlink()
    assert show.summary(folder)["arms"] == ["dense", "split", "random"]


def nested(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {**tree, "name": name}


def test_experts_that_are_not_named_by_their_categories_say_whom_they_serve(folder: runs.RunFolder) -> None:
    group, prose = TREE["children"]
    finish(folder, RESULT.model_copy(update={"tree": {**TREE, "children": [nested(group, "systems"), prose]}}))
    lines = [" ".join(line.split()) for line in printed(folder).splitlines()]
    for line in ("core all 40 40.0%", "systems python, c 20 20.0%", "python python 10 10.0% 70.0%"):
        assert line in lines


def test_what_cannot_change_is_a_dot_and_what_happens_to_be_zero_is_not(folder: runs.RunFolder) -> None:
    matrix = {c: dict.fromkeys(("python+c", *CATEGORIES), 0.0) for c in CATEGORIES}
    matrix["python"]["prose"] = 1e-9  # off the route and not exactly zero: told as it is
    finish(folder, RESULT.model_copy(update={"own_other": matrix}))
    lines = [" ".join(line.split()) for line in printed(folder).splitlines()]
    place = lines.index("Rise of test loss (nats) without an expert and all below it")
    assert lines[place + 1 :] == [
        "without python c prose",
        "python+c +0.0000 +0.0000 ·",
        "python +0.0000 · ·",
        "c · +0.0000 ·",
        "prose +0.0000 · +0.0000",
        "·: exactly 0, the category never runs that expert",
    ]


def test_verdicts_on_experts_stand_in_the_trees_order_and_fit_80_columns(
    folder: runs.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    known = {"own": 0.5, "own_low": 0.4, "own_high": 12.25, "other": 0.0}
    modules = (
        ModuleTest(expert="prose", **known, drawn_own=(0.6,) * 19, drawn_other=(0.2,) * 19),
        ModuleTest(expert="python+c", **known, drawn_own=(0.1, float("inf")), drawn_other=(0.2, 0.2)),
    )
    finish(folder, RESULT.model_copy(update={"modules": modules}))
    lines = printed(folder).splitlines()
    place = lines.index("Clean modules (rise of test loss, nats)")
    assert [line.split() for line in lines[place + 1 : place + 4]] == [
        ["without", "own", "at", "least", "leak", "random", "own", "leak", "p", "verdict"],
        ["python+c", "+0.5000", "+0.4000", "0%", "-", "-", "0.67", "too", "few", "draws"],
        ["prose", "+0.5000", "+0.4000", "0%", "+0.6000", "33%", "0.05", "clean"],
    ]
    assert max(map(len, lines)) <= 80
    told = show.summary(folder)["modules"]
    assert [(each["expert"], each["verdict"]) for each in told] == [("prose", "clean"), ("python+c", "too few draws")]


def test_a_wide_matrix_is_divided_by_subtree_and_leaves_out_whom_a_part_does_not_concern(
    folder: runs.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "36")
    experts = ("python+c", *CATEGORIES)
    matrix = {c: {expert: 0.5 if c in expert.split("+") else 0.0 for expert in experts} for c in CATEGORIES}
    finish(folder, RESULT.model_copy(update={"own_other": matrix}))
    first, second = (part.splitlines() for part in printed(folder).split(" below it ")[1:])
    assert [line.split() for line in first[1:5]] == [
        ["without", "python", "c"],
        ["python+c", "+0.5000", "+0.5000"],
        ["python", "+0.5000", "·"],
        ["c", "·", "+0.5000"],
    ]
    assert [line.split() for line in second[1:3]] == [["without", "prose"], ["prose", "+0.5000"]]


def test_a_damaged_result_is_named_in_one_line(folder: runs.RunFolder) -> None:
    folder.result.write_text('{"unit": "token"}')
    with pytest.raises(ValueError, match=r"result.json is damaged \(categories: Field required\)"):
        show.summary(folder)
    folder.result.write_text(RESULT.model_copy(update={"tree": {"name": "core", "children": 3}}).model_dump_json())
    with pytest.raises(ValueError, match=r"result.json is damaged \(tree"):
        show.summary(folder)
    folder.result.write_text(RESULT.model_copy(update={"active_fraction": {"c": 0.5}}).model_dump_json())
    with pytest.raises(ValueError, match=r"result.json is damaged .*active_fraction lacks python, prose"):
        show.summary(folder)
    (row,) = show.listing([folder])
    assert row["rounds"] is None
    assert "damaged" in row["problem"]
    stream = io.StringIO()
    show.print_runs([folder], stream)
    assert "damaged" in stream.getvalue()


def test_the_list_of_runs_tells_each_in_a_line(folder: runs.RunFolder) -> None:
    finish(folder)
    (row,) = show.listing([folder])
    assert row == {
        "run": folder.id,
        "status": "finished",
        "path": str(folder.path),
        "rounds": 1,
        "active_fraction": pytest.approx(2 / 3),
        "tax": 0.1,
        "problem": None,
    }
    stream = io.StringIO()
    show.print_runs([folder], stream)
    assert stream.getvalue().splitlines()[1].split() == [folder.id, "finished", "1", "66.7%", "+0.1000"]

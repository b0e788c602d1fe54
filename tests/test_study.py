"""Studies: what their arms are, what their tables say, and how they are run and kept; Ray is test_compare's matter."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from rich.console import Console

from attribution.heatmap import figure
from moeify.comparison import Interval, mean_interval
from moeify.models.build import build_llama
from moeify.recipe.model import LlamaModel
from moeify.routed.gradients import GradientRouter
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.tasks.digits import DigitsTask
from pipelines import study, study_plot, study_report, study_tracking
from pipelines.cli import main
from pipelines.kept_jobs import JobsFolder
from pipelines.pool import Broken
from pipelines.runs import RunBusyError
from pipelines.studies import access_control, edge_choices, whole_blocks
from pipelines.studies import study as study_of
from pipelines.studies.catalogue import QUESTIONS, find_study
from pipelines.studies.study import Arm, ArmJob, Column, Measures, Size, Study, changed, jobs, shipped_recipe, table
from pipelines.studies.subsets import Subset
from pipelines.studies.training import without_rows
from pipelines.study import ArmOrder, Done, EndedArm, Progress, progress_line, run_arm

DIGITS = shipped_recipe("digits")


def nothing(_: object) -> Measures:
    return {}


STUDY = Study(
    lambda _: (Arm("plain", DIGITS, nothing), Arm("other", DIGITS, nothing)),
    columns=(Column("loss", "loss, nats"), Column("active", "active", against=False)),
    note="loss: on test data.",
    reference="plain",
)
FOUND: dict[ArmJob, Measures] = {
    ArmJob("plain", 0): {"loss": 2.0},
    ArmJob("plain", 1): {"loss": 3.0},
    ArmJob("other", 0): {"loss": 2.1, "active": 0.5},
    ArmJob("other", 1): {"loss": 3.3, "active": 0.5},
}


# --- what studies are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("size", ["quick", "full", "large"])
def test_every_study_has_arms_of_their_own_names_and_its_reference_among_them(name: str, size: Size) -> None:
    found = find_study(name)
    names = [arm.name for arm in found.arms(size)]
    assert len({str(job) for job in jobs(found.arms(size), [0])}) == len(names)
    held = {each: found.held_against(each) for each in names}
    assert {each for each in held.values() if each} <= {each for each, other in held.items() if other is None}
    assert found.reference is None or any(held.values())
    assert all(arm.work.__module__.startswith("pipelines.studies.") for arm in found.arms(size))
    assert QUESTIONS[name].endswith("?")


def test_a_study_that_there_is_not_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"got 'edge_choice', wanted one of access_control, .*; nearest: edge_choices"):
        find_study("edge_choice")


def test_a_shipped_recipe_is_changed_section_by_section_and_a_new_kind_replaces_the_old() -> None:
    found = shipped_recipe("text", training={"steps": 700}, partition={"owners": {"kind": "random"}})
    assert (found.training.steps, found.training.rows) == (700, 16)
    assert (found.partition.owners.kind, found.partition.min_units) == ("random", 8)
    assert found.cluster.workers == 1
    images = {"kind": "images", "source": "mnist", "objective": "reconstruct", "categories": {"a": [0], "b": [1]}}
    assert changed(DIGITS, data=images).data.kind == "images"


# --- what they say ----------------------------------------------------------------------------------------


def test_what_is_held_against_the_reference_is_held_against_it_seed_by_seed() -> None:
    plain, other = table(STUDY, FOUND)
    assert plain.cells["loss"].above is None
    assert "active" not in plain.cells
    assert other.cells["loss"].value == mean_interval([2.1, 3.3])
    above = other.cells["loss"].above
    assert above is not None
    assert above.mean == pytest.approx(0.2)
    assert above.half == pytest.approx(mean_interval([0.1, 0.3]).half)  # not that of the losses, which is 7
    assert other.cells["active"].above is None
    assert (plain.seeds, other.seeds) == (2, 2)


def test_a_seed_whose_reference_failed_is_held_against_nothing() -> None:
    _, other = table(STUDY, {job: each for job, each in FOUND.items() if job != ArmJob("plain", 1)})
    assert other.seeds == 2
    above = other.cells["loss"].above
    assert above is not None
    assert above.mean == pytest.approx(0.1)
    assert math.isnan(above.half)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Progress:
    monkeypatch.setitem(QUESTIONS, "fake", "Is it so?")  # type: ignore[arg-type]
    progress = Progress("fake", "full", STUDY, tuple(FOUND))
    for job, measures in FOUND.items():
        done = Done(arm=job.arm, seed=job.seed, seconds=30.0, measures={**measures, "loss/a+b/c": 1.0})
        progress.ended[job] = EndedArm(done, Path(f"/results/{job}.json"), before=False)
    return progress


def test_the_summary_the_table_and_the_picture(fake: Progress, tmp_path: Path) -> None:
    broken = ArmJob("other", 1)
    fake.ended[broken] = Broken("no memory")
    folder = JobsFolder(tmp_path, "study")
    study_report.write(fake, folder)
    known = json.loads(folder.summary.read_text())
    assert (known["question"], known["command"], known["seeds"]) == ("Is it so?", "moeify study fake --seeds 2", [0, 1])
    assert [run["status"] for run in known["runs"]] == ["finished", "finished", "finished", "failed"]
    assert known["rows"][0]["measures"]["loss"]["value"]["mean"] == 2.5
    assert known["rows"][1]["measures"]["loss"]["above"] == {"mean": pytest.approx(0.1), "low": None, "high": None}
    assert folder.picture.read_bytes().startswith(b"\x89PNG")
    text = study_report.markdown(fake)
    assert "| other | 1 | 2.100 | 0.500 |" in text
    assert "**Above plain, seed by seed**" in text
    assert "failed: other, seed 1: no memory" in text


def test_a_study_of_pairs_is_drawn_as_points(fake: Progress, tmp_path: Path) -> None:
    found = find_study("worth_separating")
    measures = {"affinity/a-b": 0.5, "tax/a-b": 0.1, "affinity/a-c": -0.5, "tax/a-c": 0.0, "rank_affinity": 1.0}
    fake.study = found
    for job, ended in fake.ended.items():
        assert isinstance(ended, EndedArm)
        done = ended.done.model_copy(update={"measures": measures})
        fake.ended[job] = EndedArm(done, ended.path, before=False)
    study_report.write(fake, JobsFolder(tmp_path, "study"))
    assert JobsFolder(tmp_path, "study").picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_nothing(fake: Progress, tmp_path: Path) -> None:
    folder = JobsFolder(tmp_path, "study")
    folder.picture.touch()  # of an earlier command
    fake.ended.clear()
    study_report.write(fake, folder)
    assert not folder.picture.exists()
    assert {run["status"] for run in json.loads(folder.summary.read_text())["runs"]} == {"missing"}


def test_mlflow_is_told_of_every_job_in_names_that_it_takes(fake: Progress) -> None:
    fake.ended[ArmJob("other", 1)] = Broken("no memory")
    told = list(study_tracking._ended(fake))
    assert told[0].points == {"loss": 2.0, "loss/a.b/c": 1.0}
    assert (told[0].name, told[0].params) == ("plain, seed 0", {"arm": "plain", "seed": "0"})
    assert (told[3].problem, told[3].result) == ("no memory", None)


def test_a_line_says_how_an_arm_ended_and_what_remains(fake: Progress) -> None:
    ended, fake.ended = fake.ended, {}
    first, second = fake.jobs[:2]
    fake.ended[first] = ended[first]
    assert progress_line(fake, first, cores=2) == "plain, seed 0: 0:30 · 1/4, about 0:45 left"
    fake.ended[second] = Broken("no memory")
    assert progress_line(fake, second, cores=2) == "plain, seed 1: failed: no memory · 2/4"


# --- how they are run -------------------------------------------------------------------------------------


def test_what_was_run_before_is_taken_and_what_is_damaged_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    folder = study.open_folder("spurious_cue", "quick", tmp_path)
    assert folder.path == tmp_path / "studies" / "spurious_cue-quick"
    asked = jobs(find_study("spurious_cue").arms("quick"), [3])
    first = study.run_study("spurious_cue", "quick", asked, folder, local=True)
    assert not first.broken
    assert all(0.0 <= each["turned"] <= 1.0 for each in first.measures.values())
    files = {path: path.stat().st_mtime_ns for path in folder.results.iterdir()}
    assert len(files) == len(asked)
    damaged = first.ended[asked[0]]
    assert isinstance(damaged, EndedArm)
    damaged.path.write_text("{")
    again = study.run_study("spurious_cue", "quick", asked, folder, local=True)
    assert again.measures == first.measures
    assert {path for path in folder.results.iterdir() if path.stat().st_mtime_ns != files[path]} == {damaged.path}


def test_measures_are_kept_by_recipe_seed_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int) -> ArmOrder:
        job = ArmJob("as it comes", seed)
        return ArmOrder(study="spurious_cue", size="quick", job=job, results=tmp_path, results_url=None, cache=tmp_path)

    one = run_arm(order(0))
    assert run_arm(order(1)).path != one.path
    monkeypatch.setattr(study, "code", lambda: "other code")
    assert run_arm(order(0)).path != one.path


def test_a_study_that_another_process_drives_is_refused(tmp_path: Path) -> None:
    folder = study.open_folder("spurious_cue", "quick", tmp_path)
    with FileLock(folder.lock), pytest.raises(RunBusyError, match="study spurious_cue-quick is driven by another"):
        study.run_study("spurious_cue", "quick", (), folder)


# --- the command ------------------------------------------------------------------------------------------


def test_without_a_name_every_study_is_listed_with_its_question() -> None:
    done = CliRunner().invoke(main, ["study"])
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert all(name in said for name in QUESTIONS)
    assert json.loads(CliRunner().invoke(main, ["study", "--json"]).stdout) == dict(QUESTIONS)


def test_the_command_asks_for_the_studys_own_seeds_and_ends_with_its_table(
    fake: Progress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, Size, tuple[ArmJob, ...]]] = []

    def run(
        name: str, size: Size, jobs: tuple[ArmJob, ...], folder: JobsFolder, heard: study.Heard, *, local: bool
    ) -> Progress:
        asked.append((name, size, jobs))
        heard(fake, fake.jobs[0], 2)
        return fake

    class Tracked:
        where_to_look = "moeify ui"

        def __init__(self, *_: object) -> None: ...

        def tell(self, _: Progress) -> None: ...

        def finish(self, _: Progress) -> None: ...

        def stop(self) -> None: ...

    monkeypatch.setattr(study, "run_study", run)
    monkeypatch.setattr(study_tracking, "StudyTracker", Tracked)
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path))
    done = CliRunner().invoke(main, ["study", "spurious_cue"])
    assert done.exit_code == 0, done.output
    assert "Above plain, seed by seed" in done.stdout
    assert "plain, seed 0: 0:30" in done.stderr
    assert json.loads(CliRunner().invoke(main, ["study", "spurious_cue", "--quick", "--json"]).stdout)["rows"]
    fake.ended[fake.jobs[0]] = Broken("no memory")
    assert CliRunner().invoke(main, ["study", "spurious_cue", "--seeds", "1"]).exit_code == 1
    assert [(size, {job.seed for job in each}) for _, size, each in asked] == [
        ("full", set(range(5))),
        ("quick", set(range(5))),
        ("full", {0}),
    ]

    def stop(*_: object, local: bool) -> Progress:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_study", stop)
    done = CliRunner().invoke(main, ["study", "spurious_cue"])
    assert done.exit_code == 130
    assert done.stderr.endswith("moeify: stopped; go on with the same command\n")


@pytest.mark.parametrize(("arguments", "said"), [(("nowhere",), "study: got 'nowhere'"), (("a", "--seeds", "0"), "0")])
def test_mistakes_are_told_in_a_line(arguments: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(main, ["study", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr


# --- what arms stand on -----------------------------------------------------------------------------------


def test_what_serves_no_permitted_category_is_superfluous() -> None:
    tree = ExpertTree.undivided("abcd").split({0: ["ab", "cd"]})
    tree = tree.split({tree.index("a+b"): ["a", "b"]})
    task = DigitsTask(DIGITS)

    class Model(SplitModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        partition = Partition(tree, {"x": (1,) * len(tree.nodes)})  # type: ignore[assignment]

    assert task.categories
    model = Model()
    assert access_control.superfluous(model, "a") == ["b", "c+d"]
    assert access_control.superfluous(model, "cd") == ["a+b", "a", "b"]
    assert access_control.superfluous(model, "abcd") == []


def test_a_sample_of_sets_is_averaged_over_what_it_permits_and_over_the_rest() -> None:
    losses = {each: {c: 1.0 if c in each else 5.0 for c in access_control.CATEGORIES} for each in access_control.SAMPLE}
    found = access_control._measures(losses, trainings=1.0)
    assert (found["permitted"], found["others"]) == (1.0, 5.0)
    assert found["loss/python/web"] == 5.0


def test_the_units_that_are_zeroed_are_those_that_gradients_were_routed_to() -> None:
    recipe = edge_choices.arms("quick")[-1].config
    model = SplitModel(DigitsTask(DIGITS).build(), edge_choices.CATEGORIES)
    router = GradientRouter(recipe.routing, model.categories, model.space.readers, seed=0)
    experts = edge_choices._experts(model)
    assert edge_choices._partition(model, experts).widths == router._given
    for site, widths in router._given.items():
        mine = torch.cat([units[site] for units in experts.values()])
        assert mine.tolist() == list(range(widths[0], sum(widths)))


def test_filtered_rows_are_those_of_the_whole_step_without_some() -> None:
    task = DigitsTask(DIGITS)
    whole, some = task.train_batch(3), without_rows(task, ["2", "7"]).train_batch(3)
    kept = (whole.categories == 2) | (whole.categories == 7)
    assert torch.equal(some.inputs, whole.inputs[kept])
    assert torch.equal(some.categories, whole.categories[kept])


def test_a_subset_numbers_its_categories_anew_and_goes_on_with_the_trained_network() -> None:
    task = DigitsTask(DIGITS)
    network = task.build()
    pair = Subset(task, ["7", "2"], network, skipped=5)
    batch, whole = pair.train_batch(1), task.train_batch(6)
    assert batch.categories.tolist() == sorted(batch.categories.tolist())
    assert torch.equal(batch.inputs[batch.categories == 0], whole.inputs[whole.categories == 7])
    assert torch.equal(batch.inputs[batch.categories == 1], whole.inputs[whole.categories == 2])
    held = list(pair.held_out_batches("test", 20, 30))
    assert sum(len(each.categories) for each in held) == 40
    built = pair.build()
    assert built is not network
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), network.parameters(), strict=True))


# --- documents --------------------------------------------------------------------------------------------


def test_the_document_names_every_study_and_its_example_is_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "studies.md").read_text(encoding="utf-8")
    assert [name for name in QUESTIONS if f"| `{name}` |" not in text] == []
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made: dict[str, Any] = {}
    exec(compile(code, "docs/studies.md", "exec"), made)
    assert [arm.name for arm in made["STUDY"].arms("full")] == ["by attribution", "at random"]


def test_kept_results_are_those_that_the_results_page_speaks_of() -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    page = (folder / "RESULTS.md").read_text(encoding="utf-8")
    for path in (folder / "results").glob("*.json"):
        known = json.loads(path.read_text(encoding="utf-8"))
        assert known["study"] == path.stem
        assert known["question"] == QUESTIONS[path.stem]
        assert f"`{known['command']}`" in page
        assert "path" not in known


def test_blocks_by_hand_are_one_for_each_category_and_run_with_the_shared_one() -> None:
    recipe = whole_blocks.arms("quick")[1].config
    assert isinstance(recipe.model, LlamaModel)
    model = SplitModel(build_llama(recipe.model, vocabulary=300, length=8, end=0, seed=0), edge_choices.CATEGORIES)
    partition = whole_blocks.by_hand(model)
    first, *others = model.space.readers
    for place, category in enumerate(edge_choices.CATEGORIES):
        assert partition.active(first.name, category).all()
        active = [int(partition.active(site.name, category).sum()) for site in others]
        assert active == [128 if place == here else 8 for here in range(4)]
    assert {round(each, 4) for each in partition.active_fraction.values()} == {0.4375}


def test_arms_are_held_against_the_reference_of_their_own_group() -> None:
    twin, hard = {"m": 1.0}, {"m": 1.5}
    losses = {"a: twin": twin, "a: hard": hard, "b: twin": {"m": 9.0}, "b: hard": {"m": 7.0}}
    found = {ArmJob(arm, 0): measures for arm, measures in losses.items()}
    known = Study(lambda _: (), (Column("m", "m"),), "", reference="twin")
    above = {row.arm: row.cells["m"].above for row in table(known, found)}
    assert {arm: each and each.mean for arm, each in above.items()} == {
        "a: twin": None,
        "a: hard": 0.5,
        "b: twin": None,
        "b: hard": -2.0,
    }


@pytest.mark.parametrize(("largest", "scale"), [(9.0, "linear"), (9e6, "log")])
def test_an_arm_that_is_far_off_does_not_put_the_others_on_one_spot(largest: float, scale: str) -> None:
    means = {"a": 4.0, "b": 5.0, "c": largest}
    rows = [study_of.Row(arm, 3, {"m": study_of.Cell(Interval(mean, 2 * mean), None)}) for arm, mean in means.items()]
    axis = figure(4.0, 2.0).subplots()
    study_plot._panel(axis, Column("m", "m"), rows, [])
    assert axis.get_xscale() == scale


def test_a_table_that_is_too_wide_becomes_several_and_names_stay_whole() -> None:
    console = Console(file=io.StringIO(), width=60)
    head, rows = ["arm", *("abcdef")], [["a name of some words", *["3.553 ±0.001"] * 6], ["other", *["1"] * 6]]
    tables = list(study_report._fitting(console, head, rows))
    assert [[column.header for column in each.columns] for each in tables] == [
        ["arm", "a", "b"],
        ["arm", "c", "d"],
        ["arm", "e", "f"],
    ]
    for each in tables:
        console.print(each)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sum(line.startswith("a name of some words ") for line in lines) == 3
    assert max(map(len, lines)) <= 60

"""The headline: what a person reads first must follow from the figures and from nothing else."""

from pathlib import Path
from typing import Any

import pytest
from fake_runs import CATEGORIES, fake_run, finish, story, tell

from moeify.events import Phase
from moeify.recipe.arms import Control
from moeify.result import Result
from pipelines.report.recorded import Recorded
from pipelines.report.verdict import Gap, gaps, headline
from pipelines.runs import RunFolder

BOTH: tuple[Control, ...] = ("random", "told")


def finished(home: Path, controls: tuple[Control, ...] = BOTH, **changes: Any) -> Recorded:
    folder = fake_run(home)
    tell(folder, story(controls))
    finish(folder, controls)
    result = Result.model_validate_json(folder.result.read_bytes())
    folder.result.write_text(result.model_copy(update=changes).model_dump_json())
    return Recorded.read(folder)


def mean(value: float) -> dict[str, float]:
    return {**dict.fromkeys(CATEGORIES, value), "mean": value}


@pytest.mark.parametrize(
    ("nats", "error", "outcome"),
    [
        (0.05, 0.02, "worse"),
        (0.03, 0.02, "level"),
        (-0.03, 0.02, "level"),
        (-0.05, 0.02, "better"),
        (9, None, "unknown"),
    ],
)
def test_a_difference_counts_beyond_its_interval(nats: float, error: float | None, outcome: str) -> None:
    assert Gap("dense twin", nats, error).outcome == outcome


def test_gaps_are_the_split_models_loss_above_each_rival(tmp_path: Path) -> None:
    errors = {"random": 0.003, "told": 0.004}
    run = finished(
        tmp_path, tax=mean(0.02), tax_error=0.005, tax_random=mean(0.05), tax_told=mean(0.07), error_over=errors
    )
    found = {gap.rival: (pytest.approx(gap.nats), gap.error, gap.outcome) for gap in gaps(run)}
    assert found == {
        "dense twin": (0.02, 0.005, "worse"),
        "told twin": (0.07, 0.004, "worse"),
        "random split": (-0.03, 0.003, "better"),
    }
    told = headline(run)
    assert told.verdict == "50.0% separated at a tax of 0.0200 nats per token"
    assert told.against == (
        "Better than a random split of the same sizes; "
        "worse than a dense twin that is told the category, as routing tells the split model"
    )
    assert told.measured == "test data, at the end of the run"


@pytest.mark.parametrize(
    ("tax", "error", "verdict"),
    [
        (0.004, 0.005, "50.0% separated at no tax that the held-out rows can show"),
        (-0.02, 0.005, "50.0% separated, 0.0200 nats per token better than the dense twin"),
        (-0.02, None, "50.0% separated at a tax of -0.0200 nats per token"),
    ],
)
def test_the_verdict_claims_no_more_than_the_error_allows(
    tmp_path: Path, tax: float, error: float | None, verdict: str
) -> None:
    assert headline(finished(tmp_path, tax=mean(tax), tax_error=error)).verdict == verdict


def test_a_run_without_its_random_control_says_so(tmp_path: Path) -> None:
    assert headline(finished(tmp_path, controls=())).against == "Without a random split to hold it against"


def unfinished(home: Path, count: int, *more: Phase) -> tuple[RunFolder, Recorded]:
    folder = fake_run(home)
    tell(folder, [*story(BOTH)[:count], *more])
    return folder, Recorded.read(folder)


def test_under_way_the_last_round_kept_is_what_is_told(tmp_path: Path) -> None:
    _, run = unfinished(tmp_path, 100)
    told = headline(run)
    assert told.verdict.endswith("at a tax of +0.0100 nats per token")
    assert told.measured == "validation data, after round 1"
    assert {gap.rival: pytest.approx(gap.nats) for gap in told.gaps} == {
        "dense twin": 0.01,
        "told twin": 0.04,
        "random split": -0.03,
    }


def test_before_a_cut_there_is_nothing_to_claim(tmp_path: Path) -> None:
    _, run = unfinished(tmp_path, 5)
    told = headline(run)
    assert (told.verdict, told.against, told.gaps) == ("Not split yet", "", ())
    assert told.scope == "4 categories, 384 units in 1 site, one dense model"


def test_the_ending_says_what_became_of_every_round(tmp_path: Path) -> None:
    note = Phase(id="n", time=1.0, phase="partition", round=3, note="no leaf's split beats permuted labels")
    folder, run = unfinished(tmp_path, 100, note)
    first, *rest = headline(run).ending
    assert first == f"Interrupted: round 3, partition, 60% of the training. Go on with: moeify resume {folder.id}"
    assert rest == [
        "Round 2 was rolled back: tax +0.0400 is beyond the budget.",
        "Round 3 cut nothing: no leaf's split beats permuted labels.",
    ]
    folder.resolved.write_text("name: fake\nbudget: {tax: 0.02}\n")
    assert "is beyond the budget of 0.02." in headline(Recorded.read(folder)).ending[1]


def test_a_budget_is_told_as_the_recipe_gives_it(tmp_path: Path) -> None:
    folder, _ = unfinished(tmp_path, 100)
    folder.resolved.write_text("name: fake\nbudget: {tax: 1 %, per: category}\n")
    told = headline(Recorded.read(folder)).ending[1]
    assert told.endswith("is beyond the budget of 1 % of the dense twin's loss in every category.")


def test_a_round_that_was_not_cut_says_why(tmp_path: Path) -> None:
    note = Phase(id="n", time=1.0, phase="partition", round=2, note="no step left: a separation of 0.1 is too dear")
    folder = fake_run(tmp_path)
    uncut = {"uncut": "no step left", "accepted": True}
    tell(folder, [e.model_copy(update=uncut) if e.id == "round/2" else e for e in story(BOTH)] + [note])
    finish(folder, BOTH)
    result = Result.model_validate_json(folder.result.read_bytes())
    folder.result.write_text(result.model_copy(update={"stopped": "no step left"}).model_dump_json())
    run = Recorded.read(folder)
    assert len(run.kept) == 1
    assert headline(run).ending == (
        "Finished: no step left. Of 2 planned rounds: 1 kept, 1 not cut.",
        "Round 2 cut nothing: no step left: a separation of 0.1 is too dear.",
    )


def test_a_finished_run_counts_its_rounds(tmp_path: Path) -> None:
    assert headline(finished(tmp_path)).ending[0] == "Finished. Of 2 planned rounds: 1 kept, 1 rolled back."

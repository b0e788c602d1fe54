"""``moeify study``: the experiments that the idea came from, each with its question, on several seeds."""

import sys
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from pipelines.commands.arguments import examples
from pipelines.commands.options import JSON
from pipelines.commands.side_by_side import drive
from pipelines.studies.catalogue import QUESTIONS

if TYPE_CHECKING:
    from pipelines.studies.study import ArmJob, Size
    from pipelines.study import Progress


def _names(ctx: click.Context | None, parameter: click.Parameter | None, begun: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in QUESTIONS if name.startswith(begun)]


@click.command(
    "study",
    epilog=examples(
        "moeify study",
        "moeify study spurious_cue --seeds 10",
        "moeify study edge_choices --quick --local",
    ),
)
@click.argument("name", required=False, shell_complete=_names)
@click.option("--seeds", type=click.IntRange(min=1), help="How many, from 0 on; the study's own number if not given.")
@click.option("--quick", "size", flag_value="quick", help="Seconds, to see that it runs: its figures mean nothing.")
@click.option("--large", "size", flag_value="large", help="The shipped recipe's own network and length: hours.")
@click.option("--local", is_flag=True, help="In this process, one arm after another, without Ray.")
@JSON
@click.pass_context
def command(
    ctx: click.Context, name: str | None, seeds: int | None, size: "Size | None", local: bool, as_json: bool
) -> None:
    """Run study NAME, which asks one question.

    Its arms run on several seeds, side by side. Without NAME: list the studies with what each asks. The same command
    goes on where it was stopped; more seeds add to what is there.
    """
    if name is None:
        _list(as_json)
        return
    from pipelines.studies.catalogue import find_study
    from pipelines.studies.study import jobs

    study, size = find_study(name), size or "full"
    asked = jobs(study.arms(size), range(seeds or study.seeds))
    from pipelines import runs, study_report
    from pipelines.study import open_folder, progress_line, run_study
    from pipelines.study_tracking import StudyTracker

    folder = open_folder(name, size, runs.home())
    click.echo(f"{len(asked)} runs, kept in {folder.address}", err=True)
    tracker = StudyTracker(folder, name)

    def heard(progress: "Progress", job: "ArmJob", cores: int) -> None:
        click.echo(progress_line(progress, job, cores), err=True)
        tracker.tell(progress)

    def run() -> "Progress":
        progress = run_study(name, size, asked, folder, heard, local=local)
        study_report.write(progress, folder)
        return progress

    def show(progress: "Progress") -> None:
        study_report.print_study(progress, folder, sys.stdout)

    drive(ctx, folder, tracker, run, study_report.summary, show, as_json=as_json)


def _list(as_json: bool) -> None:
    """Print every study with its question."""
    if as_json:
        from pipelines.show import to_json

        click.echo(to_json(dict(QUESTIONS)))
        return
    from pipelines.tables import console_for, table_for

    console = console_for(sys.stdout)
    table = table_for(console, "study", "question", text=(0, 1))
    for name, question in QUESTIONS.items():
        table.add_row(name, question)
    console.print(table)

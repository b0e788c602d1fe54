"""What a shell completes arguments with, and that every help shows examples that the command takes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipelines.cli import COMMANDS, main
from pipelines.commands import arguments
from pipelines.find_recipe import shipped

IDS = ("text-20261125-111352-bc5c", "text-20261126-111352-0000", "digits-20261124-090000-ffff")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three runs, a folder that is none, recipes and other files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEIFY_HOME", raising=False)
    for run in IDS:
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "resolved.yaml").touch()
    (tmp_path / "runs" / "plots").mkdir()
    (tmp_path / "recipes").mkdir()
    for file in ("mine.yaml", "other.yml", "notes.txt", ".hidden.yaml", "recipes/deep.yaml"):
        (tmp_path / file).touch()
    return tmp_path / "runs"


def values(items: list[click.shell_completion.CompletionItem]) -> list[str]:
    return [item.value for item in items]


def test_runs_are_offered_the_newest_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert values(arguments.runs(None, None, "")) == ["last", IDS[1], IDS[0], IDS[2]]
    assert values(arguments.runs(None, None, "text-20261125")) == [IDS[0]]
    assert values(arguments.runs_or_models(None, None, "dig")) == [IDS[2]]
    assert [item.type for item in arguments.runs_or_models(None, None, "./mod")] == ["dir"]
    for elsewhere in ("s3://bucket/runs", str(home / "nothing")):
        monkeypatch.setenv("MOEIFY_HOME", elsewhere)
        assert arguments.runs(None, None, "") == []


def test_recipes_are_shipped_names_and_files_of_yaml() -> None:
    assert values(arguments.recipes(None, None, "")) == [*shipped(), "mine.yaml", "other.yml", "recipes/", "runs/"]
    assert values(arguments.recipes(None, None, "recipes/")) == ["recipes/deep.yaml"]
    assert values(arguments.recipes(None, None, "./m")) == ["./mine.yaml"]
    assert values(arguments.recipes(None, None, "no/such/")) == []


def test_every_argument_that_names_a_run_or_a_recipe_is_completed() -> None:
    found = 0
    for name in COMMANDS:
        for parameter in main.get_command(click.Context(main), name).params:
            if parameter.name in ("run_", "recipe") or parameter.metavar in ("RUN_OR_MODEL", "RECIPE"):
                found += 1
                assert parameter._custom_shell_complete is not None, f"{name} {parameter.name}"
    assert found >= 16


def test_a_shell_is_answered_without_the_libraries_of_a_run() -> None:
    program = (
        "import sys\nfrom pipelines.cli import main\n"
        "try:\n    main(prog_name='moeify')\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'pydantic', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    )
    root = str(Path(__file__).parent.parent)
    asked = {"_MOEIFY_COMPLETE": "bash_complete", "COMP_WORDS": "moeify show digits", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [f"plain,{IDS[2]}", "[]"], done.stderr


def test_every_help_shows_examples_that_the_command_takes() -> None:
    group = main.get_command(click.Context(main), "cluster")
    paths = [(), *((name,) for name in COMMANDS), *(("cluster", name) for name in group.commands)]
    for path in paths:
        said = CliRunner().invoke(main, [*path, "--help"]).output
        assert "Examples:" in said, path
        if path == ("completion",):
            continue
        lines = said.partition("Examples:")[2].strip().splitlines()
        assert lines, path
        for line in lines:
            words = shlex.split(line.strip().removeprefix('eval "$(').removesuffix(')"').partition(" > ")[0])
            assert words[0] == "moeify", line
            takes(main, words[1:])


def takes(command: click.Command, words: list[str]) -> None:
    """Parse words as a command's, nested ones too, and run nothing."""
    if isinstance(command, click.Group):
        below = command.get_command(click.Context(command), words[0])
        assert below is not None, words
        takes(below, words[1:])
    elif "--help" not in words:
        command.make_context("moeify", list(words))

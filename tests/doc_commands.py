"""The commands that the documents name, as they can be tried on a small run."""

import re
import shlex
from pathlib import Path

import click

from pipelines.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
TRIED = tuple(path for path in DOCUMENTS if path.name != "quickstart.md")
"""The quickstart's commands are run as they stand, in their order, by a test of its own."""

ELSEWHERE = {
    "compare": ("test_docs.py", "test_the_quickstart_runs_from_top_to_bottom"),
    "doctor": ("test_docs.py", "test_the_quickstart_runs_from_top_to_bottom"),
    "ui": ("test_mlflow_ui.py", "test_the_real_pages_show_the_run_and_ctrl_c_leaves_no_process"),
    "run text": ("test_main_path.py", "test_text_runs_on_ray_and_exports_what_stock_transformers_load"),
    "run cifar": ("test_main_path.py", "test_cifar_runs_where_its_data_is"),
    "run digits --local": ("test_main_path.py", "test_digits_run_on_ray_and_are_tracked"),
    "submit": ("test_cluster.py", "test_a_run_is_submitted_and_told_of_as_a_local_one"),
    "stop": ("test_cluster.py", "test_a_run_that_was_stopped_or_whose_driver_was_killed_ends_with_the_same_bits"),
    "cluster up": ("test_cluster.py", "service"),
    "cluster down": ("test_cluster.py", "service"),
}
"""What a command begins with -> the test that runs it, because it starts Ray or a server, or takes its time."""
STAND_INS = {
    "RUN": "last",
    "RUN_OR_MODEL": "last",
    "RUN_OR_MODEL_OR_RECIPE": "last",
    "RECIPE": "tiny.yaml",
    "recipe.yaml": "tiny.yaml",
    "CHECKPOINT": "checkpoint",
    "./my-model": "checkpoint",
    "FILES": "texts.jsonl",
    "FILE": "texts.jsonl",
    "FOLDER_OR_FILE": "texts.jsonl",
    "texts": "texts.jsonl",
    "DIR": "out",
    "s3://BUCKET/models/digits": "memory://bucket/models",
    "web": "prose",
    "python": "code",
    "SHELL": "bash",
    "NAME": "edge_choices",
    "spurious_cue": "edge_choices",
    "worth_separating": "edge_choices",
}
"""What the documents' placeholders, and their examples of categories and studies, are where commands are tried."""
ALSO = {
    "run": ["--local"],
    "resume": ["--local"],
    "split": ["--local", "--steps", "10"],
    "study": ["--quick", "--local", "--seeds", "1"],
    "export": ["--no-verify"],
    "init": ["--force"],
    "plan": ["--categories", "2"],
}
"""What keeps a command short: without Ray, few steps, no process that compares."""


def written(document: Path) -> list[str]:
    """Return every command in a document: in text, in blocks, and in the first column of the README's table."""
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"`moeify ([^`]+)`", text) + re.findall(r"^(?:\$ )?moeify (.+)$", text, re.MULTILINE)
    if document == README:
        for cell in re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE):
            spans = [span.removeprefix("moeify ") for span in re.findall(r"`([^`]+)`", cell)]
            found += ["cluster down" if span == "down" else span for span in spans]
    return [each for each in dict.fromkeys(found) if each.split()[0] in COMMANDS]


def variants(command: str) -> list[str]:
    """Return a command without what stands in brackets, and with each of the brackets alone, inner ones too."""
    start = command.find("[")
    if start < 0:
        return [" ".join(command.split())]
    parts = (command[start:at] for at in range(start, len(command) + 1))
    depths = [part.count("[") - part.count("]") for part in parts]
    end = start + depths.index(0, 1) - 1
    before, inside, after = command[:start], command[start + 1 : end], command[end + 1 :]
    bare = re.sub(r"\[.*\]", "", after)
    return list(dict.fromkeys([*variants(before + after), *variants(f"{before}{inside}{bare}")]))


def elsewhere(command: str) -> tuple[str, str] | None:
    """Return the test that runs a command, where it is not tried."""
    return next((test for begun, test in ELSEWHERE.items() if f"{command} ".startswith(f"{begun} ")), None)


def tried(command: str) -> list[str]:
    """Return a command's words as it is tried; none where it lacks an argument, and so is only named."""
    name, *rest = [STAND_INS.get(word, word) for word in shlex.split(command)]
    found = main.get_command(click.Context(main), name)
    assert found is not None, name
    more = ALSO.get(name, []) if name != "study" or rest else []
    if "--seeds" in rest:
        place = rest.index("--seeds")
        rest = rest[:place] + rest[place + 2 :]
    words = [*rest, *(word for word in more if word not in rest)]
    try:
        found.make_context(name, list(words))
    except click.UsageError:
        return []
    return [name, *words]

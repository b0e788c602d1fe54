"""Thousands of spoiled recipes, data files, checkpoints and command lines: no traceback may reach a person.

Each case is one call of the command line (in this process) or of ``moeify.load_split``, with something spoiled in a way
that a seeded generator draws from the case's own name, so that ``--case recipes/17`` repeats it and shows the
traceback. A case is wrong when anything but a told error comes out: a traceback, an exit code other than 0, 1 and 2, an
error without a word, a file outside of the case's folder (but where an argument says so), or no end within minutes.

Launching is replaced (what would train on Ray does not), but for the group ``runs``, which trains tiny networks in this
process. The full benchmark has ten thousand cases and takes about a quarter of an hour; --quick some three hundred.
"""

import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from benchmarks import mutations
from benchmarks.report import Figure, parser, report
from moeify.recipe import strict_yaml
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe

COUNTS = {"recipes": 4500, "arguments": 1800, "data": 1300, "run files": 1300, "checkpoints": 700, "splits": 700}
"""Cases of each group; with ``runs`` ten thousand and more."""
RUNS = 120
QUICK = 0.03
"""Share of the cases that --quick runs."""
LONGEST = 300
"""Seconds of one case."""
MEMORY = 12 * 2**30
"""Bytes of address space: a hostile size must not take the machine down."""
SHOWN = 15

TINY = """name: tiny
data: {kind: text, source: {kind: jsonl, path: texts.jsonl}, vocabulary: 270, length: 8}
model: {kind: llama, hidden: 8, layers: 1, heads: 2, ffn: 16}
training: {steps: 6, rows: 4}
attribution: {rows: 4, rows_at_once: 4}
partition: {multiple: 2, min_units: 2}
rounds: [{train: 2, recover: 2, separation: 0.3}]
evaluation: {validation_rows: 4, test_rows: 4, rows_at_once: 4}
"""
DIGITS = """name: tiny
data: {kind: digits}
model: {kind: autoencoder, hidden: 16, code: 2}
training: {steps: 6, rows: 20}
attribution: {rows: 4, rows_at_once: 20}
partition: {multiple: 2, min_units: 1}
rounds: [{train: 2, recover: 1, separation: 0.2}, {train: 1, recover: 1, separation: 0.3}]
evaluation: {validation_rows: 4, test_rows: 4, rows_at_once: 20}
"""


class Untracked:
    """Stands for MLflow, which is another program's."""

    offset = 0

    def __init__(self, *_: Any) -> None: ...

    def take(self, events: Any) -> None:
        """Drop the events."""

    def close(self) -> None:
        """Nothing to close."""


class HungError(Exception):
    """A case has no end."""


@dataclass(frozen=True)
class Fault:
    """A case that went wrong."""

    case: str
    said: str
    """One line."""
    trace: str


@dataclass
class Stage:
    """Where cases play: finished things to spoil copies of, and a folder for the case at hand."""

    place: Path
    run: str
    """Id of the finished run below ``place/runs``."""

    @property
    def scratch(self) -> Path:
        """Of the case at hand; new for each."""
        return self.place / "case"


def main() -> None:
    """Play all cases and count those that went wrong."""
    parsed = parser(__doc__)
    parsed.add_argument("--case", metavar="GROUP/NUMBER", help="play this one case and show its traceback")
    parsed.add_argument("--only", metavar="GROUP", choices=[*COUNTS, "runs"], help="play the cases of this group")
    asked = parsed.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder, _stage(Path(folder)) as stage:
        if asked.case:
            fault = _played(stage, asked.case)
            sys.exit(f"{fault.said}\n{fault.trace}" if fault else None)
        counts = {**COUNTS, "runs": RUNS}
        if asked.quick:
            counts = {group: max(3, round(count * QUICK)) for group, count in counts.items()}
        counts = {group: count for group, count in counts.items() if asked.only in (None, group)}
        rows: list[dict[str, str | int]] = []
        faults: list[Fault] = []
        for group, count in counts.items():
            found = []
            for number in range(count):
                if fault := _played(stage, f"{group}/{number}"):
                    found.append(fault)
                    print(f"{fault.case}: {fault.said}", file=sys.stderr, flush=True)
            rows.append({"group": group, "cases": count, "tracebacks": len(found)})
            faults += found
            print(f"{group}: {count} cases, {len(found)} went wrong", file=sys.stderr, flush=True)
    alike = Counter(fault.said for fault in faults)
    for said, count in alike.most_common(SHOWN):
        first = next(fault.case for fault in faults if fault.said == said)
        print(f"{count} x {said} (--case {first!r})", file=sys.stderr)
    figures = [
        Figure("cases", sum(counts.values()), ">= 10,000 in full"),
        Figure("tracebacks", len(faults), "0"),
    ]
    report("fuzz", rows, figures, asked.json, quick=asked.quick)


# --- the stage ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stage(place: Path) -> Iterator[Stage]:
    """Make a finished run with a router and a split folder, in this process."""
    os.environ |= {"MOEIFY_HOME": str(place / "runs"), "MOEIFY_CACHE": str(place / "cache"), "COLUMNS": "80"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    from pipelines import compare, doctor, launch, runs

    vars(launch).update(MlflowFollower=Untracked, on_ray=_not_launched)
    vars(compare).update(compare=_refused)
    vars(doctor).update(examine=lambda: iter(()))
    write_texts(place / "texts.jsonl", random.Random(0))
    (place / "tiny.yaml").write_text(TINY, encoding="utf-8")
    _made("run", str(place / "tiny.yaml"), "--local", "--quiet")
    run = runs.every(place / "runs")[0].id
    _made("route", run)
    _made("export", run, "--split", "-o", str(place / "split"), "--no-verify")
    before = os.getcwd()  # noqa: PTH109
    try:
        yield Stage(place, run)
    finally:
        os.chdir(before)


def _not_launched(*_: Any) -> None:
    """Stand for Ray: the run goes no further."""


def _refused(*_: Any) -> None:
    raise ValueError("nothing is compared here")


def _made(*arguments: str) -> None:
    from pipelines.cli import main as moeify

    done = CliRunner().invoke(moeify, arguments)
    if done.exit_code:
        raise SystemExit(f"the stage could not be set: {done.output}") from done.exception


def write_texts(path: Path, draw: random.Random) -> None:
    """Write twenty short documents of each of two categories as JSON lines."""
    words = ("river", "stone", "cloud", "garden", "music", "winter", "silver", "meadow", "island", "velvet")
    with path.open("w", encoding="utf-8") as file:
        for _ in range(20):
            for category, form in (("code", "def {}({}): return 0\n"), ("prose", "The {} and the {} are here.\n")):
                text = "".join(form.format(draw.choice(words), draw.choice(words)) for _ in range(6))
                file.write(json.dumps({"text": text, "category": category}) + "\n")


# --- one case -------------------------------------------------------------------------------------------


def _played(stage: Stage, case: str) -> Fault | None:
    """Play a case in a folder of its own; return what went wrong."""
    group = case.rpartition("/")[0]
    shutil.rmtree(stage.scratch, ignore_errors=True)
    stage.scratch.mkdir()
    os.chdir(stage.scratch)
    os.environ["MOEIFY_HOME"] = str(stage.scratch / "runs")
    there = _outside(stage)
    signal.signal(signal.SIGALRM, _hung)
    signal.alarm(LONGEST)
    try:
        fault = GROUPS[group](stage, random.Random(case))
    except BaseException as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}", traceback.format_exc()
    finally:
        signal.alarm(0)
    if fault is None and group != "arguments" and (strangers := _outside(stage) - there):
        fault = f"wrote outside of its folder: {sorted(strangers)[0]}", ""
    return Fault(case, *fault) if fault else None


def _hung(*_: object) -> None:
    raise HungError(f"no end within {LONGEST} s")


def _outside(stage: Stage) -> set[str]:
    return {path.name for path in (*stage.place.iterdir(), *stage.place.parent.glob("x*"))}


Went = tuple[str, str] | None
"""What is wrong, in a line, and the traceback."""


def _called(*arguments: str) -> Went:
    """Call the command line."""
    from pipelines.cli import main as moeify

    done = CliRunner().invoke(moeify, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        error = done.exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = (
            f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {' '.join(str(error).split())[:90]}"
        )
        told = "".join(traceback.format_exception(error))
        return said, f"moeify {' '.join(map(repr, arguments))}\n{told}"
    if done.exit_code not in (0, 1, 2):
        return f"exit code {done.exit_code}", f"moeify {arguments}\n{done.output}"
    if done.exit_code and not done.output.strip():
        return f"exit code {done.exit_code} without a word", f"moeify {arguments}"
    return None


# --- groups ---------------------------------------------------------------------------------------------


def _recipes(stage: Stage, draw: random.Random) -> Went:
    """Run a spoiled recipe, as far as its launch."""
    name = draw.choice(("text", "digits"))
    text = (files("pipelines.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    text = draw.choice((text, TINY, DIGITS))
    path = stage.scratch / "recipe.yaml"
    if draw.random() < 0.4:
        path.write_bytes(mutations.spoiled_bytes(draw, text.encode()))
    else:
        data = mutations.spoiled_tree(draw, _complete(text) if draw.random() < 0.6 else strict_yaml.read(text))
        path.write_bytes(_yaml(draw, data))
    return _called("run", str(path), "--quiet")


def _complete(text: str) -> Any:
    """Return a recipe with every default spelled out, some of them with the variant that is not the default."""
    from moeify.recipe.load import parse_recipe

    data = parse_recipe(text, where="shipped").model_dump(mode="json")
    data["budget"] = {"tax": "1 %", "per": "category", "least_step": 0.02}
    data["partition"]["null_test"] = {"permutations": 8, "level": 0.05}
    data["training"]["on_divergence"] = {"kind": "lower_rate", "factor": 0.5, "most": 3}
    return data


def _yaml(draw: random.Random, data: Any) -> bytes:
    try:
        text = strict_yaml.write(data) if draw.random() < 0.7 else json.dumps(data)
    except Exception:  # what YAML has no word for goes as JSON, which is YAML too
        text = json.dumps(data)
    return text.encode("utf-8", "surrogatepass")


def _arguments(stage: Stage, draw: random.Random) -> Went:
    """Call commands with words that fit, nearly fit or do not fit."""
    from pipelines.cli import COMMANDS
    from pipelines.cli import main as moeify

    shutil.copytree(stage.place / "runs", stage.scratch / "runs")
    # Left out: what starts processes or waits for a cluster.
    name = draw.choice([name for name in COMMANDS if name not in ("cluster", "submit", "ui")])
    command = moeify.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    flags = [flag for param in command.params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-")]
    # 'logs -f' of a run that nobody drives ends; an address has nobody behind it and is a matter of its own tests.
    flags = [flag for flag in flags if flag != "--address"]
    values = (
        *(stage.run, "last", "tiny", "dense", "split", "python", "code", "prose", "glm4_moe", "float16", "texts.jsonl"),
        *("1", "0", "-1", "3.5", "1e9", "nan", "", " ", "../x", "/nowhere", "a\x00b", "é" * 200, "--", "-x", "*", "~"),
        *(str(stage.place / "tiny.yaml"), str(stage.place / "split"), str(stage.place / "texts.jsonl"), "\udcff"),
    )
    words = [stage.run] if draw.random() < 0.5 else []
    for _ in range(draw.randint(0, 4)):
        words.append(draw.choice(flags) if flags and draw.random() < 0.6 else draw.choice(values))
    return _called(name, *words)


def _data(stage: Stage, draw: random.Random) -> Went:
    """Let ``init`` look at spoiled texts, or a run prepare them."""
    if draw.random() < 0.6:
        name = draw.choice(("texts.jsonl", "texts.jsonl", "texts.jsonl.gz", "texts.txt"))
        path = stage.scratch / name
        path.write_bytes(_spoiled_lines(draw, (stage.place / "texts.jsonl").read_bytes()))
        source = {"kind": "jsonl", "path": name}
    else:
        path = stage.scratch / "folders"
        _spoiled_folders(draw, path)
        source = {"kind": "folders", "categories": {"code": "folders/code", "prose": "folders/prose"}}  # type: ignore[dict-item]
    if draw.random() < 0.5:
        more = draw.choice(([], ["--discover"], ["--text", "text"], ["--category", "category"], ["--text", "none"]))
        return _called("init", str(path), "-o", str(stage.scratch / "recipe.yaml"), *more)
    data = strict_yaml.read(TINY)
    data["data"]["source"] = source
    (stage.scratch / "recipe.yaml").write_text(strict_yaml.write(data), encoding="utf-8")
    return _with_preparation(str(stage.scratch / "recipe.yaml"))


def _with_preparation(recipe: str) -> Went:
    """Run a recipe up to where its first step would be."""
    from pipelines import launch

    def prepare(folder: Any, config: RunConfig, base: Path, followers: Sequence[Any]) -> None:
        from moeify.tasks.build import build_task
        from pipelines.runs import cache

        task = build_task(config, cache=cache(), base=base)
        task.train_batch(0)
        list(task.held_out_batches("test", 2, 2))

    real = launch.in_process
    vars(launch).update(in_process=prepare)
    try:
        return _called("run", recipe, "--local", "--quiet")
    finally:
        vars(launch).update(in_process=real)


def _spoiled_lines(draw: random.Random, content: bytes) -> bytes:
    lines = content.splitlines()
    match draw.randrange(8):
        case 0:
            return mutations.spoiled_bytes(draw, content)
        case 1:
            return lines[0] + b"\n"
        case 2:
            return b""
        case 3:
            huge = json.dumps({"text": "word " * draw.choice((10, 200_000)), "category": "code"}).encode()
            return b"\n".join([*lines, huge])
        case 4:
            text = content.decode()
            return text.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "cp037")))
        case 5:
            empty = json.dumps({"text": draw.choice(("", " ", "\n", "\0", "x")), "category": "code"}).encode()
            return b"\n".join([empty] * draw.randint(1, 9) + lines[: draw.randint(0, 4)])
        case _:
            for _ in range(draw.randint(1, 5)):
                place = draw.randrange(len(lines))
                lines[place] = json.dumps(mutations.spoiled_tree(draw, json.loads(lines[0]))).encode()
            return b"\n".join(lines)


def _spoiled_folders(draw: random.Random, path: Path) -> None:
    for category in ("code", "prose"):
        (path / category).mkdir(parents=True)
        for number in range(draw.choice((1, 3, 12))):
            (path / category / f"{number}.txt").write_text(f"{category} {number} says this and that\n" * 20)
    target = path / "code"
    match draw.randrange(7):
        case 0:
            shutil.rmtree(target)
        case 1:
            (target / "odd.txt").write_bytes(draw.choice((b"", b"\0", b"\xff\xfeab", b"\n" * 999, b"\xed\xa0\x80")))
        case 2:
            (target / "loop").symlink_to(target)
        case 3:
            (target / "gone.txt").symlink_to("/nowhere/x")
        case 4:
            os.mkfifo(target / "pipe.txt")
        case 5:
            (target / ("é" * 60 + "\n.txt")).write_text("text " * 50)
        case _:
            (target / "odd.txt").write_bytes(mutations.spoiled_bytes(draw, b"some words and more of them\n" * 20))


def _run_files(stage: Stage, draw: random.Random) -> Went:
    """Ask for a finished run of which one file is spoiled."""
    folder = _copied_run(stage)
    names = ("journal.jsonl", "journal.jsonl", "result.json", "origin.json", "driver.json", "resolved.yaml", "assets")
    match draw.choice(names):
        case "resolved.yaml":
            path = folder / "resolved.yaml"
            if draw.random() < 0.5:
                path.write_bytes(mutations.spoiled_bytes(draw, path.read_bytes()))
            else:
                path.write_bytes(_yaml(draw, mutations.spoiled_tree(draw, strict_yaml.read(path.read_text()))))
        case "assets":
            mutations.spoil_json(draw, draw.choice(sorted((folder / "assets").glob("*.json"))))
        case name:
            mutations.spoil_json(draw, folder / name)
    return _called(*_question(stage, draw))


def _question(stage: Stage, draw: random.Random) -> list[str]:
    out = str(stage.scratch / "out")
    return draw.choice(
        [
            *(["show", stage.run], ["show", stage.run, "--json"], ["runs"], ["runs", "--json"], ["status", stage.run]),
            *(["logs", stage.run], ["report", stage.run], ["resume", stage.run, "--quiet"], ["stop", stage.run]),
            ["resume", stage.run, "--local", "--quiet"],
            ["generate", stage.run, "--prompt", "The", "--tokens", "4"],
            ["generate", stage.run, "--prompt", "x", "--tokens", "4", "--category", "code", "--json"],
            ["export", stage.run, "--split", "-o", out],
            ["export", stage.run, "--category", "code", "-o", out, "--no-verify"],
            ["export", stage.run, "--moe", "glm4_moe", "-o", out, "--no-verify"],
            ["attribute", stage.run, "--json"],
        ]
    )


def _copied_run(stage: Stage) -> Path:
    shutil.copytree(stage.place / "runs" / stage.run, stage.scratch / "runs" / stage.run)
    return stage.scratch / "runs" / stage.run


def _checkpoints(stage: Stage, draw: random.Random) -> Went:
    """Use a run whose checkpoint or router is spoiled, by accident or on purpose."""
    folder = _copied_run(stage)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    spoiled = folder / "router" if draw.random() < 0.3 else checkpoints[-1]
    if draw.random() < 0.1:
        spoiled.rename(spoiled.with_name(draw.choice(("zzz", "é", "9999-x", ".hidden"))))
    else:
        mutations.spoil_checkpoint(draw, spoiled)
    if draw.random() < 0.3:
        (folder / "result.json").unlink()  # then there is something to resume
    question = _question(stage, draw)
    if question[0] in ("show", "runs", "status", "logs", "report", "stop"):
        question = ["generate", stage.run, "--prompt", "The", "--tokens", "3"]
    return _called(*question)


def _splits(stage: Stage, draw: random.Random) -> Went:
    """Load a split folder that is spoiled, by accident or on purpose."""
    import torch

    import moeify

    folder = stage.scratch / "split"
    shutil.copytree(stage.place / "split", folder)
    mutations.spoil_checkpoint(draw, folder)
    try:
        model = moeify.load_split(folder)
    except (ValueError, OSError) as error:
        return (f"{type(error).__name__} without a word", "") if not str(error).strip() else None
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    return None


def _runs(stage: Stage, draw: random.Random) -> Went:
    """Train by a recipe whose numbers are odd and small, to its end."""
    text = draw.choice((DIGITS, DIGITS, TINY))
    data = load_recipe_data(text, stage.scratch)
    for _ in range(draw.randint(1, 3)):
        section = draw.choice(("model", "training", "attribution", "partition", "evaluation", "checkpoints", "data"))
        numbers = [key for key, value in data[section].items() if type(value) in (int, float)]
        if not numbers:
            continue
        key = draw.choice(numbers)
        small = (0, 1, 2, 3, 7, 8, 20, 300) if isinstance(data[section][key], int) else (0.0, 1e-6, 0.01, 0.3, 0.9, 5.0)
        data[section][key] = draw.choice(small)
    for round_ in data["rounds"]:
        round_["separation"] = draw.choice((0.05, 0.2, 0.3, 0.45, 0.6, round_["separation"]))
    if draw.random() < 0.3:
        data["budget"] = {"tax": draw.choice((1e-9, 0.1, 9.0)), "per": "category"}
    if draw.random() < 0.3:
        data["controls"] = draw.choice(([], ["told"], ["random", "told"]))
    data["training"]["steps"] = min(data["training"]["steps"], 20)
    shutil.copy(stage.place / "texts.jsonl", stage.scratch)
    (stage.scratch / "recipe.yaml").write_text(strict_yaml.write(data), encoding="utf-8")
    return _called("run", str(stage.scratch / "recipe.yaml"), "--local", "--quiet")


def load_recipe_data(text: str, scratch: Path) -> Any:
    """Return a recipe as plain data, every default filled in."""
    path = scratch / "whole.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path).model_dump(mode="json")


GROUPS: dict[str, Callable[[Stage, random.Random], Went]] = {
    "recipes": _recipes,
    "arguments": _arguments,
    "data": _data,
    "run files": _run_files,
    "checkpoints": _checkpoints,
    "splits": _splits,
    "runs": _runs,
}

if __name__ == "__main__":
    main()

"""The kinds of cases: what is spoiled, and what is then asked."""

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from benchmarks import mutations
from benchmarks.fuzz_stage import TINY, Stage, Went, called
from benchmarks.fuzz_streamed import spoiled_source
from moeify.recipe import strict_yaml
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe

DIGITS = """name: tiny
data: {kind: digits}
model: {kind: autoencoder, hidden: 16, code: 2}
training: {steps: 6, rows: 20}
attribution: {rows: 4, rows_at_once: 20}
partition: {multiple: 2, min_units: 1}
rounds: [{train: 2, recover: 1, separation: 0.2}, {train: 1, recover: 1, separation: 0.3}]
evaluation: {validation_rows: 4, test_rows: 4, rows_at_once: 20}
"""


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
    return called("run", str(path), "--quiet")


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
    command = moeify.get_command(click.Context(moeify), name)
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
    return called(name, *words)


def _data(stage: Stage, draw: random.Random) -> Went:
    """Let ``init`` look at spoiled texts, or a run prepare them."""
    if draw.random() < 0.6:
        name = draw.choice(("texts.jsonl", "texts.jsonl", "texts.jsonl.gz", "texts.txt"))
        path = stage.scratch / name
        path.write_bytes(_spoiled_lines(draw, (stage.place / "texts.jsonl").read_bytes()))
        source: dict[str, Any] = {"kind": "jsonl", "path": name}
    else:
        path = stage.scratch / "folders"
        _spoiled_folders(draw, path)
        source = {"kind": "folders", "categories": {"code": "folders/code", "prose": "folders/prose"}}
    if draw.random() < 0.5:
        more = draw.choice(([], ["--discover"], ["--text", "text"], ["--category", "category"], ["--text", "none"]))
        return called("init", str(path), "-o", str(stage.scratch / "recipe.yaml"), *more)
    data = strict_yaml.read(TINY)
    data["data"]["source"] = source
    (stage.scratch / "recipe.yaml").write_text(strict_yaml.write(data), encoding="utf-8")
    return _with_preparation(str(stage.scratch / "recipe.yaml"))


def _streamed(stage: Stage, draw: random.Random) -> Went:
    """Let a run prepare spoiled files that are streamed."""
    recipe = spoiled_source(draw, (stage.place / "texts.jsonl").read_bytes(), stage.scratch)
    (stage.scratch / "recipe.yaml").write_text(recipe, encoding="utf-8")
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
        return called("run", recipe, "--local", "--quiet")
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
    return called(*_question(stage, draw))


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
    return called(*question)


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
    return called("run", str(stage.scratch / "recipe.yaml"), "--local", "--quiet")


def load_recipe_data(text: str, scratch: Path) -> Any:
    """Return a recipe as plain data, every default filled in."""
    path = scratch / "whole.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path).model_dump(mode="json")


GROUPS: dict[str, Callable[[Stage, random.Random], Went]] = {
    "recipes": _recipes,
    "arguments": _arguments,
    "data": _data,
    "streamed": _streamed,
    "run files": _run_files,
    "checkpoints": _checkpoints,
    "splits": _splits,
    "runs": _runs,
}

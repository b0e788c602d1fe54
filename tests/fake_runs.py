"""A run folder as the loop leaves it, made by hand: for readers of run folders."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moeify.events import Artifact, Evaluated, Event, Finished, Phase, RoundEnded, Started, Step
from moeify.recipe.arms import Arm, Control, cut, twins
from moeify.recipe.config import RunConfig
from moeify.result import Result
from pipelines.journal import JournalTracker
from pipelines.runs import RunFolder

CATEGORIES = ("python", "prose", "c", "web")
NODES = [
    {"name": "core", "parent": None, "categories": ["python", "c", "web", "prose"]},
    {"name": "python+c+web", "parent": 0, "categories": ["python", "c", "web"]},
    {"name": "python", "parent": 1, "categories": ["python"]},
    {"name": "c", "parent": 1, "categories": ["c"]},
    {"name": "web", "parent": 1, "categories": ["web"]},
    {"name": "prose", "parent": 0, "categories": ["prose"]},
]
SHARES = [0.22, 0.1, 0.18, 0.16, 0.14, 0.2]
TREE: dict[str, Any] = {"name": "core", "categories": list(CATEGORIES), "units": 384, "children": []}


def recipe() -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "fake",
            "seed": 3,
            "data": {"kind": "text", "source": {"kind": "installed"}},
            "model": {"kind": "llama"},
            "training": {"steps": 100},
            "rounds": [
                {"train": 20, "recover": 10, "separation": 0.2},
                {"train": 20, "recover": 10, "separation": 0.5},
            ],
        }
    )


def fake_run(home: Path, number: int = 1) -> RunFolder:
    """Return an empty run folder with its recipe."""
    path = home / f"fake-20260102-03040{number}-abcd"
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.recipe.write_text("name: fake\n")
    folder.resolved.write_text("name: fake\nseed: 3\n")
    return folder


def losses(base: float) -> dict[str, float]:
    return {category: base + 0.1 * index for index, category in enumerate(CATEGORIES)}


def arms_of(controls: Collection[Control]) -> tuple[Arm, ...]:
    return (*twins(controls), *cut(controls))


def story(controls: Collection[Control] = ("random",)) -> list[Event]:
    """Return what a run of two rounds says, the second of which is rolled back."""
    now = 1_700_000_000.0
    events: list[Event] = [
        Started(
            id="started",
            time=now,
            categories=CATEGORIES,
            unit="token",
            steps=100,
            parameters=1000,
            sites={"layers.0.ffn": 384},
            rounds=2,
            arms=arms_of(controls),
        ),
        Phase(id="phase/1/train", time=now, phase="train", round=1),
    ]
    for round_, steps in ((1, range(10, 40, 10)), (2, range(40, 70, 10))):
        for arm in arms_of(controls):
            for step in steps:
                events.append(
                    Step(
                        id=f"step/{arm}/{step}",
                        time=now + step,
                        arm=arm,
                        round=round_,
                        step=step,
                        work=step / 100,
                        loss=losses(5 - step / 50),
                        learning_rate=0.003,
                        units_per_second=40_000.0,
                    )
                )
        until = steps[-1]
        for moment, rise in (("before_cut", 0.0), ("after_cut", 0.5), ("recovered", 0.1)):
            events.append(
                Evaluated(
                    id=f"evaluated/split/{round_}/{moment}",
                    time=now + until + rise,
                    arm="split",
                    round=round_,
                    step=until,
                    moment=moment,
                    split="validation",
                    loss=losses(4 + rise),
                )
            )
        path = f"rounds/{round_}/partition.json"
        events.append(Artifact(id=f"artifact/{path}", time=now + until, path=path, round=round_))
        events.append(
            RoundEnded(
                id=f"round/{round_}",
                time=now + until + 1,
                round=round_,
                step=until,
                separation=0.2 * round_,
                tax=0.01 * round_**2,
                tax_by_category=dict.fromkeys(CATEGORIES, 0.01 * round_),
                tax_random=0.04 * round_ if "random" in controls else None,
                tax_told=0.01 * round_**2 + 0.03 if "told" in controls else None,
                predicted=0.02 * round_,
                predicted_random=0.05 * round_ if "random" in controls else None,
                accepted=round_ == 1,
                seconds=12.0,
                tree=TREE,
            )
        )
    events.append(
        Evaluated(
            id="evaluated/dense/2/test",
            time=now + 101,
            arm="dense",
            round=0,
            step=100,
            moment="test",
            split="test",
            loss=losses(3.5),
        )
    )
    return events


def tell(folder: RunFolder, events: list[Event]) -> None:
    with JournalTracker(folder.journal) as journal:
        for event in events:
            journal.emit(event)


def leave_rounds(folder: RunFolder, sites: int = 4, units: int = 384, shares: list[float] | None = None) -> None:
    """Write ``partition.json`` and ``attribution.safetensors`` of both rounds."""
    random = np.random.default_rng(0)
    shares = SHARES if shares is None else shares
    widths = [round(units * share) for share in shares]
    widths[0] += units - sum(widths)
    owners = np.repeat(np.arange(len(NODES)), widths)
    for round_ in (1, 2):
        tables = {}
        for site in range(sites):
            table = random.gamma(0.5, 1e-4, (units, len(CATEGORIES))) * random.gamma(0.7, 1.0, (units, 1))
            for node, entry in enumerate(NODES):
                serves = [CATEGORIES.index(category) for category in entry["categories"]]
                table[np.ix_(owners == node, serves)] *= 6
            tables[f"layers.{site}.ffn"] = table.astype(np.float32)
        place = folder.rounds / str(round_)
        place.mkdir(parents=True)
        save_file(tables, place / "attribution.safetensors", {"categories": json.dumps(CATEGORIES), "score": "fisher"})
        partition = {
            "nodes": NODES,
            "widths": dict.fromkeys(tables, widths),
            "owners": {site: owners.tolist() for site in tables},
        }
        (place / "partition.json").write_text(json.dumps(partition))


def finish(folder: RunFolder, controls: Collection[Control] = ("random",)) -> None:
    """Write the result and say that the run ended."""
    rounds = tuple(event for event in story(controls) if isinstance(event, RoundEnded))
    mean = {"mean": 0.02}
    bases: dict[Arm, float] = {"dense": 3.5, "told": 3.45, "split": 3.52, "random": 3.6}
    result = Result(
        categories=CATEGORIES,
        unit="token",
        tree=TREE,
        active_fraction={**dict.fromkeys(CATEGORIES, 0.5), "mean": 0.5},
        rounds=rounds,
        test_loss={arm: losses(bases[arm]) for arm in arms_of(controls)},
        bits_per_byte=None,
        own_other={},
        tax=dict.fromkeys(CATEGORIES, 0.02) | mean,
        tax_random=dict.fromkeys(CATEGORIES, 0.1) | mean if "random" in controls else None,
        tax_told=dict.fromkeys((*CATEGORIES, "mean"), 0.07) if "told" in controls else None,
        steps=100,
        seconds=60.0,
    )
    folder.result.write_text(result.model_dump_json())
    tell(folder, [Finished(id="finished", time=1_700_000_110.0, seconds=60.0)])

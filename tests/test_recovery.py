from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import moeify
from moeify.export.pruning import prune, without
from moeify.export.publish import How, Origin, export_moe, export_split
from moeify.export.recovery import Recover
from moeify.loop import run
from moeify.models.families import unit_space
from moeify.recipe.config import RunConfig
from moeify.recipe.load import parse_recipe
from moeify.recipe.training import Distillation
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.store import FolderStore
from moeify.task import Batch, Task
from moeify.tasks.build import build_task
from pipelines import runs
from pipelines.cli import main
from pipelines.journal import JournalTracker
from tests.finished_runs import TINY
from tests.texts import write_texts
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

STEPS = 12


class Watched(ToyTextTask):
    """Puts down what is read of the train split."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.read: list[int] = []

    def train_batch(self, step: int) -> Batch:
        self.read.append(step)
        return super().train_batch(step)


def config() -> RunConfig:
    return RunConfig.model_validate(TEXT_CONFIG)


def split_of(task: Task) -> SplitModel:
    """The task's network, four categories in two groups."""
    network, tree = task.build(), ExpertTree.undivided("abcd").split({0: [("a", "b"), ("c", "d")]})
    tree = tree.split({tree.index("a+b"): [("a",), ("b",)], tree.index("c+d"): [("c",), ("d",)]})
    return SplitModel(
        network, "abcd", Partition(tree, {s.name: (8, 4, 4, 4, 4, 4, 4) for s in unit_space(network).sites})
    )


def cut(split: SplitModel, drop: list[str]) -> SplitModel:
    return prune(split, without(split.partition, drop))


def origin() -> Origin:
    return Origin(split_of(ToyTextTask(config())))


def along(model: SplitModel, category: str) -> torch.Tensor:
    rows = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(rows, torch.full((3,), model.categories.index(category)))


def test_a_recovery_reads_retained_rows_behind_the_runs_own_and_gives_the_same_bits_again() -> None:
    split, task = split_of(ToyTextTask(config())), Watched(config())
    parts = [cut(split, ["c"]) for _ in range(2)]
    first, again = (Recover(task, config(), STEPS)(split, part, ["c"]) for part in parts)
    assert first == again
    for one, other in zip(parts[0].network.parameters(), parts[1].network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert task.read == 2 * list(range(60, 60 + STEPS))
    wanted = sum(int((ToyTextTask(config()).train_batch(step).categories != 2).sum()) for step in range(60, 60 + STEPS))
    assert (first.rows, first.read, first.retained) == (wanted, 12 * wanted, ("a", "b", "d"))
    assert all(first.before[category] == first.intact[category] for category in "abd")
    assert first.before["c"] != first.intact["c"]
    assert sum(first.after[category] for category in "abd") < sum(first.before[category] for category in "abd")


def test_a_step_without_retained_rows_takes_those_of_a_later_one() -> None:
    few = config().model_copy(update={"training": config().training.model_copy(update={"rows": 1})})

    class Turns(Watched):
        """One row a step, of each category in turn."""

        def train_batch(self, step: int) -> Batch:
            self.read.append(step)
            return self._rows([1, 0], 4).take(torch.tensor([step % 4]))

    task, split = Turns(few), split_of(ToyTextTask(config()))
    found = Recover(task, few, 3)(split, cut(split, ["a"]), ["a"])
    assert found.rows == 3
    assert len(set(task.read)) == len(task.read)


def test_a_recovered_model_is_exported_as_it_was_trained_and_the_card_says_so(tmp_path: Path) -> None:
    recover = Recover(ToyTextTask(config()), config(), STEPS)
    done = export_split(origin(), tmp_path / "part", How(dtype="bfloat16"), drop=["c"], recover=recover)
    assert done.differences is not None
    assert done.differences.keys() == set("abcd")
    assert done.rounding is not None
    assert done.recovery is not None
    split = split_of(ToyTextTask(config()))
    part = cut(split, ["c"])
    recover(split, part, ["c"])
    back = moeify.load_split(tmp_path / "part")
    for name, parameter in part.network.named_parameters():
        assert torch.equal(back.network.get_parameter(name), parameter.bfloat16().float())
    text = (tmp_path / "part" / "README.md").read_text()
    rows, read = done.recovery.rows, done.recovery.read
    assert f"for {STEPS} steps on {rows} train rows ({read:,} tokens) of a, b, d, and of no other category" in text
    losses = " | ".join(
        f"{loss['c']:.4f}" for loss in (done.recovery.intact, done.recovery.before, done.recovery.after)
    )
    assert f"| c | taken out | {losses} |" in text
    assert "without c as it was recovered, equal weights" in text
    export_moe(origin(), "glm4_moe", tmp_path / "moe", How(verify=False), forced="a", drop=["c"], recover=recover)
    from transformers import AutoModelForCausalLM

    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    rows_given = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(moe(rows_given).logits, along(part, "a"), atol=1e-4, rtol=0)


def test_a_recovery_learns_from_what_its_run_learned_from() -> None:
    task, found = ToyTextTask(config()), []
    for taught in (None, Distillation(), Distillation(stream=3.0)):
        known = config().model_copy(update={"distillation": taught})
        split = split_of(task)
        part = cut(split, ["c"])
        Recover(task, known, 2)(split, part, ["c"])
        found.append(part.network.get_parameter("lm_head.weight").detach())
    assert all(not torch.equal(found[a], found[b]) for a, b in ((0, 1), (1, 2), (0, 2)))


def test_what_cannot_be_recovered_is_refused(tmp_path: Path) -> None:
    split, task = split_of(ToyTextTask(config())), ToyTextTask(config())
    with pytest.raises(ValueError, match="got 0 steps, wanted one at least"):
        Recover(task, config(), 0)
    with pytest.raises(ValueError, match="every category's expert is taken out, so there is nothing to recover"):
        Recover(task, config(), 1)(split, split, list("abcd"))
    with pytest.raises(ValueError, match="a recovery is for a model without a category"):
        export_split(origin(), tmp_path / "none", keep=["a"], recover=Recover(task, config(), 1))
    wild = config().model_copy(update={"training": config().training.model_copy(update={"learning_rate": 1e6})})
    with pytest.raises(ValueError, match=r"^recovery: step \d+: .*; take fewer steps, or export without$"):
        Recover(task, wild, 40)(split, cut(split, ["c"]), ["c"])
    assert not (tmp_path / "none").exists()
    first = config().model_copy(update={"training": config().training.model_copy(update={"rows": 1})})
    with pytest.raises(ValueError, match=r"rows of b, c, d never came in 1000 steps; raise training\.rows"):
        Recover(ToyTextTask(first), first, 2)(split, cut(split, ["a"]), ["a"])


def test_an_autoencoder_recovers_too(tmp_path: Path) -> None:
    task: Task = ToyTask(toy_config())
    done = export_split(Origin(split_of(task)), tmp_path / "out", drop=["b"], recover=Recover(task, toy_config(), 3))
    assert done.recovery is not None
    assert done.recovery.unit == "example"
    assert done.recovery.read == done.recovery.rows


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run of text."""
    write_texts(tmp_path)
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    recipe = parse_recipe(TINY, where="tiny")
    folder = runs.create(recipe, TINY, tmp_path / "runs", base=tmp_path)
    task = build_task(recipe, cache=tmp_path / "cache", base=tmp_path)
    with JournalTracker(folder.journal) as journal:
        result = run(recipe, task, store=FolderStore(folder.path, 2), tracker=journal)
        folder.result.write_text(result.model_dump_json())
        journal.emit(moeify.events.Finished(id="finished", time=1.0, seconds=1.0))
    return tmp_path


def export(place: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", "last", *arguments, "-o", str(place / "out")])


def test_the_command_recovers_on_the_runs_data_and_on_no_other(place: Path) -> None:
    done = export(place, "--without", "code", "--recover", "4")
    assert done.exit_code == 0, done.output
    assert "training on for 4 steps ..." in done.stderr
    said = done.stdout.splitlines()[1]
    assert said.startswith("recovered in 4 steps on 256 tokens; validation loss of what is kept ")
    assert "equal to the recovered model within" in done.stdout
    assert "| prose | kept |" in (place / "out" / "README.md").read_text()

    (place / "out").rename(place / "first")
    texts = place / "texts.jsonl"
    kept = texts.read_text()
    texts.write_text(kept.replace("river", "ocean"))
    changed = export(place, "--without", "code", "--recover", "4")
    assert changed.exit_code == 2
    assert "which has changed since; put it back, or export without --recover" in changed.stderr
    texts.unlink()
    gone = export(place, "--without", "code", "--recover", "4")
    assert gone.exit_code == 2
    assert "which cannot be read: " in gone.stderr
    assert len(gone.stderr.splitlines()) == 1
    assert not (place / "out").exists()

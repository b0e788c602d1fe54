"""Studies of removal: who learns from which rows, what is left, and every arm of the quick forms."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeify.models.build import build_llama
from moeify.models.resizing import widened
from moeify.recipe.config import RunConfig
from moeify.recipe.data import MixedText, TextData
from moeify.recipe.model import LlamaModel
from moeify.routed.split_model import SplitModel
from moeify.tasks.build import build_task
from moeify.tasks.digits import DigitsTask
from moeify.training import Contestant
from pipelines.studies import fine_tuning, hard_neighbours, removal, unlearning
from pipelines.studies.apart import train_apart
from pipelines.studies.catalogue import find_study
from pipelines.studies.low_rank import Adapters
from pipelines.studies.study import Bench, changed, shipped_recipe
from pipelines.studies.training import trained
from tests.texts import WORDS

pytestmark = pytest.mark.usefixtures("shapes_unchecked")
DIGITS = shipped_recipe("digits", training={"steps": 3}, rounds=[{"train": 0, "recover": 0, "separation": 0.4}])
TINY = LlamaModel(kind="llama", hidden=16, layers=2, heads=2, ffn=24)


def language_model(names: tuple[str, ...] = ("a", "b")) -> SplitModel:
    return SplitModel(build_llama(TINY, vocabulary=300, length=8, end=0, seed=0), names)


def test_rows_are_drawn_in_their_shares_and_are_the_tasks_own() -> None:
    task = DigitsTask(changed(DIGITS, training={"rows": 100}))
    some = removal.in_shares(task, [0.05, 0.15] + [0.1] * 8, 10)
    counts = torch.stack([torch.bincount(some.train_batch(step).categories, minlength=10) for step in range(100)])
    assert counts.sum(1).tolist() == [10] * 100
    assert (counts.sum(0) - torch.tensor([50, 150] + [100] * 8)).abs().max() <= 3
    batch, whole = some.train_batch(7), task.train_batch(7)
    assert {tuple(row.tolist()) for row in batch.inputs} <= {tuple(row.tolist()) for row in whole.inputs}


def test_training_apart_where_every_row_teaches_everything_is_training() -> None:
    task = DigitsTask(DIGITS)
    plain, apart = trained(DIGITS, task), SplitModel(task.build(), task.categories)
    train_apart(Contestant(apart, DIGITS.training), task, DIGITS.training, lambda _: list(apart.parameters()))
    for one, other in zip(plain.network.parameters(), apart.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_what_a_category_does_not_teach_is_left_as_it_is() -> None:
    task = removal.without_rows(DigitsTask(DIGITS), ["3"])
    model = SplitModel(task.build(), task.categories)
    names = [name for name, _ in model.network.named_parameters()]
    before = [parameter.detach().clone() for parameter in model.network.parameters()]
    only = [model.network.get_parameter(names[0])]
    train_apart(Contestant(model, DIGITS.training), task, DIGITS.training, lambda _: only)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.network.parameters(), strict=True)]
    assert moved == [True] + [False] * (len(names) - 1)


def test_adapters_add_nothing_at_first_and_one_runs_at_a_time() -> None:
    model = language_model()
    tokens, kinds = torch.randint(300, (4, 8)), torch.tensor([0, 0, 1, 1])
    with torch.no_grad():
        before = model(tokens, kinds)
        plain = len(list(model.network.parameters()))
        adapters = Adapters(model, rank=2, seed=0)
        assert [len(adapters.of(name)) for name in ("a", "b")] == [16, 16]  # two for each of four maps of two layers
        assert len(adapters.base()) == plain
        torch.testing.assert_close(model(tokens, kinds), before)
        for parameter in adapters.of("b"):
            parameter += 0.3 * torch.randn_like(parameter)
        torch.testing.assert_close(model(tokens, kinds), before)
        adapters.run("b")
        after = model(tokens, kinds)
        assert not torch.allclose(after, before, atol=1e-2)
        left = SplitModel(adapters.merged("b"), ("a", "b"))
        torch.testing.assert_close(left(tokens, kinds), after, rtol=1e-4, atol=1e-4)
    assert len(list(left.network.parameters())) == plain


def test_an_adapter_and_the_base_learn_from_the_rows_that_teach_them() -> None:
    model = language_model()
    adapters = Adapters(model, rank=2, seed=0)
    tokens = torch.randint(300, (4, 8))
    adapters.run("a")
    loss = model(tokens, torch.tensor([0, 0, 0, 0])).square().mean()
    taught = [*adapters.of("a"), *adapters.base()]
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(loss, taught, retain_graph=True))
    idle = torch.autograd.grad(loss, adapters.of("b"), allow_unused=True)
    assert idle == (None,) * len(idle)


def test_adapters_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.studies.low_rank.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'moeify\[peft\]'"):
        Adapters(language_model(), rank=2, seed=0)


def test_a_network_without_its_fresh_units_is_the_one_before() -> None:
    narrow = language_model()
    wide = SplitModel(widened(narrow.network, lambda _: 6, seed=1), ("a", "b"))
    tokens, kinds = torch.randint(300, (3, 8)), torch.tensor([0, 1, 1])
    left = SplitModel(
        removal.with_units(wide, {site.name: torch.arange(site.units - 6) for site in wide.space.sites}), "ab"
    )
    torch.testing.assert_close(left(tokens, kinds), narrow(tokens, kinds))


def test_the_equivalent_share_lies_between_the_points_of_the_curve() -> None:
    curve = [(0.25, 4.0), (0.5, 3.0), (1.0, 2.0)]
    found = [removal._equivalent(loss, curve) for loss in (5.0, 4.0, 3.5, 2.25, 2.0, 1.0)]
    assert found == pytest.approx([0.25, 0.25, 0.375, 0.875, 1.0, 1.0])


def bench_of(config: RunConfig, base: Path) -> Bench:
    """Return a bench of three kinds of small texts, or of two, in place of those that are installed."""
    draw = random.Random(0)
    patterns = {"python": "def {}_{}({}): return 0\n", "prose": "The {} and the {} are {}.\n", "c": "int {}({}, {});\n"}
    for name, pattern in patterns.items():
        (base / name).mkdir(parents=True)
        for number in range(30):
            lines = (pattern.format(*draw.choices(WORDS, k=3)) for _ in range(16))
            (base / name / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    assert isinstance(config.data, TextData)
    assert isinstance(config.data.source, MixedText)
    parts = {name: {"kind": "folder", "path": str(base / name)} for name in config.data.source.categories}
    source = {"kind": "mixed", "categories": parts}
    data = {**config.model_dump(mode="json")["data"], "source": source, "vocabulary": 300, "length": 16}
    mine = RunConfig.model_validate({**config.model_dump(mode="json"), "data": data})
    return Bench(mine, build_task(mine, cache=base / "cache", base=base), base / "twins")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return that of the quick form of ``unlearning``."""
    return bench_of(unlearning.arms("quick")[0].config, tmp_path_factory.mktemp("pair") / "texts")


def test_where_the_whole_network_is_routed_what_was_removed_left_no_trace(bench: Bench) -> None:
    """The old network learns as if it had never seen the removed category, but for the clipped gradient's length."""
    config = changed(bench.config, training={"clip": 1e6, "weight_decay": 0.0})
    mine = replace(bench, config=config)
    asked = unlearning.terms(mine)
    routed = removal.routed(mine, asked, hard=True, whole=True)
    never = removal.never_seen(mine, asked.kept(mine))
    for one, other in zip(routed.left.parameters(), never.left.parameters(), strict=True):
        # Rows of the removed category count in the mean over a step's rows, so gradients are of other size, which Adam
        # does not see.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


def test_rows_without_a_label_are_not_filtered_out(bench: Bench) -> None:
    whole = [bench.task.train_batch(step).categories for step in range(20)]
    some = [
        hard_neighbours.unlabelled(bench.task, 0.4, bench.config.seed).train_batch(step).categories
        for step in range(20)
    ]
    share = sum((each == 0).sum().item() for each in some) / sum((each == 0).sum().item() for each in whole)
    assert 0.4 < share < 0.8
    assert sum((each == 1).sum().item() for each in some) == sum((each == 1).sum().item() for each in whole)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("unlearning", ("dense twin", "routed, whole", "attribution", "loop", "loop, apart")),
        ("hard_neighbours", ("filtered, 40 %", "routed, 40 %")),
        ("fine_tuning", ("filtered twin", "new: adapters, base frozen", "adapters, base learns the rest")),
    ],
)
def test_arms_of_the_quick_forms_end_with_every_measure(name: str, some: tuple[str, ...], tmp_path: Path) -> None:
    study = find_study(name)
    arms = {arm.name: arm for arm in study.arms("quick")}
    known = bench_of(arms["dense twin"].config, tmp_path / "texts")
    for arm in map(arms.__getitem__, some):
        config = RunConfig.model_validate(
            {**arm.config.model_dump(mode="json"), "data": known.config.model_dump()["data"]}
        )
        found = arm.work(replace(known, config=config))
        assert {column.measure for column in study.columns} <= set(found)
        assert all(0.0 < value < 10.0 for key, value in found.items() if key.startswith(("before/", "attack-")))
        assert all(found[key] == 0.0 for key in ("tax", "gone", "relearned") if arm.name == "dense twin")


def test_what_is_new_in_fine_tuning_is_not_in_the_network_that_it_starts_from(bench: Bench) -> None:
    old, new = (fine_tuning._tuning(bench, new=new) for new in (False, True))
    losses = [removal.test_losses(SplitModel(each.task.build(), each.task.categories), each) for each in (old, new)]
    assert losses[0]["python"] < losses[1]["python"]
    assert torch.equal(old.task.train_batch(2).inputs, new.task.train_batch(2).inputs)

"""What fits a step into memory: low precision, parts of a step, layers that are computed again."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from attribution.measure import Moments, measure
from attribution.subject import Subject
from moeify.divergence import DivergedError
from moeify.loop import run
from moeify.models.families import unit_space
from moeify.recipe.config import RunConfig
from moeify.recipe.load import RecipeError, parse_recipe
from moeify.recipe.partition import UnitKind
from moeify.recipe.routing import Routing
from moeify.routed.gradients import GradientRouter
from moeify.routed.recompute import recompute
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.store import FolderStore
from moeify.training import Contestant, train
from moeify.world import Solo
from tests.networks import CATEGORIES, DECODER_CONFIGS, rows_for, tiny_autoencoder, tiny_decoder, tiny_resnet
from tests.oracles import gradients
from tests.test_divergence import Trouble
from tests.test_loop import DyingStore, KilledError, final, outcome
from tests.toy import CONFIG, TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

FAMILIES = {
    **{family: (lambda family=family: tiny_decoder(family)) for family in DECODER_CONFIGS},
    "autoencoder": lambda: tiny_autoencoder().float(),
    "resnet": lambda: tiny_resnet().float(),
}
TREE = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]}).split({1: [("a",), ("b",)]})
"""Five nodes: the core, two groups, two leaves of the first."""


def split(family: str, *, told: bool = False) -> SplitModel:
    """A split model of two levels, heads too where routed attention knows the family's."""
    network = FAMILIES[family]()
    sites = unit_space(network, get_args(UnitKind)).readers
    widths = {site.name: _widths(site.units) for site in sites}
    return SplitModel(network, CATEGORIES, Partition(TREE, widths), told=told)


def _widths(units: int) -> tuple[int, ...]:
    own = units // 6
    return (units - 4 * own, own, own, own, own) if own else (units - 1, 0, 0, 0, 1)


def shape_of(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten().double() for g in grads.values()])


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_rectangles_in_bfloat16_are_as_near_to_full_precision_as_the_masked_oracle(family: str, told: bool) -> None:
    model = split(family, told=told)
    inputs, categories = rows_for(model.network, 8).to(next(model.parameters()).dtype), torch.arange(4).repeat(2)
    if family not in ("autoencoder", "resnet"):
        inputs = inputs.long()
    exact, exact_grads = model(inputs, categories), shape_of(gradients(model, inputs, categories))
    model.autocast = torch.bfloat16
    found = {}
    for name in ("routed", "masked"):
        with model.masked() if name == "masked" else torch.enable_grad():
            out, grads = model(inputs, categories), gradients(model, inputs, categories)
        assert out.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert all(g.dtype == torch.float32 for g in grads.values())
        far = (
            (out - exact).norm().detach() / exact.norm().detach(),
            (shape_of(grads) - exact_grads).norm() / exact_grads.norm(),
        )
        found[name] = [float(each) for each in far]
    assert 0 < found["routed"][0] < max(0.02, 2 * found["masked"][0])
    assert 0 < found["routed"][1] < max(0.03, 2 * found["masked"][1])
    with torch.no_grad():
        once = model.eval()(inputs, categories)
    assert once.dtype == torch.float32


@pytest.mark.parametrize("family", list(DECODER_CONFIGS))
def test_layers_that_are_computed_again_give_the_same_bits(family: str) -> None:
    routing = Routing.model_validate({"gradients": "both", "routes": "soft"})
    kept, again = split(family).train(), split(family).train()
    recompute(again)
    inputs, categories = rows_for(kept.network, 8), torch.arange(4).repeat_interleave(2)
    runs, grads = [], []
    for model in (kept, again):
        torch.manual_seed(0)  # some families drop out
        layer, calls = model.space.sites[0], []
        reader = model.network.get_submodule(f"{layer.module}")
        reader.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        router = GradientRouter(routing, CATEGORIES, model.space.readers, 0)
        learning = router.learning(model.partition, categories, torch.ones(8, dtype=torch.bool))
        with model.learns(learning) if not model.whole_rows else torch.enable_grad():
            outputs = model(inputs, categories)
        outputs.square().sum().backward()  # when the routes say something else again
        runs.append(len(calls))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert runs in ([1, 2], [1, 1])  # where the layer itself is the site's module, hooks stay outside
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert torch.equal(gradient, grads[1][name]), name


def test_a_network_without_layers_cannot_forget_them() -> None:
    with pytest.raises(ValueError, match="Autoencoder has no decoder layers"):
        recompute(split("autoencoder"))


def with_training(config: dict[str, Any], **training: Any) -> RunConfig:
    return RunConfig.model_validate({**config, "training": {**config["training"], **training}})


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_step_in_parts_is_the_step_but_for_rounding(accumulate: int) -> None:
    routing = Routing.model_validate({"gradients": "both", "routes": "soft"})
    found = []
    for parts in (1, accumulate):
        config = with_training(TEXT_CONFIG, accumulate=parts)
        task = ToyTextTask(config)
        model = SplitModel(task.build().double(), task.categories)
        model.repartition(Partition(TREE, {site.name: _widths(site.units) for site in model.space.readers}))
        router = GradientRouter(routing, CATEGORIES, model.space.readers, 0)
        contestant, told = Contestant(model, config.training, router), []
        train(contestant, task, Solo(), config.training, 4, 2, lambda _, progress, told=told: told.append(progress))
        found.append((contestant.tensors(), told))
    (whole, one), (parted, other) = found
    for name, tensor in whole.items():
        torch.testing.assert_close(parted[name], tensor, rtol=1e-9, atol=1e-11)
    for mine, yours in zip(one, other, strict=True):
        assert mine.learning_rate == yours.learning_rate
        assert mine.loss == pytest.approx(yours.loss, rel=1e-9)


def test_a_part_of_a_step_that_goes_wrong_is_named() -> None:
    config = with_training(CONFIG, accumulate=4)
    for kind, said in (("nan", "the loss of 'c' is not finite"), ("gradient", "the gradient of 'c' is not finite")):
        task = Trouble(config, at=(3,), kind=kind, rows=slice(1))
        contestant = Contestant(SplitModel(task.build(), task.categories), config.training)
        with pytest.raises(DivergedError, match=f"step 3: {said}"):
            train(contestant, task, Solo(), config.training, 5, 9, lambda *_: None)
        assert contestant.step == 2
        assert all(p.grad is None for p in contestant.model.parameters())


LEAN: dict[str, Any] = {"autocast": "bfloat16", "accumulate": 2}


def test_a_run_in_low_precision_and_parts_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = with_training({**CONFIG, "controls": ["random", "told"]}, **LEAN)
    calm, stormy, result = FolderStore(tmp_path / "calm", 2), DyingStore(tmp_path / "stormy", 2), None
    wanted = run(config, ToyTask(config), store=calm)
    while result is None:
        stormy.lives = 4
        try:
            result = run(config, ToyTask(config), store=stormy)
        except KilledError:
            continue
    assert outcome(result) == outcome(wanted)
    assert result.active_fraction["mean"] == pytest.approx(0.55, abs=0.05)
    for arm, tensors in final(calm).items():
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, final(stormy)[arm][name]), (arm, name)
    full = run(with_training(config.model_dump(), autocast="none"), ToyTask(config))
    assert full.test_loss != wanted.test_loss
    assert full.test_loss["dense"]["a"] == pytest.approx(wanted.test_loss["dense"]["a"], rel=0.05)


def test_a_decoder_with_all_of_it_goes_on_to_the_same_bits() -> None:
    routing = Routing.model_validate({"gradients": "parameters", "routes": "hard"})
    config = with_training(TEXT_CONFIG, **LEAN, checkpoint_activations=True)
    task = ToyTextTask(config)

    def begun() -> Contestant:
        model = SplitModel(task.build(), task.categories, told=True)
        model.repartition(Partition(TREE, {site.name: _widths(site.units) for site in model.space.readers}))
        return Contestant(model, config.training, GradientRouter(routing, CATEGORIES, model.space.readers, 0))

    straight, first, second = begun(), begun(), begun()
    train(straight, task, Solo(), config.training, 4, 9, lambda *_: None)
    train(first, task, Solo(), config.training, 2, 9, lambda *_: None)
    second.load(first.tensors())
    second.step, second.health = 2, first.health
    train(second, task, Solo(), config.training, 4, 9, lambda *_: None)
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_attribution_in_bfloat16_adds_up_in_float64() -> None:
    config = toy_config()
    task = ToyTask(config)
    scores = []
    for autocast in (None, torch.bfloat16):
        model = SplitModel(copy.deepcopy(task.build()), task.categories)
        model.autocast = autocast
        subject = Subject(model.network, model.space.readers, task.categories, task.nats, task.sample, model)
        with model.masked():
            table = measure(subject, task.probe_batches(1, 32, 16), moments=Moments())
        scores.append(table.score("encoder.hidden", "fisher"))
    assert scores[1].dtype == torch.float64
    assert 0 < float((scores[1] - scores[0]).norm() / scores[0].norm()) < 0.05


GOOD = """
name: mine
data: {kind: digits}
model: {kind: autoencoder}
rounds: [{train: 10, recover: 20, separation: 0.4}]
"""


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ("{steps: 100, rows: 16, accumulate: 3}", "training.accumulate: got 3, wanted a divisor of 16"),
        (
            "{steps: 100, checkpoint_activations: true}",
            "training.checkpoint_activations: got true, wanted false",
        ),
        ("{steps: 100, autocast: float16}", "training.autocast: got 'float16', wanted one of 'none', 'bfloat16'"),
    ],
)
def test_what_cannot_apply_is_refused_in_a_line(training: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{GOOD}training: {training}\n", where="my.yaml")
    assert any(line.startswith(said) for line in caught.value.problems), caught.value.problems


def test_a_residual_network_takes_its_steps_whole() -> None:
    with pytest.raises(ValueError, match=r"training\.accumulate: got 2, wanted 1 beside model.kind 'resnet'"):
        RunConfig.model_validate(
            {
                **CONFIG,
                "data": {"kind": "images", "source": "cifar10", "categories": {"a": [0, 1], "b": [2, 3]}},
                "model": {"kind": "resnet"},
                "training": {"steps": 60, "accumulate": 2},
            }
        )

"""What each expert does, against the slow way: dense sums by hand, and the model run with units zeroed one by one."""

import base64

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moeify import loop
from moeify.examples import Picture, Portraits, Text
from moeify.portraits import EXCERPT, _as_picture, portraits
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_from_run
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.store import FolderStore
from moeify.task import Task
from tests.pictures import pictures, pictures_config
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def trained(config: RunConfig, task: Task, place: pytest.TempPathFactory) -> SplitModel:
    folder = place.mktemp("run")
    loop.run(config, task, store=FolderStore(folder, keep=1))
    return load_from_run(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[SplitModel, ToyTask]:
    config = toy_config()
    task = ToyTask(config)
    return trained(config, task, tmp_path_factory), task


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[SplitModel, ToyTextTask]:
    config = RunConfig.model_validate(TEXT_CONFIG)
    task = ToyTextTask(config)
    return trained(config, task, tmp_path_factory), task


def test_pictures_have_the_activity_and_the_rise_of_the_slow_way(images: tuple[SplitModel, ToyTask]) -> None:
    model, task = images
    found = portraits(model, task, 8, 16)
    tree, owned = model.partition.tree, model.partition.owned
    assert [each.expert for each in found.experts] == [n.name for n, u in zip(tree.nodes, owned, strict=True) if u]
    (one, two) = task.held_out_batches("validation", 8, 16)
    inputs, categories = (torch.cat([getattr(one, name), getattr(two, name)]) for name in ("inputs", "categories"))
    network = model.network
    with torch.no_grad():
        hidden = {}
        encoder, decoder = network.get_submodule("encoder"), network.get_submodule("decoder")
        x = inputs
        for name, block in (("encoder", encoder), ("decoder", decoder)):
            up, down = block.get_submodule("up"), block.get_submodule("down")
            mask = torch.stack([model.partition.active(f"{name}.hidden", task.categories[c]) for c in categories])
            hidden[name] = F.relu(up(x)) * mask
            x = down(hidden[name])
        loud = {name: hidden[name].abs() * network.get_parameter(f"{name}.down.weight").norm(dim=0) for name in hidden}
        total = sum(each.sum(1) for each in loud.values())
        intact = task.nats(model(inputs, categories), inputs)
        for portrait in found.experts:
            node = tree.index(portrait.expert)
            own = {name: (model.partition.owners(f"{name}.hidden") == node).double() for name in loud}
            share = sum((loud[name] * own[name]).sum(1) for name in loud) / total
            mine = torch.tensor([node in tree.route(task.categories[c]) for c in categories])
            assert portrait.activity == pytest.approx(share[mine].mean().item(), abs=1e-4)
            with model.routes.ablating([node]):
                rise = task.nats(model(inputs, categories), inputs) - intact
            assert not rise[~mine].any()
            assert portrait.rise == pytest.approx(rise[mine].mean().item(), abs=1e-3)
            shown = portrait.active[0]
            assert isinstance(shown, Picture)
            assert shown.size == (1, 10, 1)
            best_of_its_category = share[categories == task.categories.index(shown.category)].max().item()
            assert shown.activity == pytest.approx(best_of_its_category, abs=1e-4)
            row = int((share * mine).argmax())
            pixels = torch.frombuffer(bytearray(base64.b64decode(shown.pixels)), dtype=torch.uint8).double()
            scaled = (inputs[row] - inputs.min()) / (inputs.max() - inputs.min()) * 255
            torch.testing.assert_close(pixels, scaled.double().round())


def test_every_category_of_an_expert_is_shown_before_one_comes_twice(images: tuple[SplitModel, ToyTask]) -> None:
    model, task = images
    for each in portraits(model, task, 8, 16).experts:
        served = model.partition.tree.nodes[model.partition.tree.index(each.expert)].categories
        shown = [example.category for example in each.active]
        assert set(shown[: len(served)]) <= set(served)
        assert len(set(shown[: len(served)])) == min(len(served), len(shown))
        assert set(shown) <= set(served)


def test_a_token_is_missed_as_it_is_predicted_and_counted_as_a_target(text: tuple[SplitModel, ToyTextTask]) -> None:
    model, task = text
    found = portraits(model, task, 8, 16)
    batches = list(task.held_out_batches("validation", 8, 16))
    inputs, targets, categories = (
        torch.cat([getattr(b, name) for b in batches]) for name in ("inputs", "targets", "categories")
    )

    def each_nats() -> torch.Tensor:
        with torch.no_grad():
            return F.cross_entropy(model(inputs, categories).transpose(1, 2), targets, reduction="none").double()

    intact = each_nats()
    for portrait in found.experts:
        node = model.partition.tree.index(portrait.expert)
        with model.routes.ablating([node]):
            rise = each_nats() - intact
        mine = torch.tensor([node in model.partition.tree.route(task.categories[c]) for c in categories])
        assert portrait.rise == pytest.approx(rise[mine].mean().item(), abs=1e-3)
        for token in portrait.tokens:
            places = (targets == int(token.text)) & mine[:, None]
            assert token.count == int(places.sum())
            assert token.rise == pytest.approx(rise[places].mean().item(), abs=2e-3)
        assert [token.rise for token in portrait.tokens] == sorted((t.rise for t in portrait.tokens), reverse=True)
        for example in (*portrait.active, *portrait.missed):
            assert isinstance(example, Text)
            assert len(example.pieces) == len(example.activity) == len(example.rise) == min(EXCERPT, 12)
            row = [" ".join(map(str, each)) for each in inputs.tolist()].index("".join(example.pieces).strip())
            shifted = torch.cat([torch.zeros(1).double(), rise[row, :-1]])
            assert list(example.rise) == pytest.approx(shifted.tolist(), abs=2e-3)
            assert all(0.0 <= share <= 1.0 for share in example.activity)


def test_the_same_model_and_rows_give_the_same_portraits_and_leave_the_model_alone(
    text: tuple[SplitModel, ToyTextTask],
) -> None:
    model, task = text
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, again = portraits(model, task, 4, 16), portraits(model, task, 4, 5)
    assert [each.expert for each in one.experts] == [each.expert for each in again.experts]
    assert portraits(model, task, 4, 16) == one
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]
    assert Portraits.model_validate_json(one.model_dump_json()) == one


def test_shares_of_a_route_add_up_to_one(text: tuple[SplitModel, ToyTextTask]) -> None:
    model, task = text
    tree = model.partition.tree
    weights = {node.name: len(node.categories) / len(tree.categories) for node in tree.nodes}
    total = sum(each.activity * weights[each.expert] for each in portraits(model, task, 8, 16).experts)
    assert total == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("row", "size"),
    [
        ((16,), (4, 4, 1)),
        ((192,), (8, 8, 3)),
        ((12,), (1, 12, 1)),
        ((10,), (1, 10, 1)),
        ((3, 2, 5), (2, 5, 3)),
        ((2, 5), (2, 5, 1)),
    ],
)
def test_rows_of_numbers_become_pictures(row: tuple[int, ...], size: tuple[int, int, int]) -> None:
    values = torch.arange(float(np.prod(row))).view(row)
    found, picture = _as_picture(values)
    assert found == size == tuple(picture.shape)
    planes = values.view(size[2], size[0], size[1])
    assert all(torch.equal(picture[..., place], plane) for place, plane in enumerate(planes))


def test_channels_of_a_residual_network_are_shown_by_images() -> None:
    task = pictures(pictures_config())
    tree = ExpertTree.undivided(task.categories).split({0: [(category,) for category in task.categories]})
    model = SplitModel(task.build(), task.categories)
    leaves = len(task.categories)
    widths = {site.name: (site.units - leaves, *(1,) * leaves) for site in model.space.sites}
    model.repartition(Partition(tree, widths))
    found = portraits(model, task, 4, 16)
    assert [each.expert for each in found.experts] == [node.name for node in tree.nodes]
    (batch,) = task.held_out_batches("validation", 4, 4 * leaves)
    shape = tuple(batch.inputs.shape[1:])
    core, *experts = found.experts
    assert core.activity + np.mean([each.activity for each in experts]) == pytest.approx(1.0, abs=1e-3)
    with torch.no_grad():
        intact = task.nats(model(batch.inputs, batch.categories), batch.targets)
    for place, each in enumerate(experts):
        assert {example.category for example in (*each.active, *each.missed)} <= {each.expert}
        shown = each.active[0]
        assert isinstance(shown, Picture)
        assert shown.size == (shape[1], shape[2], shape[0])
        with torch.no_grad(), model.ablated(each.expert):
            rise = task.nats(model(batch.inputs, batch.categories), batch.targets) - intact
        mine = batch.categories == place
        assert each.rise == pytest.approx(rise[mine].mean().item(), abs=2e-4)

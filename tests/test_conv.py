import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.data.images import NORMS, load
from moeify.export.pruning import only, prune, without
from moeify.export.stock import extract, to_dense
from moeify.export.stock_moe import to_moe
from moeify.models.families import describe, entries, example_inputs, readers, rebuild, unit_space
from moeify.models.resnet import ResNet, build_resnet
from moeify.models.units import input_weight, output_weight, unit_parameters
from moeify.routed.conv import RoutedBlock
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_split, save_split
from moeify.splitting.partition import Partition
from moeify.splitting.surgery import permute
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, rows_for, tiny_resnet
from tests.oracles import assert_equals_the_masked_oracle
from tests.trees import partitions

SITES = list(unit_space(tiny_resnet()).readers)
TREE = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]}).split({1: [("a",), ("b",)]})
WIDTHS = {"layer1.0.channels": (2, 1, 1, 1, 1), "layer2.0.channels": (4, 2, 2, 1, 3)}
CATEGORIES_OF_ROWS = torch.tensor([2, 0, 3, 1, 1, 0, 2])


def split_of(partition: Partition | None = None, *, told: bool = False, seed: int = 0) -> SplitModel:
    partition = partition or Partition(TREE, WIDTHS)
    return SplitModel(tiny_resnet(seed), sorted(partition.tree.categories), partition, told=told)


def statistics(model: SplitModel) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.network.named_buffers() if b.is_floating_point()}


def trained_on(model: SplitModel, inputs: Tensor, categories: Tensor) -> SplitModel:
    """Return a copy whose running statistics have seen these rows once."""
    seen = copy.deepcopy(model).train()
    seen(inputs, categories)
    return seen


def test_the_layout_of_a_resnet() -> None:
    network = build_resnet((3, 32, 32), classes=10, width=16, blocks=3, stages=3, seed=0)
    assert sum(parameter.numel() for parameter in network.parameters()) == 269_722
    space = unit_space(network)
    assert [site.name for site in space.sites][::3] == [f"layer{stage}.0.channels" for stage in (1, 2, 3)]
    assert [site.units for site in space.sites] == [16] * 3 + [32] * 3 + [64] * 3
    seen: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0, 0].numel()}))
    with torch.no_grad():
        assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        network(torch.randn(2, 3, 32, 32))
    for name, _, places in network.blocks():
        assert seen[f"{name}.conv1"] == seen[f"{name}.conv2"] == places
    operations = sum(2 * network.get_parameter(f"{n}.weight").numel() * places for n, places in seen.items())
    model = SplitModel(network, CATEGORIES)
    assert model.active_flops(1) == dict.fromkeys(CATEGORIES, 1.0)
    half = SplitModel(
        build_resnet((3, 32, 32), classes=10, width=16, blocks=3, stages=3, seed=0),
        ("a", "b"),
        Partition(
            ExpertTree.undivided("ab").split({0: [("a",), ("b",)]}),
            {site.name: (0, site.units // 2, site.units // 2) for site in space.sites},
        ),
    )
    whole = operations + 2 * 640  # and the linear layer
    outside = 2 * 3 * 16 * 9 * 1024 + 2 * 640
    assert half.active_flops(1)["a"] == pytest.approx((outside + (whole - outside) / 2) / whole)


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_rectangles_equal_the_masked_oracle_and_so_do_running_statistics(
    data: st.DataObject, rows: int, seed: int, training: bool
) -> None:
    model = split_of(data.draw(partitions(SITES)), told=data.draw(st.booleans())).train(training)
    for bias in model.told:
        nn.init.normal_(bias)
    inputs = rows_for(model.network, rows, seed)
    categories = torch.randint(len(model.categories), (rows,), generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(model)
    model(inputs, categories)
    with other.masked():
        other(inputs, categories)
    torch.testing.assert_close(statistics(model), statistics(other), rtol=1e-9, atol=1e-12)
    assert_equals_the_masked_oracle(model, inputs, categories)


def test_a_channels_norm_sees_exactly_the_rows_of_the_categories_that_it_serves() -> None:
    model = split_of()
    inputs, before = rows_for(model.network, 7), statistics(model)
    after = statistics(trained_on(model, inputs, CATEGORIES_OF_ROWS))
    block = model.network.get_submodule("layer1.0")
    assert isinstance(block, RoutedBlock)
    network = tiny_resnet().train()
    maps = F.relu(network.bn1(network.conv1(inputs)))  # the norm of the stem sees all rows
    through = F.conv2d(maps, block.conv1.weight, padding=1)
    start = 0
    for node, width in zip(TREE.nodes, WIDTHS["layer1.0.channels"], strict=True):
        serves = torch.tensor([CATEGORIES[c] in node.categories for c in CATEGORIES_OF_ROWS.tolist()])
        mine = through[serves, start : start + width].transpose(0, 1).flatten(1)
        for what, now in (("mean", mine.mean(1)), ("var", mine.var(1))):
            name = f"layer1.0.bn1.running_{what}"
            wanted = 0.9 * before[name][start : start + width] + 0.1 * now
            torch.testing.assert_close(after[name][start : start + width], wanted, rtol=1e-9, atol=1e-12)
        start += width
    # Rows of c alone leave what c does not run as it was.
    only_c = statistics(trained_on(model, inputs, torch.full((7,), 2)))
    moved = only_c["layer1.0.bn1.running_mean"] != before["layer1.0.bn1.running_mean"]
    assert moved.tolist() == [True, True, False, False, False, True]


def test_undivided_it_is_the_dense_network_in_training_too() -> None:
    for training in (False, True):
        network = tiny_resnet().train(training)
        inputs = rows_for(network, 6)
        model = SplitModel(copy.deepcopy(network), CATEGORIES)
        assert list(model.network.state_dict()) == list(network.state_dict())
        torch.testing.assert_close(model(inputs, torch.tensor([0, 0, 1, 2, 3, 3])), network(inputs))
        own = {n: b for n, b in network.named_buffers() if b.is_floating_point()}
        torch.testing.assert_close(statistics(model), own)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_a_row_does_not_depend_on_its_neighbours_or_their_order(data: st.DataObject) -> None:
    model = split_of(data.draw(partitions(SITES, categories=4))).eval()
    inputs, categories = rows_for(model.network, 6), torch.tensor([2, 0, 3, 1, 1, 0])
    together = model(inputs, categories)
    for i in range(6):
        torch.testing.assert_close(
            together[i], model(inputs[i : i + 1], categories[i : i + 1])[0], rtol=1e-9, atol=1e-12
        )


def test_blocks_pass_gradcheck() -> None:
    model = split_of().train()
    block = model.network.get_submodule("layer2.0")
    model.routes.bounds = (0, 1, 2, 3, 4)
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()), fast_mode=True)


def test_a_permutation_moves_everything_of_a_channel_and_nothing_else() -> None:
    network = tiny_resnet()
    space, before = unit_space(network), {n: t.clone() for n, t in network.state_dict().items()}
    order = {site.name: torch.arange(site.units).roll(1) for site in space.sites}
    permute(network, None, space, order)
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {part.parameter for site in space.sites for part in site.slices}
    statistics = "layer1.0.bn1.running_var"
    assert torch.equal(network.state_dict()[statistics], before[statistics].roll(1))


@pytest.mark.parametrize("told", [False, True])
def test_what_is_extracted_for_a_category_is_a_dense_network_of_its_route(told: bool) -> None:
    model = split_of(told=told)
    inputs = rows_for(model.network, 7)
    model = trained_on(model, inputs, CATEGORIES_OF_ROWS).eval()
    for number, bias in enumerate(model.told):
        bias.data.copy_(torch.linspace(-1, 1 + number, bias.numel()).view_as(bias))
    for number, category in enumerate(CATEGORIES):
        wanted = model(inputs, torch.full((7,), number))
        dense = extract(model, category).double()
        assert isinstance(dense, ResNet)
        torch.testing.assert_close(dense(inputs), wanted, rtol=1e-5, atol=1e-5)
        active = [int(model.partition.active(site.name, category).sum()) for site in SITES]
        narrow = to_dense(model, [category], padded=False)
        assert [site.units for site in unit_space(narrow.network).sites] == active
        assert narrow.price.own == narrow.price.stored == sum(active)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_split_folder_gives_the_split_model_back_and_parts_of_it_do(tmp_path: Path, dtype: torch.dtype) -> None:
    model = split_of(told=True)
    inputs = rows_for(model.network, 7).float()
    model = trained_on(model.float(), inputs, CATEGORIES_OF_ROWS).eval()
    for bias in model.told:
        nn.init.normal_(bias)
    for parameter in model.network.parameters():
        parameter.data = parameter.data.to(dtype).float()
    save_split(model, tmp_path / "split", {}, dtype=dtype)
    loaded = load_split(tmp_path / "split")
    with torch.no_grad():
        wanted = model(inputs, CATEGORIES_OF_ROWS)
        torch.testing.assert_close(loaded(inputs, CATEGORIES_OF_ROWS), wanted, rtol=0, atol=0)
        part = prune(model, only(model.partition, ["a", "c"]))
        assert part.space.units < model.space.units
        mine = CATEGORIES_OF_ROWS % 2 == 0
        torch.testing.assert_close(part(inputs[mine], CATEGORIES_OF_ROWS[mine] // 2), wanted[mine])
        save_split(part, tmp_path / "part", {})
        again = load_split(tmp_path / "part")
        torch.testing.assert_close(again(inputs[mine], CATEGORIES_OF_ROWS[mine] // 2), wanted[mine])
        lacking = prune(model, without(model.partition, ["a"]))
        with model.ablated("a"):
            torch.testing.assert_close(
                lacking(inputs, CATEGORIES_OF_ROWS), model(inputs, CATEGORIES_OF_ROWS), rtol=1e-5, atol=1e-5
            )


def test_ablating_an_expert_silences_it_and_the_core_can_be_silent_too() -> None:
    model = split_of().eval()
    inputs = rows_for(model.network, 7)
    intact = model(inputs, CATEGORIES_OF_ROWS)
    with model.ablated("a+b"):
        wounded = model(inputs, CATEGORIES_OF_ROWS)
        with model.masked():
            torch.testing.assert_close(model(inputs, CATEGORIES_OF_ROWS), wounded)
    theirs = CATEGORIES_OF_ROWS > 1
    assert torch.equal(intact[theirs], wounded[theirs])
    assert bool((intact[~theirs] != wounded[~theirs]).any(1).all())
    with model.ablated("core"):
        silent = model(inputs, CATEGORIES_OF_ROWS)
        with model.masked():
            torch.testing.assert_close(model(inputs, CATEGORIES_OF_ROWS), silent)


def test_it_is_described_and_rebuilt() -> None:
    network = tiny_resnet().float().eval()
    again = rebuild(json.loads(json.dumps(describe(network)))).eval()
    again.load_state_dict(network.state_dict())
    inputs = example_inputs(network, rows=3, seed=0)
    torch.testing.assert_close(again(inputs), network(inputs), rtol=0, atol=0)
    narrow = prune(split_of(), only(Partition(TREE, WIDTHS), ["b"])).network
    assert describe(narrow)["inner"] == [4, 7]
    rebuild(describe(narrow)).load_state_dict(narrow.state_dict())


def test_units_are_weighed_and_named() -> None:
    network = tiny_resnet()
    one, two = unit_space(network).sites
    assert unit_parameters(network, one) == 6 * 9 + 2 + 6 * 9
    assert unit_parameters(network, two) == 6 * 9 + 2 + 12 * 9
    assert input_weight(network, two).shape == (12, 54)
    assert output_weight(network, two).shape == (12, 12 * 9)
    assert entries(network) == ()
    assert [site.reader for site in readers(network)] == ["layer1.0.conv2", "layer2.0.conv2"]
    with pytest.raises(ValueError, match="no stock MoE holds a network of family 'resnet'"):
        to_moe(split_of(), "glm4_moe", "a")


@pytest.mark.slow
def test_the_published_resnet_20_loads_and_classifies(published: Path) -> None:
    network = build_resnet((3, 32, 32), classes=10, width=16, blocks=3, stages=3, seed=0).eval()
    network.load_state_dict(load_file(published / "cifar10-resnets" / "resnet20.safetensors"))
    _, test = load("cifar10-jpeg", published)
    pixels, labels = test.pixels[::5], test.labels[::5]  # they lie class by class
    mean, deviation = (torch.tensor(values)[:, None, None] for values in NORMS["cifar10-jpeg"])
    model = SplitModel(network, ("a", "b"))
    right = 0
    with torch.no_grad():
        for first in range(0, 2000, 200):
            images = torch.from_numpy(pixels[first : first + 200]).float() / 255
            outputs = model((images - mean) / deviation, torch.arange(200) * 2 // 200)
            right += int((outputs.argmax(1).numpy() == labels[first : first + 200]).sum())
    assert 0.77 < right / 2000 < 0.85  # 81.03 % on all 10,000: images are through JPEG

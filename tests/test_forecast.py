"""What a run takes, foreseen without numbers, against what runs with numbers take."""

from pathlib import Path

import pytest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moeify.dry_run import FlopCounter, Sizes, _step, build, sizes, without_numbers
from moeify.events import MemoryTracker
from moeify.forecast import Forecast, forecast
from moeify.loop import _Loop, run
from moeify.models.pretrained import look
from moeify.recipe.config import RunConfig
from moeify.recipe.model import PretrainedModel
from moeify.stopping import never
from moeify.store import MemoryStore
from moeify.world import Solo
from tests.checkpoints import save_checkpoint
from tests.toy import TEXT_CONFIG, ToyTextTask, toy_config

TEXT = toy_config(**TEXT_CONFIG)
RESNET = toy_config(
    data={"kind": "images", "source": "cifar10-jpeg", "categories": {"a": [0, 1], "b": [2, 3], "c": [4, 5]}},
    model={"kind": "resnet", "width": 4, "blocks": 1},
)
BASE = Path()


def foreseen(config: RunConfig, categories: int = 4) -> Forecast:
    return forecast(config, sizes(config, BASE, 1, categories), categories)


@pytest.mark.parametrize("config", [toy_config(), TEXT, RESNET], ids=["autoencoder", "llama", "resnet"])
def test_tensors_without_numbers_take_what_real_ones_take(config: RunConfig) -> None:
    def step(network: nn.Module) -> tuple[int, int, int]:
        return _step(config, network, 6, {p.untyped_storage()._cdata for p in network.parameters()})

    real = step(build(config, BASE))
    with FakeTensorMode():
        assert step(without_numbers(config, BASE)) == real
    assert min(real) > 0


@pytest.mark.parametrize("family", ["gpt2", "phi3", "bert", "vit"])
def test_a_checkpoint_is_counted_by_its_configuration(family: str, tmp_path: Path) -> None:
    model = PretrainedModel(kind="pretrained", path=save_checkpoint(tmp_path / family, family))
    config = (RESNET if family == "vit" else TEXT).model_copy(update={"model": model})
    known = sizes(config, BASE, 1, 4)
    network = look(tmp_path / family).network()
    assert known.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert 0 < known.split < 1
    assert known.backward > known.forward > 0


def test_a_llama_of_seven_billion_parameters_is_counted_on_the_spot() -> None:
    config = toy_config(
        data={**TEXT_CONFIG["data"], "vocabulary": 32_000, "length": 2048},
        model={"kind": "llama", "hidden": 4096, "layers": 32, "heads": 32, "ffn": 11_008, "tie_embeddings": False},
        training={"steps": 100, "rows": 8},
        attribution={"rows": 32, "rows_at_once": 8},
    )
    known = sizes(config, BASE, 8, 4)
    assert known.parameters == 6_738_415_616  # of Llama 2 7B (Touvron et al. 2023)
    weights, attended = known.parameters - 32_000 * 4096 - 65 * 4096, 32 * 2 * 2048 * 4096  # a token looks at half
    assert known.forward == 2048 * (2 * weights + attended)
    assert known.backward == pytest.approx(2 * known.forward, rel=0.01)


def test_a_whole_run_takes_the_operations_foreseen() -> None:
    rounds = [{"train": 4, "recover": 2, "separation": 0.3}, {"train": 2, "recover": 2, "separation": 0.45}]
    few = {"validation_rows": 4, "test_rows": 4, "rows_at_once": 16}
    short = {"training": {"steps": 14, "rows": 16}, "rounds": rounds, "controls": ["random", "told"]}
    config = toy_config(**{**TEXT_CONFIG, **short, "attribution": {"rows": 8, "rows_at_once": 16}, "evaluation": few})
    with FlopCounter() as counter:
        run(config, ToyTextTask(config))
    assert foreseen(config).flops == pytest.approx(counter.flops, rel=0.12)


def test_memory_is_that_of_the_tensors_that_there_are() -> None:
    task, store = ToyTextTask(TEXT), MemoryStore()
    loop = _Loop(TEXT, task, Solo(), store, MemoryTracker(), None, never)
    loop.run()
    held = [tensor for arm in loop.state.arms.values() for tensor in arm.tensors().values() if tensor.numel() > 1]
    known = foreseen(TEXT)
    assert sum(tensor.nbytes for tensor in held) == known.memory.parameters + known.memory.optimizer
    assert known.checkpoint == known.memory.parameters + known.memory.optimizer
    table = loop._measure(loop.state.arms["split"].model, 1)
    sums = [tensor for site in table.sites.values() for tensor in site.tensors()]
    assert sum(tensor.nbytes for tensor in sums) == known.sizes.table


def test_workers_that_share_models_out_hold_a_part_each_and_one_layer() -> None:
    sharing = toy_config(**{**TEXT_CONFIG, "cluster": {"workers": 2, "parallel": {"kind": "fsdp"}}})
    known = sizes(sharing, BASE, 2, 4)
    whole, part = forecast(TEXT, known, 4).memory, forecast(sharing, known, 4).memory
    arms, half = len(sharing.arms), known.parameters // 2
    embedding = 300 * 16 + 16  # tied, and the last norm: more than a layer
    assert known.layer == embedding
    assert part.parameters == (arms * half + embedding) * 4
    assert part.optimizer == whole.optimizer // 2
    assert part.peak < whole.peak
    assert forecast(sharing, known, 4, workers=4).memory.optimizer == whole.optimizer // 4
    assert forecast(sharing, known, 4).checkpoint == forecast(TEXT, known, 4).checkpoint


def test_more_workers_keep_less_each_and_sharing_unequally_is_refused() -> None:
    one, two = (sizes(TEXT, BASE, workers, 4) for workers in (1, 2))
    assert two.kept < one.kept
    assert (two.forward, two.parameters, two.table) == (one.forward, one.parameters, one.table)
    with pytest.raises(ValueError, match=r"training\.rows: got 16, which 3 workers cannot share equally"):
        sizes(TEXT, BASE, 3, 4)


def test_what_saves_memory_in_training_is_foreseen() -> None:
    def with_training(**changes: object) -> Sizes:
        data = {**TEXT_CONFIG["data"], "length": 64}
        model = {**TEXT_CONFIG["model"], "layers": 6, "hidden": 32, "ffn": 128}
        training = {"steps": 60, "rows": 16, **changes}
        return sizes(toy_config(**{**TEXT_CONFIG, "data": data, "model": model, "training": training}), BASE, 1, 4)

    plain, parts = with_training(), with_training(accumulate=4)
    again, low = with_training(checkpoint_activations=True), with_training(autocast="bfloat16")
    assert parts.kept == pytest.approx(plain.kept / 4, rel=0.02)
    assert (parts.forward, parts.backward, parts.again) == (plain.forward, plain.backward, 0)
    assert again.kept < plain.kept / 2
    assert 0.5 * plain.forward < again.again < plain.forward
    assert (again.forward, again.backward, again.kept_measuring) == (plain.forward, plain.backward, plain.kept)
    assert 0.5 * plain.kept < low.kept < plain.kept


def test_deeper_rounds_and_fewer_controls_take_less() -> None:
    deep = TEXT.model_copy(update={"rounds": tuple(r.model_copy(update={"separation": 0.7}) for r in TEXT.rounds)})
    assert foreseen(deep).flops < foreseen(TEXT).flops
    bare = TEXT.model_copy(update={"controls": ()})
    assert foreseen(bare).flops < foreseen(TEXT).flops
    assert foreseen(bare).memory.peak < foreseen(TEXT).memory.peak

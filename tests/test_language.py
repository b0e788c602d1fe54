import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moeify.data.prepared import Tokens
from moeify.models.build import logits
from moeify.recipe.config import RunConfig
from moeify.task import Task
from moeify.tasks.build import build_task
from moeify.tasks.language import LanguageTask
from tests.texts import write_texts
from tests.toy import toy_config

LENGTH = 8


def config(**changes: object) -> RunConfig:
    source = {"kind": "jsonl", "path": "texts.jsonl"}
    return toy_config(
        **{
            "data": {"kind": "text", "source": source, "vocabulary": 300, "length": LENGTH, "test": 0.2},
            "model": {"kind": "llama", "hidden": 16, "layers": 1, "heads": 2, "ffn": 32},
            "training": {"steps": 60, "rows": 7},
            **changes,
        }
    )


def stream(size: int, base: int) -> np.ndarray:
    """Return a stream that tells where it was cut: its numbers rise from ``base``, which no other stream has."""
    return np.arange(base, base + size, dtype=np.uint16)


def tokens(train: int = 200, held_out: tuple[int, int, int] = (25, 26, 81)) -> Tokens:
    return Tokens(
        categories=("a", "b", "c"),
        streams={
            "train": tuple(stream(train, 1000 * number) for number in (1, 2, 3)),
            "validation": tuple(stream(size, 1000 * (4 + i)) for i, size in enumerate(held_out)),
            "test": tuple(stream(size, 1000 * (7 + i)) for i, size in enumerate(held_out)),
        },
        sizes={"train": (1, 1, 1), "validation": (50, 60, 70), "test": (50, 60, 70)},
        vocabulary=10_000,
        end=0,
        assets={"tokenizer.json": b"{}"},
    )


@pytest.fixture(scope="module")
def task() -> LanguageTask:
    return LanguageTask(config(), tokens())


# --- rows ---------------------------------------------------------------------------------------------


def test_a_step_is_the_same_each_time_and_steps_and_seeds_differ(task: LanguageTask) -> None:
    one, again = task.train_batch(3), LanguageTask(config(), tokens()).train_batch(3)
    assert torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.categories, again.categories)
    assert not torch.equal(one.inputs, task.train_batch(4).inputs)
    assert not torch.equal(one.inputs, LanguageTask(config(seed=1), tokens()).train_batch(3).inputs)


def test_targets_are_the_tokens_after_the_inputs_in_the_stream_of_the_category(task: LanguageTask) -> None:
    batch = task.train_batch(0)
    assert batch.inputs.shape == batch.targets.shape == (7, LENGTH)
    assert batch.inputs.dtype == batch.targets.dtype == batch.categories.dtype == torch.int64
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert torch.equal(batch.inputs[:, 0] // 1000 - 1, batch.categories)
    assert batch.ids.tolist() == list(range(7))
    assert task.train_batch(5).ids.tolist() == list(range(35, 42))


def test_windows_that_start_in_the_same_piece_of_a_stream_are_one_example(task: LanguageTask) -> None:
    for batch in map(task.train_batch, range(20)):
        assert batch.examples is not None
        for category, example, row in zip(batch.categories, batch.examples, batch.inputs, strict=True):
            stream, length = task._tokens.streams["train"][int(category)], task.units_per_row
            starts = range(int(example) * length, (int(example) + 1) * length)
            assert any(np.array_equal(stream[start : start + length], row.numpy()) for start in starts)


def test_categories_share_a_step_equally_and_lie_in_order(task: LanguageTask) -> None:
    counts = torch.stack([torch.bincount(task.train_batch(step).categories, minlength=3) for step in range(60)])
    assert set(counts.flatten().tolist()) == {2, 3}
    assert bool((counts.sum(1) == 7).all())
    assert bool((counts.sum(0) > 120).all())
    categories = task.train_batch(1).categories
    assert bool((categories[1:] >= categories[:-1]).all())


def test_windows_reach_from_the_first_to_the_last_token_of_a_stream() -> None:
    task = LanguageTask(config(), tokens(train=LENGTH + 3))
    starts = {int(row[0]) for step in range(100) for row in task.train_batch(step).inputs}
    assert starts == {base + offset for base in (1000, 2000, 3000) for offset in range(3)}


def test_probe_rows_are_train_rows_that_change_with_the_round(task: LanguageTask) -> None:
    batches = list(task.probe_batches(0, 10, 6))
    assert [len(batch.ids) for batch in batches] == [6] * 5
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(30))
    assert all(torch.bincount(batch.categories, minlength=3).tolist() == [2, 2, 2] for batch in batches)
    inputs = torch.cat([batch.inputs for batch in batches])
    assert bool((inputs < 4000).all())
    others = torch.cat([batch.inputs for batch in task.probe_batches(1, 10, 6)])
    assert not torch.equal(inputs, others)
    again = torch.cat([batch.inputs for batch in task.probe_batches(0, 10, 6)])
    assert torch.equal(inputs, again)
    steps = torch.cat([task.train_batch(step).inputs for step in range(3)])
    assert not torch.equal(inputs[:, 0].sort().values[:21], steps[:, 0].sort().values)


def test_held_out_rows_lie_side_by_side_and_stay_the_same(task: LanguageTask) -> None:
    batches = list(task.held_out_batches("validation", 100, 4))
    assert [len(batch.ids) for batch in batches] == [4, 4, 4, 4]
    targets = torch.cat([batch.targets for batch in batches]).flatten().tolist()
    # 25, 26 and 81 tokens: 3, 3 and 10 windows of 8, each target once.
    assert sorted(targets) == [*range(4001, 4025), *range(5001, 5025), *range(6001, 6081)]
    for batch in batches:
        assert bool((batch.categories[1:] >= batch.categories[:-1]).all())
    again = list(task.held_out_batches("validation", 100, 4))
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(batches, again, strict=True))


def test_fewer_held_out_rows_are_spread_over_the_split(task: LanguageTask) -> None:
    (batch,) = task.held_out_batches("test", 5, 100)
    assert torch.bincount(batch.categories).tolist() == [3, 3, 5]
    assert batch.inputs[batch.categories == 2, 0].tolist() == [9000, 9016, 9032, 9048, 9064]


def test_a_split_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the validation split of category 'b' has 8 tokens.*data\.length, 8"):
        LanguageTask(config(), tokens(held_out=(9, 8, 9)))
    assert len(list(LanguageTask(config(), tokens(held_out=(9, 9, 9))).held_out_batches("test", 4, 1))) == 3


def test_a_task_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'autoencoder'"):
        LanguageTask(toy_config(), tokens())


# --- loss and samples ---------------------------------------------------------------------------------


def test_nats_are_the_summed_losses_of_every_token(task: LanguageTask) -> None:
    outputs = torch.randn(3, LENGTH, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(11, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = torch.tensor(
        [
            sum(-math.log(float(outputs[row, at].softmax(-1)[targets[row, at]])) for at in range(LENGTH))
            for row in range(3)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(task.nats(outputs, targets), expected)
    torch.testing.assert_close(task.nats(outputs.float(), targets).double(), expected, rtol=1e-5, atol=1e-5)


def test_nats_have_the_gradient_of_the_loss(task: LanguageTask) -> None:
    outputs = torch.randn(2, LENGTH, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (2, LENGTH))
    task.nats(outputs, targets).sum().backward()
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, outputs.detach().softmax(-1) - F.one_hot(targets, 5))


def test_a_sample_follows_the_distribution(task: LanguageTask) -> None:
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    outputs = chances.log().clamp(min=-1e9).expand(2000, LENGTH, 5)
    drawn = task.sample(outputs, range(2000))
    assert drawn.shape == (2000, LENGTH)
    assert drawn.dtype == torch.int64
    shares = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    torch.testing.assert_close(shares, chances, rtol=0, atol=0.02)
    assert shares[1] == shares[4] == 0
    at_first = torch.bincount(drawn[:, 0], minlength=5) / 2000
    torch.testing.assert_close(at_first, chances, rtol=0, atol=0.05)


def test_a_sample_does_not_depend_on_how_rows_are_shared_out(task: LanguageTask) -> None:
    outputs, seeds = torch.randn(6, LENGTH, 50), [11, 5, 7, 11, 3, 2]
    whole = task.sample(outputs, seeds)
    for part in (slice(0, None, 2), slice(1, None, 2), slice(4, 5)):
        assert torch.equal(task.sample(outputs[part], seeds[part]), whole[part])
    state = torch.random.get_rng_state()
    assert torch.equal(task.sample(outputs, seeds), whole)
    assert torch.equal(torch.random.get_rng_state(), state)
    alike = task.sample(outputs[:1].expand(2, -1, -1), [4, 4])
    assert torch.equal(alike[0], alike[1])


def test_bits_per_byte_by_hand(task: LanguageTask) -> None:
    bits = task.bits_per_byte({"a": math.log(2), "b": 2 * math.log(2), "c": 0.0}, "validation")
    assert bits is not None
    assert bits == pytest.approx({"a": 25 / 50, "b": 2 * 26 / 60, "c": 0.0})


# --- the whole of it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Task:
    base = tmp_path_factory.mktemp("texts")
    write_texts(base)
    return build_task(config(), cache=base / "cache", base=base)


def test_a_recipe_becomes_a_task_whose_network_takes_its_rows(prepared: Task) -> None:
    assert prepared.categories == ("code", "prose")
    assert (prepared.unit, prepared.units_per_row) == ("token", LENGTH)
    network, batch = prepared.build(), prepared.train_batch(0)
    outputs = logits(network, batch.inputs)
    assert outputs.shape == (7, LENGTH, 300)
    nats = prepared.nats(outputs, batch.targets) / LENGTH
    assert bool((abs(nats - math.log(300)) < 1).all())
    assert prepared.sample(outputs, range(7)).max() < 300
    assert set(prepared.assets()) == {"tokenizer.json", "tokenizer_config.json"}


def test_the_network_is_the_same_each_time_and_leaves_randomness_alone(prepared: Task) -> None:
    state = torch.random.get_rng_state()
    one, other = (prepared.build().state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss_on_held_out_text(prepared: Task) -> None:
    network = prepared.build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)

    def held_out() -> float:
        with torch.no_grad():
            nats = [
                prepared.nats(logits(network, b.inputs), b.targets) for b in prepared.held_out_batches("test", 8, 16)
            ]
        return float(torch.cat(nats).mean()) / LENGTH

    before = held_out()
    for step in range(60):
        batch = prepared.train_batch(step)
        optimizer.zero_grad()
        prepared.nats(logits(network, batch.inputs), batch.targets).mean().backward()
        optimizer.step()
    assert held_out() < before - 1


def test_the_cache_gives_the_same_rows(prepared: Task, tmp_path: Path) -> None:
    write_texts(tmp_path)
    other = build_task(config(), cache=tmp_path / "cache", base=tmp_path)
    again = build_task(config(), cache=tmp_path / "cache", base=tmp_path)
    for step in range(3):
        rows = [task.train_batch(step).inputs for task in (prepared, other, again)]
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])

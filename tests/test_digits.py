import pytest
import torch
from torch import Tensor

from moeify.recipe.config import RunConfig
from moeify.task import HeldOut
from moeify.tasks.digits import DigitsTask
from tests.toy import toy_config


@pytest.fixture(scope="module")
def task() -> DigitsTask:
    return DigitsTask(config())


def config(**data: float) -> RunConfig:
    return toy_config(data={"kind": "digits", **data}, training={"steps": 60, "rows": 24, "learning_rate": 0.01})


def rows_of(task: DigitsTask, split: HeldOut) -> set[bytes]:
    batches = list(task.held_out_batches(split, 10**6, 32))
    return {row.numpy().tobytes() for batch in batches for row in batch.inputs}


def test_a_step_is_the_same_each_time_and_steps_differ(task: DigitsTask) -> None:
    one, again, other = task.train_batch(3), task.train_batch(3), task.train_batch(4)
    assert torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.categories, again.categories)
    assert not torch.equal(one.inputs, other.inputs)


def test_digits_share_a_step_equally_and_lie_in_order(task: DigitsTask) -> None:
    seen = torch.zeros(10)
    for step in range(50):
        counts = torch.bincount(task.train_batch(step).categories, minlength=10)
        assert counts.sum() == 24
        assert set(counts.tolist()) == {2, 3}
        seen += counts
    assert bool((seen > 100).all())
    categories = task.train_batch(0).categories
    assert bool((categories[1:] >= categories[:-1]).all())


def test_an_image_is_the_same_example_whenever_it_is_drawn(task: DigitsTask) -> None:
    seen: dict[tuple[int, int], bytes] = {}
    for batch in map(task.train_batch, range(200)):
        assert batch.examples is not None
        for category, example, row in zip(
            batch.categories.tolist(), batch.examples.tolist(), batch.inputs, strict=True
        ):
            assert seen.setdefault((category, example), row.numpy().tobytes()) == row.numpy().tobytes()
    assert len(seen) == len(set(seen.values())) > 900
    half = batch.take(torch.arange(23, -1, -1)).shard(1, 2)
    assert half.examples is not None
    assert half.examples.tolist() == batch.examples.flip(0)[1::2].tolist()


def test_no_image_lies_in_two_splits(task: DigitsTask) -> None:
    train = {row.numpy().tobytes() for images in task._images["train"] for row in images}
    validation, test = rows_of(task, "validation"), rows_of(task, "test")
    assert len(train) + len(validation) + len(test) == 1797
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_probes_take_each_row_of_each_digit_once(task: DigitsTask) -> None:
    batches = list(task.probe_batches(1, 12, 16))
    assert [len(batch.ids) for batch in batches] == [16] * 7 + [8]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(120))
    counts = torch.bincount(torch.cat([batch.categories for batch in batches]))
    assert counts.tolist() == [12] * 10
    assert len({row.numpy().tobytes() for batch in batches for row in batch.inputs}) == 120
    assert all(len(set(batch.categories.tolist())) >= 8 for batch in batches)


def test_the_loss_is_the_bernoulli_likelihood_of_each_pixel(task: DigitsTask) -> None:
    logits, pixels = torch.randn(3, 64), torch.rand(3, 64)
    p = torch.sigmoid(logits)
    slow: Tensor = -(pixels * p.log() + (1 - pixels) * (1 - p).log()).sum(1)
    torch.testing.assert_close(task.nats(logits, pixels), slow)


def test_sampled_labels_do_not_depend_on_sharding_and_follow_the_prediction(task: DigitsTask) -> None:
    logits, seeds = torch.randn(400, 64) * 0 + torch.linspace(-2, 2, 64), list(range(400))
    whole = task.sample(logits, seeds)
    assert torch.equal(whole[1::2], task.sample(logits[1::2], seeds[1::2]))
    assert (whole.mean(0) - torch.sigmoid(logits[0])).abs().max() < 0.12


def test_a_split_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="without images"):
        DigitsTask(config(validation=0.001))

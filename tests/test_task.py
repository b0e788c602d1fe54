import dataclasses
from collections.abc import Iterator

import torch

from moeify.task import Batch, HeldOut, content, data_hash
from tests.toy import ToyTask, toy_config


class Changed(ToyTask):
    """One value of the last test row is another."""

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        *most, last = super().held_out_batches(split, rows, rows_at_once)
        yield from most
        targets = last.targets.clone()
        targets[-1, -1] += 1e-6
        yield dataclasses.replace(last, targets=targets)


def test_the_same_data_has_the_same_hash_and_one_other_value_another() -> None:
    config = toy_config()
    found = data_hash(ToyTask(config), config)
    assert len(found) == 64
    assert data_hash(ToyTask(config), config) == found
    assert data_hash(Changed(config), config) != found
    fewer = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"test_rows": 8})})
    assert data_hash(ToyTask(config), fewer) != found


def test_the_bytes_of_a_tensor_do_not_depend_on_how_it_lies_in_memory() -> None:
    whole = torch.arange(12).view(3, 4)
    assert content(whole[:, ::2]) == content(whole[:, ::2].contiguous()) == whole[:, ::2].numpy().tobytes()
    one = torch.arange(4)[::2][:1]  # one row, as the last batch of a split may have; strides of 2
    assert content(one) == content(torch.tensor([0]))

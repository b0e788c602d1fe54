import pytest
import torch

from benchmarks.random_splits import Size, mixed_rows, pair
from moeify.roofline import flops
from moeify.timing import ratio, seconds

SIZE = Size(16, 64, 4, 2, vocabulary=32, length=8)


@pytest.mark.parametrize("widths", ["equal", "ragged"])
def test_what_a_split_model_runs_are_the_operations_of_active_units(widths: str) -> None:
    dense, split = pair(SIZE, widths, ("ffn", "heads"))
    tokens, categories = mixed_rows(SIZE, 8)
    shares = split.active_flops(SIZE.length).values()
    heads = [site.name for site in split.space.sites if site.kind == "heads"]
    active = [float(split.partition.active(name, c).double().mean()) for name in heads for c in split.categories]
    whole = flops(torch.no_grad()(lambda: dense(tokens)))
    routed = flops(torch.no_grad()(lambda: split(tokens, categories)))
    half = SIZE.layers * 2 * SIZE.hidden * SIZE.length * tokens.numel()
    """Of attention, which is whole where it is counted, and the half that is causal in ``active_flops``."""
    assert routed == pytest.approx((whole - half) * sum(shares) / 4 + half * sum(active) / len(active))


def test_a_step_runs_what_the_backward_pass_of_active_units_needs() -> None:
    dense, split = pair(SIZE, "ragged")
    tokens, categories = mixed_rows(SIZE, 8)
    split(tokens, categories)
    name = "model.layers.0.mlp"
    x = torch.randn(8, SIZE.length, SIZE.hidden, requires_grad=True)
    blocks = (dense.get_submodule(name), split.network.get_submodule(name))
    whole, routed = (flops(lambda block=block: block(x).sum().backward()) for block in blocks)
    site = split.space.sites[0].name
    shares = [float(split.partition.active(site, c).double().mean()) for c in split.categories]
    assert whole == 3 * 3 * 2 * x.numel() * SIZE.ffn
    assert routed == pytest.approx(whole * sum(shares) / 4)


def test_rivals_take_turns_and_ratios_are_within_turns() -> None:
    ran: list[str] = []
    times = seconds({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, turns=3, at_least=0.0)
    assert ran == ["a", "a", "b", "b", *"abbaab"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0


@pytest.mark.parametrize("widths", ["equal", "ragged"])
def test_partitions_are_about_44_percent_active(widths: str) -> None:
    _, split = pair(Size(16, 512, 4, 8, vocabulary=32, length=8), widths)
    fractions = split.partition.active_fraction.values()
    assert sum(fractions) / len(fractions) == pytest.approx(0.4375, abs=0.05)
    assert (len(set(split.partition.widths.values())) == 1) == (widths == "equal")

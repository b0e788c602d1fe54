"""What measuring every unit against every category costs, over a plain forward and backward pass of the same batches.

A Llama of 6 layers with FFN neurons and attention heads as units, rows of four categories. Plain: a training step's
forward and backward pass, parameter gradients included. Times are medians of ratios of alternating passes in one
process, by the clock and by the processor's time, which other work on the machine does not lengthen; memory is the peak
of live tensor memory above the weights, from the profiler's allocation events.

The full benchmark takes about two minutes of two idle cores; --quick a smaller network, --gpu a larger one on a GPU,
whose memory is what its allocator says.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from attribution.measure import Moments, measure
from attribution.roots import categorical_root
from attribution.subject import Rows, Subject
from benchmarks.report import Cell, Figure, gpu_parser, report
from moeify.device import finish, take_device
from moeify.models.build import build_llama
from moeify.models.families import readers
from moeify.recipe.model import LlamaModel
from moeify.tasks.language import token_nats
from moeify.world import CPU

CATEGORIES = ("a", "b", "c", "d")
VOCABULARY, LENGTH, ROWS, BATCHES = 4096, 128, 16, 1


def main() -> None:
    """Time each way against the plain passes, and compare its memory."""
    asked = gpu_parser(__doc__).parse_args()
    device = take_device(int(asked.gpu))
    size, repeats = ((32, 2, 128), 3) if asked.quick else ((256, 6, 1024), 5)
    if asked.gpu and not asked.quick:
        size = (1024, 8, 4096)
    hidden, layers, ffn = size
    model = LlamaModel(kind="llama", hidden=hidden, layers=layers, heads=4, ffn=ffn)
    network = build_llama(model, vocabulary=VOCABULARY, length=LENGTH, end=0, seed=0).eval().to(device)
    sites = readers(network)
    batches = make_batches(ROWS * (4 if asked.gpu else 1), BATCHES, device)

    def subject(sampled: bool) -> Subject:
        return Subject(network, sites, CATEGORIES, token_nats, root=categorical_root if sampled else None)

    ways: dict[str, Callable[[], object]] = {
        "plain forward + backward": lambda: plain(network, batches),
        "true labels (taylor, |g a|, empirical Fisher)": lambda: measure(subject(False), batches),
        "and the model's own labels (Fisher, report)": lambda: measure(subject(True), batches),
        "and second moments, sketched to 128": lambda: measure(subject(True), batches, moments=Moments(128)),
        "and second moments, exact": lambda: measure(subject(True), batches, moments=Moments()),
        "captum, all layers at once": lambda: captum(network, batches, [s.reader for s in sites], together=True),
        "captum, one layer at a time": lambda: captum(network, batches, [s.reader for s in sites], together=False),
    }
    base = next(iter(ways))
    ratios, cpu = time_ratios(ways, base, repeats, device)
    peaks = {name: peak_bytes(way, device) for name, way in ways.items()}
    rows: list[dict[str, Cell]] = [
        {
            "way": name,
            "time / plain": statistics.median(ratios[name]),
            "lowest": min(ratios[name]),
            "highest": max(ratios[name]),
            "cpu / plain": statistics.median(cpu[name]),
            "memory / plain": peaks[name] / peaks[base],
            "peak MB": peaks[name] / 1e6,
        }
        for name in ways
    ]
    true, sampled, slow = list(ways)[1], list(ways)[2], list(ways)[-1]
    figures = [
        Figure("cost_ratio", statistics.median(ratios[true]), "<= 1.15"),
        Figure("cost_ratio_sampled", statistics.median(ratios[sampled]), "<= 1.15"),
        Figure("cpu_ratio", statistics.median(cpu[true]), "<= 1.15"),
        Figure("cpu_ratio_sampled", statistics.median(cpu[sampled]), "<= 1.15"),
        Figure("memory_ratio", peaks[true] / peaks[base], "<= 1.1"),
        Figure("memory_ratio_sampled", peaks[sampled] / peaks[base], "<= 1.1"),
        Figure("cost_ratio_captum_one_layer", statistics.median(ratios[slow]), "for comparison"),
        Figure("memory_ratio_captum_one_layer", peaks[slow] / peaks[base], "for comparison"),
    ]
    report("attribution_cost", rows, figures, asked.json, quick=asked.quick)


def make_batches(rows: int, count: int, device: torch.device = CPU) -> list[Rows]:
    """Return random tokens in category order."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        tokens = torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=generator).to(device)
        categories = torch.arange(rows) * len(CATEGORIES) // rows
        found.append(Rows(tokens[:, :-1], tokens[:, 1:], categories, torch.arange(rows) + number * rows))
    return found


def plain(network: nn.Module, batches: Sequence[Rows]) -> None:
    """Run forward and backward passes with parameter gradients."""
    for batch in batches:
        network.zero_grad(set_to_none=True)
        outputs: Any = network(batch.inputs)
        token_nats(outputs.logits, batch.targets).sum().backward()
    network.zero_grad(set_to_none=True)


def captum(network: nn.Module, batches: Sequence[Rows], readers: Sequence[str], *, together: bool) -> None:
    """Run Captum's gradient x activation at the inputs of ``readers``, by category, as its users add it up."""
    from captum.attr import LayerGradientXActivation

    layers = [network.get_submodule(name) for name in readers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches:

            def loss(inputs: Tensor, batch: Rows = batch) -> Tensor:
                outputs: Any = network(inputs)
                return token_nats(outputs.logits, batch.targets)

            for chosen in [layers] if together else [[layer] for layer in layers]:
                found = LayerGradientXActivation(loss, chosen).attribute(batch.inputs, attribute_to_layer_input=True)
                for each in found:
                    by_row = (each[0] if isinstance(each, tuple) else each).detach().sum(1)
                    for category in range(len(CATEGORIES)):
                        by_row[batch.categories == category].double().sum(0)


Ratios = dict[str, list[float]]
"""Of each way: its time over the base's of the same turn, turn by turn."""


def time_ratios(
    ways: dict[str, Callable[[], object]], base: str, repeats: int, device: torch.device = CPU
) -> tuple[Ratios, Ratios]:
    """Run all ways in turn, ``repeats`` times, and return their ratios by the clock and by the processor's time."""
    clock: Ratios = {name: [] for name in ways}
    cpu: Ratios = {name: [] for name in ways}
    for way in ways.values():
        way()
    finish(device)
    for _ in range(repeats):
        taken = {}
        for name, way in ways.items():
            started, busy = time.perf_counter(), time.process_time()
            way()
            finish(device)
            taken[name] = time.perf_counter() - started, time.process_time() - busy
        for name in ways:
            clock[name].append(taken[name][0] / taken[base][0])
            cpu[name].append(taken[name][1] / taken[base][1])
    return clock, cpu


def peak_bytes(way: Callable[[], object], device: torch.device = CPU) -> int:
    """Return the peak of tensor memory that ``way`` holds beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        way()
    assert watched.profiler is not None
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()

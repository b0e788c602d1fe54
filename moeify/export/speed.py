"""How fast an export is: against the dense network of the same shape, and against what its saved work allows.

Both sides do the same work (``moeify.export.works``) in turns, in one process and on as many threads as torch has; an
export is what its files give, in their dtype, and so is the dense network, whose weights are drawn: they make no
difference to its speed. Medians over turns of a ratio within each turn, so that a busy machine slows both alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moeify.export import gguf_file, onnx_file
from moeify.export.limits import Limit, limit_of
from moeify.export.speeds import Speed, Speeds
from moeify.export.stock import without_bars
from moeify.export.works import Work, dense_run, prompts_of, routed_run, works_of
from moeify.models.families import describe, example_inputs, rebuild, transformer_of
from moeify.models.fused import closed
from moeify.models.transformer import config_of
from moeify.routed.split_model import SplitModel
from moeify.timing import Run, ratio, seconds

TURNS = 5
AT_LEAST = 0.1
"""Seconds of one model's turn."""
_WRITTEN = 64
"""Tokens that llama.cpp writes in a turn, which it times by itself."""
FILE = "speed.json"
"""What an export's folder holds of it."""
_PROGRAMS = Path(__file__).parent


def dense_like(whole: SplitModel, dtype: torch.dtype) -> nn.Module:
    """Return a dense network of a split model's shape, of the stock class, with weights that are drawn."""
    with torch.random.fork_rng(devices=[]):
        return closed(rebuild(describe(whole.network))).to(dtype).eval()


def of_stock(split: SplitModel, whole: SplitModel, folder: Path, category: str | None, dtype: torch.dtype) -> Speeds:
    """Time what plain ``transformers`` loads from a folder, which runs the route of a category.

    None: routers choose, so its limit is that of all categories, or of the longest route where there is one row.

    ``split``: the split model that the export equals; ``whole``: of which that is a part, and which the dense network
    is as large as.
    """
    import transformers

    family = transformer_of(whole.network)
    assert family is not None
    auto = getattr(transformers, family.auto)
    with without_bars():
        export = auto.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False).eval()
    dense = dense_like(whole, dtype)
    longest = category or max(split.categories, key=split.partition.active_units)
    rows = [
        row
        for work in works_of(whole.network)
        for route in [split.categories if category is None and work.batch > 1 else (longest,)]
        for row in _taking_turns(dense, split, work, {route: dense_run(export, work)})
    ]
    return _speeds(rows, whole, dtype)


def of_split(split: SplitModel, whole: SplitModel) -> Speeds:
    """Time a split model in this package's runtime: rows of the longest route and, among many, of all categories."""
    dense = dense_like(whole, torch.float32)
    longest = max(split.categories, key=split.partition.active_units)
    rows: list[Speed] = []
    for work in works_of(whole.network):
        asked: list[tuple[str, ...]] = [(longest,)]
        if work.batch > 1 and len(split.categories) > 1:
            asked.append(split.categories)
        rows += _taking_turns(dense, split, work, {each: routed_run(split, work, each) for each in asked})
    return _speeds(rows, whole, torch.float32)


def of_gguf(
    split: SplitModel, whole: SplitModel, file: Path, assets: Mapping[str, bytes], category: str, dtype: torch.dtype
) -> Speeds:
    """Time a GGUF file in llama.cpp, a row at a time, against the dense network's file of the same dtype."""
    dense = dense_like(whole, torch.float32)
    works = [work for work in works_of(whole.network) if work.batch == 1]
    with tempfile.TemporaryDirectory() as place:
        rival = Path(place) / "dense.gguf"
        gguf_file.write(dense, assets, rival, dtype=dtype, name="dense")
        asked = replace(works[0], new=_WRITTEN)
        found = gguf_rates([rival, file], asked, config_of(dense).vocab_size, turns=TURNS)
    rows = []
    for number, work in enumerate(works):
        times = {name: [1.0 / rate for rate in found[path][number]] for name, path in (("", rival), ("own", file))}
        rows.append(_speed(work, (category,), times, "own", 1, limit_of(dense, split, work, (category,))))
    return _speeds(rows, whole, dtype)


def refuse_gguf(whole: SplitModel) -> None:
    """Raise ValueError where the dense network that a GGUF file is to be timed against cannot be one itself."""
    if (found := describe(whole.network)["family"]) != "llama":
        raise ValueError(f"--speed of a GGUF file writes the dense model as one too, and knows llama, not {found}")
    if find_spec("xllamacpp") is None:
        raise ValueError(
            "timing a GGUF file in llama.cpp needs the xllamacpp package; pip install 'moeify[gguf]', "
            "or do without --speed"
        )


def gguf_rates(
    files: Sequence[Path], work: Work, vocabulary: int, *, turns: int
) -> dict[Path, tuple[list[float], list[float]]]:
    """Return file -> tokens a second of llama.cpp reading a prompt, and of writing behind it, a value a turn."""
    asked = (turns, work.prompt, work.new, vocabulary, *(path.absolute() for path in files))
    found = _told("timed_gguf.py", "llama.cpp", asked)
    return {path: (found[str(path.absolute())][0], found[str(path.absolute())][1]) for path in files}


def of_onnx(split: SplitModel, whole: SplitModel, file: Path, category: str, dtype: torch.dtype) -> Speeds:
    """Time an ONNX graph in onnxruntime, which reads rows from the start, against the dense network's of that dtype."""
    dense = dense_like(whole, dtype).float()
    works = [work for work in works_of(whole.network) if work.kind != "decode"]
    names = onnx_file.Signature.of(dense).names
    given: dict[str, Tensor] = {}
    for number, work in enumerate(works):
        inputs = prompts_of(dense, work) if work.kind == "prefill" else example_inputs(dense, work.batch, seed=0)
        given |= {f"{number}/{name}": torch.ones_like(inputs) if name == "attention_mask" else inputs for name in names}
    with tempfile.TemporaryDirectory() as place:
        rival, asked = Path(place) / "dense.onnx", Path(place) / "works.safetensors"
        onnx_file.write(dense, rival, dtype=dtype, name="dense")
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, asked)
        found = _told("timed_onnx.py", "onnxruntime", (TURNS, AT_LEAST, asked, rival, file.absolute()))
        each = {"": found[str(rival)], "own": found[str(file.absolute())]}
    rows = []
    for number, work in enumerate(works):
        times = {name: seconds_[number] for name, seconds_ in each.items()}
        limit = limit_of(dense, split, work, (category,))
        rows.append(_speed(work, (category,), times, "own", work.units, limit))
    return _speeds(rows, whole, dtype)


def _told(program: str, what: str, asked: Sequence[object]) -> Any:
    """Return what a program of its own tells; RuntimeError with its last words where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-P", str(_PROGRAMS / program), *map(str, asked)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"{what} could not be timed ({done.returncode}); it said: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def _taking_turns(
    dense: nn.Module, split: SplitModel, work: Work, rivals: Mapping[tuple[str, ...], Run]
) -> list[Speed]:
    numbered = {str(number): run for number, run in enumerate(rivals.values())}
    times = seconds({"": dense_run(dense, work), **numbered}, turns=TURNS, at_least=AT_LEAST)
    return [
        _speed(work, route, times, own, work.units, limit_of(dense, split, work, route))
        for route, own in zip(rivals, numbered, strict=True)
    ]


def _speed(
    work: Work,
    route: tuple[str, ...],
    times: Mapping[str, list[float]],
    own: str,
    units: int,
    limit: Limit,
) -> Speed:
    """Return what the times of the dense network, which are named "", and of the export say."""
    rates = {name: units / statistics.median(times[name]) for name in ("", own)}
    return Speed(
        work.kind,
        work.batch,
        route[0] if len(route) == 1 else "mixed",
        rates[""],
        rates[own],
        ratio(times, "", own),
        limit.times,
        limit.bound,
    )


def _speeds(rows: Sequence[Speed], whole: SplitModel, dtype: torch.dtype) -> Speeds:
    work = works_of(whole.network)[0]
    writes = work.kind != "rows"
    return Speeds(
        tuple(rows),
        "token" if writes else "row",
        str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
        work.prompt if writes else None,
    )

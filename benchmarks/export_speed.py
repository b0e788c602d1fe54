"""Tokens a second of what a split model becomes, against the dense model and against the limit.

Random weights in float32, a core and four experts of equal widths (43.75 % of FFN units active); exports are written to
a temporary folder and loaded from there by plain ``transformers``. Rows:

category            the dense export of one category
split, one category the split model in this package's runtime, all rows of one category
split, mixed        the same with rows of all categories (at batch 1 it is one category, so it is not measured again)
glm4_moe, ...       the stock mixture of experts, sent along one category's route, with each of transformers' ways to
                    run experts (``set_experts_implementation``)
GGUF, ...           in llama.cpp, batch 1, over the dense model in llama.cpp; "-" where ``xllamacpp`` is not installed

Work: ``prefill`` reads prompts without a cache; ``decode`` adds tokens, one a row and step, behind prompts in a cache.
The limit is what the saved work allows (``moeify.roofline``): the dense model's least time over that of what is needed,
each operation at this machine's pace of arithmetic or of reading (weights, keys and values), whichever takes longer.
What is needed is the route's own; padding and copies of a format count against it. ``of FLOPs``: the same of a machine
that reads in no time, which says too little of decode: at batch 32 all models, split or not, read about as many bytes
of keys and values as the dense model has of weights. All write keys and values in place, and copy none.

Medians over turns of a ratio within each turn (``moeify.timing``), on as many threads as torch is given
(OMP_NUM_THREADS). About ten minutes on one thread; --large, a model four times the size, of whose single tokens a
framework's own work is a smaller part, takes half an hour; --quick runs a tiny model, too hastily to quote.
"""

import math
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_splits import CATEGORIES, Size, pair
from benchmarks.report import Cell, Figure, parser, report
from moeify.data.documents import Document
from moeify.data.tokens import train_tokenizer
from moeify.export import gguf_file
from moeify.export.limits import limit_of
from moeify.export.speed import gguf_rates
from moeify.export.speeds import Kind
from moeify.export.stock import Form, to_dense
from moeify.export.stock_moe import to_moe
from moeify.export.works import BATCHES, NEW, PROMPT, Work, dense_run, routed_run
from moeify.roofline import Machine
from moeify.routed.split_model import SplitModel
from moeify.timing import ratio, seconds

LARGE = Size(1024, 4096, 8, 8, vocabulary=4096, length=512)
FULL = Size(512, 2048, 8, 8, vocabulary=4096, length=512)
QUICK = Size(64, 256, 4, 2, vocabulary=512, length=512)
WAYS = ("grouped_mm", "batched_mm", "eager")
KINDS: tuple[Kind, ...] = ("prefill", "decode")
MOE: Form = "glm4_moe"
MIXED, ALONE = "split, mixed", "split, one category"


def main() -> None:
    """Run the benchmark."""
    asked = parser(__doc__)
    asked.add_argument("--large", action="store_true", help="d_model 1024 in place of 512")
    args = asked.parse_args()
    size = QUICK if args.quick else LARGE if args.large else FULL
    turns, at_least = (2, 0.01) if args.quick else (5, 0.2)
    dense, split = pair(size, "equal")
    dense.eval()
    split.eval()
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as place:
        models = {"dense": dense, "category": _category(split, Path(place)), **_moes(split, Path(place))}
        for work in (Work(kind, batch) for kind in KINDS for batch in BATCHES):
            rivals = {name: dense_run(model, work) for name, model in models.items() if _sensible(name, work)}
            rivals[ALONE] = routed_run(split, work, CATEGORIES[:1])
            if work.batch > 1:
                rivals[MIXED] = routed_run(split, work, CATEGORIES)
            times = seconds(rivals, turns=turns, at_least=at_least)
            saved = {each: _saved(dense, split, work, each) for each in (CATEGORIES, CATEGORIES[:1])}
            for name in rivals:
                route = CATEGORIES if name == MIXED else CATEGORIES[:1]  # any category's, since widths are equal
                limits = (1.0, 1.0) if name == "dense" else saved[route]
                rows.append(_row(name, work, limits, ratio(times, "dense", name), times[name]))
        rows += _llama_cpp(dense, split, Path(place), turns)
    rows.sort(key=lambda row: (row["work"] == "decode", row["batch"]))
    figures = [
        Figure("category_fraction_of_limit", _worst(rows, "category"), ">= .90, the worst row"),
        Figure("moe_fraction_of_limit", _worst(rows, ALONE, MIXED), ">= .80, the worst row of the split model"),
        Figure("category_fraction_of_flops", _worst(rows, "category", of="of FLOPs"), "the same, had reading no limit"),
        Figure("moe_fraction_of_flops", _worst(rows, ALONE, MIXED, of="of FLOPs"), "likewise"),
    ]
    report("export_speed", rows, figures, args.json, quick=args.quick)


def _saved(dense: Any, split: SplitModel, work: Work, route: tuple[str, ...]) -> tuple[float, float]:
    """Return the limit of a route on this machine, and on one that reads in no time."""
    boundless = Machine(1.0, math.inf)
    return limit_of(dense, split, work, route).times, limit_of(dense, split, work, route, boundless).times


def _row(name: str, work: Work, limits: tuple[float, float], over_dense: float, times: list[float]) -> dict[str, Cell]:
    return _cells(name, work, work.units / statistics.median(times), over_dense, limits)


def _cells(
    name: str, work: Work, rate: float | None, over_dense: float | None, limits: tuple[float, float]
) -> dict[str, Cell]:
    limit, flops = limits
    return {
        "work": work.kind,
        "batch": work.batch,
        "model": name,
        "threads": torch.get_num_threads(),
        "tokens/s": rate,
        "over dense": over_dense,
        "limit": limit,
        "of the limit": None if over_dense is None else over_dense / limit,
        "of FLOPs": None if over_dense is None else over_dense / flops,
    }


def _worst(rows: list[dict[str, Cell]], *models: str, of: str = "of the limit") -> float:
    return min(float(row[of] or 0.0) for row in rows if row["model"] in models)


# --- what is exported ---------------------------------------------------------------------------------


def _loaded(network: Any, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    network.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _category(split: SplitModel, place: Path) -> Any:
    return _loaded(to_dense(split, CATEGORIES[:1]).network, place / "category")


def _moes(split: SplitModel, place: Path) -> dict[str, Any]:
    found = {}
    with torch.no_grad():
        network = to_moe(split, MOE, CATEGORIES[0]).network
    for way in WAYS:
        model = _loaded(network, place / MOE)
        model.set_experts_implementation(way)
        found[f"{MOE}, {way}"] = model
    return found


def _sensible(name: str, work: Work) -> bool:
    """Say whether a rival can do the work: ``batched_mm`` copies an expert's weights for each token."""
    return not name.endswith("batched_mm") or work.units <= PROMPT


def _llama_cpp(dense: Any, split: SplitModel, place: Path, turns: int) -> list[dict[str, Cell]]:
    """Return the rows of GGUF files: of the dense model, of one category and of the mixture."""
    networks = {
        "GGUF, dense": dense,
        "GGUF, category": to_dense(split, CATEGORIES[:1]).network,
        f"GGUF, {MOE}": to_moe(split, MOE, CATEGORIES[0]).network,
    }
    tokenizer = train_tokenizer([[Document(__doc__ or "", "docstring")]], 300).to_str().encode()
    files = {name: place / f"{number}.gguf" for number, name in enumerate(networks)}
    for name, network in networks.items():
        gguf_file.write(network, {"tokenizer.json": tokenizer}, files[name], dtype=torch.float32, name=name)
    work = Work("decode", 1, new=8 * NEW)
    rates = (
        gguf_rates(list(files.values()), work, dense.config.vocab_size, turns=turns) if find_spec("xllamacpp") else {}
    )
    saved = {kind: _saved(dense, split, Work(kind, 1), CATEGORIES[:1]) for kind in KINDS}
    found = []
    for number, kind in enumerate(KINDS):
        times = {name: [1.0 / rate for rate in rates[file][number]] for name, file in files.items() if file in rates}
        for name in files:
            rate = 1.0 / statistics.median(times[name]) if times else None
            over = ratio(times, "GGUF, dense", name) if times else None
            found.append(_cells(name, Work(kind, 1), rate, over, (1.0, 1.0) if name == "GGUF, dense" else saved[kind]))
    return found


if __name__ == "__main__":
    main()

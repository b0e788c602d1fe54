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
The limit is what the saved work allows: the dense model's tokens a second x its work / the work that is needed. Work
is bytes read (weights, keys and values) for decode at batch 1, and FLOPs of matrix products and attention otherwise.
What is needed is the category's own route; padding and copies of a format count against it.

Medians over turns of a ratio within each turn (``benchmarks.alternation``), on as many threads as torch is given
(OMP_NUM_THREADS). About a quarter of an hour on one thread; --quick runs a tiny model, too hastily to quote.
"""

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.alternation import Run, flops, ratio, seconds
from benchmarks.random_splits import CATEGORIES, Size, pair
from benchmarks.report import Cell, Figure, arguments, report
from moeify.data.documents import Document
from moeify.data.tokens import train_tokenizer
from moeify.export import gguf_file
from moeify.export.stock import Form, to_dense
from moeify.export.stock_moe import to_moe
from moeify.routed.split_model import SplitModel

FULL = Size(512, 2048, 8, 8, vocabulary=4096, length=512)
QUICK = Size(64, 256, 4, 2, vocabulary=512, length=512)
PROMPT, NEW = 128, 8
"""Tokens that are read before, and written in, one run."""
WAYS = ("grouped_mm", "batched_mm", "eager")
MOE: Form = "glm4_moe"
MIXED, ALONE = "split, mixed", "split, one category"


@dataclass(frozen=True)
class Work:
    """One kind of work."""

    decode: bool
    batch: int

    @property
    def name(self) -> str:
        """For the table."""
        return "decode" if self.decode else "prefill"

    @property
    def tokens(self) -> int:
        """That one run reads or writes."""
        return self.batch * (NEW if self.decode else PROMPT)


def main() -> None:
    """Run the benchmark."""
    args = arguments(__doc__)
    size = QUICK if args.quick else FULL
    turns, at_least = (2, 0.01) if args.quick else (5, 0.2)
    dense, split = pair(size, "equal")
    dense.eval()
    split.eval()
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as place:
        models = {"dense": dense, "category": _category(split, Path(place)), **_moes(split, Path(place))}
        for work in (Work(decode, batch) for decode in (False, True) for batch in (1, 32)):
            rivals = {name: _plain(model, work) for name, model in models.items() if _sensible(name, work)}
            rivals[ALONE] = _routed(split, work, torch.zeros(work.batch, dtype=torch.long))
            if work.batch > 1:
                rivals[MIXED] = _routed(split, work, torch.arange(work.batch) % len(CATEGORIES))
            needed = _needed(work, rivals, dense, models["category"])
            times = seconds(rivals, turns=turns, at_least=at_least)
            rows += [_row(name, work, needed, ratio(times, "dense", name), times[name]) for name in rivals]
        rows += _llama_cpp(dense, split, Path(place), turns, rows)
    rows.sort(key=lambda row: (row["work"] == "decode", row["batch"]))
    figures = [
        Figure("category_fraction_of_limit", _worst(rows, "category"), ">= .90, the worst row"),
        Figure("moe_fraction_of_limit", _worst(rows, ALONE, MIXED), ">= .80, the worst row of the split model"),
    ]
    report("export_speed", rows, figures, args.json, quick=args.quick)


def _row(name: str, work: Work, needed: float, over_dense: float, times: list[float]) -> dict[str, Cell]:
    return _cells(name, work, work.tokens / statistics.median(times), over_dense, 1.0 if name == "dense" else needed)


def _cells(name: str, work: Work, rate: float | None, over_dense: float | None, needed: float) -> dict[str, Cell]:
    return {
        "work": work.name,
        "batch": work.batch,
        "model": name,
        "threads": torch.get_num_threads(),
        "tokens/s": rate,
        "over dense": over_dense,
        "limit": 1.0 / needed,
        "of the limit": None if over_dense is None else over_dense * needed,
    }


def _worst(rows: list[dict[str, Cell]], *models: str) -> float:
    return min(float(row["of the limit"] or 0.0) for row in rows if row["model"] in models)


def _needed(work: Work, rivals: dict[str, Run], dense: Any, category: Any) -> float:
    """Return the needed share of the dense model's work; any category needs as much, since widths are equal."""
    if work.decode and work.batch == 1:
        return _byte_share(dense, category)
    return flops(rivals["category"]) / flops(rivals["dense"])


def _byte_share(dense: Any, category: Any) -> float:
    one, other = ((_weights(network) + _cache(network)) for network in (category, dense))
    return one / other


def _weights(network: Any) -> int:
    """Return the bytes of the weights that a token needs; of an embedding that is not the head too, that is a row."""
    table = network.get_input_embeddings().weight
    shared = table is network.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in network.parameters())
    return total - (0 if shared else table.numel() * table.element_size())


def _cache(network: Any) -> int:
    config = network.config
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PROMPT


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
    return not name.endswith("batched_mm") or work.tokens <= PROMPT


# --- work ---------------------------------------------------------------------------------------------


def _prompts(network: Any, work: Work) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, network.config.vocab_size, (work.batch, PROMPT), generator=generator)


def _plain(network: Any, work: Work) -> Run:
    return _run(network, work, network)


def _routed(split: SplitModel, work: Work, categories: Tensor) -> Run:
    categories = categories[split.order(categories)]
    return _run(split.network, work, lambda tokens, **more: split(tokens, categories[: len(tokens)], **more))


@torch.no_grad()
def _run(network: Any, work: Work, forward: Any) -> Run:
    """Return what does the work; of every model alike."""
    from transformers import DynamicCache

    prompts = _prompts(network, work)
    if not work.decode:
        return torch.no_grad()(lambda: forward(prompts, use_cache=False))
    cache: Any = DynamicCache(config=network.config)
    keyword = "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"
    forward(prompts, use_cache=True, **{keyword: cache})

    @torch.no_grad()
    def decode() -> None:
        for place in range(NEW):
            forward(prompts[:, place : place + 1], use_cache=True, **{keyword: cache})
        cache.crop(-NEW)

    return decode


def _llama_cpp(
    dense: Any, split: SplitModel, place: Path, turns: int, rows: list[dict[str, Cell]]
) -> list[dict[str, Cell]]:
    """Return the rows of GGUF files: of the dense model, of one category and of the mixture."""
    networks = {
        "GGUF, dense": dense,
        "GGUF, category": to_dense(split, CATEGORIES[:1]).network,
        f"GGUF, {MOE}": to_moe(split, MOE, CATEGORIES[0]).network,
    }
    tokenizer = train_tokenizer([[Document(__doc__ or "", "docstring")]], 300).to_str().encode()
    files = {name: place / f"{number}.gguf" for number, name in enumerate(networks)}
    for name, network in networks.items():
        gguf_file.write(network, tokenizer, files[name], dtype=torch.float32, name=name)
    command = [sys.executable, "-m", "benchmarks.llama_cpp", str(turns), str(PROMPT), str(8 * NEW)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*command, *map(str, files.values())], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    rates = json.loads(done.stdout.splitlines()[-1])
    limits = {row["work"]: float(row["limit"] or 1.0) for row in rows if (row["model"], row["batch"]) == (ALONE, 1)}
    found = []
    for decode in (False, True):
        work = Work(decode, 1)
        for name, file in files.items():
            rate = rates and rates[str(file)][decode]
            over = rates and rate / rates[str(files["GGUF, dense"])][decode]
            found.append(_cells(name, work, rate, over, 1.0 if name == "GGUF, dense" else 1.0 / limits[work.name]))
    return found


if __name__ == "__main__":
    main()

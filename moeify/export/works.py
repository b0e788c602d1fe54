"""What a model is timed at, and how any model does it: reading prompts, adding tokens behind them, or taking in rows.

A causal language model reads prompts without a cache (``prefill``) and adds tokens, one a row and step, behind prompts
in a cache that is written in place (``decode``). All others take in rows (``rows``). Each with one row, and with many.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moeify.export.speeds import Kind
from moeify.models.build import logits
from moeify.models.families import example_inputs, transformer_of
from moeify.models.transformer import config_of
from moeify.routed.split_model import SplitModel
from moeify.timing import Run

BATCHES = (1, 32)
PROMPT, NEW = 128, 8
"""Tokens that are read before, and written in, one run; fewer where the model has fewer positions."""
_FIRST = 3
"""The first token of prompts: those before it are special in many tokenizers."""


@dataclass(frozen=True)
class Work:
    """One kind of work."""

    kind: Kind
    batch: int
    """Rows."""
    prompt: int = PROMPT
    new: int = NEW

    @property
    def units(self) -> int:
        """Tokens that one run reads or writes; rows, where the work is rows."""
        match self.kind:
            case "prefill":
                return self.batch * self.prompt
            case "decode":
                return self.batch * self.new
            case "rows":
                return self.batch


def works_of(network: nn.Module) -> list[Work]:
    """Return the work that a network can do, fewest rows of each kind first."""
    family = transformer_of(network)
    if family is None or family.learns != "next token":
        return [Work("rows", batch) for batch in BATCHES]
    positions = family.positions(config_of(network))
    new = max(1, min(NEW, positions // 4))
    prompt = min(PROMPT, positions - new)
    return [Work(kind, batch, prompt, new) for kind in ("prefill", "decode") for batch in BATCHES]


def dense_run(network: nn.Module, work: Work) -> Run:
    """Return what does the work on a network that knows no categories."""
    return _run(network, work, lambda inputs, **more: logits(network, inputs, **more))


def routed_run(split: SplitModel, work: Work, categories: Sequence[str]) -> Run:
    """Return what does the work on a split model whose rows are of these categories in turn."""
    asked = rows_of(split, work.batch, categories)
    return _run(split.network, work, lambda inputs, **more: split(inputs, asked, **more))


def rows_of(split: SplitModel, rows: int, categories: Sequence[str]) -> Int[Tensor, " rows"]:
    """Return the rows' categories, in the order in which the split model moves no row."""
    turns = torch.tensor([split.categories.index(category) for category in categories])
    asked = turns[torch.arange(rows) % len(turns)]
    return asked[split.order(asked)]


def prompts_of(network: nn.Module, work: Work) -> Int[Tensor, "batch prompt"]:
    """Return random tokens, the same for networks of one vocabulary."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = config_of(network).vocab_size
    return torch.randint(min(_FIRST, vocabulary - 1), vocabulary, (work.batch, work.prompt), generator=generator)


def _run(network: nn.Module, work: Work, forward: Callable[..., object]) -> Run:
    if work.kind == "rows":
        inputs = example_inputs(network, work.batch, seed=0)
        if inputs.is_floating_point():
            inputs = inputs.to(next(network.parameters()).dtype)
        return torch.no_grad()(lambda: forward(inputs))
    prompts = prompts_of(network, work)
    if work.kind == "prefill":
        return torch.no_grad()(lambda: forward(prompts, use_cache=False))
    from moeify.models.caches import growing_cache  # brings transformers, which rows do without

    cache, keyword = growing_cache(network)
    torch.no_grad()(forward)(prompts, use_cache=True, **{keyword: cache})

    @torch.no_grad()
    def decode() -> None:
        for place in range(work.new):
            forward(prompts[:, place % work.prompt, None], use_cache=True, **{keyword: cache})
        cache.crop(-work.new)

    return decode

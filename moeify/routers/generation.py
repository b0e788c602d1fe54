"""Text from a split model, and which expert served each token of it.

Keys and values of earlier tokens are kept, so a token costs one pass over itself alone, along its own route (two where
a second opinion is asked). When the model's context is full, the older half of it is forgotten and the rest is read
again, along the routes that it had.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.data.given_tokenizer import GivenTokenizer, of_folder
from moeify.models.families import transformer_of
from moeify.routed.split_model import SplitModel
from moeify.routers.router import Router, category_of_leaf, early, remember

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(frozen=True)
class Served:
    """A token and the expert that read it (of the prompt), or wrote it (of what follows)."""

    token: int
    written: bool
    expert: int
    """Place among the tree's leaves."""
    probability: float | None
    """Of the expert, as the router saw it then; None where the caller chose the expert."""
    second: int | None = None
    """The expert whose second opinion was averaged in, where one was asked."""


@dataclass(frozen=True)
class Decision:
    """What serves a token."""

    expert: int
    probability: float | None
    second: int | None = None
    log_weights: tuple[float, float] = (0.0, 0.0)
    """Of the first and of the second opinion."""


@torch.no_grad()
def generate(
    model: SplitModel,
    chosen: Router | int,
    prompt: Sequence[int],
    *,
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    ends: Collection[int] = (),
) -> Iterator[Served]:
    """Yield the prompt's tokens as they are read, then up to ``tokens`` more as they are written.

    ``chosen``: a router, or the expert (its place among the leaves) that serves everything. ``temperature``: 0 takes
    the likeliest token. ``ends``: tokens after which nothing follows; they are not yielded. The same seed writes the
    same text. ValueError for an empty prompt, and for networks that do not read tokens.
    """
    if not prompt:
        raise ValueError("the prompt holds no token; start it with the end token, as a document starts")
    family = transformer_of(model.network)
    if (family and family.learns != "next token") or not hasattr(model.network, "get_input_embeddings"):
        raise ValueError(
            f"only causal language models write text, and this network is a {type(model.network).__name__}"
        )
    decide = _Follower(model, chosen) if isinstance(chosen, Router) else _Fixed(chosen)
    reader = Reader(model)
    decisions = decide(prompt)
    for token, decision in zip(prompt, decisions, strict=True):
        yield Served(token, False, decision.expert, decision.probability)
    reader.read(prompt[:-1], [decision.expert for decision in decisions[:-1]])
    generator = torch.Generator().manual_seed(seed)
    token, decision = prompt[-1], decisions[-1]
    for _ in range(tokens):
        token = _draw(reader.next(token, decision), temperature, generator)
        if token in ends:
            return
        yield Served(token, True, decision.expert, decision.probability, decision.second)
        (decision,) = decide([token])


class _Fixed:
    """Sends everything to one expert."""

    def __init__(self, expert: int) -> None:
        self.expert = expert

    def __call__(self, tokens: Sequence[int]) -> list[Decision]:
        return [Decision(self.expert, None)] * len(tokens)


class _Follower:
    """Reads along with a router; a ``document`` router decides once, after all that the first call gives it."""

    def __init__(self, model: SplitModel, router: Router) -> None:
        self.model, self.router = model, router
        self.sums_D: Tensor | None = None
        self.count = 0
        self.held: Decision | None = None

    def __call__(self, tokens: Sequence[int]) -> list[Decision]:
        if self.held is not None:
            return [self.held] * len(tokens)
        before_RD = None if self.sums_D is None else self.sums_D.unsqueeze(0)
        sums_PD = remember(early(self.model.network, torch.tensor([tokens])), before_RD)[0]
        counts_P = torch.arange(1, len(tokens) + 1) + self.count
        self.sums_D, self.count = sums_PD[-1], self.count + len(tokens)
        log_p_PE = self.router.log_probabilities(sums_PD, counts_P)
        if self.router.kind == "document":
            self.held = self._decision(log_p_PE[-1])
            return [self.held] * len(tokens)
        return [self._decision(log_p_E) for log_p_E in log_p_PE]

    def _decision(self, log_p_E: Tensor) -> Decision:
        top = log_p_E.topk(2)
        first, second = top.indices.tolist()
        probability = top.values[0].exp().item()
        if probability >= self.router.threshold:
            return Decision(first, probability)
        one, other = top.values.log_softmax(-1).tolist()
        return Decision(first, probability, second, (one, other))


class Reader:
    """Runs tokens through the model, each along its route, and remembers them."""

    def __init__(self, model: SplitModel) -> None:
        self.model = model
        network: Any = model.network
        self.context: int = network.config.max_position_embeddings
        self.leaf_category = category_of_leaf(model)
        self.cache: DynamicCache
        self.tokens: list[int] = []
        self.experts: list[int] = []
        self._forget()

    def read(self, tokens: Sequence[int], experts: Sequence[int]) -> None:
        """Remember these tokens, or as many of them as half the context holds where they are too many."""
        self.tokens += tokens
        self.experts += experts
        if len(self.tokens) >= self.context:
            keep = self.context // 2
            self.tokens, self.experts = self.tokens[-keep:], self.experts[-keep:]
        self._forget()
        if self.tokens:
            self._run(self.tokens, self.experts)

    def next(self, token: int, decision: Decision) -> Float[Tensor, " vocabulary"]:
        """Return the log probabilities of what follows a token, which is remembered along its first expert's route."""
        if len(self.tokens) + 1 > self.context:
            self.read([], [])
        other = None if decision.second is None else self._second(token, decision.second)
        log_p_V = self._run([token], [decision.expert])
        self.tokens.append(token)
        self.experts.append(decision.expert)
        if other is None:
            return log_p_V
        one, two = decision.log_weights
        return torch.logaddexp(one + log_p_V, two + other)

    def _second(self, token: int, expert: int) -> Float[Tensor, " vocabulary"]:
        """Return what another expert says, and do not remember it."""
        from moeify.models.caches import GrowingLayer

        if all(isinstance(layer, GrowingLayer) for layer in self.cache.layers):
            said = self._run([token], [expert])
            self.cache.crop(-1)
            return said
        kept, self.cache = self.cache, copy.deepcopy(self.cache)  # a sliding window has dropped what it held before
        said = self._run([token], [expert])
        self.cache = kept
        return said

    def _forget(self) -> None:
        from moeify.models.caches import growing_cache

        self.cache, self.keyword = growing_cache(self.model.network)

    def _run(self, tokens: Sequence[int], experts: Sequence[int]) -> Float[Tensor, " vocabulary"]:
        categories = self.leaf_category[torch.tensor([experts])]
        if self.model.whole_rows:  # the expert is the same all along
            categories = categories[:, 0]
        outputs = self.model(torch.tensor([tokens]), categories, **{self.keyword: self.cache}, use_cache=True)
        return outputs[0, -1].double().log_softmax(-1)


def _draw(log_p_V: Float[Tensor, " vocabulary"], temperature: float, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(log_p_V.argmax())
    return int(torch.multinomial((log_p_V / temperature).softmax(-1), 1, generator=generator))


# --- text ---------------------------------------------------------------------------------------------


def tokenizer_of(run: Path) -> GivenTokenizer:
    """Return the tokenizer that a run's model reads through; ValueError where the run is not about text."""
    found = of_folder(run / "assets")
    if found is None:
        raise ValueError(f"{run.name} has no tokenizer: only language models write text")
    return found


def encode_prompt(given: GivenTokenizer, text: str) -> list[int]:
    """Return a prompt's tokens as a document starts: behind the end of another."""
    return [given.end, *given.tokenizer.encode(text, add_special_tokens=False).ids]

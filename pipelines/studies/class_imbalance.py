"""Class imbalance: few classes are routed to half of a code, and all the others train as they always would.

The split autoencoder of Cloud et al. 2024 (arXiv 2410.04332, section 4.1) on scikit-learn's digits, 64-128-16-128-64:
there both halves of the classes are routed, and regularisation is needed. Here k of ten digits, drawn anew each seed,
teach the encoder through one half of the code alone; the rest teach it through both halves. The other half's
certificate, a decoder of its own that learns all digits, says what that half holds. Each arm is held against the same
network without routing, regularised alike: the L1 norm of the code, and the mean absolute correlation across halves.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from attribution.sites import Site
from moeify import rows as rows_of
from moeify.models.build import FeedForward
from moeify.recipe.routing import Routing
from moeify.routed.gradients import GradientRouter
from moeify.routed.learning import damp
from moeify.splitting.partition import Partition
from moeify.task import Batch
from moeify.tasks.pixels import pixel_nats
from pipelines.studies.recipes import UNCUT
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, shipped_recipe

_CODE = 16
_L1, _CORRELATION = 3e-3, 0.1
"""As published."""
_NAMES = ("rest", "routed")
_ROUTING = Routing.model_validate(
    {"gradients": "activations", "core": "frozen", "experts": [{"categories": ["routed"], "units": 0.5}]}
)


@dataclass(frozen=True)
class _Setting:
    """What an arm does."""

    classes: int
    """That are routed."""
    kept: float
    """Share of their rows that is trained on."""
    regularised: bool

    def __call__(self, bench: Bench) -> Measures:
        """Train with and without routing, and return how much worse the first is, by who draws and what."""
        chosen = rows_of.generator(bench.config.seed, "split", 1).permutation(10)[: self.classes]
        is_routed = torch.zeros(10, dtype=torch.bool)
        is_routed[torch.from_numpy(chosen)] = True
        routed, plain = (_errors(_trained(self, bench, is_routed, on), bench, is_routed) for on in (True, False))
        return {name: routed[name] - plain[name] for name in plain}


def arms(size: Size) -> tuple[Arm, ...]:
    """Return 5, 2 and 1 of ten digits, and 1 with few rows, each with and without regularisation.

    Two digits are 20 % of the rows, and of one digit so many are kept that they are 4 % and 1 %.
    """
    steps = {"quick": 20, "full": 500, "large": 6000}[size]
    recipe = shipped_recipe("digits", training={"steps": steps}, rounds=UNCUT, controls=())
    digits = [(f"{k} digit{'s' * (k > 1)}", k, 1.0) for k in (5, 2, 1)]
    few = [(f"{share:.0%}".replace("%", " %"), 1, 9 * share / (1 - share)) for share in (0.04, 0.01)]
    found = []
    for regularised in (False, True):
        for name, classes, kept in (*digits, *few):
            label = f"{name}, regularised" if regularised else name
            found.append(Arm(label, recipe, _Setting(classes, kept, regularised)))
    return tuple(found)


class _SplitCode(nn.Module):
    """Encoder and decoder, and the certificate of the first half of the code."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder, self.decoder = FeedForward(64, hidden, _CODE), FeedForward(_CODE, hidden, 64)
        self.certificate = FeedForward(_CODE // 2, hidden, 64)

    def certified(self, code: Tensor) -> Tensor:
        """Return what the certificate draws; nothing flows back into the code."""
        return self.certificate(code.detach()[:, : _CODE // 2])


def _trained(setting: _Setting, bench: Bench, is_routed: Tensor, routing: bool) -> _SplitCode:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.config.seed)
        model = _SplitCode(128)
    optimizer = torch.optim.Adam(model.parameters(), lr=bench.config.training.learning_rate)
    site = Site("code", "decoder", _CODE)
    router, undivided = GradientRouter(_ROUTING, _NAMES, [site], seed=0), Partition.undivided(_NAMES, [site])
    for step in range(bench.config.training.steps):
        batch = _thinned(bench.task.train_batch(step), is_routed, setting.kept, bench.config.seed, step)
        code = seen = model.encoder(batch.inputs)
        if routing:
            kinds = is_routed[batch.categories].long()
            learning = router.learning(undivided, kinds, torch.ones_like(kinds, dtype=torch.bool))
            assert learning is not None
            seen = damp(code, learning.damped(site.name))
        loss = pixel_nats(model.decoder(seen), batch.targets).mean()
        loss = loss + pixel_nats(model.certified(code), batch.targets).mean()
        if setting.regularised:
            # Published for a mean over pixels; this loss is their sum.
            loss = loss + 64 * (_L1 * code.abs().mean(0).sum() + _CORRELATION * _correlation(code))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def _thinned(batch: Batch, is_routed: Tensor, kept: float, seed: int, step: int) -> Batch:
    """Return the batch's rows, those of routed digits side by side and only a share of them."""
    routed = is_routed[batch.categories]
    lucky = torch.from_numpy(rows_of.generator(seed, "permute", step).random(len(routed))) < kept
    some = (~routed | lucky).nonzero()[:, 0]
    return batch.take(some[routed[some].long().argsort(stable=True)])


def _correlation(code: Tensor) -> Tensor:
    first, second = ((code - code.mean(0)) / code.std(0)).chunk(2, dim=1)
    return (first.t() @ second / len(code)).abs().mean()


@torch.no_grad()
def _errors(model: _SplitCode, bench: Bench, is_routed: Tensor) -> dict[str, float]:
    """Return mean test losses, nats an image: the certificate's by kind of digit, the decoder's of all."""
    asked = bench.config.evaluation
    found: dict[str, list[Tensor]] = {"held": [], "rest": [], "tax": []}
    for batch in bench.task.held_out_batches("test", asked.test_rows, asked.rows_at_once):
        code = model.encoder(batch.inputs)
        certified = pixel_nats(model.certified(code), batch.targets)
        routed = is_routed[batch.categories]
        found["held"].append(certified[routed])
        found["rest"].append(certified[~routed])
        found["tax"].append(pixel_nats(model.decoder(code), batch.targets))
    return {name: fmean(torch.cat(each).tolist()) for name, each in found.items()}


STUDY = Study(
    arms,
    columns=(Column("held", "not held: routed"), Column("rest", "not held: rest"), Column("tax", "tax, nats")),
    note=(
        "Nats an image above the same network without routing. not held: what the certificate of the other half of the "
        "code cannot draw, of routed digits (the more, the better they are kept out of it) and of the rest (the less, "
        "the better). tax: of the whole autoencoder, all digits. 4 %, 1 %: one digit, of whose rows so few are trained "
        "on that they are this share of all; 2 digits are 20 %."
    ),
)

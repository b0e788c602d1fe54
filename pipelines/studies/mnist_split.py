"""The split autoencoder of Cloud et al. 2024 (arXiv 2410.04332, section 4.1), and what it leaves open.

An autoencoder of MNIST, ReLU, learns the mean absolute error of pixels in -1..1. Routed, digits 5-9 teach the encoder
through the first half of the code alone, and 0-4 through the second: a stop-gradient at the other half, row by row in
mixed batches (routing.gradients: activations). A part's certificate, a decoder of its own, sees that part and learns
all digits: what it cannot draw is not there. Regularised as published: the L1 norm of the code, and the mean absolute
correlation between units of different parts.

Beyond the published arms: one side is routed and 0-4 teach the whole code; ten parts, one for each digit, of a code of
40; and halves that are not there from the first step, but made of a trained code after a quarter of the steps, by
attribution, or blindly. The loop cuts hidden units and no code, so what is taken of it is what finds owners: one pass
of attribution (Fisher; the error is the nats of a Laplace distribution of scale 1), and exact assignment.

``large`` is the published size, on a GPU if this process sees one (``--local``); ``quick`` takes scikit-learn's digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from attribution.measure import measure
from attribution.sites import Site
from attribution.subject import Rows, Subject
from moeify.recipe.config import RunConfig
from moeify.recipe.routing import Routing
from moeify.routed.gradients import GradientRouter
from moeify.routed.learning import damp
from moeify.splitting.assignment import assign
from moeify.splitting.partition import Partition
from pipelines.studies.recipes import UNCUT
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, shipped_recipe

L1, CORRELATION = 3e-3, 0.1
"""Weights of the regularisers, as published."""
CODE, DEEP_CODE = 32, 40
"""Units of the code in halves, and in ten parts."""
LATE = 0.25
"""Share of the steps before a code that was trained whole is divided."""
HALVES: tuple[tuple[int, ...], ...] = ((5, 6, 7, 8, 9), (0, 1, 2, 3, 4))
DIGITS: tuple[tuple[int, ...], ...] = tuple((digit,) for digit in range(10))
PUBLISHED: Mapping[str, tuple[float, float]] = {
    "routed": (0.32, 0.08),
    "routed, unregularised": (0.32, 0.32),
    "regularised": (0.13, 0.13),
    "neither": (0.08, 0.09),
}
"""Arm -> mean squared error of the certificate of 5-9, on 0-4 and on 5-9: 20 runs, printed there as MAE."""
Chosen = Literal["given", "attribution", "blindly"]


@dataclass(frozen=True)
class Setting:
    """How an arm trains."""

    hidden: tuple[int, ...]
    """Widths of the encoder's layers; the decoders' are the same, the other way round."""
    routed: tuple[int, ...] = ()
    """Parts whose digits are routed to them; digits of the others teach the whole code."""
    regularised: bool = True
    parts: tuple[tuple[int, ...], ...] = HALVES
    """The digits of each part of the code; parts are equal in size."""
    chosen: Chosen = "given"
    """How units find their part: in order, from the first step on, or else once ``LATE`` of the steps are over."""

    @property
    def code(self) -> int:
        """Units of the code."""
        return CODE if len(self.parts) == 2 else DEEP_CODE

    def __call__(self, bench: Bench) -> Measures:
        """Train, and return the errors on test digits."""
        return errors(trained(self, bench), self, bench)


def arms(size: Size) -> tuple[Arm, ...]:
    """Return the published arms, and the others."""
    hidden = {"quick": (24, 12), "full": (512, 128), "large": (2048, 512)}[size]
    recipe = recipe_of(size)

    both, every = (0, 1), tuple(range(10))
    settings = {
        "routed": Setting(hidden, both),
        "routed, unregularised": Setting(hidden, both, regularised=False),
        "regularised": Setting(hidden),
        "neither": Setting(hidden, regularised=False),
        "5-9 routed": Setting(hidden, (0,)),
        "halves by attribution": Setting(hidden, both, chosen="attribution"),
        "halves late, blindly": Setting(hidden, both, chosen="blindly"),
        "ten parts": Setting(hidden, every, parts=DIGITS),
        "ten parts, not routed": Setting(hidden, parts=DIGITS),
    }
    return tuple(Arm(name, recipe, setting) for name, setting in settings.items())


def recipe_of(size: Size) -> RunConfig:
    """Return the data and the training of all arms; ten digits in equal shares."""
    steps, rows = {"quick": (8, 40), "full": (1500, 128), "large": (6000, 2048)}[size]
    training = {"steps": steps, "rows": rows, "learning_rate": 1e-3}
    data = {
        "kind": "images",
        "source": "mnist",
        "objective": "reconstruct",
        "categories": {str(digit): [digit] for digit in range(10)},
    }
    return shipped_recipe(
        "digits",
        training=training,
        rounds=UNCUT,
        controls=(),
        evaluation={"test_rows": 1500, "rows_at_once": 500},
        attribution={"rows": 4 if size == "quick" else 100},
        **({} if size == "quick" else {"data": data}),
    )


class SplitAutoencoder(nn.Module):
    """Encoder, decoder, and a certificate for each part of the code."""

    def __init__(self, pixels: int, setting: Setting) -> None:
        super().__init__()
        down, up, parts = list(setting.hidden), list(reversed(setting.hidden)), len(setting.parts)
        self.encoder = _layers([pixels, *down, setting.code], bias=False)
        self.decoder = _layers([setting.code, *up, pixels])
        self.certificates = nn.ModuleList(_layers([setting.code // parts, *up, pixels]) for _ in range(parts))
        self.register_buffer("order", torch.arange(setting.code))
        """The code's units, those of each part side by side."""

    order: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Return the decoder's pictures."""
        return self.decoder(self.encoder(images))

    def parted(self, code: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a code."""
        return code[:, self.order].chunk(len(self.certificates), dim=1)

    def certified(self, code: Tensor) -> list[Tensor]:
        """Return what each certificate draws of its part; nothing flows back into the code."""
        parts = self.parted(code.detach())
        return [certificate(part) for certificate, part in zip(self.certificates, parts, strict=True)]


def _layers(sizes: Sequence[int], *, bias: bool = True) -> nn.Sequential:
    """Return linear layers with ReLU between; ``bias``: of the last one."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    layers[-2] = nn.Linear(sizes[-2], sizes[-1], bias=bias)
    return nn.Sequential(*layers[:-1])


def trained(setting: Setting, bench: Bench) -> SplitAutoencoder:
    """Return a trained autoencoder with its certificates; arms of a seed see the same rows in the same order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, training = bench.config.training.steps, bench.config.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.config.seed)
        model = SplitAutoencoder(bench.task.train_batch(0).inputs.shape[1], setting).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate, weight_decay=5e-5)
    late = 0 if setting.chosen == "given" else round(LATE * steps)
    for step in range(steps):
        if setting.chosen == "attribution" and step == late:
            model.order.copy_(torch.from_numpy(order_by_attribution(model, setting, bench)))
        batch = bench.task.train_batch(step)
        part = part_of(setting)[batch.categories]
        rows = part.argsort(stable=True)
        loss = objective(model, setting, _pixels(batch.inputs[rows]).to(device), part[rows], routing=step >= late)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def objective(model: SplitAutoencoder, setting: Setting, images: Tensor, part: Tensor, *, routing: bool) -> Tensor:
    """Return what is minimised; rows of each part lie side by side."""
    code = model.encoder(images)
    seen = routed(model, setting, code, part) if routing and setting.routed else code
    miss = (model.decoder(seen) - images).abs().mean(1)
    # As published: each half's mean, added up.
    loss = 2 * torch.stack([miss[part.to(miss.device) == each].mean() for each in part.unique().tolist()]).mean()
    for drawn in model.certified(code):
        loss = loss + (drawn - images).abs().mean()
    if setting.regularised:
        loss = loss + L1 * code.abs().mean(0).sum() + CORRELATION * correlation(model.parted(code))
    return loss


def routed(model: SplitAutoencoder, setting: Setting, code: Tensor, part: Tensor) -> Tensor:
    """Return the code, each routed part of which is taught by its own digits, and those of parts not routed, alone."""
    names, site = [str(each) for each in range(len(setting.parts))], Site("code", "decoder", setting.code)
    experts = [{"categories": [names[each]], "units": 1 / len(names)} for each in setting.routed]
    routing = Routing.model_validate({"gradients": "activations", "core": "frozen", "experts": experts})
    router = GradientRouter(routing, names, [site], seed=0)
    undivided = Partition.undivided(names, [site])
    learning = router.learning(undivided, part, torch.ones_like(part, dtype=torch.bool))
    assert learning is not None
    # A router has what is shared in front of the experts, in the order that they are given.
    size = setting.code // len(names)
    shared = [each for each in range(len(names)) if each not in setting.routed]
    place = torch.cat([torch.arange(each * size, (each + 1) * size) for each in (*shared, *setting.routed)])
    order = model.order[place.to(code.device)]
    return damp(code[:, order], learning.damped(site.name))[:, order.argsort()]


def correlation(parts: Sequence[Tensor]) -> Tensor:
    """Return the mean absolute correlation between units of different parts."""
    unit = [(part - part.mean(0)) / part.std(0) for part in parts]
    return torch.stack([(one.t() @ other / len(one)).abs().mean() for one, other in combinations(unit, 2)]).mean()


def order_by_attribution(model: SplitAutoencoder, setting: Setting, bench: Bench) -> np.ndarray:
    """Return the code's units, those that matter most to each part's digits side by side, parts equal in size."""
    parts = len(setting.parts)
    owner_U = assign(value_of(model, setting, bench), np.full(parts, setting.code // parts)).owner
    return np.argsort(owner_U, kind="stable")


def value_of(model: SplitAutoencoder, setting: Setting, bench: Bench) -> np.ndarray:
    """Return how much each unit of the code matters to each part's digits [units parts], nats."""
    asked, names = bench.config.attribution, tuple(str(each) for each in range(len(setting.parts)))
    site, device = Site("code", "decoder.0", setting.code), model.order.device
    batches = []
    for batch in bench.task.probe_batches(1, asked.rows, asked.rows_at_once):
        images = _pixels(batch.inputs).to(device)
        batches.append(Rows(images, images, part_of(setting)[batch.categories], batch.ids))
    subject = Subject(model, (site,), names, laplace_nats, laplace_sample)
    table = measure(subject, batches, seed=bench.config.seed)
    return (table.score("code", "fisher") * table.shares).numpy()


def laplace_nats(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each image's negative log-likelihood, up to a constant: pixels have a Laplace distribution of scale 1."""
    return (outputs - targets).abs().sum(1)


def laplace_sample(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw each pixel from its distribution, one seed an image."""
    drawn = [torch.rand(outputs.shape[1], generator=torch.Generator().manual_seed(seed)) - 0.5 for seed in seeds]
    share = torch.stack(drawn).to(outputs)
    return outputs - share.sign() * torch.log1p(-2 * share.abs().clamp(max=0.5 - 1e-7))


def part_of(setting: Setting) -> Tensor:
    """Return the part that each digit belongs to."""
    return torch.tensor([next(i for i, part in enumerate(setting.parts) if digit in part) for digit in range(10)])


def _pixels(intensities: Tensor) -> Tensor:
    """Return intensities 0..1 as pixels -1..1."""
    return intensities * 2 - 1


@torch.no_grad()
def errors(model: SplitAutoencoder, setting: Setting, bench: Bench) -> Measures:
    """Return mean errors of test pixels: of the certificates on other digits and on their own, and of the decoder.

    Of halves the first certificate counts, that of 5-9, as in what is published; of ten parts the mean of all.
    """
    asked, device = bench.config.evaluation, model.order.device
    found: dict[str, list[Tensor]] = {}
    for batch in bench.task.held_out_batches("test", asked.test_rows, asked.rows_at_once):
        images, part = _pixels(batch.inputs).to(device), part_of(setting)[batch.categories]
        code = model.encoder(images)
        asked_of = 1 if len(setting.parts) == 2 else len(setting.parts)
        for number, drawn in enumerate(model.certified(code)[:asked_of]):
            for name, mine in (("own", part == number), ("other", part != number)):
                _add(found, f"{name}/{number}", drawn - images, mine)
        _add(found, "decoder", model.decoder(code) - images, torch.ones_like(part, dtype=torch.bool))
    mean = {name: torch.cat(each).double().mean().item() for name, each in found.items()}
    measures = {}
    for kind in ("mse", "mae"):
        for name in ("other", "own"):
            measures[f"{kind}_{name}"] = fmean(mean[key] for key in mean if key.startswith(f"{kind}/{name}/"))
        measures[f"{kind}_decoder"] = mean[f"{kind}/decoder"]
    return measures


def _add(found: dict[str, list[Tensor]], name: str, miss: Tensor, rows: Tensor) -> None:
    miss = miss[rows.to(miss.device)]
    found.setdefault(f"mse/{name}", []).append(miss.square().mean(1).cpu())
    found.setdefault(f"mae/{name}", []).append(miss.abs().mean(1).cpu())


STUDY = Study(
    arms,
    columns=(
        Column("mse_other", "MSE, not its own"),
        Column("mse_own", "its own"),
        Column("mse_decoder", "decoder"),
        Column("mae_other", "MAE, not its own"),
        Column("mae_own", "its own"),
        Column("mae_decoder", "decoder"),
    ),
    reference="regularised",
    note=(
        "Mean squared and mean absolute error of test pixels in -1..1. The certificate of the half that 5-9 are routed "
        "to, on 0-4 (not its own: the more, the better they are kept out) and on 5-9 (its own); of ten parts the mean "
        "over all certificates; the decoder, all digits. Published MSE, not its own and own: routed .32, .08; "
        "unregularised .32, .32; regularised .13, .13; neither .08, .09 (printed there as MAE). Ten parts have a code "
        "of 40, and are held against 'ten parts, not routed' rather than 'regularised'. One and the same image for all "
        "has an MSE of about .35."
    ),
)

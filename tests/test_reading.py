"""Networks that change in place what a site's reader reads: the numbers are right, or the reason is told."""

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.ablation import ablation_rises, single
from attribution.interactions import measure_interactions
from attribution.measure import measure
from attribution.methods import Conductance, IntegratedGradients, InternalInfluence, Method, RelP, scores
from attribution.roots import categorical_root
from attribution.sites import Site
from attribution.subject import Rows, Subject, batched

CHANGED = r"the input of '{}' was changed in place after it was read, .* \(x = x \+ y for x \+= y; .* inplace=False\)"


class Residual(nn.Module):
    """Two blocks on a stream of six features."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.embed, self.first, self.second, self.out = (nn.Linear(n, m) for n, m in ((4, 6), (6, 6), (6, 6), (6, 3)))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in (self.first, self.second):
            y = torch.tanh(block(x))
            if self.in_place:
                x += y
            else:
                x = x + y
        return self.out(x)


def rows() -> list[Rows]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    return batched(inputs, torch.randint(3, (10,), generator=generator), torch.arange(10) % 2, rows_at_once=4)


def asked(network: nn.Module, *sites: Site) -> Subject:
    return Subject(network, sites, ("p", "q"), nn.CrossEntropyLoss(reduction="none"), root=categorical_root)


def both(*readers: str) -> tuple[Subject, Subject]:
    """Return the same network without and with changes in place."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        clean, in_place = Residual(False).double(), Residual(True).double()
    in_place.load_state_dict(clean.state_dict())
    sites = [Site(reader, reader, 6) for reader in readers]
    return asked(clean, *sites), asked(in_place, *sites)


def test_a_stream_that_grows_in_place_is_measured_as_it_was_read() -> None:
    clean, in_place = (measure(subject, rows(), exact_outputs=3) for subject in both("first"))
    for kind in ("taylor", "absolute", "fisher", "empirical", "report"):
        assert torch.equal(in_place.score("first", kind), clean.score("first", kind))
    wanted, found = (scores(IntegratedGradients(3), subject, rows()) for subject in both("first", "second"))
    assert all(torch.equal(found[site], wanted[site]) for site in wanted)


def found(ask: Callable[[Subject], Mapping[str, Tensor]], subject: Subject) -> Mapping[str, Tensor] | str:
    try:
        return ask(subject)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("readers", [("first",), ("second",), ("first", "second"), ("out",)])
def test_every_method_is_right_or_says_what_was_changed(readers: tuple[str, ...]) -> None:
    methods: list[Method] = [IntegratedGradients(2), Conductance(2), InternalInfluence(2), RelP()]
    asks: list[Callable[[Subject], Mapping[str, Tensor]]] = [
        *(lambda subject, method=method: scores(method, subject, rows()) for method in methods),
        lambda subject: {name: sums.taylor for name, sums in measure(subject, rows()).sites.items()},
        lambda subject: {
            name: each.totals for name, each in measure_interactions(subject, rows(), kind="attribution").items()
        },
    ]
    clean, in_place = both(*readers)
    for ask in asks:
        wanted, got = found(ask, clean), found(ask, in_place)
        assert not isinstance(wanted, str)
        if isinstance(got, str):
            assert got.startswith("the input of ")
            assert "was changed in place after it was read" in got
            assert "out" not in readers
        else:
            assert all(torch.equal(got[site], wanted[site]) for site in wanted)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(inplace=True)])
@pytest.mark.parametrize("upstream", [False, True])
def test_a_reader_that_works_in_place_is_named(activation: nn.Module, upstream: bool) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), activation, nn.Linear(6, 3)).double()
    sites = (Site("first", "2", 6),) * upstream + (Site("pre", "3", 6),)
    subject = asked(network, *sites)
    for method in (IntegratedGradients(2), Conductance(2), RelP()):
        with pytest.raises(ValueError, match=CHANGED.format(3)):
            scores(method, subject, rows())
    with pytest.raises(ValueError, match=CHANGED.format(3)):
        measure(subject, rows())
    with pytest.raises(ValueError, match=CHANGED.format(3)):
        measure_interactions(subject, rows(), kind="attribution")
    assert ablation_rises(subject, rows(), "pre", single(6)).isfinite().all()


def test_an_embedding_that_is_added_to_in_place_is_explained() -> None:
    """Relevance starts at an embedding, which no gradient has come to before."""

    def run(inputs: Tensor, _: Tensor) -> Tensor:
        stream = embedding(inputs)
        stream += torch.tanh(layer(stream))
        return F.linear(layer(stream), layer.weight)

    embedding, layer = nn.Embedding(9, 6).double(), nn.Linear(6, 6).double()
    network = nn.ModuleList([embedding, layer, nn.Identity()])
    subject = Subject(
        network,
        (Site("s", "2", 6),),
        ("p",),
        nn.CrossEntropyLoss(reduction="none"),
        run=lambda x, c: network[2](run(x, c)),
    )
    tokens = torch.arange(5)
    batch = Rows(tokens, tokens, torch.zeros(5, dtype=torch.int64), tokens)
    assert bool(scores(RelP(), subject, [batch])["s"].isfinite().all())

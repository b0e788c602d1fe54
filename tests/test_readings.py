import itertools

import pytest
import torch

from moeify.evaluation import held_out_loss
from moeify.recipe.config import Evaluation
from moeify.routed.split_model import SplitModel
from moeify.routers.generation import Decision, Reader
from moeify.routers.readings import decided, opinion_nats, read
from moeify.routers.report import Choice, calibration_error
from moeify.routers.router import category_of_leaf, early
from moeify.routers.training import best, route
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.task import Batch
from moeify.world import Solo
from tests.networks import CATEGORIES, rows_for
from tests.test_routers import some_router, split_llama
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("few_rows_to_fit")

TASK = ToyTextTask(toy_config(**TEXT_CONFIG))


def toy_split(task: ToyTask) -> SplitModel:
    """The toy task's untrained network, cut into four leaves, with units made large so that routes matter."""
    model = SplitModel(task.build(), CATEGORIES)
    tree = ExpertTree.undivided(CATEGORIES).split({0: [(c,) for c in ("b", "a", "d", "c")]})
    model.repartition(Partition(tree, {site.name: (12, 5, 5, 5, 5) for site in model.space.sites}))
    with torch.no_grad():
        for site in model.space.sites:
            model.network.get_parameter(site.output).mul_(20)
    return model.double()


@torch.no_grad()
def test_opinions_of_one_pass_are_those_of_reading_token_by_token() -> None:
    model = split_llama()
    tokens = rows_for(model.network, 3)
    targets = tokens.roll(-1, 1)
    choices = torch.randint(4, (3, 12, 2), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, targets, torch.zeros(3, dtype=torch.long), torch.arange(3))
    nats = opinion_nats(model, TASK, batch, choices)
    first = model(tokens, category_of_leaf(model)[choices[..., 0]]).log_softmax(-1)
    torch.testing.assert_close(nats[..., 0], -first.gather(2, targets.unsqueeze(2))[..., 0], rtol=1e-9, atol=1e-12)
    for row, weights in itertools.product(range(3), [(0.0, -torch.inf), (-torch.inf, 0.0), (-0.5, -0.9)]):
        reader = Reader(model)
        for place in range(12):
            one, two = choices[row, place].tolist()
            log_p = reader.next(int(tokens[row, place]), Decision(one, 0.5, two, weights))
            expected = -torch.logsumexp(torch.tensor(weights, dtype=torch.float64) - nats[row, place], 0)
            torch.testing.assert_close(-log_p[targets[row, place]], expected, rtol=1e-8, atol=1e-10)


def test_losses_are_those_of_the_loop_and_policies_mix_by_the_formula() -> None:
    model, twin = toy_split(TASK), SplitModel(TASK.build(), CATEGORIES)
    router = some_router(model)
    settings = Evaluation(validation_rows=6, test_rows=8, rows_at_once=8)
    found = read(model, {"dense": twin}, TASK, settings, "test", router, ("document", "token"))
    assert found.prefix == 3
    assert found.causal == slice(2, None)
    for arm, nats in ((model, found.label_RP), (twin, found.twins["dense"])):
        loss = held_out_loss(arm, TASK, Solo(), settings, "test")
        for category, name in enumerate(CATEGORIES):
            assert nats[found.categories_R == category].mean().item() == pytest.approx(loss[name], rel=1e-6)
    for kind in ("document", "token"):
        probability, second = found.decided(kind).exp().topk(2).values.unbind(-1)
        one, two = found.routed[kind].unbind(-1)
        assert torch.equal(found.nats(kind, 0.0), one)
        mixed = -torch.log((probability * torch.exp(-one) + second * torch.exp(-two)) / (probability + second))
        torch.testing.assert_close(found.nats(kind, 1.0), mixed)
        half = found.nats(kind, 0.5)
        torch.testing.assert_close(half, torch.where(probability < 0.5, mixed, one))
    assert not torch.allclose(found.routed["token"][..., 0], found.label_RP)


def test_a_document_is_decided_from_its_first_tokens_alone() -> None:
    model = split_llama()
    router = some_router(model)
    tokens = rows_for(model.network, 4)
    changed = torch.cat([tokens[:, :3], tokens[:, 3:].flip(0)], 1)
    one, other = (decided(router.read(early(model.network, each)), "document", 3) for each in (tokens, changed))
    assert torch.equal(one, other)
    assert torch.equal(one, one[:, :1].expand_as(one))


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    expected = 4 / 6 * abs(0.75 - 0.95) + 2 / 6 * abs(0.5 - 0.55)
    assert calibration_error(confidence, right) == pytest.approx(expected, rel=1e-5)
    assert calibration_error(torch.ones(3), torch.ones(3)) == 0.0


def choice(kind: str, threshold: float, loss: float, loss_all: float | None = None) -> Choice:
    return Choice(
        kind=kind, threshold=threshold, asked=0.0, loss=loss, router_tax=0.0, loss_all=loss_all, router_tax_all=None
    )


def test_the_lowest_threshold_with_nine_tenths_of_the_gain_is_taken() -> None:
    document = [choice("document", t, loss) for t, loss in ((0.0, 3.0), (0.5, 2.95), (0.9, 2.909), (0.99, 2.9))]
    assert best(document, None).threshold == 0.9
    assert best(document, 0.5).threshold == 0.5
    token = [choice("token", 0.0, 2.95, 3.5), choice("token", 0.5, 2.905, 3.6)]
    assert (best([*document, *token], None).kind, best([*document, *token], None).threshold) == ("document", 0.9)
    assert best([*document, *token], 0.5).kind == "token"
    flat = [choice("document", t, 3.0) for t in (0.0, 0.5)]
    assert best(flat, None).threshold == 0.0


def test_a_router_is_trained_chosen_and_measured() -> None:
    config = toy_config(**TEXT_CONFIG)
    model = toy_split(TASK).float()
    told = SplitModel(TASK.build(), CATEGORIES, told=True)
    router, report = route(model, {"dense": SplitModel(TASK.build(), CATEGORIES), "told": told}, TASK, config)
    assert (router.kind, router.threshold) == (report.kind, report.threshold)
    assert [c.kind for c in report.choices] == ["document"] * 6 + ["token"] * 6
    assert report.accuracy > 0.3
    assert all(sum(shares.values()) == pytest.approx(1) for shares in report.confusion.values())
    assert list(report.accuracy_after) == [1, 2, 4, 8, 12]
    for compared in (report.whole, report.later):
        if compared:
            assert set(compared.loss) == {"label", "router", "dense", "told"}
            over = compared.loss["router"]["mean"] - compared.loss["told"]["mean"]
            assert compared.over_told["mean"] == pytest.approx(over)
            rise = compared.loss["router"]["a"] / compared.loss["label"]["a"] - 1
            assert compared.router_tax["a"] == pytest.approx(rise)
    assert (report.whole is None) == (report.kind == "document")
    _, fixed = route(model, {"dense": told}, TASK, config, "document", 0.8)
    assert (fixed.kind, fixed.threshold, fixed.whole) == ("document", 0.8, None)
    assert [c.threshold for c in fixed.choices] == [0.0, 0.8]


def test_split_heads_leave_documents_without_a_second_opinion() -> None:
    config = toy_config(**TEXT_CONFIG)
    flat = toy_split(TASK).float()
    widths = flat.partition.widths | {f"layers.{i}.heads": (1, 1, 0, 0, 0) for i in range(2)}
    model = SplitModel(TASK.build(), CATEGORIES, Partition(flat.partition.tree, widths))
    router, report = route(model, {"dense": SplitModel(TASK.build(), CATEGORIES)}, TASK, config)
    assert (router.kind, router.threshold, len(report.choices)) == ("document", 0.0, 1)
    for kind, threshold in (("token", None), (None, 0.5)):
        with pytest.raises(ValueError, match="heads are split"):
            route(model, {}, TASK, config, kind, threshold)


def test_examples_are_routed_one_by_one() -> None:
    config = toy_config()
    task = ToyTask(config)
    model = toy_split(task).float()
    _, report = route(model, {"dense": SplitModel(task.build(), CATEGORIES)}, task, config)
    assert (report.kind, report.threshold, report.later) == ("document", 0.0, None)
    assert report.accuracy > 0.95
    assert report.whole.loss["router"]["mean"] == pytest.approx(report.whole.loss["label"]["mean"], rel=0.05)
    with pytest.raises(ValueError, match="take 'document'"):
        route(model, {}, task, config, "token")
    with pytest.raises(ValueError, match="single examples; leave"):
        route(model, {}, task, config, None, 0.5)

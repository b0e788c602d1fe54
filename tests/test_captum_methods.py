from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import InternalInfluence, LayerConductance
from subjects import NAMES, activations, by_category, close, extra, losses_of, nats, subject_of, whole
from torch import Tensor, nn

from attribution.captum_methods import along_the_input
from attribution.sites import Site
from attribution.subject import Rows, Subject


def moved(kind: str, subject: Subject, rows: Rows) -> tuple[Callable[..., Tensor], Tensor]:
    """Return the rows' losses as Captum wants them, and what it moves."""
    if kind == "llama":
        network: Any = subject.network
        embedded = network.get_input_embeddings()(rows.inputs).detach()
        return lambda e, _, targets, __: nats(network(inputs_embeds=e).logits, targets), embedded
    return losses_of(subject), rows.inputs


@pytest.mark.parametrize("kind", ["mlp", "conv", "llama"])
def test_both_equal_captum_called_directly_on_everything_at_once(kind: str) -> None:
    subject, batches = subject_of(kind)
    subject.network.eval()
    rows = whole(batches)
    losses, inputs = moved(kind, subject, rows)
    conductance = along_the_input("conductance", subject, batches, 5, at_once=13)
    influence = along_the_input("internal influence", subject, batches, 5, at_once=13)
    for site in subject.sites:
        a, reader = activations(subject, rows, site).detach(), subject.reader(site)
        settings: dict[str, Any] = {
            "additional_forward_args": extra(rows), "n_steps": 5, "attribute_to_layer_input": True,
        }  # fmt: skip
        z = LayerConductance(losses, reader).attribute(inputs, **settings)
        close(conductance[site.name], by_category(-whole_tensor(z), rows, site))
        g = InternalInfluence(losses, reader).attribute(inputs, **settings)
        close(influence[site.name], by_category(-whole_tensor(g) * a, rows, site))


def whole_tensor(found: Any) -> Tensor:
    """Captum gives a layer that takes its input in a tuple a tuple."""
    return (found if isinstance(found, Tensor) else found[0]).detach()


class TwoUnits(nn.Module):
    """y = 3 a_1 - 2 a_2, a = x."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        self.down.weight.data = torch.tensor([[3.0, -2.0]], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x)


def test_a_linear_loss_gives_the_numbers_worked_out_by_hand() -> None:
    """a = (1, 2): influence 3 a_1 = 3 and -2 a_2 = -4; conductance that, times what lies between the two nodes."""
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    row = Rows(x, torch.zeros(1), torch.tensor([0]), torch.tensor([0]))
    subject = Subject(TwoUnits(), (Site("s", "down", 2),), ("a",), lambda outputs, _: outputs.sum(1))
    wanted = torch.tensor([[-3.0], [4.0]], dtype=torch.float64)
    close(along_the_input("internal influence", subject, [row], 1)["s"], wanted)
    close(along_the_input("conductance", subject, [row], 1)["s"], wanted / 3**0.5)  # Nodes 1/2 -+ 1/(2 sqrt 3).


def test_conductance_adds_up_to_the_rise_without_the_input_as_steps_grow() -> None:
    subject, batches = subject_of("mlp")
    subject.network.eval()
    rows = whole(batches)
    losses = losses_of(subject)
    with torch.no_grad():
        loss, base = losses(rows.inputs, *extra(rows)), losses(rows.inputs * 0, *extra(rows))
    token = Site("any", "any", 1)
    rise = by_category((base - loss)[:, None, None].expand(-1, 3, 1) / 3, rows, token)[0]
    for site in subject.sites:
        errors = [
            (along_the_input("conductance", subject, batches, steps)[site.name].sum(0) - rise).abs().max()
            for steps in (32, 1024)
        ]
        assert float(errors[1] / rise.abs().max()) < 1e-3
        assert float(errors[1] / errors[0]) < 1 / 16


def test_the_network_is_left_as_it_was() -> None:
    for kind in ("conv", "llama"):
        subject, batches = subject_of(kind)
        subject.network.train()
        before = {name: value.clone() for name, value in subject.network.state_dict().items()}
        along_the_input("conductance", subject, batches, 2)
        along_the_input("internal influence", subject, batches, 2)
        for module in subject.network.modules():
            assert module.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert all(p.requires_grad and p.grad is None for p in subject.network.parameters())
        assert all(torch.equal(value, before[name]) for name, value in subject.network.state_dict().items())
        assert not any(batch.inputs.requires_grad for batch in batches)


def test_bad_input_is_refused_with_the_way_out() -> None:
    subject, batches = subject_of("llama")
    network = subject.network
    bare = Subject(
        nn.ModuleDict({"model": network.model}), subject.sites, NAMES, nats, run=lambda x, _: network(x).logits
    )
    with pytest.raises(ValueError, match=r"torch\.int64 cannot be moved by degrees, and ModuleDict has no get_input"):
        along_the_input("conductance", bare, batches, 2)
    twice = Subject(network, subject.sites, NAMES, nats, run=lambda x, _: network(x).logits + network(x).logits)
    with pytest.raises(ValueError, match="the input embedding must run once"):
        along_the_input("conductance", twice, batches, 2)
    subject, batches = subject_of("mlp")
    with pytest.raises(ValueError, match="no rows of 'c'"):
        along_the_input("conductance", subject, [batches[0].take(batches[0].categories < 2)], 2)
    with pytest.raises(ValueError, match="no rows of 'a', 'b', 'c'"):
        along_the_input("internal influence", subject, [batches[0].take(slice(0, 0))], 2)
    mlp = subject.network
    cut = Subject(mlp, subject.sites, NAMES, nats, run=lambda x, _: mlp(x).detach())
    beside = Subject(mlp, subject.sites, NAMES, nats, run=lambda x, _: (mlp(x) * 0).detach() + x[..., :4])
    still = Subject(mlp, subject.sites, NAMES, nats, run=lambda x, _: mlp(x.detach()) + x[..., :4])
    for broken in (cut, beside, still):
        with pytest.raises(ValueError, match="the loss does not depend on the units of site 'first', or they do not"):
            along_the_input("conductance", broken, batches, 2)

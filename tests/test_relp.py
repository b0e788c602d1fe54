import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import NAMES, activations, by_category, close, in_float64, llama, nats, subject_of, whole
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from attribution.methods import Taylor, scores
from attribution.relp import relevance, rules
from attribution.sites import Site
from attribution.subject import Rows, Subject


class WrittenNorm(nn.Module):
    """A root mean square norm spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1))


class Block(nn.Module):
    """x + down(silu(gate n) * up n), n = norm x."""

    def __init__(self, norm: str, residual: bool) -> None:
        super().__init__()
        self.norm = WrittenNorm() if norm == "written" else nn.RMSNorm(5, eps=0.1)
        self.gate, self.up, self.down = nn.Linear(5, 7, False), nn.Linear(5, 7, False), nn.Linear(7, 5, False)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        y = self.down(F.silu(self.gate(n)) * self.up(n))
        return x + y if self.residual else y


def gated(norm: str = "written", residual: bool = True) -> tuple[Subject, list[Rows]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(Block(norm, residual), Block(norm, residual), nn.Linear(5, 4, False)).double()
        for block in (network[0], network[1]):
            block.norm.weight.data.uniform_(0.5, 1.5)
    _, batches = subject_of("mlp")
    return Subject(network, (Site("first", "0.down", 7), Site("second", "1.down", 7)), NAMES, nats), batches


@pytest.mark.parametrize("norm", ["written", "torch"])
@pytest.mark.parametrize("residual", [True, False])
def test_norms_and_gated_units_follow_the_rules_written_out_by_hand(norm: str, residual: bool) -> None:
    subject, batches = gated(norm, residual)
    rows, network = whole(batches), subject.network
    z = {"first": torch.zeros(11, 3, 7).double(), "second": torch.zeros(11, 3, 7).double()}
    for r in range(11):
        for p in range(3):
            x, seen = rows.inputs[r, p], []
            for block in (network[0], network[1]):
                size = (x.square().mean() + 0.1).sqrt()
                n = block.norm.weight * x / size
                gate, up = block.gate.weight @ n, block.up.weight @ n
                silu = gate * torch.sigmoid(gate)
                seen.append((block, size, gate, up, silu))
                x = block.down.weight @ (silu * up) + (x if residual else 0)
            probabilities = (network[2].weight @ x).softmax(0)
            back = network[2].weight.T @ (probabilities - F.one_hot(rows.targets[r, p], 4))
            for name, (block, size, gate, up, silu) in (("second", seen[1]), ("first", seen[0])):
                to_units = block.down.weight.T @ back
                z[name][r, p] = (silu * up * to_units).detach()
                to_gate = to_units * up / 2 * silu / gate
                to_up = to_units * silu / 2
                to_n = block.gate.weight.T @ to_gate + block.up.weight.T @ to_up
                back = block.norm.weight * to_n / size + (back if residual else 0)
    found = relevance(subject, batches)
    for site in subject.sites:
        close(found[site.name], by_category(-z[site.name], rows, site))
    taylor = scores(Taylor(), subject, batches)["first"]
    assert float((taylor - found["first"]).abs().max() / taylor.abs().max()) > 0.01


def test_relevance_is_conserved_from_the_output_to_every_site_that_all_paths_cross() -> None:
    subject, batches = gated(residual=False)
    rows = whole(batches)
    found = relevance(subject, batches)
    logits = subject.network(rows.inputs).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(nats(logits, rows.targets).sum(), logits)
    logits = logits.detach()
    wanted = by_category(-(logits * gradient).sum(-1, keepdim=True), rows, Site("any", "any", 1))[0]
    for site in subject.sites:
        close(found[site.name].sum(0), wanted)
    taylor = scores(Taylor(), subject, batches)["first"].sum(0)
    assert float((taylor / wanted - 1).abs().min()) > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_relevance_is_conserved_through_a_transformer(attention: str) -> None:
    network = llama(attention).requires_grad_(False)
    tokens = torch.randint(17, (4, 8), generator=torch.Generator().manual_seed(1))
    embedded = network.get_input_embeddings()(tokens[:, :-1]).requires_grad_()
    with rules(network):
        logits = network(inputs_embeds=embedded).logits
    loss_R = nats(logits, tokens[:, 1:])
    back, top = torch.autograd.grad(loss_R.sum(), (embedded, logits))
    # The stock norms compute in float32.
    close((embedded * back).sum((1, 2)).detach(), (logits * top).sum((1, 2)), 1e-5)


def test_both_kinds_of_attention_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    # The eager one would be in float32.
    monkeypatch.setattr(F, "softmax", lambda x, dim, **_: torch.softmax(x, dim))
    subject, batches = subject_of("llama")
    fused, eager = (
        relevance(Subject(in_float64(llama(kind), eps=1e-6), subject.sites, NAMES, nats), batches)
        for kind in ("sdpa", "eager")
    )
    taylor = scores(Taylor(), subject, batches)
    for site in subject.sites:
        close(eager[site.name], fused[site.name])
        assert float((taylor[site.name] - fused[site.name]).abs().max() / taylor[site.name].abs().max()) > 0.01


def test_heads_follow_the_rules_written_out_by_hand() -> None:
    """The relevance of the last layer's heads, with the norms and ratios above them frozen at what they are."""
    subject, batches = subject_of("llama")
    rows, network, site = whole(batches), in_float64(llama(), eps=1e-6), subject.sites[3]
    subject = Subject(network, (site,), NAMES, nats)
    a = activations(subject, rows, site).detach().requires_grad_()
    layer, kept = network.model.layers[1], {}
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: kept.update(x=args[0].detach()), with_kwargs=True)
    network(rows.inputs)
    handle.remove()

    def frozen(x: Tensor, norm: nn.Module) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + norm.eps)

    x = kept["x"] + layer.self_attn.o_proj(a)
    n = frozen(x, layer.post_attention_layernorm)
    gate, up = layer.mlp.gate_proj(n), layer.mlp.up_proj(n)
    ratio = torch.sigmoid(gate).detach()
    halves = ((gate * ratio).detach() * up + gate * ratio * up.detach()) / 2
    logits = network.lm_head(frozen(x + layer.mlp.down_proj(halves), network.model.norm))
    (back,) = torch.autograd.grad(nats(logits, rows.targets).sum(), a)
    close(relevance(subject, batches)[site.name], by_category((-a * back).detach(), rows, site))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_relevance_of_networks_that_are_linear_piece_by_piece_is_the_gradient_times_the_activation(kind: str) -> None:
    subject, batches = subject_of(kind)
    taylor, found = scores(Taylor(), subject, batches), relevance(subject, batches)
    for site in subject.sites:
        close(found[site.name], taylor[site.name])


class Chain(nn.Module):
    """head(function(down(x)))."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.down, self.middle, self.head = nn.Linear(5, 6), Calling(function), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.down(x)))


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def chain(function: Callable[[Tensor], Tensor]) -> tuple[Subject, list[Rows]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Chain(function).double()
    return Subject(network, (Site("s", "down", 5),), NAMES, nats), subject_of("mlp")[1]


def slow_chain(subject: Subject, batches: list[Rows], factor: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the scores if ``function`` is its input times a constant factor of it."""
    rows, network, site = whole(batches), subject.network, subject.sites[0]
    a = rows.inputs.clone().requires_grad_()
    y = network.down(a)
    logits = network.head(y * factor(y.detach()))
    torch.testing.assert_close(logits, network(rows.inputs), rtol=1e-9, atol=1e-12)
    (back,) = torch.autograd.grad(nats(logits, rows.targets).sum(), a)
    return by_category((-a * back).detach(), rows, site)


@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (F.gelu, lambda y: F.gelu(y) / y),
        (torch.tanh, lambda y: y.tanh() / y),
        (lambda y: y**3, lambda y: y**2),
        (lambda y: y * y, lambda y: y),
        (lambda y: y / (1 + y.square().sum(-1, keepdim=True)), lambda y: 1 / (1 + y.square().sum(-1, keepdim=True))),
        (lambda y: y * y.softmax(-1), lambda y: y.softmax(-1)),
        (lambda y: torch.einsum("rpi,rpi->rpi", y, y), lambda y: y),
        (lambda y: F.rms_norm(y, (6,), eps=0.1), lambda y: (y.square().mean(-1, keepdim=True) + 0.1).rsqrt()),
        (lambda y: F.relu(y, inplace=True), lambda y: (y > 0).double()),
        (lambda y: y.mul_(2).div_(3), lambda y: torch.full_like(y, 2 / 3)),
        (lambda y: y.view(len(y), -1).unflatten(1, (3, 6)) - 0 * y, torch.ones_like),
    ],
)
def test_functions_follow_their_rule(function: Callable[[Tensor], Tensor], factor: Callable[[Tensor], Tensor]) -> None:
    subject, batches = chain(function)
    close(relevance(subject, batches)["s"], slow_chain(subject, batches, factor))


def test_a_layer_norm_has_a_constant_deviation() -> None:
    subject, batches = chain(lambda y: F.layer_norm(y, (6,), torch.arange(6.0).double(), torch.ones(6).double()))
    rows, network, site = whole(batches), subject.network, subject.sites[0]
    a = rows.inputs.clone().requires_grad_()
    y = network.down(a)
    deviation = (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt().detach()
    logits = network.head((y - y.mean(-1, keepdim=True)) / deviation * torch.arange(6.0) + 1)
    torch.testing.assert_close(logits, network(rows.inputs))
    (back,) = torch.autograd.grad(nats(logits, rows.targets).sum(), a)
    close(relevance(subject, batches)["s"], by_category((-a * back).detach(), rows, site))


def test_what_is_written_over_its_input_reaches_all_who_read_it() -> None:
    def twice(inplace: bool) -> Callable[[Tensor], Tensor]:
        def function(y: Tensor) -> Tensor:
            positive = F.relu(y, inplace=inplace)
            return positive + (y if inplace else positive)

        return function

    over, beside = (chain(twice(inplace)) for inplace in (True, False))
    close(relevance(*over)["s"], relevance(*beside)["s"], 1e-12)


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5)
        return GPT2LMHeadModel(config).double()


def test_an_activation_written_out_in_products_gets_the_rule_of_the_whole() -> None:
    """GPT-2 spells its GELU out; the rule must not look inside."""
    network = gpt2()
    tokens = torch.randint(17, (11, 8), generator=torch.Generator().manual_seed(2))
    rows = Rows(tokens[:, :-1], tokens[:, 1:], torch.arange(11) * 3 // 11, torch.arange(11))
    sites = tuple(Site(f"{i}", f"transformer.h.{i}.mlp.c_proj", 32) for i in range(2))
    subject = Subject(network, sites, NAMES, nats)
    written = relevance(subject, [rows])
    for block in network.transformer.h:
        block.mlp.act = nn.GELU("tanh")
    fused = relevance(subject, [rows])
    for name in ("0", "1"):
        close(written[name], fused[name])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.sigmoid, "sigmoid"),
        (F.softplus, "softplus"),
        (torch.exp, "exp"),
        (lambda y: y.abs(), "abs"),
        (lambda y: 1 / y, "__rdiv__"),
        (lambda y: torch.ones_like(y).div_(y), "div_"),
        (lambda y: y**-1, "pow"),
        (lambda y: 2.0**y, "__rpow__"),
        (lambda y: F.log_softmax(y, -1), "log_softmax"),
        (lambda y: F.batch_norm(y.flatten(0, 1), None, None, training=True).view_as(y), "batch_norm"),
        (lambda y: F.linear(y, y[0, :, :].T @ y[0]), "linear"),
    ],
)
def test_functions_without_a_rule_are_refused_by_name_and_place(function: Callable[..., Tensor], name: str) -> None:
    subject, batches = chain(function)
    subject.network.train()
    with pytest.raises(ValueError, match=rf"no rule for '{name}' as it is used in module 'middle'; use another method"):
        relevance(subject, batches)
    left_alone(subject)
    assert not torch.overrides._get_current_function_mode_stack()


def left_alone(subject: Subject) -> None:
    for module in subject.network.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in subject.network.parameters())


@pytest.mark.parametrize("kind", ["mlp", "conv", "llama"])
def test_the_network_is_left_as_it_was(kind: str) -> None:
    subject, batches = subject_of(kind)
    rows, network = whole(batches), subject.network
    network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = subject.forward(rows.inputs, rows.categories)
    with subject.still(), rules(network):
        same = subject.forward(rows.inputs, rows.categories)
    torch.testing.assert_close(same, logits, rtol=1e-9, atol=1e-12)
    network.train()
    relevance(subject, batches)
    left_alone(subject)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_scores_of_a_site_do_not_depend_on_the_other_sites() -> None:
    subject, batches = subject_of("llama")
    found = relevance(subject, batches)
    for site in subject.sites:
        alone = relevance(Subject(subject.network, (site,), NAMES, nats), batches)
        close(alone[site.name], found[site.name], 1e-12)


class Beside(nn.Module):
    """Units that three modules read, of which the site means one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 6)
        self.down, self.side, self.skip, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        a = self.embedding(tokens) * 2
        return self.head(self.down(a) * self.side(a) + self.skip(a))


def test_only_the_reader_counts_and_other_paths_from_the_embedding_take_their_half() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Beside().double()
    drawn = whole(subject_of("mlp")[1])
    tokens = torch.randint(17, (11, 3), generator=torch.Generator().manual_seed(2))
    rows, site = Rows(tokens, drawn.targets, drawn.categories, drawn.ids), Site("s", "down", 6)
    a = (network.embedding(tokens) * 2).detach()
    product = (network.down(a) * network.side(a) + network.skip(a)).detach().requires_grad_()
    (back,) = torch.autograd.grad(nats(network.head(product), rows.targets).sum(), product)
    z = a * ((network.side(a) * back) @ network.down.weight) / 2
    found = relevance(Subject(network, (site,), NAMES, nats), [rows])
    close(found["s"], by_category(-z.detach(), rows, site))


def test_bad_input_is_refused_with_the_way_out() -> None:
    subject, batches = subject_of("mlp")
    network: Any = subject.network
    with pytest.raises(ValueError, match="no rows of 'c'"):
        relevance(subject, [batches[0].take(batches[0].categories < 2)])
    softmax = Subject(network, subject.sites, NAMES, nats, run=lambda x, _: network(x).softmax(-1))
    with pytest.raises(ValueError, match="only through a softmax"):
        relevance(softmax, batches)
    beside = Subject(network, subject.sites, NAMES, nats, run=lambda x, _: network(x).detach() + x[..., :4])
    with pytest.raises(ValueError, match="does not depend on the units of site 'first'"):
        relevance(beside, batches)

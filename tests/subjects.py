"""Tiny networks of three kinds, with sites, uneven batches and labels, that several test files measure."""

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.sites import Site
from attribution.subject import Rows, Subject

NAMES = ("a", "b", "c")


def nats(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(outputs), -1).sum(1)


def sample(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
    drawn = [
        torch.multinomial(row.flatten(0, -2).softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
        for row, seed in zip(outputs.view(len(outputs), -1, outputs.shape[-1]), seeds, strict=True)
    ]
    return torch.stack(drawn).view(outputs.shape[:-1])


class ReluNet(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7, bias), nn.Linear(7, 6, bias)
        self.up2, self.down2 = nn.Linear(6, 8, bias), nn.Linear(8, 4, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down2(torch.relu(self.up2(self.down(torch.relu(self.up(x))))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.head = nn.Conv2d(6, 5, 3, padding=1, stride=2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(maps)).mean((2, 3)))


def llama(attention: str = "sdpa", groups: int = 2) -> LlamaForCausalLM:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=17,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=groups,
            max_position_embeddings=8,
            initializer_range=0.5,
            use_cache=False,
            attn_implementation=attention,
        )
        return LlamaForCausalLM(config).double()


def in_float64(network: LlamaForCausalLM, eps: float) -> LlamaForCausalLM:
    """Put norms that compute in float64 in the place of the stock ones, which compute in float32."""

    def same(stock: nn.Module) -> nn.RMSNorm:
        norm = nn.RMSNorm(8, eps=eps, dtype=torch.float64)
        norm.weight = stock.weight
        return norm

    network.model.norm = same(network.model.norm)
    for layer in network.model.layers:
        layer.input_layernorm = same(layer.input_layernorm)
        layer.post_attention_layernorm = same(layer.post_attention_layernorm)
    return network


def subject_of(kind: str, bias: bool = True) -> tuple[Subject, list[Rows]]:
    """Return a subject and its data in two uneven batches, the second in no order."""
    network: nn.Module
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "mlp":
            network, sites = ReluNet(bias).double(), (Site("first", "down", 7), Site("second", "down2", 8))
            inputs = torch.randn(11, 3, 5, generator=generator, dtype=torch.float64)
            targets = torch.randint(4, (11, 3), generator=generator)
        elif kind == "conv":
            network = ConvNet().double()
            sites = (Site("maps", "conv2", 6, spatial=True), Site("pooled", "head", 5))
            inputs = torch.randn(11, 1, 7, 7, generator=generator, dtype=torch.float64)
            targets = torch.randint(4, (11,), generator=generator)
        else:
            network = llama()
            ffn = tuple(Site(f"layers.{i}.ffn", f"model.layers.{i}.mlp.down_proj", 12) for i in range(2))
            heads = (Site(f"layers.{i}.heads", f"model.layers.{i}.self_attn.o_proj", 2, width=4) for i in range(2))
            sites = (*ffn, *heads)
            tokens = torch.randint(17, (11, 8), generator=generator)
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
    rows = Rows(inputs, targets, torch.arange(11) * 3 // 11, torch.arange(11))
    shuffled = torch.tensor([10, 4, 7, 0, 9])
    batches = [rows.take(torch.tensor([1, 2, 3, 5, 6, 8])), rows.take(shuffled)]
    return Subject(network, sites, NAMES, nats, sample), batches


def whole(batches: Sequence[Rows]) -> Rows:
    def together(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    return Rows(together("inputs"), together("targets"), together("categories"), together("ids"))


def activations(subject: Subject, rows: Rows, site: Site) -> Tensor:
    seen: list[Tensor] = []
    handle = subject.reader(site).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    subject.forward(rows.inputs, rows.categories)
    handle.remove()
    return seen[0]


Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def losses_of(subject: Subject) -> Losses:
    """Return each row's loss, of (inputs, inputs, targets, categories): the form that Captum calls."""
    return lambda inputs, _, targets, categories: subject.nats(subject.forward(inputs, categories), targets)


def tail(subject: Subject, site: Site) -> Losses:
    """Return each row's loss as a function of the site's activations: (activations, inputs, targets, categories)."""

    def losses(activation: Tensor, inputs: Tensor, targets: Tensor, categories: Tensor) -> Tensor:
        handle = subject.reader(site).register_forward_pre_hook(lambda _, args: (activation, *args[1:]))
        outputs = subject.forward(inputs, categories)
        handle.remove()
        return subject.nats(outputs, targets)

    return losses


def extra(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return rows.inputs, rows.targets, rows.categories


def by_category(terms: Tensor, rows: Rows, site: Site) -> Tensor:
    """Add up by unit terms in the shape of the site's activations; return their means over each category's tokens."""
    arranged = site.arrange(terms)
    sums = torch.zeros(site.units, len(NAMES), dtype=torch.float64)
    tokens = torch.zeros(len(NAMES), dtype=torch.float64)
    for r, c in enumerate(rows.categories.tolist()):
        sums[:, c] += arranged[r].sum((0, 2))
        tokens[c] += arranged.shape[1]
    return sums / tokens


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-9) -> None:
    """Compare element by element, and rounding noise with the largest element."""
    assert found.dtype == torch.float64
    wanted = wanted.detach()
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * 1e-3 * float(wanted.abs().max()))

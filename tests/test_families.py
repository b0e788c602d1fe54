import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.edges import measure_edges
from attribution.measure import measure
from attribution.subject import Rows, Subject
from moeify.families import entries, readers
from moeify.language import sample_tokens, token_nats
from moeify.models import Autoencoder


def llama(groups: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
        heads = {"num_attention_heads": 4, "num_key_value_heads": groups, "max_position_embeddings": 8}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))


@pytest.mark.parametrize(("groups", "width"), [(4, 4), (2, 8), (1, 16)])
def test_heads_that_share_keys_are_one_unit_and_sites_follow_the_network(groups: int, width: int) -> None:
    sites = readers(llama(groups))
    assert [site.name for site in sites] == ["layers.0.heads", "layers.0.ffn", "layers.1.heads", "layers.1.ffn"]
    assert [(site.units, site.width) for site in sites] == [(groups, width), (24, 1)] * 2


@pytest.mark.parametrize("groups", [4, 2])
def test_every_entry_is_measured_from_all_sites_before_it(groups: int) -> None:
    network = llama(groups)
    tokens = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = Rows(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 0, 1, 1]), torch.arange(4))
    subject = Subject(network, readers(network), ("a", "b"), token_nats, sample_tokens)
    found = measure_edges(subject, [rows], entries(network))
    names = [site.name for site in subject.sites]
    assert set(found.pairs) == {(a, b) for i, b in enumerate(names) for a in names[:i]}
    assert all(bool(edges.taylor.any()) for edges in found.pairs.values())
    assert measure(subject, [rows]).sites.keys() == set(names)


def test_the_autoencoders_second_hidden_layer_is_entered_through_the_code() -> None:
    (entry,) = entries(Autoencoder(6, 5, 3))
    assert (entry.site, [writer.module for writer in entry.writers], entry.norm) == (
        "decoder.hidden",
        ["decoder.up"],
        None,
    )


def test_a_network_without_an_adapter_is_named() -> None:
    for ask in (readers, entries):
        with pytest.raises(ValueError, match="no adapter for Linear"):
            ask(nn.Linear(2, 2))

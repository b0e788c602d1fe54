from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from moeify.models.caches import empty_cache, growing_cache
from tests.networks import grouped_llama, tiny_decoder

TOKENS = torch.randint(3, 30, (3, 40), generator=torch.Generator().manual_seed(0))


LONG = {"max_position_embeddings": 64}


@pytest.mark.parametrize("make", [grouped_llama, lambda: tiny_decoder("gpt2", **LONG)])
@torch.no_grad()
def test_what_is_read_behind_a_cache_that_grows_is_what_transformers_own_tells(
    make: Callable[[], nn.Module],
) -> None:
    network = make().float().eval()
    (plain, keyword), (growing, _) = empty_cache(network), growing_cache(network)

    def read(low: int, high: int, rows: Sequence[int] = (0, 1, 2)) -> None:
        told = [network(TOKENS[list(rows), low:high], **{keyword: cache}).logits for cache in (plain, growing)]
        torch.testing.assert_close(*told)

    read(0, 5)
    for place in range(5, 12):
        read(place, place + 1)
    for cache in (plain, growing):
        cache.crop(-3)
    read(9, 12)
    read(12, 20)
    for cache in (plain, growing):
        cache.batch_select_indices(torch.tensor([2, 0]))
    read(20, 21, [2, 0])
    for cache in (plain, growing):
        cache.batch_repeat_interleave(2)
    read(21, 22, [2, 2, 0, 0])


@torch.no_grad()
def test_a_token_is_written_behind_those_before_it_which_stay_where_they_are() -> None:
    network = grouped_llama().float().eval()
    cache, keyword = growing_cache(network)
    places = []
    for place in range(TOKENS.shape[1]):
        network(TOKENS[:, place, None], **{keyword: cache})
        places.append(cache.layers[0].keys.data_ptr())
    moves = sum(one != other for one, other in pairwise(places))
    assert cache.get_seq_length() == 40
    assert moves <= 10


def test_layers_of_a_sliding_window_stay_as_transformers_makes_them() -> None:
    config = MistralConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, sliding_window=4
    )
    network = MistralForCausalLM(config)
    kinds = [[type(layer).__name__ for layer in make(network)[0].layers] for make in (empty_cache, growing_cache)]
    assert kinds == [["DynamicSlidingWindowLayer"], ["DynamicSlidingWindowLayer"]]

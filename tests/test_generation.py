import pytest
import tokenizers
import torch
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from moeify.data.given_tokenizer import GivenTokenizer
from moeify.data.pieces import pieces
from moeify.data.tokens import END
from moeify.routed.split_model import SplitModel
from moeify.routers.generation import encode_prompt, generate
from moeify.routers.router import category_of_leaf, early
from moeify.splitting.partition import Partition
from tests.networks import CATEGORIES, tiny_autoencoder, tiny_decoder
from tests.test_pruning import TREE
from tests.test_routers import some_router, split_llama

PROMPT = [0, 7, 31]


@torch.no_grad()
def test_without_temperature_every_token_is_the_likeliest_of_the_whole_text_so_far() -> None:
    model = split_llama()
    served = list(generate(model, 2, PROMPT, tokens=9, seed=0, temperature=0.0))
    assert [each.written for each in served] == [False] * 3 + [True] * 9
    tokens = [each.token for each in served]
    for length in range(3, 12):
        category = category_of_leaf(model)[[2]]
        assert tokens[length] == int(model(torch.tensor([tokens[:length]]), category)[0, -1].argmax())
    assert {(each.expert, each.probability, each.second) for each in served} == {(2, None, None)}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["token", "document"])
def test_a_router_decides_as_it_reads(kind: str) -> None:
    model = split_llama()
    router = some_router(model, kind, threshold=0.9, seed=3)
    served = list(generate(model, router, PROMPT, tokens=9, seed=5))
    tokens = torch.tensor([[each.token for each in served]])
    probabilities = router.read(early(model.network, tokens))[0].exp()
    for place, each in enumerate(served):
        at = 2 if kind == "document" else place - each.written  # the token before a written one chose its writer
        assert each.expert == int(probabilities[at].argmax())
        assert each.probability == pytest.approx(float(probabilities[at].max()))
        unsure = each.written and each.probability < 0.9
        assert each.second == (int(probabilities[at].topk(2).indices[1]) if unsure else None)
    if kind == "token":
        assert len({each.expert for each in served}) > 1


@torch.no_grad()
def test_text_goes_on_beyond_the_context_and_is_the_same_for_the_same_seed() -> None:
    model = split_llama()
    router = some_router(model, threshold=0.7)
    one, again, other = (list(generate(model, router, PROMPT, tokens=40, seed=seed)) for seed in (1, 1, 2))
    assert len(one) == 43
    assert one == again
    assert one != other
    long = [0, *range(1, 30)]  # more than the context of 12
    served = list(generate(model, 0, long, tokens=1, seed=0, temperature=0.0))
    kept = torch.tensor([long[-7:]])  # half a context before the last token
    assert served[-1].token == int(model(kept, category_of_leaf(model)[[0]])[0, -1].argmax())


@torch.no_grad()
def test_second_opinions_leave_no_trace_in_a_sliding_window() -> None:
    network = tiny_decoder("mistral", sliding_window=4, hidden_size=16)
    sites = {"layers.0.ffn": (6, 2, 3, 3, 6), "layers.1.ffn": (4, 5, 2, 3, 6)}
    model = SplitModel(network, CATEGORIES, Partition(TREE, sites)).eval()
    router = some_router(model, threshold=0.999, seed=3)
    served = list(generate(model, router, PROMPT, tokens=8, seed=0, temperature=0.0))
    assert any(each.second is not None for each in served)
    tokens = [each.token for each in served]
    log_p_PE = router.read(early(model.network, torch.tensor([tokens])))[0]
    for place in range(len(PROMPT), len(tokens)):
        top, route = log_p_PE[place - 1].topk(2), log_p_PE[:place].argmax(-1)
        said = []
        for expert in top.indices:
            route[-1] = expert
            categories = category_of_leaf(model)[route.unsqueeze(0)]
            said.append(model(torch.tensor([tokens[:place]]), categories)[0, -1].double().log_softmax(-1))
        one, other = top.values.log_softmax(-1)
        mixed = torch.logaddexp(one + said[0], other + said[1]) if top.values[0].exp() < 0.999 else said[0]
        assert tokens[place] == int(mixed.argmax())


def test_nothing_follows_the_end() -> None:
    model = split_llama()
    tokens = [each.token for each in generate(model, 1, PROMPT, tokens=200, seed=0)]
    end = tokens[20]
    cut = [each.token for each in generate(model, 1, PROMPT, tokens=200, seed=0, ends={end})]
    assert cut == tokens[: next(i for i, token in enumerate(tokens) if i > 2 and token == end)]


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="holds no token"):
        next(generate(split_llama(), 0, [], tokens=1, seed=0))
    with pytest.raises(ValueError, match="Autoencoder"):
        next(generate(SplitModel(tiny_autoencoder(), CATEGORIES), 0, [1], tokens=1, seed=0))


def test_pieces_add_up_to_the_text_and_never_hold_half_a_character() -> None:
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.train_from_iterator(
        ["aab"], BpeTrainer(special_tokens=[END], initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    )
    text = "naïve 日本 🙂 end"
    end = tokenizer.token_to_id(END)
    start, *tokens = encode_prompt(GivenTokenizer(tokenizer, end, {}), text)
    assert start == end
    found = list(pieces(tokenizer, tokens))
    assert len(found) == len(tokens)
    assert "".join(found) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)


@torch.no_grad()
def test_split_heads_have_one_route_a_row() -> None:
    model = split_llama(heads=True)
    assert model.whole_rows
    with pytest.raises(ValueError, match="give one category a row"):
        model(torch.tensor([PROMPT]), torch.tensor([[0, 1, 2]]))
    for expert in range(4):
        tokens = [each.token for each in generate(model, expert, PROMPT, tokens=9, seed=0, temperature=0.0)]
        for length in range(3, 12):
            outputs = model(torch.tensor([tokens[:length]]), category_of_leaf(model)[[expert]])
            assert tokens[length] == int(outputs[0, -1].argmax())

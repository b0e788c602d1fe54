"""What routing costs beyond its arithmetic: the split model's time over the dense one's, over their ratio of FLOPs.

1 would be a split that gains all that it saves. FLOPs are counted where they are run, of both models: matrix products
and attentions, which must be those of active units alone. Both models have the same random weights in float32, a core
and four experts, and a batch of all categories; the dense model is the stock one of ``transformers``. Rows:

ffn, attention   one layer's block alone: the step is forward and backward; of heads a split by head
model            the whole network with split feed-forward blocks: the step is forward, loss and backward
model, heads     the same with split attention heads too
by token         the whole network, every token along a route of its own, drawn at random: sort, rectangles, unsort

Norms, rotary positions, softmax and loss are no FLOPs of this count but cost time in both models, the more of it the
smaller the model: where a whole network is small, no routing saves enough for the goal.
Medians over turns of a ratio within each turn (``moeify.timing``), on as many threads as torch is given
(OMP_NUM_THREADS). About ten minutes on one thread; --quick does the smallest size, too hastily to quote. --gpu takes
larger batches, and leaves out the sizes that are over before the next kernel has been asked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.random_splits import CATEGORIES, Size, Widths, mixed_rows, pair
from benchmarks.report import Cell, Figure, gpu_parser, report
from moeify.device import take_device
from moeify.roofline import flops
from moeify.routed.split_model import SplitModel
from moeify.timing import Run, ratio, seconds

SIZES = (  # the first is that of the shipped text recipe
    (Size(64, 384, 4, 4), 16),
    (Size(128, 512, 8, 4), 16),
    (Size(256, 1024, 8, 4), 16),
    (Size(512, 2048, 8, 2), 16),
    (Size(1024, 4096, 16, 2), 8),
)
"""And rows of a batch."""
GPU_SIZES = ((Size(1024, 4096, 16, 2), 64), (Size(2048, 8192, 16, 2), 64))

Rivals = dict[str, Run]


def main() -> None:
    """Run the benchmark."""
    args = gpu_parser(__doc__).parse_args()
    device = take_device(int(args.gpu))
    sizes = GPU_SIZES if args.gpu else SIZES
    turns, at_least = (2, 0.01) if args.quick else (7, 0.1)
    rows: list[dict[str, Cell]] = []
    for size, batch in sizes[:1] if args.quick else sizes:
        for widths in ("equal", "ragged"):
            for part, step, inference in _parts(size, batch, widths, device):
                found: dict[str, Cell] = {
                    "part": part,
                    "size": f"{size.hidden}/{size.ffn}",
                    "widths": widths,
                    "threads": torch.get_num_threads(),
                }
                for what, rivals in (("step", step), ("inference", inference)):
                    counted = flops(rivals["split"]) / flops(rivals["dense"])
                    times = seconds(rivals, turns=turns, at_least=at_least, device=device)
                    taken = ratio(times, "split", "dense")
                    found |= {f"{what}: time": taken, "FLOPs" if what == "step" else "FLOPs ": counted}
                    found[f"{what} over FLOPs"] = taken / counted
                rows.append(found)
    figures = [
        Figure(f"{prefix}{what}_over_flop_ratio", _worst(rows, f"{what} over FLOPs", token), "<= 1.10, the worst row")
        for prefix, token in (("", False), ("by_token_", True))
        for what in ("step", "inference")
    ]
    report("routed_speed", rows, figures, args.json, quick=args.quick)


def _worst(rows: list[dict[str, Cell]], column: str, token: bool) -> float:
    return max(float(row[column] or 0.0) for row in rows if (row["part"] == "by token") == token)


def _parts(size: Size, batch: int, widths: Widths, device: torch.device) -> list[tuple[str, Rivals, Rivals]]:
    """Return part, its rivals' training steps, and their inference."""
    tokens, categories = mixed_rows(size, batch)
    tokens = tokens.to(device)
    dense, split = (model.to(device) for model in pair(size, widths, ("ffn", "heads")))
    split(tokens, categories)  # the blocks alone take the routes of the last batch
    found = [_block("ffn", dense, split, batch), _block("attention", dense, split, batch)]
    generator = torch.Generator().manual_seed(2)
    by_token = torch.randint(len(CATEGORIES), tokens.shape, generator=generator)
    plain = pair(size, widths)[1].to(device)
    found.append(_model("model", dense, plain, tokens, categories))
    found.append(_model("model, heads", dense, split, tokens, categories))
    found.append(_model("by token", dense, plain, tokens, by_token))
    return found


def _block(part: str, dense: nn.Module, split: SplitModel, batch: int) -> tuple[str, Rivals, Rivals]:
    name = {"ffn": "model.layers.0.mlp", "attention": "model.layers.0.self_attn"}[part]
    blocks = {"dense": dense.get_submodule(name), "split": split.network.get_submodule(name)}
    length, norm = 128, dense.get_parameter("model.norm.weight")
    x_RTD = torch.randn(batch, length, norm.numel(), generator=torch.Generator().manual_seed(3)).to(norm.device)
    x_RTD.requires_grad_()
    rotary = dense.get_submodule("model.rotary_emb")(x_RTD, torch.arange(length, device=norm.device)[None])

    def output(block: nn.Module) -> Tensor:
        return block(x_RTD) if part == "ffn" else block(x_RTD, position_embeddings=rotary, attention_mask=None)[0]

    def step(block: nn.Module) -> Run:
        def run() -> None:
            output(block).backward(x_RTD.detach())
            block.zero_grad()
            x_RTD.grad = None

        return run

    def inference(block: nn.Module) -> Run:
        return torch.no_grad()(lambda: output(block))

    return part, {n: step(b) for n, b in blocks.items()}, {n: inference(b) for n, b in blocks.items()}


def _model(
    part: str, dense: nn.Module, split: SplitModel, tokens: Tensor, categories: Tensor
) -> tuple[str, Rivals, Rivals]:
    forward = {"dense": lambda: dense(tokens).logits, "split": lambda: split(tokens, categories)}

    def step(name: str) -> Run:
        def run() -> None:
            F.cross_entropy(forward[name]()[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            (dense if name == "dense" else split).zero_grad()

        return run

    return part, {name: step(name) for name in forward}, {name: torch.no_grad()(forward[name]) for name in forward}


if __name__ == "__main__":
    main()

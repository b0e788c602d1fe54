"""What a recipe's dense network costs: it is built at its full size and run once on tensors that hold no numbers.

Those are torch's fake tensors: they have shapes alone, so a network of seven billion parameters is counted in seconds
on a laptop, by the code that will train it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from attribution.measure import Moments, unmeasured
from attribution.subject import Subject
from attribution.table import SiteSums
from moeify.models.build import PRECISIONS, build_autoencoder, build_llama, logits
from moeify.models.families import layers, outside_flops, unit_space
from moeify.models.pretrained import look
from moeify.models.resnet import build_resnet
from moeify.models.transformer import config_of, image_size
from moeify.models.units import ConvUnits, UnitSite, UnitSpace, flops
from moeify.recipe.config import RunConfig
from moeify.recipe.data import CLASSES, DigitsData, ImageData, TextData
from moeify.recipe.model import AutoencoderModel, GivenModel, LlamaModel, PretrainedModel, ResnetModel
from moeify.recipe.partition import UnitKind
from moeify.routed.ffn import Routes
from moeify.routed.recompute import recompute_layers
from moeify.splitting.partition import Partition
from moeify.tasks.language import token_nats
from moeify.tasks.pixels import pixel_nats


@dataclass(frozen=True)
class Sizes:
    """What the dense network costs, in floating-point operations and bytes."""

    parameters: int
    layer: int
    """Parameters of the largest layer, or of what is in no layer where that is more: what is gathered at a time where
    workers share models out."""
    units: dict[str, int]
    """Site -> units, of what the recipe splits."""
    split: float
    """Share of a forward pass's operations that belong to those units, 0..1."""
    forward: int
    """Operations of one row's forward pass."""
    backward: int
    """Operations of one row's backward pass, weight gradients and all."""
    again: int
    """Operations of one row that training does once more, where layers are computed again."""
    kept: int
    """Bytes that a worker's rows of a training step, or of the part of it that is run at a time, keep for the backward
    pass."""
    kept_measuring: int
    """Bytes that a worker's rows of one attribution batch keep."""
    table: int
    """Bytes of the attribution table, second moments among them."""
    moments: int
    """Operations of one row's second moments."""


def sizes(config: RunConfig, base: Path, workers: int, categories: int) -> Sizes:
    """Run the recipe's network on tensors without numbers; ``base``: where its relative paths start.

    ValueError where ``workers`` cannot share the rows equally, and for a pretrained model that cannot be read.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows, measured = config.training.rows, config.attribution.rows_at_once
    for path, each in (("training.rows", rows), ("attribution.rows_at_once", measured)):
        if each % workers:
            raise ValueError(f"{path}: got {each}, which {workers} workers cannot share equally, wanted a multiple")
    with FakeTensorMode():
        network = without_numbers(config, base)
        space = unit_space(network, config.partition.units)
        own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        share = max(1, rows // workers // config.training.accumulate)
        forward, backward, kept = _step(config, network, share, own)
        again, each = 0, measured // workers
        kept_measuring = kept if each == share else _step(config, network, each, own)[2]
        subject = Subject(network, space.readers, tuple(map(str, range(categories))), lambda outputs, _: outputs)
        moments = Moments(config.attribution.columns)
        tables = {site.name: unmeasured(subject, site, moments) for site in subject.sites}
        if config.training.checkpoint_activations:
            again, kept = _recomputing(config, network, share, own, backward, kept)
        return Sizes(
            parameters=_numbers(network),
            layer=_largest(network),
            units={site.name: site.units for site in space.sites},
            split=_split_share(network, space, units_per_row(config)),
            forward=forward // share,
            backward=backward // share,
            again=again // share,
            kept=kept,
            kept_measuring=kept_measuring,
            table=sum(tensor.nbytes for sums in tables.values() for tensor in sums.tensors()),
            moments=units_per_row(config) * sum(_moments(tables[site.name], site) for site in space.sites),
        )


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _largest(network: nn.Module) -> int:
    each = [_numbers(layer) for layer in layers(network)]
    return max([*each, _numbers(network) - sum(each)])


def build(config: RunConfig, base: Path) -> nn.Module:
    """Return the recipe's network without reading data; a pretrained one with the shapes of its weights alone."""
    match config.model:
        case LlamaModel() as model:
            assert isinstance(config.data, TextData)
            return build_llama(model, vocabulary=config.data.vocabulary, length=config.data.length, end=0, seed=0)
        case PretrainedModel(path=path):
            checkpoint = look(base / path)
            return checkpoint.family.build({"config": checkpoint.config().to_dict()})
        case AutoencoderModel() as model:
            return build_autoencoder(model, inputs=math.prod(_image(config)), seed=0)
        case ResnetModel() as model:
            sizes = {"width": model.width, "blocks": model.blocks, "stages": model.stages}
            return build_resnet(_image(config), classes=CLASSES, **sizes, seed=0)
        case GivenModel():
            raise ValueError("model.kind: got 'given', a network at hand, wanted one that a recipe can build")
        case _ as never:
            assert_never(never)


def without_numbers(config: RunConfig, base: Path) -> nn.Module:
    """Return the recipe's network in fake tensors; call it in their mode.

    Weights are not initialised, which for some takes numbers. And a network of ``transformers`` attends without a mask,
    as it does in training: without numbers it cannot tell that a mask says no more than "causal", and would make one.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.initialization import no_init_weights
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with no_init_weights():
        network = build(config, base)
    if isinstance(network, PreTrainedModel):
        network.tie_weights()  # which is a part of their initialisation
        AttentionInterface.register("unmasked", sdpa_attention_forward)
        AttentionMaskInterface.register("unmasked", lambda *_, **__: None)
        network.set_attn_implementation("unmasked")
    return network


def units_per_row(config: RunConfig) -> int:
    """Return the tokens of a row; 1 where a row is an example."""
    return config.data.length if isinstance(config.data, TextData) else 1


def _image(config: RunConfig) -> tuple[int, int, int]:
    match config.data:
        case DigitsData():
            return 1, 8, 8
        case ImageData(source=source):
            return (1, 28, 28) if source == "mnist" else (3, 32, 32)
        case _:
            raise AssertionError(config.data)


def rows_of(config: RunConfig, network: nn.Module, rows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the shape that the network takes, all zero."""
    match config.data:
        case TextData(length=length):
            tokens = torch.zeros(rows, length, dtype=torch.long)
            return tokens, tokens
        case _ if isinstance(config.model, AutoencoderModel):
            pixels = torch.zeros(rows, math.prod(_image(config)))
            return pixels, pixels
        case _:
            taken = config_of(network) if isinstance(config.model, PretrainedModel) else None
            image = (taken.num_channels, *image_size(taken)) if taken else _image(config)
            return torch.zeros(rows, *image), torch.zeros(rows, dtype=torch.long)


def nats_of(config: RunConfig, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each row's loss as the recipe's task has it."""
    match config.data:
        case TextData():
            return token_nats(outputs, targets)
        case _ if isinstance(config.model, AutoencoderModel):
            return pixel_nats(outputs, targets)
        case _:
            return F.cross_entropy(outputs, targets, reduction="none")


def _step(config: RunConfig, network: nn.Module, rows: int, own: set[int]) -> tuple[int, int, int]:
    """Return operations forward and backward, and the bytes kept between them, of a training step's rows."""
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), storage  # held, so that no other takes its place in memory
        return tensor

    network.train()
    inputs, targets = rows_of(config, network, rows)
    with FlopCounter() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = logits(network, inputs, autocast=PRECISIONS[config.training.autocast])
        loss = nats_of(config, outputs, targets).sum()
    with FlopCounter() as backward:
        loss.backward()
    network.zero_grad(set_to_none=True)
    return forward.flops, backward.flops, sum(size for size, _ in kept.values())


def _recomputing(
    config: RunConfig, network: nn.Module, rows: int, own: set[int], backward: int, kept: int
) -> tuple[int, int]:
    """Return the operations that are done again, and the bytes kept, where layers keep their inputs alone.

    While one layer is computed again it keeps what it would have kept, beside all layers' inputs.
    """
    inputs: list[int] = []
    for layer in layers(network):
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].nbytes))
    recompute_layers(network, Routes(Partition.undivided(("all",), unit_space(network).readers)))
    _, more, outside = _step(config, network, rows, own)
    number = len(layers(network))
    return more - backward, outside + sum(inputs[:number]) + (kept - outside) // number


class FlopCounter(TorchDispatchMode):
    """Adds up the operations of matrix products and convolutions while the context lasts, by torch's own formulas.

    Also counts what those leave out: causal attention on the CPU (half of all pairs), and products that are added in
    place, as routed blocks do. (torch's ``FlopCounterMode`` takes every other operation apart as well, which is slow.)
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        packet, aten = func._overloadpacket, torch.ops.aten
        if packet is aten.addmm_:
            self.flops += 2 * args[1].numel() * args[2].shape[1]
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            causal = args[4] if len(args) > 4 else False
            self.flops += sdpa_flop_count(*(each.shape for each in args[:3])) // (2 if causal else 1)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(each.shape for each in args[:4])) // (2 if args[7] else 1)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def _moments(sums: SiteSums, site: UnitSite) -> int:
    """Return the operations of a token's second moments (or an example's) in one site."""
    places = site.places if isinstance(site, ConvUnits) else 1
    columns = [(each.features, each.tensors()[0].shape[-1]) for each in sums.moments]
    return places * sum(2 * x * (x if s == x else 2 * s) for x, s in columns)


def _split_share(network: nn.Module, space: UnitSpace, length: int) -> float:
    sites = unit_space(network, get_args(UnitKind)).sites
    costs = {site.name: site.units * flops(network, site, length) for site in sites}
    return sum(costs[site.name] for site in space.sites) / (sum(outside_flops(network).values()) + sum(costs.values()))

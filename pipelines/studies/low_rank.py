"""Low-rank adapters of the package ``peft``, one for each category (LoRA: Hu et al. 2021, arXiv 2106.09685).

On every query, key, value and output map, as published for attention. ``peft`` trains one adapter at a time, so rows of
different categories run one category after the other (``pipelines.studies.apart``).
"""

import warnings
from importlib.util import find_spec

import torch
from torch import nn

from moeify.routed.split_model import SplitModel

_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Adapters:
    """An adapter for each category, put into a model in place; they add nothing at first. The first one runs.

    Raises ValueError where ``peft`` is not installed.
    """

    def __init__(self, model: SplitModel, rank: int, seed: int) -> None:
        if find_spec("peft") is None:
            raise ValueError("adapters need the peft package, which is not here: pip install 'moeify[peft]'")
        import peft
        from peft.tuners.lora import LoraLayer

        self._network, self._categories = model.network, model.categories
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_MAPS))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # there are several on purpose
            torch.manual_seed(seed)
            for number in range(len(model.categories)):
                peft.inject_adapter_in_model(config, model.network, _name(number))
        self._layers = {name: m for name, m in model.network.named_modules() if isinstance(m, LoraLayer)}
        self.run(model.categories[0])

    def run(self, category: str) -> None:
        """Let this category's adapter run for all rows, and no other."""
        for layer in self._layers.values():
            layer.set_adapter(_name(self._categories.index(category)))
        self._network.requires_grad_(True)  # peft froze what does not run; who learns is for the caller to say

    def of(self, category: str) -> list[nn.Parameter]:
        """Return the parameters of a category's adapter."""
        name = _name(self._categories.index(category))
        maps = (part[name] for layer in self._layers.values() for part in (layer.lora_A, layer.lora_B))
        return [parameter for each in maps for parameter in each.parameters()]

    def base(self) -> list[nn.Parameter]:
        """Return all parameters of the network that are no adapter's."""
        mine = {id(parameter) for category in self._categories for parameter in self.of(category)}
        return [parameter for parameter in self._network.parameters() if id(parameter) not in mine]

    def merged(self, category: str) -> nn.Module:
        """Return the network with one category's adapters merged and the others' removed, in place."""
        for path, layer in self._layers.items():
            layer.merge(adapter_names=[_name(self._categories.index(category))])
            parent, _, name = path.rpartition(".")
            setattr(self._network.get_submodule(parent), name, layer.get_base_layer())
        return self._network


def _name(number: int) -> str:
    """Return the name of a category's adapter; a category's own may hold what a module's name cannot."""
    return f"category_{number}"

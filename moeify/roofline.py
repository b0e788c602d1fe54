"""The least time that a run can take on a machine, by what its operations compute and what they must read.

The roofline of Williams, Waterman and Patterson 2009 ("Roofline: an insightful visual performance model for multicore
architectures"), operation by operation: each takes as long as its arithmetic at the machine's pace, or as reading its
weights and, of attention, its keys and values, whichever is longer. Activations and copies are not counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from moeify.timing import Run, seconds

_SIDE = 512
"""Of the square matrices whose product sets a machine's pace of arithmetic."""
_READ = 4096
"""Of the square matrix, 64 MB and so beyond caches, whose product with a vector sets its pace of reading."""


@dataclass(frozen=True)
class Operation:
    """A matrix product, a convolution or an attention; or what else reads weights."""

    flops: int
    """Floating-point operations, 2 a multiplication. Causal attention counts as a whole square, as is common."""
    reads: int
    """Elements of weights, and of an attention's keys and values."""


@dataclass(frozen=True)
class Machine:
    """How fast a machine is at its best."""

    flops: float
    """Floating-point operations a second."""
    reads: float
    """Elements a second, from main memory."""

    def seconds(self, operations: Sequence[Operation]) -> float:
        """Return the least time that the operations take, one after the other."""
        return sum(max(each.flops / self.flops, each.reads / self.reads) for each in operations)

    def reads_most(self, operations: Sequence[Operation]) -> bool:
        """Say whether most of that time goes to operations that are waiting for what they read."""
        waiting = [each for each in operations if each.reads / self.reads > each.flops / self.flops]
        return self.seconds(waiting) > self.seconds(operations) / 2


@lru_cache
def this_machine(dtype: torch.dtype, threads: int) -> Machine:
    """Return the pace of this machine, measured once; ``threads`` as torch has them."""
    one, other = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    matrix, vector = torch.randn(_READ, _READ), torch.randn(_READ)
    times = seconds({"product": lambda: one @ other, "reading": lambda: matrix @ vector}, turns=5, at_least=0.05)
    read = matrix.numel() * matrix.itemsize / dtype.itemsize
    return Machine(2 * _SIDE**3 / min(times["product"]), read / min(times["reading"]))


def flops(run: Run) -> int:
    """Return the floating-point operations of a run's matrix products, convolutions and attentions."""
    return sum(each.flops for each in operations(run, nn.Module()))


def operations(run: Run, network: nn.Module) -> list[Operation]:
    """Return what a run of a network does, in order, forward and backward."""
    with _Recorder(network) as recorder:
        run()
    return recorder.found


class _Recorder(TorchDispatchMode):
    """Notes operations as they come, those that are made of others by their parts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operation] = []
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in _COUNTS:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if _reads_nothing(func):
            return out
        count = _COUNTS.get(packet)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        reads = self._reads(packet, args, out)
        if flops or reads:
            self.found.append(Operation(flops, reads))
        return out

    def _reads(self, packet: Any, args: Sequence[Any], out: Any) -> int:
        if packet in _KEYS_AND_VALUES:
            return sum(args[place].numel() for place in _KEYS_AND_VALUES[packet])
        if packet is torch.ops.aten.embedding:
            return int(out.numel())
        return sum(
            each.numel()
            for each in args
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() in self._weights
        )


def _reads_nothing(func: Any) -> bool:
    """Say whether an operation returns a view, or takes a tensor for its shape and dtype alone."""
    name = func.overloadpacket.__name__
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    return views or name.startswith("new_") or name.endswith("_like")


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _addmm(_: Tensor, one: Tensor, other: Tensor, **__: Any) -> int:
    return 2 * one.shape[0] * one.shape[1] * other.shape[1]


_ATEN = torch.ops.aten
_COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN.addmm_: _addmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_KEYS_AND_VALUES = {
    _ATEN.bmm: (1,),
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (1, 2),
    _ATEN._scaled_dot_product_flash_attention: (1, 2),
    _ATEN._scaled_dot_product_efficient_attention: (1, 2),
}
"""Places of an operation's operands that are keys and values, when it is an attention's."""

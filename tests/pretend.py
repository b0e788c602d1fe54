"""A pretend accelerator: it computes on the CPU, and refuses what a GPU refuses, above all tensors of two devices.

So a run on it shows, without a GPU, that every tensor is where a GPU would want it, and gives the CPU's own bits. It is
registered with torch for good and some libraries look for what an accelerator should have, so import this in a process
of its own. What it does not show: kernels, streams, autocast, memory, and what goes from one GPU to another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretend", _Module())
DEVICE = torch.device("pretend", 0)

_aten = torch.ops.aten
_BETWEEN = {_aten.copy_.default, _aten._to_copy.default}
"""What moves numbers from one device to another."""
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
"""What takes indices of the CPU for a tensor of a GPU."""


class Held(Tensor):
    """A tensor of the accelerator."""

    raw: Tensor
    """Its numbers, on the CPU."""
    operations = 0
    """Run on the accelerator so far, of all kinds."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Held":
        made = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Held({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.raw.tolist()

    def new_tensor(self, data: Any, **more: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **more})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()


_STRICT = {
    each.default
    for each in (
        *(_aten.cat, _aten.stack, _aten.index_add, _aten.index_add_, _aten.index_select, _aten.gather),
        *(_aten.scatter_add, _aten.scatter_add_),
    )
}
"""What does not take a single number of the CPU beside a GPU's tensors, as arithmetic does."""


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given: list[Tensor] = []
    device = kwargs.get("device")
    on_cpu = {key: _raw(each, given) for key, each in kwargs.items() if key != "device"}
    if device is not None:
        on_cpu["device"] = torch.device("cpu")
    raw = [_raw(each, given) for each in args]
    held = [each for each in given if isinstance(each, Held)]
    on_cpu_alone = not held and (device is None or torch.device(device).type != DEVICE.type)
    if kwargs.get("generator") is not None and not on_cpu_alone:
        raise RuntimeError(f"{func}: expected a generator of the accelerator, got one of the CPU")
    if held:
        Held.operations += 1
        _check(func, args, given)
    found = func(*raw, **on_cpu)
    if func is _aten.copy_.default:
        there = isinstance(args[0], Held)
    else:
        there = bool(held) if device is None else torch.device(device).type == DEVICE.type
    # What is changed in place stays the tensor that it was.
    return _wrapped(found, {id(each.raw): each for each in held}) if there else found


def _raw(each: Any, given: list[Tensor]) -> Any:
    """Return an argument as it is on the CPU; its tensors are noted in ``given``."""
    if isinstance(each, Tensor):
        given.append(each)
        return each.raw if isinstance(each, Held) else each
    return type(each)(_raw(part, given) for part in each) if type(each) in (list, tuple) else each


def _wrapped(each: Any, known: Mapping[int, Held]) -> Any:
    if isinstance(each, Tensor):
        return known[id(each)] if id(each) in known else Held(each)
    return type(each)(_wrapped(part, known) for part in each) if type(each) in (list, tuple) else each


def _check(func: Any, args: Sequence[Any], given: Sequence[Tensor]) -> None:
    if func in _BETWEEN:
        return
    if func in _INDEXED:
        given = [each for each in (args[0], *args[2:3]) if isinstance(each, Tensor)]
    strict = func in _INDEXED or func in _STRICT
    if any(not isinstance(each, Held) and (each.dim() or strict) for each in given):
        told = [(str(each.device), tuple(each.shape)) for each in given]
        raise RuntimeError(f"{func}: expected all tensors on one device, got {told}")


_kernels = torch.library.Library("_", "IMPL")
_kernels.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")  # what makes tensors there
_kernels.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

_tensor, _to = torch.tensor, nn.Module.to


def _made(data: Any, *, device: Any = None, **more: Any) -> Tensor:
    """Stand in for ``torch.tensor``, which makes none for a device that is written in Python."""
    made = _tensor(data, **more)
    return made if device is None else made.to(device)


def _moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Move a module, and leave tied parameters tied, as they are on a GPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _to(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


torch.tensor = _made
nn.Module.to = _moved  # type: ignore[method-assign]

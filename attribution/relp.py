"""Relevance patching: gradient times activation with gradients that follow the rules of relevance propagation.

Everything the network computes from its input is followed, as functions of torch, whatever the modules are called:
a function that is linear keeps its gradient, the known others get a rule, anything else is refused by name. What
``torch.autograd.Function`` computes cannot be seen, and keeps its own gradient.

RelP: Rezaei Jafari et al. 2025 (arXiv 2508.21258), with the LN and AH rules of Ali et al. 2022 (arXiv 2202.07304) and
the half rule of Arras et al. 2019 (arXiv 1909.12114).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attribution.ablation import CategorySums
from attribution.reading import Kept, apart, at_readers
from attribution.subject import Probe, Subject, segments

_ADDITIVE = frozenset(
    {
        "__get__", "__getitem__", "__add__", "__radd__", "__iadd__", "add", "add_", "__sub__", "__rsub__", "__isub__",
        "sub", "sub_", "neg", "__neg__", "sum", "mean", "cat", "stack", "where", "masked_fill", "masked_fill_",
        "index_select", "gather", "narrow", "select", "view", "view_as", "reshape", "flatten", "unflatten", "transpose",
        "permute", "movedim", "t", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "repeat",
        "repeat_interleave", "chunk", "split", "unbind", "flip", "roll", "contiguous", "clone", "to", "type_as",
        "float", "double", "half", "bfloat16", "cumsum", "pad", "dropout", "dropout1d", "dropout2d", "avg_pool1d",
        "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "interpolate", "unfold", "fold", "max_pool1d",
        "max_pool2d",
        "requires_grad_", "register_hook",
    }
)  # fmt: skip
"""Linear in all arguments together (or, for a maximum, linear where it is looked at)."""
_ONE_SIDED = frozenset(
    {
        "linear", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "batch_norm", "mul_", "__imul__",
    }
)  # fmt: skip
"""Linear in one argument while the others are constants, as weights are."""
_PRODUCTS = frozenset(
    {"mul", "multiply", "__mul__", "__rmul__", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum"}
)
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "__truediv__", "div_", "__itruediv__"})
_CONSTANT = frozenset({"softmax", "sqrt", "rsqrt", "reciprocal", "std", "var", "norm", "vector_norm"})
"""Attention's probabilities, and what norms divide by."""
_ACTIVATIONS = frozenset(
    {
        "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "hardswish", "hardtanh",
        "softsign", "square",
    }
)  # fmt: skip


def relevance(subject: Subject, batches: Sequence[Probe]) -> dict[str, Float64[Tensor, "units categories"]]:
    """Return -E[a r] of every unit, r: how the loss is propagated back to its activation; nats per token.

    The loss itself is explained by its gradient at the network's output, and below it: norms have a constant
    denominator (all square roots, deviations and reciprocals are constant), softmax (attention) is constant, an
    activation function is its ratio f(x)/x, a product of two things that depend on the input hands half to each, what
    is linear is left alone and biases keep their share. One forward and one backward pass for all sites. ValueError for
    functions without a rule.

    >>> relevance(asked, rows)["first"].tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    sums = {site.name: CategorySums(subject.categories, site.units) for site in subject.sites}
    with subject.still():
        for batch in batches:
            if len(batch.categories):
                _one_batch(subject, batch, sums)
    return {name: total.means() for name, total in sums.items()}


def _one_batch(subject: Subject, batch: Probe, sums: Mapping[str, CategorySums]) -> None:
    parts, rows = segments(batch, subject.categories), len(batch.categories)
    found: dict[str, Tensor] = {}
    kept: dict[str, Kept] = {}

    def capturing(name: str) -> Callable[[Tensor], Tensor]:
        def capture(x: Tensor) -> Tensor:
            found[name] = apart(x)
            kept[name] = Kept(subject.site(name), found[name])
            return found[name]

        return capture

    inputs = batch.inputs.detach()
    if inputs.is_floating_point():
        inputs = inputs.requires_grad_().clone()  # no leaf, which could not be changed in place
    with at_readers(subject, rows, {name: capturing(name) for name in sums}), rules(subject.inner):
        outputs = subject.forward(inputs, batch.categories)
    loss = subject.row_nats(outputs, batch.targets).sum()
    if not loss.requires_grad:
        raise ValueError("the loss depends on the units only through a softmax; let the network return its logits")
    gradients = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    for (name, a), gradient in zip(kept.items(), gradients, strict=True):
        a.check(gradient is not None)
        site = subject.site(name)
        z_RPUW = site.arrange(a.value.double() * gradient.double())
        sums[name].add(parts, -z_RPUW.sum((1, 3)), z_RPUW.shape[1])


@contextmanager
def rules(network: nn.Module) -> Iterator[None]:
    """Let gradients through whatever runs in here follow the rules; ``network`` serves to name the place in errors."""
    running: list[str] = []
    with ExitStack() as stack:
        for name, module in network.named_modules():
            stack.callback(module.register_forward_pre_hook(_enter(running, name), prepend=True).remove)
            stack.callback(module.register_forward_hook(_leave(running), always_call=True).remove)
            if type(module).__module__ == "transformers.activations":
                # These are written out in products and powers, whose rules are not the one of the whole.
                _whole(stack, module, name)
        stack.enter_context(_Rules(running))
        yield


def _enter(running: list[str], name: str) -> Callable[..., None]:
    return lambda *_: running.append(name)


def _leave(running: list[str]) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        running.pop()

    return leave


def _whole(stack: ExitStack, module: nn.Module, name: str) -> None:
    """Give a whole module the rule of an activation function."""
    with torch.no_grad():
        example = next(module.parameters(), torch.empty(0))
        at_zero = float(module(torch.zeros(1, dtype=example.dtype, device=example.device)).abs().max())
    if at_zero > 1e-6:
        raise ValueError(
            f"RelP has no rule for {type(module).__name__} ({name!r}), which is not 0 at 0; use another method"
        )
    held: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held.append(args[0])
        return (args[0].detach(), *args[1:])

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _ratio(held.pop(), output)

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


class _Rules(TorchFunctionMode):
    """Intercepts torch's functions. Inside one the mode is off, so what they are made of is not looked at."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self._running = running

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "embedding":
            # Relevance starts here even if no site is below, so that a product's halves do not depend on the sites.
            return func(*args, **kwargs).detach().requires_grad_().clone()
        moving = [tensor for tensor in _tensors((*args, *kwargs.values())) if tensor.requires_grad]
        if not moving or not torch.is_grad_enabled() or name in _ADDITIVE:
            return func(*args, **kwargs)
        return self._by_rule(func, name, args, kwargs, moving)

    def _by_rule(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        moving: Sequence[Tensor],
    ) -> Any:
        if name in _CONSTANT:
            return func(*args, **kwargs).detach()
        if name == "scaled_dot_product_attention":
            return _attention(func, *args, **kwargs)
        if name == "layer_norm":
            return _layer_norm(*args, **kwargs)
        if name == "rms_norm":
            return _rms_norm(*args, **kwargs)
        if name in _PRODUCTS and len(moving) <= 2:
            return func(*args, **kwargs) if len(moving) == 1 else _halves(func, args, kwargs)
        if name in _QUOTIENTS and args and args[0] is moving[0]:
            return func(args[0], *_detached(args[1:]), **kwargs)
        power = name in ("pow", "__pow__", "float_power") and _is_positive_power(args)
        if args and args[0] is moving[0] and (name in _ACTIVATIONS or power):
            return _activated(func, *args, **kwargs)
        if name in _ONE_SIDED and len(moving) == 1 and not (name == "batch_norm" and _batch_statistics(args, kwargs)):
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if any(tensor.requires_grad for tensor in _tensors((output,))):
            place = self._running[-1] if self._running else ""
            raise ValueError(
                f"RelP has no rule for {name!r} as it is used in module {place!r}; use another method "
                f"(IntegratedGradients works for any network)"
            )
        return output


def _activated(func: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return an activation function by the identity rule, written over ``x`` where ``func`` would do so."""
    copy = x.detach().clone()
    output = func(copy, *args, **kwargs)
    moving = _ratio(x, output)
    return x.copy_(moving) if output is copy else moving


def _ratio(x: Tensor, output: Tensor) -> Tensor:
    """Return ``output`` as x times the constant output / x: the identity rule; nothing passes where x is 0."""
    x_, output = x.detach(), output.detach()
    ratio = torch.where(x_ == 0, 0, output / torch.where(x_ == 0, 1, x_))
    # The first term carries the gradient, the second the value, to the last bit.
    moving = x * ratio
    return moving - moving.detach() + output


def _halves(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a product of two moving factors, half of the relevance to each."""
    arguments, named = list(args), dict(kwargs)
    if len(args) > 0 and isinstance(args[-1], list | tuple):
        raise ValueError("RelP takes the factors of a product one by one, not in a list")
    moving = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
    if len(moving) != 2:
        raise ValueError("RelP takes the factors of a product by position")
    left, right = list(arguments), list(arguments)
    left[moving[1]] = arguments[moving[1]].detach()
    right[moving[0]] = arguments[moving[0]].detach()
    return (func(*left, **named) + func(*right, **named)) / 2


def _attention(
    func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Return attention with constant probabilities: the AH rule."""
    return func(query.detach(), key.detach(), value, *args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return the layer norm with a constant standard deviation: the LN rule."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    output = centred * (centred.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Return the root mean square norm with a constant denominator: the LN rule."""
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    output = input * (input.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    return output if weight is None else output * weight


def _is_positive_power(args: tuple[Any, ...]) -> bool:
    return len(args) > 1 and isinstance(args[1], int | float) and args[1] >= 1


def _batch_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[5] if len(args) > 5 else kwargs.get("training", False))


def _detached(values: Iterable[Any]) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(_tensors(value))
    return found

"""Routed attention: as in ``moeify.routed.ffn`` every expert is a rectangle, here of rows times heads.

A head attends within its row, so a rectangle of rows and heads is an attention of its own: projections of views of
the weights, rotary positions, scaled dot products, and what they write is added up over rectangles.

Axes: R rows, T positions, D model width, F features (several a head); a rectangle has n rows and f features.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moeify.models.units import HeadUnits
from moeify.routed.ffn import Routes, lowered, uncompiled
from moeify.routed.learning import Rectangle

Rotary = tuple[Float[Tensor, "some positions size"], Float[Tensor, "some positions size"]]
"""Cosines and sines, one row for all rows or one each."""
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values [n heads T size]; keys and values of as many heads as there are units."""


class RoutedAttention(nn.Module):
    """An attention block that runs only the heads on each row's route; positions are rotary, or none of its business.

    It takes over the submodules of the dense block under their own names, and what ``transformers`` calls it with:
    positions and mask are the model's own. A cache holds all heads, 0 where a row does not run them; calls that share
    one must have the same rows.
    """

    def __init__(self, dense: nn.Module, units: HeadUnits, routes: Routes) -> None:
        super().__init__()
        for name, child in dense.named_children():
            self.add_module(name, child)
        self.training = dense.training
        self.units = units
        self.routes = routes
        self._layer: int | None = getattr(dense, "layer_idx", None)
        self._scale = cast(float, getattr(dense, "scaling", units.size**-0.5))
        dropout = getattr(dense, "dropout", None)
        self._dropout = dropout.p if isinstance(dropout, nn.Dropout) else float(getattr(dense, "attention_dropout", 0))

    def forward(
        self,
        hidden_states: Float[Tensor, "rows positions dim"],
        attention_mask: Tensor | None = None,
        position_embeddings: Rotary | None = None,
        cache: Any = None,
        **others: Any,
    ) -> tuple[Float[Tensor, "rows positions dim"], None]:
        """Return what the active heads write, and no attention weights."""
        return uncompiled(self._run)(hidden_states, position_embeddings, attention_mask, cache, **others), None

    def _run(
        self, hidden_states: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: Any, **others: Any
    ) -> Tensor:
        if self.routes.bounds[-1:] != (len(hidden_states),):
            raise ValueError(
                f"site {self.units.name!r}: got {len(hidden_states)} rows, wanted as many as there are routes, "
                f"{self.routes.bounds[-1:]}; heads look over a whole row, which has one route"
            )
        cache = others.get("past_key_values") if cache is None else cache
        run = self._masked if self.routes.masked else self._routed
        return run(hidden_states, rotary, mask, cache)

    def _linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.get_submodule(name))

    def _routed(self, x_RTD: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: Any) -> Tensor:
        units, out = self.units, self._linear(self.units.out)
        rectangles = self.routes.rectangles(units.name)
        ways_in = [self._linear(name) for name in (units.query, units.key, units.value)]
        parameters = [p for way in ways_in for p in (way.weight, way.bias)]
        low_RTD, out_DF, out_bias_D, *low = lowered(x_RTD, out.weight, out.bias, *parameters)
        projected = _project(low_RTD, rectangles, self._widths, *low) if rectangles else ()
        angles, turn = _angles(*rotary) if rotary else None, _turn if torch.is_grad_enabled() else _turned_at_once
        heads = [
            self._heads(projected[3 * i : 3 * i + 3], angles and _of_rows(angles, rectangle.rows), turn)
            for i, rectangle in enumerate(rectangles)
        ]
        if cache is not None:
            heads = self._cached(heads, rectangles, x_RTD, cache)
        written = [
            self._attend(each, None if mask is None else _of_rows([mask], rectangle.rows)[0])
            for each, rectangle in zip(heads, rectangles, strict=True)
        ]
        width = units.queries * units.size
        return _write(x_RTD.shape[:-1], out_DF, out_bias_D, rectangles, width, *written)

    def _masked(self, x_RTD: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: Any) -> Tensor:
        units = self.units
        ways_in = (units.query, units.key, units.value)
        query, key, value = self._heads([self._linear(name)(x_RTD) for name in ways_in], rotary, _turned)
        if cache is not None:
            key, value = cache.update(key, value, self._layer)
        keep_RU = x_RTD.new_zeros(len(x_RTD), units.units)
        for rectangle in self.routes.rectangles(units.name):
            keep_RU[rectangle] = 1.0
        keep_RF = keep_RU.repeat_interleave(units.queries * units.size, 1)
        return self._written(self._attend((query, key, value), mask) * keep_RF[:, None])

    def _written(self, seen: Tensor) -> Tensor:
        """Return what the heads write of what they see [R T F], where all of them run."""
        return self._linear(self.units.out)(seen)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Rows of the query, key and value weights a unit."""
        return self.units.queries * self.units.size, self.units.size, self.units.size

    def _heads(
        self, projected: Sequence[Tensor], angles: Sequence[Tensor] | None, turn: Callable[..., Tensor]
    ) -> Heads:
        """Return queries, keys and values of linear maps' outputs [n T f], positions turned in."""
        query, key, value = (each.unflatten(2, (-1, self.units.size)).transpose(1, 2) for each in projected)
        if self.units.norms:
            query, key = (self.get_submodule(n)(x) for n, x in zip(self.units.norms, (query, key), strict=True))
        if angles is None:
            return query, key, value
        cos, sin = (part.unsqueeze(1) for part in angles)
        query, key = query.to(cos.dtype), key.to(cos.dtype)  # turned in the angles' precision, whatever autocast says
        return _partly(turn, query, cos, sin), _partly(turn, key, cos, sin), value

    def _cached(self, heads: list[Heads], rectangles: Sequence[Rectangle], x_RTD: Tensor, cache: Any) -> list[Heads]:
        """Put the keys and values of all rectangles into the cache, and take them with those from before."""
        rows, positions, _ = x_RTD.shape
        shape = (rows, self.units.units, positions, self.units.size)
        keys, values = x_RTD.new_zeros(shape), x_RTD.new_zeros(shape)
        for (_, key, value), rectangle in zip(heads, rectangles, strict=True):
            keys[rectangle], values[rectangle] = key, value
        keys, values = cache.update(keys, values, self._layer)
        return [(query, keys[r], values[r]) for (query, _, _), r in zip(heads, rectangles, strict=True)]

    def _attend(self, heads: Heads, mask: Tensor | None) -> Tensor:
        """Return what the heads see [n T f]."""
        query, key, value = heads
        causal = self.units.causal and mask is None and query.shape[2] > 1
        if causal:  # a cache made for more positions has nothing behind those of the queries yet
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        seen = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self._dropout if self.training else 0.0,
            is_causal=causal,
            scale=self._scale,
            enable_gqa=self.units.queries > 1,
        )
        return seen.transpose(1, 2).flatten(2)


def _of_rows(tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Return the rows' part of each tensor; one that has one row serves all."""
    return [each[rows] if len(each) > 1 else each for each in tensors]


def _partly(turn: Callable[..., Tensor], heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return vectors turned in their first dimensions, as many as there are angles for; the others stay."""
    turned, rest = heads.split([cos.shape[-1], heads.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat((turn(turned, cos, sin), rest), dim=-1) if rest.shape[-1] else turn(heads, cos, sin)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return vectors turned by their positions' angles, halves of a head in pairs, as in ``transformers``' Llama."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines, and sines with the signs with which ``_Turn`` adds them."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def _swapped(heads: Tensor) -> Tensor:
    """Return a copy with the halves of each head swapped, heads after positions or before as they are."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def _turned_at_once(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Return the same as ``_turned``, in three kernels over whole heads; of ``_angles``."""
    return _swapped(heads).mul_(signed_sin).addcmul_(heads, cos)


class _Turn(torch.autograd.Function):
    """``_turned_at_once``, forward and backward; autograd's own backward of ``_turned`` pads and adds each half."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _turned_at_once(heads, cos, signed_sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return _turned_at_once(grads[0], cos, _swapped(signed_sin)), None, None


def _scaled(units: slice, width: int) -> slice:
    return slice(units.start * width, units.stop * width)


class _Project(torch.autograd.Function):
    """The linear maps into each rectangle: queries, keys and values [n T f], one rectangle after the other.

    ``parameters``: weight and bias of each map. Written out for the reason that ``moeify.routed.ffn`` gives.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RTD: Tensor, rectangles: Sequence[Rectangle], widths: tuple[int, ...], *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x_RTD, *weights)
        ctx.rectangles, ctx.widths, ctx.biased = rectangles, widths, [bias is not None for bias in biases]
        found = []
        for rows, units in rectangles:
            for weight_FD, bias_F, width in zip(weights, biases, widths, strict=True):
                mine = _scaled(units, width)
                assert weight_FD is not None
                found.append(F.linear(x_RTD[rows], weight_FD[mine], None if bias_F is None else bias_F[mine]))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_RTD, *weights = ctx.saved_tensors
        x_RTD = x_RTD.contiguous()
        x_grad_RTD = torch.zeros_like(x_RTD)
        weight_grads = [torch.zeros_like(weight) for weight in weights]
        bias_grads = [w.new_zeros(len(w)) if biased else None for w, biased in zip(weights, ctx.biased, strict=True)]
        given = iter(grads)
        for rows, units in ctx.rectangles:
            x_ND, x_grad_ND = x_RTD[rows].flatten(0, 1), x_grad_RTD[rows].flatten(0, 1)
            for weight_FD, weight_grad_FD, bias_grad_F, width in zip(
                weights, weight_grads, bias_grads, ctx.widths, strict=True
            ):
                mine, grad_Nf = _scaled(units, width), next(given).flatten(0, 1)
                torch.mm(grad_Nf.t(), x_ND, out=weight_grad_FD[mine])
                x_grad_ND.addmm_(grad_Nf, weight_FD[mine])
                if bias_grad_F is not None:
                    bias_grad_F[mine] = grad_Nf.sum(0)
        pairs = [each for pair in zip(weight_grads, bias_grads, strict=True) for each in pair]
        return (x_grad_RTD, None, None, *pairs)


class _Write(torch.autograd.Function):
    """The sum over rectangles of what their heads write, each into its own rows [R T D]."""

    @staticmethod
    def forward(
        ctx: Any,
        shape: torch.Size,
        weight_DF: Tensor,
        bias_D: Tensor | None,
        rectangles: Sequence[Rectangle],
        width: int,
        *seen: Tensor,
    ) -> Tensor:
        out_RTD = weight_DF.new_zeros(*shape, len(weight_DF))
        if bias_D is not None:
            out_RTD += bias_D
        for (rows, units), seen_nTf in zip(rectangles, seen, strict=True):
            out_RTD[rows].flatten(0, 1).addmm_(seen_nTf.flatten(0, 1), weight_DF[:, _scaled(units, width)].t())
        ctx.save_for_backward(weight_DF, *seen)
        ctx.rectangles, ctx.width, ctx.biased = rectangles, width, bias_D is not None
        return out_RTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out_grad_RTD = grads[0].contiguous()
        weight_DF, *seen = ctx.saved_tensors
        weight_grad_DF, seen_grads = torch.zeros_like(weight_DF), []
        for (rows, units), seen_nTf in zip(ctx.rectangles, seen, strict=True):
            mine, grad_nTD = _scaled(units, ctx.width), out_grad_RTD[rows]
            seen_grads.append(grad_nTD @ weight_DF[:, mine])
            torch.mm(grad_nTD.flatten(0, 1).t(), seen_nTf.flatten(0, 1), out=weight_grad_DF[:, mine])
        bias_grad_D = out_grad_RTD.flatten(0, 1).sum(0) if ctx.biased else None
        return (None, weight_grad_DF, bias_grad_D, None, None, *seen_grads)


_turn: Callable[..., Tensor] = _Turn.apply
_project: Callable[..., tuple[Tensor, ...]] = _Project.apply
_write: Callable[..., Tensor] = _Write.apply

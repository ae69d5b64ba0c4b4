"""Forward and backward of a batch with many adapters, on the kernels and in plain PyTorch.

Both take x and g of any number of dimensions. h [M, max r] is scaled already, its rows are
positions (see kernels/rows.py), and it is undefined where a row has no adapter. Nothing given is
overwritten. A quantised weight becomes values as in `lora_linear`: in the base product's K loop or
in a scratch tensor on the kernels, some rows or columns at a time in PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import no_autocast
from .backends import as_gradient, as_matrix
from .kernels.configs import choose_config
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.rows import AdapterLayout, AdapterTable, RowGroups, adapter_table, addresses_of
from .kernels.tile_config import Kind, TileConfig
from .products import addmm_, bmm, mm
from .quantized_weight import QuantizedWeight, Weight
from .reference import keep_mask
from .torch_backend import add_base_dx, base_product, masked

# split: h, then the GEMM adds h B; expand: h, the base product, then h B added in place.
Strategy = Literal["split", "expand", "library"]
# Of what `batches` puts side by side: rows of an adapter, bytes of its A or B, and of all of them.
_FEW_ROWS = 16
_SMALL, _STACKED = 256 << 10, 1 << 20
Gradients = tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]


@dataclass(frozen=True)
class MultiPlan:
    """The decision for one call."""

    backend: Literal["triton", "torch"]
    strategy: Strategy  # of the forward; always "library" on the torch backend
    strategy_dx: Strategy
    # Whether the base product of each, where h B is added to it afterwards ("expand"), turns a
    # quantised W0's codes into values in its K loop; else they are values in a scratch tensor.
    in_loop: bool = False
    in_loop_dx: bool = False


class Batch(NamedTuple):
    """Adapters of one rank with as many rows each."""

    adapters: tuple[int, ...]
    each: int  # rows
    rank: int
    positions: slice | Tensor  # those of the first adapter, then of the second, ...
    rows: slice | Tensor  # those at these positions

    def of_each(self, rows: Tensor) -> Tensor:
        """The batch's rows [adapters * each, C] as [adapters, each, C], a view."""
        return rows.view(len(self.adapters), self.each, rows.shape[1])


class Adapted(NamedTuple):
    """A frozen weight, its adapters, and which rows of the batch take which of them."""

    weight: Weight  # [N, K]
    lora_As: Sequence[Tensor]  # each [r_i, K]
    lora_Bs: Sequence[Tensor]  # each [N, r_i]
    scalings: Sequence[float]
    dropout: Dropout | None
    rows: RowGroups
    layout: AdapterLayout | None = None  # where the adapters lie, if that is known

    def table(self) -> AdapterTable:
        """The kernels' table of the adapters."""
        return adapter_table(self.lora_As, self.lora_Bs, self.scalings, self.layout)

    def ranks(self) -> tuple[int, ...]:
        """Of every adapter."""
        return self.layout.ranks if self.layout else tuple(A.shape[0] for A in self.lora_As)

    def wide(self, dtype: torch.dtype) -> torch.dtype | None:
        """In what PyTorch multiplies few rows of an x in ``dtype`` adapter by adapter, uncopied.

        As in `torch_backend.composed`, the adapters' dtype if that is the wider one. None: they go
        side by side, as in half precision single rows are slow.
        """
        wide = torch.promote_types(dtype, self.lora_As[0].dtype)
        return wide if wide.itemsize > 2 else None

    def batches(self, dtype: torch.dtype, *, copied: bool = True) -> tuple[Batch, ...]:
        """The adapters as PyTorch multiplies them, in ``dtype``; see `batches`."""
        return batches(self.rows, self.ranks(), max(self.weight.shape) * dtype.itemsize, copied)

    def unpacked(self) -> Adapted:
        """For adapters that were saved: hooks may have moved them, and what is known is dropped."""
        if self.layout is None or self.layout.addresses == addresses_of(self.lora_As, self.lora_Bs):
            return self
        return self._replace(layout=None)


def forward(
    x: Tensor, layer: Adapted, bias: Tensor | None, plan: MultiPlan, *, need_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and, if needed, h [M, max r], both in x's dtype."""
    matrix = as_matrix(x)
    with no_autocast(x):
        if plan.backend == "triton":
            y, h = _triton_product(matrix, layer, bias, plan, forward=True, need_h=need_h)
        else:
            y, h = _torch_forward(matrix, layer, bias, need_h=need_h)
    # Not view(): autograd refuses changes in place of a view that a Function returns.
    return y.resize_(*x.shape[:-1], y.shape[-1]), h if need_h else None


def backward(
    g: Tensor, x: Tensor | None, layer: Adapted, h: Tensor | None, plan: MultiPlan, *, need_dx: bool
) -> Gradients:
    """dx [..., K], every dA and every dB for g = dL/dy [..., N]: dAs iff x is given, dBs iff h is.

    The gradient of an adapter without rows is zero.
    """
    g2, x2 = as_gradient(g, plan.backend), None if x is None else as_matrix(x)
    with no_autocast(g):
        if plan.backend == "triton":
            dx, dAs, dBs = _triton_backward(g2, x2, layer, h, plan, need_dx=need_dx)
        else:
            dx, dAs, dBs = _torch_backward(g2, x2, layer, h, need_dx=need_dx)
    return None if dx is None else dx.view(*g.shape[:-1], dx.shape[-1]), dAs, dBs


def _config(kind: Kind, x: Tensor, N: int, r: int, dropout: Dropout | None) -> TileConfig:
    device = device_info(x.device)
    return choose_config(kind, x.shape[0], N, r, x.dtype.itemsize, dropout is not None, device)


def _triton_product(
    x: Tensor,
    layer: Adapted,
    bias: Tensor | None,
    plan: MultiPlan,
    *,
    forward: bool,
    need_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """y and h; with forward=False dx and dh, for x = g."""
    from .kernels.gemm import Multi, gemm_add_multi, gemm_scaled
    from .kernels.multi import expand, shrink
    from .kernels.quantized import QuantizedMatrix, dequantize

    rows, adapters = layer.rows, layer.table()
    strategy, in_loop = plan.strategy, plan.in_loop
    if not forward:
        strategy, in_loop = plan.strategy_dx, plan.in_loop_dx
    w = layer.weight.matrix() if isinstance(layer.weight, QuantizedWeight) else layer.weight
    if isinstance(w, QuantizedMatrix) and not in_loop:
        w = dequantize(w, x.dtype)
    w = w.t() if forward else w
    r, N = adapters.max_rank, w.shape[1]
    # Forward drops elements of what is shrunk, the input gradient of what was expanded.
    drop_x, drop_y = (layer.dropout, None) if forward else (None, layer.dropout)
    in_parts = strategy == "expand"
    config = _config("plain", x, r, r, drop_x)
    h = shrink(config, x, rows, adapters, use_A=forward, in_parts=in_parts, dropout=drop_x)
    if not in_parts:
        multi = Multi(rows, adapters, use_A=not forward)
        config = _config("second", x, N, r, drop_y)
        return gemm_add_multi(config, x, w, h, multi, bias=bias, dropout=drop_y), h
    if isinstance(w, QuantizedMatrix):
        y = gemm_scaled(_config(w.kind, x, N, r, None), x, w, scale=1.0, bias=bias)
    else:
        y = F.linear(x, w.t(), bias)
    config = _config("expand", x, N, r, drop_y)
    return y, expand(
        config, y, h, rows, adapters, use_A=not forward, store_h=need_h, dropout=drop_y
    )


def _triton_backward(
    g: Tensor,
    x: Tensor | None,
    layer: Adapted,
    h: Tensor | None,
    plan: MultiPlan,
    *,
    need_dx: bool,
) -> Gradients:
    from .kernels.multi import multi_grads, shrink

    rows, dropout, adapters = layer.rows, layer.dropout, layer.table()
    r = adapters.max_rank
    dx = dh = None
    if need_dx:
        dx, dh = _triton_product(g, layer, None, plan, forward=False, need_h=x is not None)
    elif x is not None:
        dh = shrink(_config("plain", g, r, r, None), g, rows, adapters, use_A=False)
    dAs: Sequence[Tensor | None] = [None] * len(layer.lora_As)
    dBs: Sequence[Tensor | None] = [None] * len(layer.lora_Bs)
    if x is not None and dh is not None:
        config = _config("multi_grad", x, x.shape[1], r, dropout)
        dAs = multi_grads(config, x, dh, rows, adapters, use_A=True, dropout=dropout)
    if h is not None:
        config = _config("multi_grad", g, g.shape[1], r, None)
        dBs = multi_grads(config, g, h, rows, adapters, use_A=False)
    return dx, dAs, dBs


def _mask(layer: Adapted, M: int) -> tuple[Tensor | None, float]:
    if layer.dropout is None:
        return None, 1.0
    seed, threshold = layer.dropout
    return keep_mask(seed, threshold, M, layer.weight.shape[1]), layer.dropout.keep_scale


@functools.lru_cache(maxsize=64)
def batches(
    rows: RowGroups, ranks: tuple[int, ...], row_bytes: int, copied: bool
) -> tuple[Batch, ...]:
    """Every adapter with rows, in batches that PyTorch multiplies by one bmm each.

    In a batch of several all have as many rows, so that nothing is padded, and few; one rank, so
    that the adapters can be copied into one tensor; and these copies are small: up to 1 MB, in a
    CPU's cache, unless they are not ``copied``. From 256 KB for A or B on, a loop is as fast in
    fp32. ``row_bytes``: of a row of A or a column of B. Kept, as are the rows' groups: every layer
    of a model asks.
    """
    spans: dict[object, list[tuple[int, int, int]]] = {}
    for span in rows.spans:
        adapter, first, last = span
        size = ranks[adapter] * row_bytes
        key: object = adapter
        if last - first <= _FEW_ROWS and size < _SMALL:
            key = (last - first, ranks[adapter])
        found = spans.setdefault(key, [])
        found.append(span)
        if copied and len(found) * size >= _STACKED:
            spans[key, adapter] = spans.pop(key)  # full
    return tuple(_batch(rows, ranks, found) for found in spans.values())


def _batch(rows: RowGroups, ranks: tuple[int, ...], spans: list[tuple[int, int, int]]) -> Batch:
    adapters, firsts, lasts = zip(*spans, strict=True)
    positions: slice | Tensor
    if firsts[1:] == lasts[:-1]:  # one after the other
        positions = slice(firsts[0], lasts[-1])
    else:
        ranges = [torch.arange(first, last, device="cpu") for _, first, last in spans]
        positions = torch.cat(ranges).to(rows.offsets.device)
    index = positions if rows.order is None else rows.order[positions]
    return Batch(adapters, lasts[0] - firsts[0], ranks[adapters[0]], positions, index)


def _stacked(adapters: Sequence[Tensor], batch: Batch, dtype: torch.dtype) -> Tensor:
    if len(batch.adapters) == 1:
        return adapters[batch.adapters[0]][None].to(dtype)
    return torch.stack([adapters[i] for i in batch.adapters]).to(dtype)


def _scale_(h: Tensor, layer: Adapted, batch: Batch, keep_scale: float) -> None:
    """h [adapters, rows, r] times each adapter's scaling, in place."""
    scales = [layer.scalings[i] * keep_scale for i in batch.adapters]
    if len({*scales}) == 1:
        h *= scales[0]
    else:
        wide = torch.promote_types(h.dtype, torch.float32)
        h *= torch.tensor(scales, dtype=wide, device=h.device)[:, None, None]


def _kept(x: Tensor, keep: Tensor | None, batch: Batch) -> Tensor:
    """The batch's rows of D o x [adapters, rows, K]."""
    part = x[batch.rows]
    return batch.of_each(part if keep is None else masked(part, keep[batch.rows]))


def _add_product(y: Tensor, batch: Batch, a: Tensor, b: Tensor, keep: Tensor | None) -> None:
    """The batch's rows of y += D o (a b), in place; no row is there twice."""
    if keep is None and isinstance(batch.rows, slice):
        if len(a) == 1:
            addmm_(y[batch.rows], a[0], b[0])
        else:
            batch.of_each(y[batch.rows]).baddbmm_(a, b)
        return
    product = bmm(a, b).flatten(0, 1)
    if keep is not None:
        masked(product, keep[batch.rows], out=product)
    y[batch.rows] += product


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of each adapter, for a [adapters, rows, m] and b [adapters, rows, n]."""
    # Of one row each, a bmm takes two to three times as long on a CPU; in bf16 this would.
    return a.mT * b if a.shape[1] == 1 and a.dtype == torch.float32 else bmm(a.mT, b)


def _few_rows(x: Tensor, layer: Adapted, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """x A^T B^T [adapters, rows, N] and each x A^T, one adapter after the other, in x's dtype.

    x [adapters, rows, K] of the batch. A bmm needs all adapters in one tensor, and that copy takes
    longer than the products of few rows: with 64 adapters of 16 x 576, a row each, a whole call is
    0.59 of the time with fp32 adapters over bf16, 0.88 all in fp32.
    """
    dtype, one = x.dtype, batch.each == 1
    update = x.new_empty((len(x), batch.each, layer.weight.shape[0]))
    rows, outs = (x[:, 0], update[:, 0]) if one else (x, update)
    parts = []
    for i, row, out in zip(batch.adapters, rows.unbind(), outs.unbind(), strict=True):
        A, B = layer.lora_As[i], layer.lora_Bs[i]
        if A.dtype != dtype or B.dtype != dtype:  # else two calls of 0.3 us
            A, B = A.to(dtype), B.to(dtype)
        if one:
            parts.append(torch.mv(A, row))
            torch.mv(B, parts[-1], out=out)
        else:
            parts.append(torch.mm(row, A.t()))
            torch.mm(parts[-1], B.t(), out=out)
    return update, parts


def _torch_forward(
    x: Tensor, layer: Adapted, bias: Tensor | None, *, need_h: bool
) -> tuple[Tensor, Tensor | None]:
    y = base_product(x, layer.weight, bias)
    h = x.new_empty((len(x), max(layer.ranks()))) if need_h else None
    keep, keep_scale = _mask(layer, len(x))
    wide = layer.wide(x.dtype)
    for batch in layer.batches(x.dtype, copied=wide is None):
        rows = _kept(x, keep, batch)
        if wide is not None and batch.each <= _FEW_ROWS:
            update, parts = _few_rows(rows.to(wide), layer, batch)
            _scale_(update, layer, batch, keep_scale)
            y[batch.rows] += update.flatten(0, 1)
            if h is not None:
                part = torch.stack(parts).view(*rows.shape[:2], batch.rank)
                _scale_(part, layer, batch, keep_scale)
        else:
            part = bmm(rows, _stacked(layer.lora_As, batch, x.dtype).mT)
            _scale_(part, layer, batch, keep_scale)
            _add_product(y, batch, part, _stacked(layer.lora_Bs, batch, x.dtype).mT, None)
        if h is not None:
            h[batch.positions, : batch.rank] = part.flatten(0, 1).to(h.dtype)
    return y, h


def _torch_backward(
    g: Tensor, x: Tensor | None, layer: Adapted, h: Tensor | None, *, need_dx: bool
) -> Gradients:
    dx = None
    if need_dx and isinstance(layer.weight, Tensor):
        dx = mm(g, layer.weight)
    elif need_dx:
        dx = g.new_zeros((len(g), layer.weight.shape[1]))
        add_base_dx(dx, g, layer.weight)
    dAs: list[Tensor | None] = [None] * len(layer.lora_As)
    dBs: list[Tensor | None] = [None] * len(layer.lora_Bs)
    needs_dh = need_dx or x is not None
    keep, keep_scale = _mask(layer, len(g)) if needs_dh else (None, 1.0)
    for batch in layer.batches(g.dtype):
        part = _kept(g, None, batch)
        if h is not None:
            h_part = batch.of_each(h[batch.positions, : batch.rank])
            _put(dBs, batch, _outer(part, h_part), layer.lora_Bs)
        if not needs_dh:
            continue
        dh = bmm(part, _stacked(layer.lora_Bs, batch, g.dtype))
        _scale_(dh, layer, batch, keep_scale)
        if x is not None:
            _put(dAs, batch, _outer(dh, _kept(x, keep, batch)), layer.lora_As)
        if dx is not None:
            _add_product(dx, batch, dh, _stacked(layer.lora_As, batch, g.dtype), keep)
    if x is not None:
        dAs = _or_zeros(dAs, layer.lora_As)
    if h is not None:
        dBs = _or_zeros(dBs, layer.lora_Bs)
    return dx, dAs, dBs


def _put(to: list[Tensor | None], batch: Batch, stacked: Tensor, like: Sequence[Tensor]) -> None:
    for i, gradient in zip(batch.adapters, stacked.unbind(), strict=True):
        to[i] = gradient.to(like[i].dtype)


def _or_zeros(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    pairs = zip(gradients, like, strict=True)
    return [torch.zeros_like(t) if gradient is None else gradient for gradient, t in pairs]

"""Forward and backward of a batch with many adapters, on the kernels and in plain PyTorch.

Both take x and g of any number of dimensions. h [M, max r] is scaled already, its rows are
positions (see kernels/rows.py), and it is undefined where a row has no adapter. Nothing given is
overwritten. A quantised weight becomes values as in `lora_linear`: in the base product's K loop or
in a scratch tensor on the kernels, some rows or columns at a time in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import _as_matrix, _gradient, _no_autocast
from .kernels.configs import Kind, TileConfig, choose_config
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.rows import AdapterLayout, AdapterTable, RowGroups, adapter_table, addresses_of
from .quantize import QuantizedWeight
from .reference import keep_mask
from .torch_backend import _add_base_dx, _base

# split: h, then the GEMM adds h B; expand: h, the base product, then h B added in place.
Strategy = Literal["split", "expand", "library"]
Span = tuple[int, int, int]  # an adapter, its first position, its last one + 1
# Of what `side_by_side` takes: rows of an adapter, bytes of its A or B, and of all A's or B's.
_FEW_ROWS = 16
_SMALL, _STACKED = 128 << 10, 1 << 20
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


class Adapted(NamedTuple):
    """A frozen weight, its adapters, and which rows of the batch take which of them."""

    weight: Tensor | QuantizedWeight  # [N, K]
    lora_As: Sequence[Tensor]  # each [r_i, K]
    lora_Bs: Sequence[Tensor]  # each [N, r_i]
    scalings: Sequence[float]
    dropout: Dropout | None
    rows: RowGroups
    layout: AdapterLayout | None = None  # where the adapters lie, if that is known

    def table(self) -> AdapterTable:
        """The kernels' table of the adapters."""
        return adapter_table(self.lora_As, self.lora_Bs, self.scalings, self.layout)

    def unpacked(self) -> Adapted:
        """For adapters that were saved: hooks may have moved them, and what is known is dropped."""
        if self.layout is None or self.layout.addresses == addresses_of(self.lora_As, self.lora_Bs):
            return self
        return self._replace(layout=None)


def forward(
    x: Tensor, layer: Adapted, bias: Tensor | None, plan: MultiPlan, *, need_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and, if needed, h [M, max r], both in x's dtype."""
    matrix = _as_matrix(x)
    with _no_autocast(x.device):
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
    g2, x2 = _gradient(g, plan.backend), None if x is None else _as_matrix(x)
    with _no_autocast(g.device):
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


def _kept(x: Tensor, keep: Tensor | None, index: slice | Tensor) -> Tensor:
    part = x[index]
    return part if keep is None else torch.where(keep[index], part, 0.0)


def _add_product(y: Tensor, index: slice | Tensor, a: Tensor, b: Tensor) -> None:
    """y[index] += a b, in place."""
    if isinstance(index, slice):
        y[index].addmm_(a, b)
    else:
        y.index_add_(0, index, a @ b)  # no row twice, so that there is no order of additions


def side_by_side(layer: Adapted, dtype: torch.dtype) -> list[list[Span]]:
    """The spans of the rows' adapters, in lists that PyTorch multiplies by one bmm each.

    In a list all have as many rows, so that nothing is padded, and few; one rank, so that the
    adapters can be copied into one tensor; and these copies are small: up to 1 MB, in a CPU's
    cache. On a CPU 64 adapters of r 16 with a row each took 0.3 instead of 0.8 ms (fp32, N and K
    576) and 0.4 instead of 6.5 ms (bf16); from 128 KB for A or B on, a loop is as fast in fp32.
    """
    lists: dict[object, list[Span]] = {}
    wide = max(layer.weight.shape) * dtype.itemsize
    for span in layer.rows.spans():
        adapter, first, last = span
        A, B = layer.lora_As[adapter], layer.lora_Bs[adapter]
        size = len(A) * wide
        key: object = adapter
        if last - first <= _FEW_ROWS and size < _SMALL:
            key = (last - first, len(A), A.dtype, B.dtype)
        found = lists.setdefault(key, [])
        found.append(span)
        if len(found) * size >= _STACKED:
            lists[key, adapter] = lists.pop(key)  # full
    return list(lists.values())


def _torch_forward(
    x: Tensor, layer: Adapted, bias: Tensor | None, *, need_h: bool
) -> tuple[Tensor, Tensor | None]:
    y = _base(x, layer.weight, bias)
    h = x.new_empty((len(x), max(A.shape[0] for A in layer.lora_As))) if need_h else None
    keep, keep_scale = _mask(layer, len(x))
    for spans in side_by_side(layer, x.dtype):
        if len(spans) > 1:
            _add_side_by_side(x, y, h, layer, spans, keep, keep_scale)
            continue
        adapter, first, last = spans[0]
        A, B = layer.lora_As[adapter], layer.lora_Bs[adapter]
        index = layer.rows.rows(first, last)
        part = F.linear(_kept(x, keep, index), A.to(x.dtype))
        part *= layer.scalings[adapter] * keep_scale
        _add_product(y, index, part, B.to(x.dtype).t())
        if h is not None:
            h[first:last, : len(A)] = part
    return y, h


def _add_side_by_side(
    x: Tensor,
    y: Tensor,
    h: Tensor | None,
    layer: Adapted,
    spans: list[Span],
    keep: Tensor | None,
    keep_scale: float,
) -> None:
    """y += h B^T in place for spans of as many rows and one rank each, and h."""
    adapters, firsts, lasts = zip(*spans, strict=True)
    count = lasts[0] - firsts[0]
    positions = torch.tensor(firsts, device=x.device)[:, None] + torch.arange(
        count, device=x.device
    )
    positions = positions.view(-1)
    index = positions if layer.rows.order is None else layer.rows.order[positions]
    A = torch.stack([layer.lora_As[i] for i in adapters]).to(x.dtype)
    B = torch.stack([layer.lora_Bs[i] for i in adapters]).to(x.dtype)
    scales = [layer.scalings[i] * keep_scale for i in adapters]
    part = torch.bmm(_kept(x, keep, index).view(len(spans), count, -1), A.mT)
    wide = torch.promote_types(x.dtype, torch.float32)
    part *= torch.tensor(scales, dtype=wide, device=x.device)[:, None, None]
    y.index_add_(0, index, torch.bmm(part, B.mT).flatten(0, 1))  # no row twice
    if h is not None:
        h[positions, : part.shape[-1]] = part.flatten(0, 1)


def _torch_backward(
    g: Tensor, x: Tensor | None, layer: Adapted, h: Tensor | None, *, need_dx: bool
) -> Gradients:
    dx = None
    if need_dx and isinstance(layer.weight, Tensor):
        dx = g @ layer.weight
    elif need_dx:
        dx = g.new_zeros((len(g), layer.weight.shape[1]))
        _add_base_dx(dx, g, layer.weight)
    dAs = [None if x is None else torch.zeros_like(A) for A in layer.lora_As]
    dBs = [None if h is None else torch.zeros_like(B) for B in layer.lora_Bs]
    needs_dh = need_dx or x is not None
    keep, keep_scale = _mask(layer, len(g)) if needs_dh else (None, 1.0)
    for adapter, first, last in layer.rows.spans():
        A, B = layer.lora_As[adapter], layer.lora_Bs[adapter]
        dA, dB = dAs[adapter], dBs[adapter]
        index = layer.rows.rows(first, last)
        part = g[index]
        if h is not None and dB is not None:
            dB.copy_(part.t() @ h[first:last, : len(A)])
        if not needs_dh:
            continue
        dh = part @ B.to(g.dtype)
        dh *= layer.scalings[adapter] * keep_scale
        if x is not None and dA is not None:
            dA.copy_(dh.t() @ _kept(x, keep, index))
        if dx is None:
            continue
        if keep is None:
            _add_product(dx, index, dh, A.to(g.dtype))
        else:
            dropped = (dh @ A.to(g.dtype)).masked_fill_(~keep[index], 0.0)
            dx[index] += dropped
    return dx, dAs, dBs

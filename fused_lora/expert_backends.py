"""Forward and backward of a mixture of experts, on the kernels and in plain PyTorch.

x is a matrix [M / fan, K] and g one [M, N], of the rows of the order or of positions in it (see
kernels/rows.py). h [M, r] is scaled already and has positions for rows; it is undefined where a row
has no expert. Nothing given is overwritten.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.configs import Kind, TileConfig, cdiv, choose_config
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.rows import AdapterStack, RowGroups
from .products import addmm_, linear, mm
from .reference import keep_mask
from .torch_backend import masked

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Experts(NamedTuple):
    """Frozen weights, an adapter for each or none, and which rows of the order take which."""

    weight: Tensor  # [E, N, K]
    lora_A: Tensor | None  # [E, r, K]
    lora_B: Tensor | None  # [E, N, r]
    scaling: float
    dropout: Dropout | None
    rows: RowGroups
    fan: int  # how many rows of the order each row of x is
    gathers: bool  # whether x has rows of the order, and not positions, for rows
    scatters: bool  # whether y has

    def source(self, first: int, last: int) -> slice | Tensor:
        """The rows of x at these positions."""
        order = self.rows.order
        if not self.gathers or order is None:
            return slice(first, last)
        rows = order[first:last]
        return rows if self.fan == 1 else rows // self.fan

    def target(self, first: int, last: int) -> slice | Tensor:
        """The rows of y at these positions."""
        return self.rows.rows(first, last) if self.scatters else slice(first, last)

    def stack(self) -> AdapterStack | None:
        """The adapters as the kernels take them."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return AdapterStack(self.lora_A.contiguous(), self.lora_B.contiguous(), self.scaling)


def triton_forward(
    x: Tensor, layer: Experts, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and h [M, r]."""
    return _product(x, layer, bias, forward=True)


def _config(kind: Kind, layer: Experts, N: int, r: int, dropout: bool, x: Tensor) -> TileConfig:
    """Of a launch whose tiles are of one expert each, for as many rows of all of them."""
    groups = min(len(layer.weight), layer.rows.M)
    rows, device = cdiv(layer.rows.M, max(groups, 1)), device_info(x.device)
    itemsize = x.dtype.itemsize
    return choose_config(kind, rows, N, max(r, 1), itemsize, dropout, device, groups=groups)


def _product(
    x: Tensor, layer: Experts, bias: Tensor | None, *, forward: bool
) -> tuple[Tensor, Tensor | None]:
    """y and h; with forward=False dx, a row for each of the order, and dh, for x = g."""
    from .kernels.experts import gemm_experts
    from .kernels.multi import shrink

    rows, adapters = layer.rows, layer.stack()
    w = layer.weight.mT if forward else layer.weight
    N, r = w.shape[2], adapters.max_rank if adapters else 0
    # Forward drops elements of what is shrunk, the input gradient of what was expanded.
    drop_x, drop_y = (layer.dropout, None) if forward else (None, layer.dropout)
    gathers, scatters, fan, fan_y = layer.gathers, layer.scatters, layer.fan, 1
    if not forward:
        gathers, scatters, fan, fan_y = scatters, gathers, 1, fan
    h = None
    if adapters:
        config = _config("plain", layer, r, r, drop_x is not None, x)
        of_x = rows if gathers else rows.sorted()
        h = shrink(config, x, of_x, adapters, use_A=forward, dropout=drop_x, fan=fan)
    y = gemm_experts(
        _config("second", layer, N, r, drop_y is not None, x),
        x,
        w,
        rows,
        adapters=adapters,
        h=h,
        use_A=not forward,
        bias=bias,
        dropout=drop_y,
        fan=fan,
        fan_y=fan_y,
        gathers=gathers,
        scatters=scatters,
    )
    return y, h


def triton_backward(
    g: Tensor, x: Tensor | None, layer: Experts, h: Tensor | None, *, need_dx: bool
) -> Gradients:
    """dx, dA and dB for g = dL/dy: dA iff x is given, dB iff h is."""
    from .kernels.multi import multi_grads, shrink

    rows, adapters, dropout = layer.rows, layer.stack(), layer.dropout
    of_x = rows if layer.gathers else rows.sorted()
    of_g = rows if layer.scatters else rows.sorted()
    dx = dh = dA = dB = None
    if need_dx:
        dx, dh = _product(g, layer, None, forward=False)
        dx = _summed(dx, layer.fan)
    if adapters is None:
        return dx, None, None
    r = adapters.max_rank
    if dh is None and x is not None:
        dh = shrink(_config("plain", layer, r, r, False, g), g, of_g, adapters, use_A=False)
    if x is not None and dh is not None:
        config = _config("multi_grad", layer, x.shape[1], r, dropout is not None, x)
        how = {"use_A": True, "dropout": dropout, "fan": layer.fan}
        dA = multi_grads(config, x, dh, of_x, adapters, **how)
    if h is not None:
        config = _config("multi_grad", layer, g.shape[1], r, False, g)
        dB = multi_grads(config, g, h, of_g, adapters, use_A=False)
    return dx, dA, dB


def _summed(dx: Tensor, fan: int) -> Tensor:
    """dx [M / fan, K] of [M, K], each sum rounded once."""
    return dx if fan == 1 else dx.view(-1, fan, dx.shape[1]).sum(1)


def _mask(layer: Experts, M: int) -> tuple[Tensor | None, float]:
    if layer.dropout is None:
        return None, 1.0
    seed, threshold = layer.dropout
    return keep_mask(seed, threshold, M, layer.weight.shape[2]), layer.dropout.keep_scale


def torch_forward(x: Tensor, layer: Experts, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and h [M, r], one expert after the other. Waits for a GPU."""
    weight, A, B, scaling = layer[:4]
    M = layer.rows.M
    y = x.new_empty((M, weight.shape[1]))
    h = None if A is None else x.new_empty((M, A.shape[1]))
    keep, keep_scale = _mask(layer, len(x))
    spans = layer.rows.spans()
    _zero_the_rest(y, layer, spans)
    for expert, first, last in spans:
        source = layer.source(first, last)
        rows = x[source]
        part = linear(rows, weight[expert], None if bias is None else bias[expert])
        if A is not None and B is not None and h is not None:
            if keep is not None:
                rows = masked(rows, keep[source])
            h_part = mm(rows, A[expert].to(x.dtype).t(), out=h[first:last])
            h_part *= scaling * keep_scale
            addmm_(part, h_part, B[expert].to(x.dtype).t())
        y[layer.target(first, last)] = part
    return y, h


def _zero_the_rest(y: Tensor, layer: Experts, spans: list[tuple[int, int, int]]) -> None:
    """The rows of no expert, which are the first."""
    first = spans[0][1] if spans else layer.rows.M
    if first:
        y[layer.target(0, first)] = 0


def torch_backward(
    g: Tensor, x: Tensor | None, layer: Experts, h: Tensor | None, *, need_dx: bool
) -> Gradients:
    """dx, dA and dB for g = dL/dy: dA iff x is given, dB iff h is."""
    weight, A, B, scaling = layer[:4]
    M, K = layer.rows.M, weight.shape[2]
    # On a CPU sums of fp32 need no row for each of them.
    at_once = layer.fan > 1 and g.device.type == "cpu" and g.dtype.itemsize >= 4
    dx = None
    if need_dx:
        dx = g.new_zeros((M // layer.fan, K)) if at_once else g.new_empty((M, K))
    dA = None if x is None or A is None else torch.zeros_like(A)
    dB = None if h is None or B is None else torch.zeros_like(B)
    needs_dh = A is not None and (need_dx or dA is not None)
    keep, keep_scale = _mask(layer, M // layer.fan) if needs_dh else (None, 1.0)
    spans = layer.rows.spans()
    if dx is not None and not at_once:
        first = spans[0][1] if spans else M
        dx[layer.rows.rows(0, first) if layer.gathers else slice(0, first)] = 0
    for expert, first, last in spans:
        source, g_part = layer.source(first, last), g[layer.target(first, last)]
        if dB is not None and h is not None:
            dB[expert] = mm(g_part.t(), h[first:last])
        dh = None
        if needs_dh and A is not None and B is not None:
            dh = mm(g_part, B[expert].to(g.dtype))
            dh *= scaling * keep_scale
        if dA is not None and dh is not None and x is not None:
            rows = x[source] if keep is None else masked(x[source], keep[source])
            dA[expert] = mm(dh.t(), rows)
        if dx is None:
            continue
        if dh is None or A is None:
            part = mm(g_part, weight[expert])
        elif keep is None:
            part = addmm_(mm(g_part, weight[expert]), dh, A[expert].to(g.dtype))
        else:
            part = mm(dh, A[expert].to(g.dtype))
            masked(part, keep[source], out=part)
            addmm_(part, g_part, weight[expert])
        if at_once and isinstance(source, Tensor):
            dx.index_add_(0, source, part)
        else:
            dx[layer.rows.rows(first, last) if layer.gathers else slice(first, last)] = part
    if dx is not None and not at_once:
        dx = _summed(dx, layer.fan)
    return dx, dA, dB

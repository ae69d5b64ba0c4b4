"""Products of a mixture of experts and their gradients, on the kernels and in plain PyTorch.

x is a matrix [M / fan, K] and y one [M, N], with rows of the order or positions in it (see
kernels/rows.py) for rows. h and dh [M, r] are scaled already and have positions for rows; they are
undefined where a row has no expert. Nothing given is overwritten.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .autocast import no_autocast
from .kernels.configs import Kind, TileConfig, cdiv, choose_config
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.rows import AdapterStack, RowGroups
from .products import addmm_, mm
from .reference import keep_mask
from .torch_backend import masked

Path = Literal["triton", "torch"]
Index = slice | Tensor


class Experts(NamedTuple):
    """Frozen weights, an adapter for each or none, and which rows of the order take which."""

    weight: Tensor  # [E, N, K]
    lora_A: Tensor | None  # [E, r, K]
    lora_B: Tensor | None  # [E, N, r]
    scaling: float
    dropout: Dropout | None
    rows: RowGroups
    fan: int = 1  # how many rows of the order each row of x is
    gathers: bool = True  # whether x has rows of the order, and not positions, for rows
    scatters: bool = True  # whether y has
    fan_g: int = 1  # how many rows of the order each row of y's gradient is

    def stack(self) -> AdapterStack | None:
        """The adapters as the kernels take them."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return AdapterStack(self.lora_A.contiguous(), self.lora_B.contiguous(), self.scaling)

    def of_x(self) -> RowGroups:
        """The order that x's rows are found by."""
        return self.rows if self.gathers else self.rows.sorted()

    def of_y(self) -> RowGroups:
        """Those of y and of its gradient."""
        return self.rows if self.scatters else self.rows.sorted()


def project(
    path: Path, x: Tensor, layer: Experts, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and h = scaling * (D o x) A^T [M, r]."""
    with no_autocast(x):
        if path == "triton":
            return _launch(x, layer, bias, forward=True)
        return _torch_project(x, layer, bias)


def project_back(
    path: Path, g: Tensor, layer: Experts, *, need_dx: bool, need_dh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, like x, and dh = scaling * g B [M, r] for g = dL/dy."""
    with no_autocast(g):
        if path == "torch":
            return _torch_project_back(g, layer, need_dx=need_dx, need_dh=need_dh)
        if need_dx:
            dx, dh = _launch(g, layer, None, forward=False)
            return _summed(dx, layer.fan), dh
        from .kernels.multi import shrink

        adapters = layer.stack()
        if adapters is None or not need_dh:
            return None, None
        config = _config("plain", layer, adapters.max_rank, adapters.max_rank, False, g)
        fan = layer.fan_g
        return None, shrink(config, g, layer.of_y(), adapters, use_A=False, fan=fan)


def grad_A(path: Path, x: Tensor, dh: Tensor, layer: Experts) -> Tensor:
    """dA [E, r, K]; of an expert without rows zero."""
    with no_autocast(x):
        if path == "torch":
            return _torch_grad_A(x, dh, layer)
        return _launch_grads(x, dh, layer, layer.of_x(), layer.fan, use_A=True)


def grad_B(path: Path, g: Tensor, h: Tensor, layer: Experts) -> Tensor:
    """dB [E, N, r]; of an expert without rows zero."""
    with no_autocast(g):
        if path == "torch":
            return _torch_grad_B(g, h, layer)
        return _launch_grads(g, h, layer, layer.of_y(), layer.fan_g, use_A=False)


def _summed(dx: Tensor, fan: int) -> Tensor:
    """dx [M / fan, K] of [M, K], each sum rounded once."""
    return dx if fan == 1 else dx.view(-1, fan, dx.shape[1]).sum(1)


def _config(kind: Kind, layer: Experts, N: int, r: int, dropout: bool, x: Tensor) -> TileConfig:
    """Of a launch whose tiles are of one expert each, for as many rows of all of them."""
    groups = min(len(layer.weight), layer.rows.M)
    rows, device = cdiv(layer.rows.M, max(groups, 1)), device_info(x.device)
    itemsize = x.dtype.itemsize
    return choose_config(kind, rows, N, max(r, 1), itemsize, dropout, device, groups=groups)


def _launch(
    x: Tensor, layer: Experts, bias: Tensor | None, *, forward: bool
) -> tuple[Tensor, Tensor | None]:
    """y and h; with forward=False a row of dx for each of the order, and dh, for x = g."""
    from .kernels.experts import gemm_experts
    from .kernels.multi import shrink

    adapters, of_x, of_y = layer.stack(), layer.of_x(), layer.of_y()
    fan, fan_y = layer.fan, 1
    w = layer.weight.mT if forward else layer.weight
    # Forward drops elements of what is shrunk, the input gradient of what was expanded.
    drop_x, drop_y = (layer.dropout, None) if forward else (None, layer.dropout)
    if not forward:
        of_x, of_y, fan, fan_y = of_y, of_x, layer.fan_g, fan
    N, r = w.shape[2], adapters.max_rank if adapters else 0
    h = None
    if adapters:
        config = _config("plain", layer, r, r, drop_x is not None, x)
        h = shrink(config, x, of_x, adapters, use_A=forward, dropout=drop_x, fan=fan)
    config = _config("second", layer, N, r, drop_y is not None, x)
    y = gemm_experts(
        config,
        x,
        w,
        layer.rows,
        adapters=adapters,
        h=h,
        use_A=not forward,
        bias=bias,
        dropout=drop_y,
        fan=fan,
        fan_y=fan_y,
        order_x=of_x.order,
        order_y=of_y.order,
    )
    return y, h


def _launch_grads(
    q: Tensor, l: Tensor, layer: Experts, rows: RowGroups, fan: int, *, use_A: bool
) -> Tensor:
    from .kernels.multi import multi_grads

    adapters = layer.stack()
    assert adapters is not None
    dropout = layer.dropout if use_A else None
    config = _config("multi_grad", layer, q.shape[1], adapters.max_rank, dropout is not None, q)
    gradient: Tensor = multi_grads(
        config, q, l, rows, adapters, use_A=use_A, dropout=dropout, fan=fan
    )
    return gradient


# PyTorch's path: one expert after the other, each a few products. It waits for a GPU, to know how
# many rows they have.


def _index(rows: RowGroups, first: int, last: int, fan: int) -> Index:
    """The rows of a matrix at these positions."""
    found = rows.rows(first, last)
    return found if fan == 1 or isinstance(found, slice) else found // fan


def _rows(t: Tensor, index: Index) -> Tensor:
    """t[index]; as advanced indexing it takes 4 times as long on a CPU."""
    return t[index] if isinstance(index, slice) else t.index_select(0, index)


def _mask(layer: Experts) -> tuple[Tensor | None, float]:
    if layer.dropout is None:
        return None, 1.0
    seed, threshold = layer.dropout
    M, K = layer.rows.M // layer.fan, layer.weight.shape[2]
    return keep_mask(seed, threshold, M, K), layer.dropout.keep_scale


def _dropped(x: Tensor, index: Index, keep: Tensor | None) -> Tensor:
    rows = _rows(x, index)
    return rows if keep is None else masked(rows, _rows(keep, index))


def _zero_the_rest(y: Tensor, rows: RowGroups) -> None:
    """The rows of no expert, which are the first."""
    spans = rows.spans()
    first = spans[0][1] if spans else rows.M
    if first:
        y[rows.rows(0, first)] = 0


def _torch_project(x: Tensor, layer: Experts, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight, of_x, of_y = layer.weight, layer.of_x(), layer.of_y()
    A, B, scaling = _adapters(layer, x.dtype)
    y = x.new_empty((layer.rows.M, weight.shape[1]))
    h = None if A is None else x.new_empty((layer.rows.M, A.shape[1]))
    keep, keep_scale = _mask(layer)
    _zero_the_rest(y, of_y)
    for expert, first, last in layer.rows.spans():
        source, target = _index(of_x, first, last, layer.fan), of_y.rows(first, last)
        rows = _rows(x, source)
        part = mm(rows, weight[expert].t(), out=y[target] if isinstance(target, slice) else None)
        if bias is not None:
            part += bias[expert]
        if A is not None and B is not None and h is not None:
            rows = rows if keep is None else masked(rows, _rows(keep, source))
            h_part = mm(rows, A[expert].t(), out=h[first:last])
            h_part *= scaling * keep_scale
            addmm_(part, h_part, B[expert].t())
        if not isinstance(target, slice):
            y[target] = part
    return y, h


def _adapters(layer: Experts, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float]:
    """A and B in ``dtype``, contiguous: one operation where the experts' own would be hundreds."""
    A, B = layer.lora_A, layer.lora_B
    if A is None or B is None:
        return None, None, 1.0
    return A.to(dtype).contiguous(), B.to(dtype).contiguous(), layer.scaling


def _torch_project_back(
    g: Tensor, layer: Experts, *, need_dx: bool, need_dh: bool
) -> tuple[Tensor | None, Tensor | None]:
    weight, rows, of_x, of_g = layer.weight, layer.rows, layer.of_x(), layer.of_y()
    A, B, scaling = _adapters(layer, g.dtype)
    M, K = rows.M, weight.shape[2]
    # On a CPU sums in fp32 need no row for each of the order.
    at_once = layer.fan > 1 and g.device.type == "cpu" and g.dtype.itemsize >= 4
    dx = dh = None
    if need_dx:
        dx = g.new_zeros((M // layer.fan, K)) if at_once else g.new_empty((M, K))
        if not at_once:
            _zero_the_rest(dx, of_x)
    if B is not None and (need_dh or need_dx):
        dh = g.new_empty((M, B.shape[2]))
    keep, keep_scale = _mask(layer) if dh is not None else (None, 1.0)
    for expert, first, last in rows.spans() if dx is not None or dh is not None else ():
        g_part = _rows(g, _index(of_g, first, last, layer.fan_g))
        dh_part = None
        if dh is not None and B is not None:
            dh_part = mm(g_part, B[expert], out=dh[first:last])
            dh_part *= scaling * keep_scale
        if dx is None:
            continue
        source = _index(of_x, first, last, layer.fan)
        if keep is None or dh_part is None or A is None:
            part = mm(g_part, weight[expert])
            if dh_part is not None and A is not None:
                addmm_(part, dh_part, A[expert])
        else:
            part = mm(dh_part, A[expert])
            masked(part, _rows(keep, source), out=part)
            addmm_(part, g_part, weight[expert])
        if at_once and isinstance(source, Tensor):
            dx.index_add_(0, source, part)
        else:
            dx[of_x.rows(first, last)] = part
    if dx is not None and not at_once:
        dx = _summed(dx, layer.fan)
    return dx, dh


def _torch_grad_A(x: Tensor, dh: Tensor, layer: Experts) -> Tensor:
    assert layer.lora_A is not None
    dA = torch.zeros_like(layer.lora_A, memory_format=torch.contiguous_format)
    of_x = layer.of_x()
    keep, _ = _mask(layer)
    for expert, first, last in layer.rows.spans():
        rows = _dropped(x, _index(of_x, first, last, layer.fan), keep)
        dA[expert] = mm(dh[first:last].t(), rows)
    return dA


def _torch_grad_B(g: Tensor, h: Tensor, layer: Experts) -> Tensor:
    assert layer.lora_B is not None
    dB = torch.zeros_like(layer.lora_B, memory_format=torch.contiguous_format)
    of_g = layer.of_y()
    for expert, first, last in layer.rows.spans():
        g_part = _rows(g, _index(of_g, first, last, layer.fan_g))
        dB[expert] = mm(g_part.t(), h[first:last])
    return dB

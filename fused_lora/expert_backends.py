"""Products of a mixture of experts and their gradients, on the kernels and in plain PyTorch.

x is a matrix [M / fan, K] and y one [M, N], with rows of the order or positions in it (see
kernels/rows.py) for rows. h and dh [M, r] are scaled already and have positions for rows; they are
undefined where a row has no expert. Nothing given is overwritten.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from . import expert_torch
from .autocast import no_autocast
from .cost_model import decodes_in_loop
from .expert_stack import Experts
from .kernels.configs import choose_config
from .kernels.device import device_info
from .kernels.rows import RowGroups
from .kernels.sizes import cdiv
from .kernels.tile_config import Kind, TileConfig
from .quantized_weight import QuantizedWeight

Path = Literal["triton", "torch"]


def project(
    path: Path, x: Tensor, layer: Experts, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and h = scaling * (D o x) A^T [M, r]."""
    with no_autocast(x):
        if path == "triton":
            return _launch(x, layer, bias, forward=True)
        return expert_torch.project(x, layer, bias)


def project_back(
    path: Path, g: Tensor, layer: Experts, *, need_dx: bool, need_dh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, like x, and dh = scaling * g B [M, r] for g = dL/dy."""
    with no_autocast(g):
        if path == "torch":
            return expert_torch.project_back(g, layer, need_dx=need_dx, need_dh=need_dh)
        if need_dx:
            dx, dh = _launch(g, layer, None, forward=False)
            return expert_torch.summed(dx, layer.fan), dh
        from .kernels.multi import shrink

        adapters = layer.stack()
        if adapters is None or not need_dh:
            return None, None
        config = _config("plain", *layer.sizes, adapters.max_rank, adapters.max_rank, False, g)
        fan = layer.fan_g
        return None, shrink(config, g, layer.of_y(), adapters, use_A=False, fan=fan)


class Gradients(NamedTuple):
    """Those that were asked for."""

    dx: Tensor | None
    dA: Tensor | None
    dB: Tensor | None


def backward(
    path: Path, g: Tensor, x: Tensor | None, h: Tensor | None, layer: Experts, *, need_dx: bool
) -> Gradients:
    """The gradients of `project` for g = dL/dy: dA if x is given, dB if h is."""
    dx, dh = project_back(path, g, layer, need_dx=need_dx, need_dh=x is not None)
    dA = None if x is None or dh is None else grad_A(path, x, dh, layer)
    return Gradients(dx, dA, None if h is None else grad_B(path, g, h, layer))


def grad_A(path: Path, x: Tensor, dh: Tensor, layer: Experts) -> Tensor:
    """dA [E, r, K]; of an expert without rows zero."""
    with no_autocast(x):
        if path == "torch":
            return expert_torch.grad_A(x, dh, layer)
        return _launch_grads(x, dh, layer, layer.of_x(), layer.fan, use_A=True)


def grad_B(path: Path, g: Tensor, h: Tensor, layer: Experts) -> Tensor:
    """dB [E, N, r]; of an expert without rows zero."""
    with no_autocast(g):
        if path == "torch":
            return expert_torch.grad_B(g, h, layer)
        return _launch_grads(g, h, layer, layer.of_y(), layer.fan_g, use_A=False)


def reads_codes(weight: QuantizedWeight, M: int, x: Tensor) -> bool:
    """Whether the launches make values of codes for each tile, and not once in a scratch tensor.

    M rows of some expert's, of x's dtype.
    """
    E, N, _ = weight.shape
    groups, rows = _groups(E, M)
    tiles = groups * cdiv(rows, _config("quantized", E, M, N, 16, False, x).BLOCK_M)
    return decodes_in_loop(weight.shape, weight.layout, tiles, x.dtype, device_info(x.device))


def _groups(E: int, M: int) -> tuple[int, int]:
    """How many of E experts M rows can have, and rows of each if all have as many."""
    groups = min(E, M)
    return groups, cdiv(M, max(groups, 1))


def _config(kind: Kind, E: int, M: int, N: int, r: int, dropout: bool, x: Tensor) -> TileConfig:
    """Of a launch whose tiles are of one expert each."""
    (groups, rows), device = _groups(E, M), device_info(x.device)
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
    weight = layer.weight
    if isinstance(weight, QuantizedWeight) and not reads_codes(weight, layer.rows.M, x):
        weight = weight.dequantize(x.dtype)
    if isinstance(weight, QuantizedWeight):
        matrix = weight.matrix()
        w, kind = matrix.t() if forward else matrix, matrix.kind
    else:
        w, kind = weight.mT if forward else weight, "second"
    # Forward drops elements of what is shrunk, the input gradient of what was expanded.
    drop_x, drop_y = (layer.dropout, None) if forward else (None, layer.dropout)
    if not forward:
        of_x, of_y, fan, fan_y = of_y, of_x, layer.fan_g, fan
    N, r = w.shape[-1], adapters.max_rank if adapters else 0
    h = None
    if adapters:
        config = _config("plain", *layer.sizes, r, r, drop_x is not None, x)
        h = shrink(config, x, of_x, adapters, use_A=forward, dropout=drop_x, fan=fan)
    config = _config(kind, *layer.sizes, N, r, drop_y is not None, x)
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
    config = _config(
        "multi_grad", *layer.sizes, q.shape[1], adapters.max_rank, dropout is not None, q
    )
    gradient: Tensor = multi_grads(
        config, q, l, rows, adapters, use_A=use_A, dropout=dropout, fan=fan
    )
    return gradient

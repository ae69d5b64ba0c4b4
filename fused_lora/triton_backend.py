"""The kernel path: which launches a strategy is made of.

Same contract as torch_backend. The input gradient is the forward with x -> g, W0^T -> W0,
A^T -> B, B^T -> A, and its by-product is dh.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import Strategy
from .kernels.configs import Kind, TileConfig, choose_config
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.gemm import ColumnScale, gemm_add_lora, gemm_one_pass, gemm_scaled
from .kernels.grads import grad_lora_a, grad_lora_b
from .kernels.group import gemm_group


def _config(
    kind: Kind, x: Tensor, N: int, r: int, dropout: Dropout | None, dora: bool = False
) -> TileConfig:
    device = device_info(x.device)
    M, itemsize = x.shape[0], x.dtype.itemsize
    return choose_config(kind, M, N, r, itemsize, dropout is not None, device, dora)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    strategy: Strategy,
    *,
    need_h: bool,
    dora: ColumnScale | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and, if needed, h = scaling * (D o x) A^T [M, r], both in x's dtype."""
    N, r = lora_B.shape
    w, a, b = weight.t(), lora_A.t(), lora_B.t()
    if strategy == "one_pass":
        config = _config("one_pass", x, N, r, dropout, dora is not None)
        return gemm_one_pass(
            config, x, w, a, b, bias=bias, scale=scaling, store_h=need_h, dora=dora
        )
    config = _config("plain", x, r, r, dropout)
    h = gemm_scaled(config, x, a, scale=scaling, dropout=dropout)
    config = _config("second", x, N, r, None, dora is not None)
    return gemm_add_lora(config, x, w, h, b, bias=bias, dora=dora), h


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    strategy: Strategy,
    *,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB for g = dL/dy [M, N]: dA iff x is given, dB iff h is given."""
    r, K = lora_A.shape
    N = g.shape[1]
    dx = dh = dA = dB = None
    if need_dx and strategy == "one_pass":
        config = _config("one_pass", g, K, r, dropout)
        dx, dh = gemm_one_pass(
            config, g, weight, lora_B, lora_A, bias=None, scale=scaling, store_h=x is not None
        )
    elif need_dx or x is not None:
        dh = gemm_scaled(_config("plain", g, r, r, None), g, lora_B, scale=scaling)
        if need_dx:
            config = _config("second", g, K, r, dropout)
            dx = gemm_add_lora(config, g, weight, dh, lora_A, dropout=dropout)
    if x is not None and dh is not None:
        config = _config("grad", x, K, r, dropout)
        dA = grad_lora_a(config, x, dh, dtype=lora_A.dtype, dropout=dropout)
    if h is not None:
        dB = grad_lora_b(_config("grad", g, N, r, None), g, h, dtype=lora_B.dtype)
    return dx, dA, dB


def forward_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
) -> tuple[list[Tensor], Tensor]:
    """Every y_i [M, N_i], and the h_i = scaling_i * (D_i o x) A_i^T side by side [M, sum r_i]."""
    ranks = [A.shape[0] for A in lora_As]
    h = x.new_empty((x.shape[0], sum(ranks)))
    hs = h.split_with_sizes(ranks, dim=1)
    if any(dropouts) or len(set(scalings)) > 1:
        for A, scale, dropout, h_i in zip(lora_As, scalings, dropouts, hs, strict=True):
            config = _config("plain", x, len(A), len(A), dropout)
            gemm_scaled(config, x, A.t(), scale=scale, dropout=dropout, out=h_i)
    else:
        config = _config("plain", x, h.shape[1], h.shape[1], None)
        gemm_scaled(config, x, torch.cat(tuple(lora_As)).t(), scale=scalings[0], out=h)
    ys = [
        gemm_add_lora(
            _config("second", x, B.shape[0], B.shape[1], None), x, W.t(), h_i, B.t(), bias=bias
        )
        for W, B, bias, h_i in zip(weights, lora_Bs, biases, hs, strict=True)
    ]
    return ys, h


def backward_group(
    gs: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
    *,
    need_dx: bool,
) -> tuple[Tensor | None, Sequence[Tensor | None], list[Tensor | None]]:
    """dx, dA_i and dB_i for g_i = dL/dy_i [M, N_i]: dA_i iff x is given, dB_i iff h_i is."""
    dx: Tensor | None = None
    dAs: list[Tensor | None] = [None] * len(gs)
    dBs: list[Tensor | None] = [None] * len(gs)
    for i, (g, h) in enumerate(zip(gs, hs, strict=True)):
        if h is not None:
            config = _config("grad", g, g.shape[1], h.shape[1], None)
            dBs[i] = grad_lora_b(config, g, h, dtype=lora_Bs[i].dtype)
    if not need_dx and x is None:
        return dx, dAs, dBs
    ranks, K = [A.shape[0] for A in lora_As], lora_As[0].shape[1]
    dh = gs[0].new_empty((gs[0].shape[0], sum(ranks)))
    dhs = dh.split_with_sizes(ranks, dim=1)
    for g, B, r, scale, dh_i in zip(gs, lora_Bs, ranks, scalings, dhs, strict=True):
        gemm_scaled(_config("plain", g, r, r, None), g, B, scale=scale, out=dh_i)
    dropout = next(filter(None, dropouts), None)
    if need_dx:
        config = _config("group", gs[0], K, max(ranks), dropout)
        dx = gemm_group(config, gs, weights, dhs, lora_As, dropouts)
    if x is not None and dropout is None:
        dtype = functools.reduce(torch.promote_types, (A.dtype for A in lora_As))
        dA = grad_lora_a(_config("grad", x, K, sum(ranks), None), x, dh, dtype=dtype, dropout=None)
        dAs = [
            part.to(A.dtype) for part, A in zip(dA.split_with_sizes(ranks), lora_As, strict=True)
        ]
    elif x is not None:
        dAs = [
            grad_lora_a(_config("grad", x, K, r, d), x, dh_i, dtype=A.dtype, dropout=d)
            for A, r, d, dh_i in zip(lora_As, ranks, dropouts, dhs, strict=True)
        ]
    return dx, dAs, dBs

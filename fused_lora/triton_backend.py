"""The kernel path: which launches a strategy is made of.

Same contract as torch_backend. The input gradient is the forward with x -> g, W0^T -> W0,
A^T -> B, B^T -> A, and its by-product is dh.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Plan, group_dx, part_config
from .kernels.configs import choose_config
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.expand import add_lora
from .kernels.gemm import ColumnScale, gemm_add_lora, gemm_one_pass, gemm_scaled
from .kernels.grads import grad_lora_a, grad_lora_b, lora_grads
from .kernels.group import add_group, gemm_group, stack_rows
from .kernels.persistent import persistent_add_lora, persistent_one_pass, persistent_produced
from .kernels.quantized import QuantizedMatrix, dequantize
from .kernels.skinny import skinny
from .kernels.tile_config import Kind, TileConfig
from .quantized_weight import Weight
from .strategies import Form, runs_as
from .tables import Strategy


def _config(
    kind: Kind, x: Tensor, N: int, r: int, dropout: Dropout | None, dora: bool = False
) -> TileConfig:
    device = device_info(x.device)
    M, itemsize = x.shape[0], x.dtype.itemsize
    return choose_config(kind, M, N, r, itemsize, dropout is not None, device, dora)


def _tile_of_h(x: Tensor, r: int, dropout: Dropout | None) -> TileConfig:
    (M, K), device = x.shape, device_info(x.device)
    return part_config("h", M, r, K, r, x.dtype, dropout is not None, device)


def _operand(weight: Weight) -> Tensor | QuantizedMatrix:
    return weight if isinstance(weight, Tensor) else weight.matrix()


def _values(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W0 itself, or what a quantised one stands for in a scratch tensor."""
    return weight if isinstance(weight, Tensor) else dequantize(weight.matrix(), dtype)


def lora_gemm(
    x: Tensor,
    w: Tensor | QuantizedMatrix,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    strategy: Strategy,
    config: TileConfig | None,
    *,
    drop_x: bool,
    need_h: bool,
    dora: ColumnScale | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] = x w + h b + bias and, if needed, h [M, r] = scaling * x a, both in x's dtype.

    Dropout is on x in h (``drop_x``: the forward) or on h b (the input gradient). ``config``: of
    the launch that makes y; None is `choose_config`'s. "library" is cuBLAS's product, with our h
    and, where h b is dropped, our launch that adds it. DoRA is in the epilogue of one_pass, split,
    ws_split and in_loop.
    """
    r, N = b.shape
    on_x, on_y = (dropout, None) if drop_x else (None, dropout)
    if isinstance(w, QuantizedMatrix) and strategy != "in_loop" and not w.takes_fp8:
        w = dequantize(w, x.dtype)
    if isinstance(w, Tensor):
        form: Form = "layer" if dora is None else "dora"
        strategy, config = runs_as(strategy, config, x, w, a, form=form)
        if strategy == "one_pass":
            config = config or _config("one_pass", x, N, r, dropout, dora is not None)
            return gemm_one_pass(
                config, x, w, a, b, bias=bias, scale=scaling, store_h=need_h, dora=dora
            )
        if strategy == "tma_one_pass":
            config = config or _config("tma_one_pass", x, N, r, dropout)
            return persistent_one_pass(config, x, w, a, b, bias=bias, scale=scaling, store_h=need_h)
        if strategy == "one_launch":
            config = config or _config("tma_produced", x, N, r, on_y)
            return persistent_produced(
                config, x, w, a, b, bias=bias, scale=scaling, dropout=dropout, drop_x=drop_x
            )
        if strategy == "ws_one_launch":
            from .kernels.specialized import specialized_produced  # Gluon: not in every Triton

            assert dropout is None, "its kernel draws no decisions"
            config = config or _config("ws_produced", x, N, r, None)
            return specialized_produced(config, x, w, a, b, bias=bias, scale=scaling)
        if strategy == "skinny":
            config = config or _config("skinny", x, N, r, None)
            return skinny(
                config,
                x,
                w,
                a,
                b,
                bias=bias,
                scale=scaling,
                dropout=dropout,
                drop_x=drop_x,
                store_h=need_h,
            )
    h = gemm_scaled(_tile_of_h(x, r, on_x), x, a, scale=scaling, dropout=on_x)
    return _add_lora(x, w, h, b, bias, on_y, strategy, config, dora), h


def _add_lora(
    x: Tensor,
    w: Tensor | QuantizedMatrix,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dropout: Dropout | None,
    strategy: Strategy,
    config: TileConfig | None,
    dora: ColumnScale | None = None,
) -> Tensor:
    """y = x w + D o (h b) + bias by a strategy that has its h from before."""
    r, N = b.shape
    if isinstance(w, QuantizedMatrix):
        config = config or _config(w.kind, x, N, r, dropout, dora is not None)
        return gemm_add_lora(config, x, w, h, b, bias=bias, dropout=dropout, dora=dora)
    if strategy == "library":
        y = F.linear(x, w.t(), bias)
        if dropout is None:
            return y.addmm_(h, b.to(x.dtype))
        add_lora(_config("expand", x, N, r, dropout), y, h, b, dropout=dropout)
        return y
    if strategy == "tma_split":
        config = config or _config("tma_second", x, N, r, dropout)
        return persistent_add_lora(config, x, w, h, b, bias=bias, dropout=dropout)
    if strategy == "ws_split":
        from .kernels.specialized import specialized_add_lora

        assert dropout is None, "its kernel draws no decisions"
        config = config or _config("ws_second", x, N, r, None)
        return specialized_add_lora(config, x, w, h, b, bias=bias, dora=dora)
    config = config or _config("second", x, N, r, dropout, dora is not None)
    return gemm_add_lora(config, x, w, h, b, bias=bias, dropout=dropout, dora=dora)


def forward(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    plan: Plan,
    *,
    need_h: bool,
    dora: ColumnScale | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and, if needed, h = scaling * (D o x) A^T [M, r], both in x's dtype."""
    return lora_gemm(
        x,
        _operand(weight).t(),
        lora_A.t(),
        lora_B.t(),
        bias,
        scaling,
        dropout,
        plan.strategy,
        plan.config,
        drop_x=True,
        need_h=need_h,
        dora=dora,
    )


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    plan: Plan,
    *,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB for g = dL/dy [M, N]: dA iff x is given, dB iff h is given."""
    r, K = lora_A.shape
    N = g.shape[1]
    dx = dh = dA = dB = None
    if need_dx:
        dx, dh = lora_gemm(
            g,
            _operand(weight),
            lora_B,
            lora_A,
            None,
            scaling,
            dropout,
            plan.strategy_dx,
            plan.config_dx,
            drop_x=False,
            need_h=x is not None,
        )
    elif x is not None:
        dh = gemm_scaled(_tile_of_h(g, r, None), g, lora_B, scale=scaling)
    of = len(g), N, K, r, g.dtype, dropout is not None, device_info(g.device)
    config = part_config("grads", *of)
    if x is not None and dh is not None and h is not None:
        dA, dB = lora_grads(
            config, x, dh, g, h, dtype_a=lora_A.dtype, dtype_b=lora_B.dtype, dropout=dropout
        )
    elif x is not None and dh is not None:
        dA = grad_lora_a(config, x, dh, dtype=lora_A.dtype, dropout=dropout)
    elif h is not None:
        dB = grad_lora_b(config, g, h, dtype=lora_B.dtype)
    return dx, dA, dB


def forward_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
    plans: Sequence[Plan],
) -> tuple[list[Tensor], Tensor]:
    """Every y_i [M, N_i], and the h_i = scaling_i * (D_i o x) A_i^T side by side [M, sum r_i]."""
    ranks = [A.shape[0] for A in lora_As]
    h = x.new_empty((x.shape[0], sum(ranks)))
    hs = h.split_with_sizes(ranks, dim=1)
    if any(dropouts) or len(set(scalings)) > 1:
        for A, scale, dropout, h_i in zip(lora_As, scalings, dropouts, hs, strict=True):
            config = _tile_of_h(x, len(A), dropout)
            gemm_scaled(config, x, A.t(), scale=scale, dropout=dropout, out=h_i)
    else:
        config = _tile_of_h(x, h.shape[1], None)
        gemm_scaled(config, x, stack_rows(lora_As, x.dtype).t(), scale=scalings[0], out=h)
    ys = []
    members = zip(weights, lora_As, lora_Bs, biases, hs, plans, strict=True)
    for weight, A, B, bias, h_i, plan in members:
        w = (_operand(weight) if plan.strategy == "in_loop" else _values(weight, x.dtype)).t()
        way = plan.strategy, plan.config
        if isinstance(w, Tensor):
            way = runs_as(*way, x, w, A.t())
        ys.append(_add_lora(x, w, h_i, B.t(), bias, None, *way))
        del w  # a scratch, before the next one is there
    return ys, h


def _group_dx(
    gs: Sequence[Tensor],
    weights: Sequence[Weight],
    dh: Tensor,
    dhs: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    dropouts: Sequence[Dropout | None],
    plans: Sequence[Plan],
) -> Tensor:
    """dx [M, K] = sum_i g_i W0_i + D_i o (dh_i A_i); dh has all dh_i side by side.

    "library" rounds it to dx's dtype once for every member.
    """
    dtype, K = dh.dtype, lora_As[0].shape[1]
    way = group_dx(plans, gs, weights, dh.device)
    if way == "split":
        dropout = next(filter(None, dropouts), None)
        config = _config("group", dh, K, max(map(len, lora_As)), dropout)
        return gemm_group(config, gs, [_values(W, dtype) for W in weights], dhs, lora_As, dropouts)
    masked = any(dropouts)
    A = None if masked else stack_rows(lora_As, dtype)
    if way == "ws_split":
        from .kernels.specialized import specialized_group

        config = _config("ws_group", dh, K, dh.shape[1], None)
        values = [_values(W, dtype) for W in weights]
        dx = specialized_group(config, gs, values, None if masked else dh, A)
    else:
        dx = gs[0] @ _values(weights[0], dtype) if A is None else dh @ A
        first = 1 if A is None else 0
        for g, weight in zip(gs[first:], weights[first:], strict=True):
            dx.addmm_(g, _values(weight, dtype))
    if masked:
        dropout = next(filter(None, dropouts))
        config = _config("expand_group", dh, K, max(map(len, lora_As)), dropout)
        add_group(config, dx, dhs, lora_As, dropouts)
    return dx


def backward_group(
    gs: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
    plans: Sequence[Plan],
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
        gemm_scaled(_tile_of_h(g, r, None), g, B, scale=scale, out=dh_i)
    if need_dx:
        dx = _group_dx(gs, weights, dh, dhs, lora_As, dropouts, plans)
    if x is not None and not any(dropouts):
        # Of one dtype nothing is asked: torch.promote_types is an operator.
        dtype = functools.reduce(torch.promote_types, {A.dtype for A in lora_As})
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

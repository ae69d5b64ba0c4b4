"""The kernel path: which launches a strategy is made of.

Same contract as torch_backend. The input gradient is the forward with x -> g, W0^T -> W0,
A^T -> B, B^T -> A, and its by-product is dh.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dispatch import Plan
from .kernels.configs import Kind, TileConfig, choose_config, tma_obstacle
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.gemm import gemm_add_lora, gemm_one_pass, gemm_scaled
from .kernels.grads import grad_lora_a, grad_lora_b, lora_grads
from .kernels.persistent import persistent_add_lora, persistent_one_pass, persistent_produced
from .kernels.skinny import skinny
from .tables import Strategy

# What a strategy that reads through tensor descriptors becomes where a tensor cannot have one.
WITHOUT_TMA: dict[Strategy, Strategy] = {
    "tma_one_pass": "one_pass",
    "tma_split": "split",
    "one_launch": "split",
}


def _config(kind: Kind, x: Tensor, N: int, r: int, dropout: Dropout | None) -> TileConfig:
    device = device_info(x.device)
    return choose_config(kind, x.shape[0], N, r, x.dtype.itemsize, dropout is not None, device)


def lora_gemm(
    x: Tensor,
    w: Tensor,
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
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] = x w + h b + bias and, if needed, h [M, r] = scaling * x a, both in x's dtype.

    Dropout is on x in h (``drop_x``: the forward) or on h b (the input gradient). ``config``: of
    the launch that makes y; None is `choose_config`'s. "library" is cuBLAS's product with our h; it
    cannot drop h b, which falls to "split".
    """
    r, N = b.shape
    if strategy in WITHOUT_TMA and tma_obstacle(x, w, None if strategy == "tma_split" else a):
        strategy, config = WITHOUT_TMA[strategy], None
    on_x, on_y = (dropout, None) if drop_x else (None, dropout)
    if strategy == "one_pass":
        config = config or _config("one_pass", x, N, r, dropout)
        return gemm_one_pass(config, x, w, a, b, bias=bias, scale=scaling, store_h=need_h)
    if strategy == "tma_one_pass":
        config = config or _config("tma_one_pass", x, N, r, dropout)
        return persistent_one_pass(config, x, w, a, b, bias=bias, scale=scaling, store_h=need_h)
    if strategy == "one_launch":
        config = config or _config("tma_produced", x, N, r, on_y)
        return persistent_produced(
            config, x, w, a, b, bias=bias, scale=scaling, dropout=dropout, drop_x=drop_x
        )
    if strategy == "skinny":
        config = config or _config("skinny", x, N, r, None)
        return skinny(config, x, w, a, b, bias=bias, scale=scaling, dropout=dropout, drop_x=drop_x)
    h = gemm_scaled(_config("plain", x, r, r, on_x), x, a, scale=scaling, dropout=on_x)
    if strategy == "library" and on_y is None:
        return F.linear(x, w.t(), bias).addmm_(h, b.to(x.dtype)), h
    if strategy == "tma_split":
        config = config or _config("tma_second", x, N, r, on_y)
        return persistent_add_lora(config, x, w, h, b, bias=bias, dropout=on_y), h
    config = config or _config("second", x, N, r, on_y)
    return gemm_add_lora(config, x, w, h, b, bias=bias, dropout=on_y), h


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    plan: Plan,
    *,
    need_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and, if needed, h = scaling * (D o x) A^T [M, r], both in x's dtype."""
    return lora_gemm(
        x,
        weight.t(),
        lora_A.t(),
        lora_B.t(),
        bias,
        scaling,
        dropout,
        plan.strategy,
        plan.config,
        drop_x=True,
        need_h=need_h,
    )


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
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
            weight,
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
        dh = gemm_scaled(_config("plain", g, r, r, None), g, lora_B, scale=scaling)
    config = _config("grad", g, max(K, N), r, dropout)
    if x is not None and dh is not None and h is not None:
        dA, dB = lora_grads(
            config, x, dh, g, h, dtype_a=lora_A.dtype, dtype_b=lora_B.dtype, dropout=dropout
        )
    elif x is not None and dh is not None:
        dA = grad_lora_a(config, x, dh, dtype=lora_A.dtype, dropout=dropout)
    elif h is not None:
        dB = grad_lora_b(config, g, h, dtype=lora_B.dtype)
    return dx, dA, dB

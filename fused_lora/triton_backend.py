"""The kernel path: which launches a strategy is made of.

Same contract as torch_backend. The input gradient is the forward with x -> g, W0^T -> W0,
A^T -> B, B^T -> A, and its by-product is dh.
"""

from __future__ import annotations

from torch import Tensor

from .dispatch import Strategy
from .kernels.configs import Kind, TileConfig, choose_config
from .kernels.device import device_info
from .kernels.dropout import Dropout
from .kernels.gemm import ColumnScale, gemm_add_lora, gemm_one_pass, gemm_scaled
from .kernels.grads import grad_lora_a, grad_lora_b


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

"""The PyTorch path: for CPUs and for what the kernels cannot take. Strategy "library".

Same contract as triton_backend: 2-D x and g, saved h already scaled, nothing overwritten but its
own outputs, and no [M, N] temporary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.dropout import Dropout
from .reference import keep_mask


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h = scaling * (D o x) A^T [M, r], both in x's dtype."""
    # h first, so that the dropped x is gone before y is there.
    if dropout is None:
        h = F.linear(x, lora_A.to(x.dtype))
    else:
        h = F.linear(x * keep_mask(*dropout, *x.shape), lora_A.to(x.dtype))
        scaling *= dropout.keep_scale
    h *= scaling
    y = F.linear(x, weight, bias)
    return y.addmm_(h, lora_B.to(x.dtype).t()), h


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    *,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB for g = dL/dy [M, N]: dA iff x is given, dB iff h is given."""
    dx = dA = None
    dB = (g.t() @ h).to(lora_B.dtype) if h is not None else None
    if not need_dx and x is None:
        return dx, dA, dB
    keep_scale = 1.0
    keep: Tensor | None = None
    if dropout is not None:
        keep = keep_mask(*dropout, g.shape[0], lora_A.shape[1])
        keep_scale = dropout.keep_scale
    # The one scale of dA and of the adapter's part of dx is put on dh, the smallest of them.
    dh = g @ lora_B.to(g.dtype)  # [M, r]
    dh *= scaling * keep_scale
    if x is not None:  # before dx, so that the dropped x is gone before dx is there
        dA = (dh.t() @ (x if keep is None else x * keep)).to(lora_A.dtype)
    if need_dx:
        dx = dh @ lora_A.to(g.dtype)
        if keep is not None:
            dx *= keep
        dx.addmm_(g, weight)
    return dx, dA, dB


# Elements of W0 + scaling * B A, and of g o z, that are there in fp32 at a time: 16 MB.
_CHUNK = 1 << 22


@torch.no_grad()
def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W0 + scaling * B A|| of each row, [N], in fp32 or better; some rows at a time."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    K = weight.shape[1]
    rows = max(1, _CHUNK // max(K, 1))
    norms = [
        torch.linalg.vector_norm(
            weight[n : n + rows].to(dtype) + scaling * (B[n : n + rows] @ A), dim=1
        )
        for n in range(0, len(weight), rows)
    ]
    return torch.cat(norms) if norms else weight.new_empty(0, dtype=dtype)


def scale_columns(z: Tensor, column_scale: Tensor, bias: Tensor | None) -> Tensor:
    """c o z + bias [M, N] in z's dtype, rounded once."""
    y = torch.empty_like(z)
    if bias is None:
        return torch.mul(z, column_scale, out=y)
    return torch.addcmul(bias, z, column_scale, out=y)


def scale_columns_backward(
    g: Tensor, column_scale: Tensor, z: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """c o g in g's dtype and, if z is given, sum_m g o z [N] in c's."""
    gs = torch.mul(g, column_scale, out=torch.empty_like(g))
    if z is None:
        return gs, None
    dot = torch.zeros_like(column_scale)
    rows = max(1, _CHUNK // max(g.shape[1], 1))
    for m in range(0, len(g), rows):
        dot += (g[m : m + rows].to(dot.dtype) * z[m : m + rows].to(dot.dtype)).sum(0)
    return gs, dot

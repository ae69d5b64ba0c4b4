"""The PyTorch path: for CPUs and for what the kernels cannot take. Strategy "library".

Same contract as triton_backend: 2-D x and g, saved h already scaled, nothing overwritten but its
own outputs, and no [M, N] temporary; but for `composed`, which is for small x, and for DoRA's z.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.dropout import Dropout, keep_scale
from .products import addmm_, linear, mm, slices
from .quantized_weight import QuantizedWeight, Weight
from .reference import drawn_mask, fp8_activations, keep_mask


def base_product(x: Tensor, weight: Weight, bias: Tensor | None, expert: int = 0) -> Tensor:
    """x W0^T + bias [M, N]. A quantised W0 is there some rows at a time.

    ``expert``: which one's, of a stack in codes.
    """
    if isinstance(weight, Tensor):
        return linear(x, weight, bias)
    if weight.activations is not None:
        x = fp8_activations(x)
    N = weight.shape[-2]
    y = x.new_empty((x.shape[0], N))
    for rows, tile in weight.row_tiles(x.dtype, expert):
        if len(tile) == N:  # no copy of the only part
            return linear(x, tile, bias)
        y[:, rows] = linear(x, tile, None if bias is None else bias[rows])
        del tile  # before the next one is there
    return y


def add_base_dx(dx: Tensor, g: Tensor, weight: Weight, expert: int = 0) -> None:
    """dx += g W0 in place. A quantised W0 is there some columns at a time: each sum is whole."""
    if isinstance(weight, Tensor):
        addmm_(dx, g, weight)
        return
    for cols, tile in weight.column_tiles(g.dtype, expert):
        addmm_(dx[:, cols], g, tile)
        del tile


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of a mask that are there as such numbers at a time: 2 MB in fp32. Of all of them it takes
# 0.7 (bf16, 512 x 1536) to 2.9 (fp32) times as long into new memory, and about as long in place.
_MASKED = 1 << 19


def masked(t: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """t where keep [M, K] is True and 0 elsewhere; ``out`` may be t itself."""
    # Bits times 0 or 1: on a CPU a float times a bool takes 1 ns an element, this a tenth.
    bits = _BITS[t.itemsize]
    out = torch.empty_like(t) if out is None else out
    values, result = t.resolve_neg().view(bits), out.view(bits)
    if t.numel() <= _MASKED:
        torch.mul(values, keep.to(bits), out=result)
    else:
        for rows in slices(len(t), max(1, _MASKED // t.shape[1])):
            torch.mul(values[rows], keep[rows].to(bits), out=result[rows])
    return out


def forward(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h = scaling * (D o x) A^T [M, r], both in x's dtype."""
    # h first, so that the dropped x is gone before y is there.
    h = linear(_dropped(x, dropout), lora_A.to(x.dtype))
    if dropout is not None:
        scaling *= dropout.keep_scale
    h *= scaling
    y = base_product(x, weight, bias)
    return addmm_(y, h, lora_B.to(x.dtype).t()), h


@functools.lru_cache(maxsize=256)
def _is_exact(scaling: float, dtype: torch.dtype) -> bool:
    """Whether `add_` and `addmm_` can have it as alpha. They refuse inf.

    They round it to their tensors' dtype: 1.3 would be 1.297 in bf16; rounded to fp32, as in the
    kernels, it is exact enough. So powers of two, the usual ones, save the call that scales h, and
    in fp32 whatever is finite there.
    """
    rounded = torch.tensor(scaling, dtype=torch.float64, device="cpu").to(dtype).item()
    return rounded == scaling or (dtype == torch.float32 and math.isfinite(rounded))


def formula(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    """y [..., N] without dropout, for Inductor, which adds in its own passes what is added.

    The adapter's part is in A's and B's dtype, x's or a wider one.
    """
    y = F.linear(x, weight, bias)
    h = F.linear(x.to(lora_A.dtype), lora_A) * scaling
    return (y + F.linear(h, lora_B)).to(y.dtype)


_LARGE = 1 << 16  # elements


def composed(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    threshold: int,
) -> Tensor:
    """y [..., N], recorded by PyTorch's autograd operator by operator; the mask is saved.

    For small x on a CPU, where a node of our own takes longer than what it saves. The adapter's
    part is in the adapters' dtype, if that is the wider one, as in PEFT: to cast so few rows is
    less than to cast A and B (0.62 of the time at M 1, 576 x 576, fp32 over bf16; 0.98 at M 64,
    1024 x 4096).
    """
    rows, K = x.shape[:-1], x.shape[-1]
    x = x if x.ndim == 2 else x.reshape(rows.numel(), K)
    dtype = x.dtype
    if lora_A.dtype != dtype and not torch.is_autocast_enabled("cpu"):  # it would cast them back
        dtype = torch.promote_types(dtype, lora_A.dtype)
    # Casts to the same dtype would be two calls of 0.3 us; so would a view of y as itself.
    A = lora_A if lora_A.dtype == dtype else lora_A.to(dtype)
    B = lora_B if lora_B.dtype == dtype else lora_B.to(dtype)
    # Backward goes the other way round: what the adapter's part needs is gone before W0's dx.
    y = F.linear(x, weight, bias)
    if threshold:
        # The mask is saved: where it is large, in x's dtype. (0.98 of the time at 32 x 4096, bf16
        # under fp32 adapters, for one more call; 1.02 at 1 x 2048.)
        mask_dtype = x.dtype if x.numel() > _LARGE else dtype
        dropped = x * drawn_mask(threshold, x.shape[0], K, mask_dtype)
        scaling *= keep_scale(threshold)
    else:
        dropped = x
    if dropped.dtype != dtype:
        dropped = dropped.to(dtype)
    h = F.linear(dropped, A)
    if not _is_exact(scaling, dtype):
        h, scaling = h.mul_(scaling), 1.0
    if y.dtype == dtype and dtype.itemsize > 2:
        y.addmm_(h, B.t(), alpha=scaling)
    else:  # for so few rows oneDNN's addmm_ onto a y in bf16 costs more than an addition of its own
        y.add_(F.linear(h, B), alpha=scaling)
    return y if len(rows) == 1 else y.view(*rows, y.shape[1])


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Weight,
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
    dB = mm(g.t(), h).to(lora_B.dtype) if h is not None else None
    if not need_dx and x is None:
        return dx, dA, dB
    keep: Tensor | None = None
    if dropout is not None:
        keep = keep_mask(*dropout, g.shape[0], lora_A.shape[1])
        scaling *= dropout.keep_scale
    # The one scale of dA and of the adapter's part of dx is put on dh, the smallest of them.
    dh = mm(g, lora_B.to(g.dtype))  # [M, r]
    dh *= scaling
    if x is not None:  # before dx, so that the dropped x is gone before dx is there
        dA = mm(dh.t(), x if keep is None else masked(x, keep)).to(lora_A.dtype)
    if need_dx and keep is None and isinstance(weight, Tensor):
        # The small product onto the large one: the other way round bf16 took 7 % longer on a CPU.
        dx = addmm_(mm(g, weight), dh, lora_A.to(g.dtype))
    elif need_dx:
        dx = mm(dh, lora_A.to(g.dtype))
        if keep is not None:
            masked(dx, keep, out=dx)
        add_base_dx(dx, g, weight)
    return dx, dA, dB


_APPROXIMATE = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}  # PyTorch's names


def activated(gate: Tensor, activation: str) -> Tensor:
    """act(gate)."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate=_APPROXIMATE[activation])


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) o up, recorded by PyTorch's autograd where that is on."""
    acted = activated(gate, activation)
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return acted * up
    return acted.mul_(up)


# Elements of act(gate)'s gradient that are there at a time: of an eighth of them each part takes
# longer to start than to compute, of all of them it takes 0.9 of the time.
_GATED_CHUNK = 1 << 18


def gated_backward(
    dx: Tensor,
    gate: Tensor,
    up: Tensor,
    acted: Tensor,
    activation: str,
    dgate: Tensor,
    dup: Tensor,
) -> None:
    """The gradients of gate and up [M, K] for dx, whose memory dgate may have."""
    aten: Any = torch.ops.aten
    for rows in slices(len(dx), max(1, _GATED_CHUNK // max(1, dx.shape[1]))):
        e, d = gate[rows], dx[rows]
        torch.mul(d, acted[rows], out=dup[rows])
        dact = d * up[rows]
        if activation == "silu":
            aten.silu_backward.grad_input(dact, e, grad_input=dgate[rows])
        else:
            how = _APPROXIMATE[activation]
            aten.gelu_backward.grad_input(dact, e, approximate=how, grad_input=dgate[rows])


# Elements of W0 + scaling * B A, and of g o z, that are there in fp32 at a time: 16 MB.
_CHUNK = 1 << 22


@torch.no_grad()
def weight_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W0 + scaling * B A|| of each row, [N], in fp32 or better; some rows at a time."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    tiles = weight.row_tiles(dtype) if isinstance(weight, QuantizedWeight) else _row_tiles(weight)
    norms = []
    for rows, tile in tiles:
        norms.append(torch.linalg.vector_norm(tile.to(dtype) + scaling * (B[rows] @ A), dim=1))
        del tile  # before the next one is there
    return torch.cat(norms) if norms else A.new_empty(0)


def _row_tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    N, K = weight.shape
    step = max(1, _CHUNK // max(K, 1))
    for rows in slices(N, step):
        yield rows, weight[rows]


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
    for part in slices(len(g), rows):
        dot += (g[part].to(dot.dtype) * z[part].to(dot.dtype)).sum(0)
    return gs, dot


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """D o x without its scale."""
    if dropout is None:
        return x
    return masked(x, keep_mask(*dropout, *x.shape))


def forward_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
) -> tuple[list[Tensor], Tensor]:
    """Every y_i [M, N_i], and the h_i = scaling_i * (D_i o x) A_i^T side by side [M, sum r_i]."""
    ranks = [A.shape[0] for A in lora_As]
    As = [A.to(x.dtype) for A in lora_As]
    if any(dropouts):
        h = x.new_empty((x.shape[0], sum(ranks)))
        for A, dropout, h_i in zip(As, dropouts, h.split_with_sizes(ranks, dim=1), strict=True):
            mm(_dropped(x, dropout), A.t(), out=h_i)
    else:
        h = linear(x, torch.cat(As))
    ys = []
    for i, h_i in enumerate(h.split_with_sizes(ranks, dim=1)):
        dropout = dropouts[i]
        h_i *= scalings[i] * (dropout.keep_scale if dropout else 1.0)
        y = base_product(x, weights[i], biases[i])
        ys.append(addmm_(y, h_i, lora_Bs[i].to(x.dtype).t()))
    return ys, h


def backward_group(
    gs: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
    *,
    need_dx: bool,
) -> tuple[Tensor | None, Sequence[Tensor | None], list[Tensor | None]]:
    """dx, dA_i and dB_i for g_i = dL/dy_i [M, N_i]: dA_i iff x is given, dB_i iff h_i is."""
    dBs = [
        None if h is None else mm(g.t(), h).to(B.dtype)
        for g, h, B in zip(gs, hs, lora_Bs, strict=True)
    ]
    dAs: Sequence[Tensor | None] = [None] * len(gs)
    if not need_dx and x is None:
        return None, dAs, dBs
    ranks = [A.shape[0] for A in lora_As]
    dh = gs[0].new_empty((gs[0].shape[0], sum(ranks)))
    dhs = dh.split_with_sizes(ranks, dim=1)
    for g, B, scale, dropout, dh_i in zip(gs, lora_Bs, scalings, dropouts, dhs, strict=True):
        mm(g, B.to(g.dtype), out=dh_i)
        dh_i *= scale * (dropout.keep_scale if dropout else 1.0)
    dx: Tensor | None = None
    if need_dx:
        dx = _adapters_dx(dh, dhs, [A.to(dh.dtype) for A in lora_As], dropouts)
        for g, weight in zip(gs, weights, strict=True):
            add_base_dx(dx, g, weight)
    if x is not None and any(dropouts):
        dAs = [
            mm(dh_i.t(), _dropped(x, dropout)).to(A.dtype)
            for dh_i, dropout, A in zip(dhs, dropouts, lora_As, strict=True)
        ]
    elif x is not None:
        parts = mm(dh.t(), x).split_with_sizes(ranks)
        dAs = [part.to(A.dtype) for part, A in zip(parts, lora_As, strict=True)]
    return dx, dAs, dBs


def _adapters_dx(
    dh: Tensor, dhs: Sequence[Tensor], As: Sequence[Tensor], dropouts: Sequence[Dropout | None]
) -> Tensor:
    """sum_i D_i o (dh_i A_i): one product where no mask has to come between."""
    if not any(dropouts):
        return mm(dh, torch.cat(tuple(As)))
    dx: Tensor | None = None
    for dh_i, A, dropout in zip(dhs, As, dropouts, strict=True):
        part = _dropped(mm(dh_i, A), dropout)
        dx = part if dx is None else dx.add_(part)
    assert dx is not None
    return dx

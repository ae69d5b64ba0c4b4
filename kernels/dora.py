"""DoRA's own kernels: the norms of W0 + scale * B A, and the backward of the column scale.

    norm[n] = ||W0[n, :] + scale * (B A)[n, :]||_2      W0 [N, K], A [R, K], B [N, R]; inf for 0
    gs = c o g,  dot[n] = sum_m g[m, n] z[m, n]         g, z [M, N], c [N]

The norm adds B A to a tile of W0 in registers: W0 + scale * B A is never in memory. Expanding the
square (||W0||^2 + 2 scale rowsum(W0 A^T o B) + ...) reads W0 and multiplies as much, and loses half
of the digits where the adapter cancels W0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import device_guard, device_info
from .grads import rows_in_split, sum_partials
from .launch import Launcher
from .quantized import QuantizedMatrix, load_weight
from .sizes import MIN_DOT, cdiv, padded
from .tile_config import FP_FUSION

# Both are bound by memory. The norm's products are exact (FMA): few rows, so that many programs
# share them; the columns' tile is one of plain loads.
_NORM = {"BLOCK_N": MIN_DOT, "BLOCK_K": 64, "num_warps": 4} | FP_FUSION
_COLUMNS = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4} | FP_FUSION
_MAX_BLOCK_R = 32  # 64 spills on sm_80


@triton.jit(do_not_specialize=["scale"])
def weight_norm_kernel(
    w_ptr,
    w_tables,  # None, or a QuantizedMatrix's tables: then w_ptr is its codes
    a_ptr,
    b_ptr,
    norm_ptr,
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    W_LAYOUT: tl.constexpr = None,  # a QuantizedMatrix's layout
):
    scale = tl.cast(scale, tl.float32)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_n.to(tl.int64)[:, None]
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    in_n = (offs_n < N)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = (k + offs_k < K)[None, :]
        cols = (k + offs_k).to(tl.int64)[None, :]
        delta = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r in range(0, R, BLOCK_R):
            in_r = r + offs_r < R
            ranks = (r + offs_r).to(tl.int64)
            b_ptrs = b_ptr + rows * stride_bn + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=in_n & in_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
            a_ptrs = a_ptr + ranks[:, None] * stride_ar + cols * stride_ak
            a = tl.load(a_ptrs, mask=in_r[:, None] & in_k, other=0.0)  # [BLOCK_R, BLOCK_K]
            delta = tl.dot(b.to(tl.float32), a.to(tl.float32), delta, input_precision="ieee")
        if W_LAYOUT is None:
            w_ptrs = w_ptr + rows * stride_wn + cols * stride_wk
            w = tl.load(w_ptrs, mask=in_n & in_k, other=0.0)  # [BLOCK_N, BLOCK_K]
        else:
            w = load_weight(
                w_ptr,
                w_tables,
                tl.program_id(0) * BLOCK_N,
                k,
                N,
                K,
                BLOCK_N,
                BLOCK_K,
                W_LAYOUT[0],
                W_LAYOUT[1],
            )
            w = tl.where(in_k, w, 0.0)
        v = w.to(tl.float32) + scale * delta
        acc += v * v
    norm = tl.sqrt_rn(tl.sum(acc, axis=1))
    norm = tl.where(norm == 0.0, float("inf"), norm)
    tl.store(norm_ptr + offs_n.to(tl.int64), norm, mask=offs_n < N)


_launch_norm = Launcher(weight_norm_kernel)


def weight_norm(
    weight: torch.Tensor | QuantizedMatrix, a: torch.Tensor, b: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """||weight + scale * b a|| of each row, fp32 [N]; any strides, any floating dtypes.

    Rows of zeros have inf: what is divided by it is 0. ``weight`` [N, K] may be a
    `QuantizedMatrix`; its values count before they are rounded.
    """
    (N, K), R = weight.shape, a.shape[0]
    norm = torch.empty(N, dtype=torch.float32, device=a.device)
    if N == 0:
        return norm
    quantized = weight if isinstance(weight, QuantizedMatrix) else None
    with device_guard(a):
        _launch_norm(
            (cdiv(N, _NORM["BLOCK_N"]), 1, 1),
            (
                weight if quantized is None else quantized.code_bytes(),
                None if quantized is None else quantized.tables,
                a,
                b,
                norm,
            ),
            (
                N,
                K,
                R,
                *((0, 0) if isinstance(weight, QuantizedMatrix) else weight.stride()),
                *a.stride(),
                *b.stride(),
            ),
            (scale,),
            BLOCK_R=min(padded(R), _MAX_BLOCK_R),
            W_LAYOUT=None if quantized is None else quantized.layout,
            **_NORM,
        )
    return norm


@triton.jit
def scale_columns_kernel(
    g_ptr,
    z_ptr,
    col_scale_ptr,
    gs_ptr,
    dot_ptr,
    M,
    N,
    rows_per_split,
    stride_gm,
    stride_gn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_s = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = (offs_n < N)[None, :]
    cols = offs_n.to(tl.int64)[None, :]
    c = tl.load(col_scale_ptr + cols, mask=in_n, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = pid_s * rows_per_split
    for m in range(start, min(start + rows_per_split, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        mask = (offs_m < M)[:, None] & in_n
        g = tl.load(g_ptr + rows * stride_gm + cols * stride_gn, mask=mask, other=0.0)
        g = g.to(tl.float32)
        tl.store(gs_ptr + rows * N + cols, (g * c).to(gs_ptr.dtype.element_ty), mask=mask)
        if z_ptr is not None:
            acc += g * tl.load(z_ptr + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        dot = tl.sum(acc, axis=0)[None, :]
        tl.store(dot_ptr + pid_s.to(tl.int64) * N + cols, dot, mask=in_n)


_launch_scale_columns = Launcher(scale_columns_kernel)


def scale_columns_backward(
    g: torch.Tensor, column_scale: torch.Tensor, z: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """c o g [M, N] in g's dtype and, if z is given, sum_m g o z [N] in fp32.

    g [M, N] any strides, z [M, N] contiguous, column_scale [N] fp32. One pass over g and z; the
    sum's partials are added in a fixed order.
    """
    M, N = g.shape
    gs = torch.empty((M, N), dtype=g.dtype, device=g.device)
    if M == 0 or N == 0:
        return gs, None if z is None else column_scale.new_zeros(N)
    tiles = cdiv(N, _COLUMNS["BLOCK_N"])
    num_sms = device_info(g.device).num_sms
    # Eight programs on every multiprocessor: the loads in flight are what makes it fast.
    rows_per_split = rows_in_split(M, tiles, _COLUMNS["BLOCK_M"], 4 * num_sms)
    SPLIT_M = cdiv(M, rows_per_split)
    partial = None if z is None else column_scale.new_empty((SPLIT_M, N))
    with device_guard(g):
        _launch_scale_columns(
            (tiles, SPLIT_M, 1),
            (g, z, column_scale, gs, partial),
            (M, N, rows_per_split, *g.stride()),
            (),
            **_COLUMNS,
        )
        if partial is None:
            return gs, None
        dot = partial[0]
        if SPLIT_M > 1:
            dot = partial.new_empty(N)
            sum_partials(partial, dot, SPLIT_M)
    return gs, dot

"""The LoRA GEMM for a handful of rows (decoding): W streams past x once, split over K.

    y = x W + h B (+ bias)      x [M, K], W [K, N], h [M, R], B [R, N], y [M, N]
    h = scale * x A             A [K, R]

With M <= 64 the time is that of reading W, so what counts is that every multiprocessor has loads in
flight. The first kernel cuts K into ranges and writes each range's fp32 part of x [W A]; a program
has columns of W or columns of A. The second adds the parts in a fixed order, makes h of A's
columns, and adds h B. No atomics: the same result bit for bit in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import split_k
from .device import device_guard, device_info
from .dropout import Dropout, scale_and_threshold, seed_of
from .gemm import dot_precision
from .launch import Launcher
from .sizes import cdiv, padded
from .tile_config import FP_FUSION, TileConfig
from .tiles import keep_mask

SUM_BLOCK_N = 32  # columns of y in the second kernel: small, so that many programs share it


@triton.jit
def partial_tile(
    x_ptr,
    w_ptr,
    seed_ptr,
    first_col,
    first_k,
    last_k,
    M,
    N,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(D o x) w over first_k .. last_k, for BLOCK_N columns of w [K, N] from first_col on."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = first_col + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = offs_m.to(tl.int64)[:, None]
    cols = offs_n.to(tl.int64)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first_k, last_k, BLOCK_K):
        ks = (k + offs_k).to(tl.int64)
        in_k = offs_k < (BLOCK_K if EVEN_K else last_k - k)
        x_ptrs = x_ptr + rows * stride_xm + ks[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & in_k[None, :], other=0.0)
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, k, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        w_ptrs = w_ptr + ks[:, None] * stride_wk + cols * stride_wn
        w = tl.load(w_ptrs, mask=in_k[:, None] & (offs_n < N)[None, :], other=0.0)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["threshold"])
def skinny_partial_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    partial_ptr,  # [SPLIT_K, M, N + R]
    seed_ptr,
    M,
    N,
    K,
    R,
    k_per_split,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_ak,
    stride_ar,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_s = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_k = pid_s * k_per_split
    last_k = min(first_k + k_per_split, K)
    if tl.program_id(0) < tiles_n:
        col = tl.program_id(0) * BLOCK_N
        end = N
        acc = partial_tile(
            x_ptr, w_ptr, None, col, first_k, last_k, M, N, stride_xm, stride_xk,
            stride_wk, stride_wn, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        rank = (tl.program_id(0) - tiles_n) * BLOCK_N
        col = N + rank
        end = N + R
        acc = partial_tile(
            x_ptr, a_ptr, seed_ptr, rank, first_k, last_k, M, R, stride_xm, stride_xk,
            stride_ak, stride_ar, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = col + tl.arange(0, BLOCK_N)
    rows = pid_s.to(tl.int64) * M + offs_m
    partial_ptrs = partial_ptr + rows[:, None] * (N + R) + offs_c.to(tl.int64)[None, :]
    tl.store(partial_ptrs, acc, mask=(offs_m < M)[:, None] & (offs_c < end)[None, :])


@triton.jit
def sum_parts(
    partial_ptr, offs_m, offs_c, end, M, row_size, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns offs_c < end of the parts [SPLIT_K, M, row_size], added in order."""
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    mask = (offs_m < M)[:, None] & (offs_c < end)[None, :]
    for s in tl.static_range(SPLIT_K):  # unrolled: all loads are in flight together
        rows = tl.cast(M, tl.int64) * s + offs_m
        partial_ptrs = partial_ptr + rows[:, None] * row_size + offs_c.to(tl.int64)[None, :]
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
    return acc


@triton.jit(do_not_specialize=["scale", "keep_scale", "threshold"])
def skinny_sum_kernel(
    partial_ptr,
    bias_ptr,
    h_ptr,
    b_ptr,
    y_ptr,
    seed_ptr,
    M,
    N,
    R,
    stride_bias,
    stride_br,
    stride_bn,
    scale,
    keep_scale,
    threshold,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_n = tl.program_id(0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    scale = tl.cast(scale, tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_m.to(tl.int64)[:, None]
    cols = offs_n.to(tl.int64)[None, :]
    in_m = (offs_m < M)[:, None]
    in_n = (offs_n < N)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(0, R, CHUNK_R):
        offs_r = r + tl.arange(0, CHUNK_R)
        in_r = offs_r < R
        ranks = offs_r.to(tl.int64)
        h = sum_parts(partial_ptr, offs_m, N + offs_r, N + R, M, N + R, SPLIT_K, BLOCK_M, CHUNK_R)
        h = (h * scale).to(dtype)  # [BLOCK_M, CHUNK_R]
        if h_ptr is not None and pid_n == 0:
            tl.store(h_ptr + rows * R + ranks[None, :], h, mask=in_m & in_r[None, :])
        b_ptrs = b_ptr + ranks[:, None] * stride_br + cols * stride_bn
        b = tl.load(b_ptrs, mask=in_r[:, None] & in_n, other=0.0)  # [CHUNK_R, BLOCK_N]
        acc = tl.dot(h, b.to(dtype), acc, input_precision=PRECISION)
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * tl.cast(keep_scale, tl.float32), 0.0)
    acc += sum_parts(partial_ptr, offs_m, offs_n, N, M, N + R, SPLIT_K, BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + rows * N + cols, acc.to(dtype), mask=in_m & in_n)


_launch_partial, _launch_sum = Launcher(skinny_partial_kernel), Launcher(skinny_sum_kernel)


def skinny(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None = None,
    drop_x: bool = False,
    store_h: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y [M, N] = x w + h b + bias and, if ``store_h``, h [M, R] = scale * x a.

    x [M, K] has at most config.BLOCK_M rows.

    w [K, N], a [K, R], b [R, N], bias [N] or None: any strides; a and b in any floating dtype, the
    rest in x's. Dropout is on x in h (``drop_x``: the forward), or on h b (the input gradient).
    """
    (M, K), (R, N) = x.shape, b.shape
    assert M <= config.BLOCK_M
    y, h = x.new_empty(M, N), x.new_empty(M, R) if store_h else None
    if M == 0 or N == 0:
        return y, h
    if dropout and drop_x:
        scale *= dropout.keep_scale
    seed, (keep_scale, threshold) = seed_of(dropout), scale_and_threshold(dropout)
    tiles = cdiv(N, config.BLOCK_N) + cdiv(R, config.BLOCK_N)
    splits = split_k(config, N, K, R, device_info(x.device))
    k_per_split = cdiv(K, splits * config.BLOCK_K) * config.BLOCK_K  # whole tiles
    SPLIT_K = cdiv(K, k_per_split) if K else 1
    partial = torch.empty((SPLIT_K, M, N + R), dtype=torch.float32, device=x.device)
    precision = dot_precision(x.dtype)
    with device_guard(x):
        _launch_partial(
            (tiles, SPLIT_K, 1),
            (x, w, a, partial, seed if drop_x else None),
            (M, N, K, R, k_per_split, *x.stride(), *w.stride(), *a.stride()),
            (threshold,),
            EVEN_K=K % config.BLOCK_K == 0,
            PRECISION=precision,
            **config.meta(),
        )
        stride_bias = bias.stride(0) if bias is not None else 0
        _launch_sum(
            (cdiv(N, SUM_BLOCK_N), 1, 1),
            (partial, bias, h, b, y, None if drop_x else seed),
            (M, N, R, stride_bias, *b.stride()),
            (scale, keep_scale, threshold),
            SPLIT_K=SPLIT_K,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=SUM_BLOCK_N,
            CHUNK_R=min(padded(R), 64),
            PRECISION=precision,
            num_warps=config.num_warps,
            **FP_FUSION,
        )
    return y, h

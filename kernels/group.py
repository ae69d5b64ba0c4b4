"""Layers that share their input: their A's as one matrix, and the input gradient of all.

    y = sum_i x_i w_i + D_i o (h_i b_i)    x_i [M, K_i], w_i [K_i, N], h_i [M, R_i], b_i [R_i, N]

The backward pass puts x_i = g_i, w_i = W0_i, h_i = dh_i and b_i = A_i, and gets dx. The reduction
runs over the members in turn, in one fp32 accumulator: dx is written once, in one rounding, where
members on their own would write n gradients and read them again to add them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .alignment import for_odd_rows, is_odd
from .device import device_guard
from .dropout import Dropout, scale_and_threshold, seed_of
from .gemm import GROUP_M, dot_precision
from .launch import Launcher
from .sizes import ALIGNED, MIN_DOT, cdiv, padded
from .tile_config import FP_FUSION, TileConfig
from .tiles import add_product, grouped_tile, keep_mask, tile_places


@triton.jit
def stack_rows_kernel(out_ptr, a_ptrs, Rs, strides_a, K, BLOCK_K: tl.constexpr):
    row = tl.program_id(0)
    offs_k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    out_ptrs = out_ptr + row.to(tl.int64) * K + offs_k
    rows = row + tl.zeros([BLOCK_K], tl.int64)  # of matrix i, one and the same
    for i in tl.static_range(len(a_ptrs)):
        mask = (offs_k < K) & (rows >= 0) & (rows < Rs[i])
        ptrs = a_ptrs[i] + rows * strides_a[i][0] + offs_k * strides_a[i][1]
        a = tl.load(ptrs, mask=mask, other=0.0)
        tl.store(out_ptrs, a.to(out_ptr.dtype.element_ty), mask=mask)
        rows -= Rs[i]


_launch_stack = Launcher(stack_rows_kernel)
STACK_TILE = {"BLOCK_K": 1024, "num_warps": 4} | FP_FUSION


def stack_rows(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Matrices [R_i, K] one below the other, [sum R_i, K] in ``dtype``: a launch to be replayed."""
    K, ranks = matrices[0].shape[1], tuple(a.shape[0] for a in matrices)
    out = matrices[0].new_empty((sum(ranks), K), dtype=dtype)
    if out.numel():
        strides = tuple(a.stride() for a in matrices)
        with device_guard(out):
            _launch_stack(
                (sum(ranks), cdiv(K, STACK_TILE["BLOCK_K"]), 1),
                (out, tuple(matrices)),
                (ranks, strides, K),
                (),
                **STACK_TILE,
            )
    return out


@triton.jit
def adapters_sum(
    h_ptrs,
    b_ptrs,
    seed_ptrs,  # one a member: None where it has no dropout
    offs_m,
    rows,
    cols,
    in_m,
    in_n,
    first_col,
    Rs,
    stride_hm,  # the h_i are columns of one matrix
    strides_b,
    scales,
    thresholds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_i D_i o (h_i b_i) [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(h_ptrs)):
        part = add_product(
            acc if seed_ptrs[i] is None else tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
            h_ptrs[i],
            b_ptrs[i],
            rows,
            cols,
            in_m,
            in_n,
            Rs[i],
            stride_hm,
            1,
            strides_b[i][0],
            strides_b[i][1],
            BLOCK_R,
            False,
            PRECISION,
            NUM_STAGES=1,  # one step at most ranks: nothing to overlap
        )
        if seed_ptrs[i] is None:
            acc = part
        else:
            keep = keep_mask(
                tl.load(seed_ptrs[i]), thresholds[i], offs_m, first_col, BLOCK_M, BLOCK_N
            )
            acc += tl.where(keep, part * scales[i], 0.0)
    return acc


@triton.jit
def lora_group_kernel(
    y_ptr,
    x_ptrs,
    w_ptrs,
    h_ptrs,
    b_ptrs,
    seed_ptrs,
    M,
    N,
    Ks,
    Rs,
    strides_x,
    strides_w,
    stride_hm,
    strides_b,
    scales,
    thresholds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,  # every K_i is a whole number of BLOCK_K
    PRECISION: tl.constexpr,
):
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m, rows, cols, in_m, in_n = tile_places(pid_m, pid_n, M, N, BLOCK_M, BLOCK_N)

    acc = adapters_sum(
        h_ptrs,
        b_ptrs,
        seed_ptrs,
        offs_m,
        rows,
        cols,
        in_m,
        in_n,
        pid_n * BLOCK_N,
        Rs,
        stride_hm,
        strides_b,
        scales,
        thresholds,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        PRECISION,
    )
    for i in tl.static_range(len(x_ptrs)):
        acc = add_product(
            acc,
            x_ptrs[i],
            w_ptrs[i],
            rows,
            cols,
            in_m,
            in_n,
            Ks[i],
            strides_x[i][0],
            strides_x[i][1],
            strides_w[i][0],
            strides_w[i][1],
            BLOCK_K,
            EVEN_K,
            PRECISION,
        )
    tl.store(y_ptr + rows * N + cols, acc.to(y_ptr.dtype.element_ty), mask=in_m & in_n)


_launch_group = Launcher(lora_group_kernel)


@triton.jit
def add_group_kernel(
    y_ptr,
    h_ptrs,
    b_ptrs,
    seed_ptrs,
    M,
    N,
    Rs,
    stride_hm,
    strides_b,
    scales,
    thresholds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # ranks
    PRECISION: tl.constexpr,
):
    # As in expand.py.
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    offs_m, rows, cols, in_m, in_n = tile_places(pid_m, pid_n, M, N, BLOCK_M, BLOCK_N)

    y_ptrs = y_ptr + rows * N + cols
    y = tl.load(y_ptrs, mask=in_m & in_n, other=0.0)
    acc = adapters_sum(
        h_ptrs,
        b_ptrs,
        seed_ptrs,
        offs_m,
        rows,
        cols,
        in_m,
        in_n,
        pid_n * BLOCK_N,
        Rs,
        stride_hm,
        strides_b,
        scales,
        thresholds,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )
    tl.store(y_ptrs, (y.to(tl.float32) + acc).to(y.dtype), mask=in_m & in_n)


_launch_add_group = Launcher(add_group_kernel)


def _ranks_at_a_time(
    config: TileConfig, hs: Sequence[torch.Tensor], bs: Sequence[torch.Tensor]
) -> int:
    if any(h.shape[1] % ALIGNED for h in hs) or is_odd(*hs, *bs):  # as in gemm.py
        return MIN_DOT
    return min(padded(max(h.shape[1] for h in hs)), config.BLOCK_K)


def gemm_group(
    config: TileConfig,
    xs: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    hs: Sequence[torch.Tensor],
    bs: Sequence[torch.Tensor],
    dropouts: Sequence[Dropout | None],
) -> torch.Tensor:
    """y [M, N] = sum_i x_i w_i + D_i o (h_i b_i) in one launch, contiguous in x's dtype.

    x_i [M, K_i], w_i [K_i, N] and b_i [R_i, N]: any strides, b_i in any floating dtype; h_i
    [M, R_i] in x's dtype: all columns of one matrix, with rows that are contiguous.
    """
    M, N = xs[0].shape[0], ws[0].shape[1]
    y = torch.empty((M, N), dtype=xs[0].dtype, device=xs[0].device)
    if M == 0 or N == 0:
        return y
    BLOCK_R = _ranks_at_a_time(config, hs, bs)
    if is_odd(*xs, *ws, y):
        config = for_odd_rows(config, y.dtype.itemsize)
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    seeds = tuple(map(seed_of, dropouts))
    with device_guard(y):
        _launch_group(
            (tiles, 1, 1),
            (y, tuple(xs), tuple(ws), tuple(hs), tuple(bs), seeds),
            (
                M,
                N,
                tuple(x.shape[1] for x in xs),
                tuple(h.shape[1] for h in hs),
                tuple(x.stride() for x in xs),
                tuple(w.stride() for w in ws),
                hs[0].stride(0),
                tuple(b.stride() for b in bs),
                # Not among the numbers: what is in a tuple, Triton specialises by.
                *zip(*map(scale_and_threshold, dropouts), strict=True),
            ),
            (),
            BLOCK_R=BLOCK_R,
            GROUP_M=GROUP_M,
            EVEN_K=all(x.shape[1] % config.BLOCK_K == 0 for x in xs),
            PRECISION=dot_precision(y.dtype),
            **config.meta(),
        )
    return y


def add_group(
    config: TileConfig,
    y: torch.Tensor,
    hs: Sequence[torch.Tensor],
    bs: Sequence[torch.Tensor],
    dropouts: Sequence[Dropout | None],
) -> None:
    """y += sum_i D_i o (h_i b_i), in place and in one launch: y is read and written once.

    y [M, N]: contiguous. h_i [M, R_i] and b_i [R_i, N]: as for `gemm_group`.
    """
    M, N = y.shape
    if M == 0 or N == 0:
        return
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    meta = config.meta() | {"BLOCK_K": _ranks_at_a_time(config, hs, bs)}
    with device_guard(y):
        _launch_add_group(
            (tiles, 1, 1),
            (y, tuple(hs), tuple(bs), tuple(map(seed_of, dropouts))),
            (
                M,
                N,
                tuple(h.shape[1] for h in hs),
                hs[0].stride(0),
                tuple(b.stride() for b in bs),
                *zip(*map(scale_and_threshold, dropouts), strict=True),
            ),
            (),
            PRECISION=dot_precision(y.dtype),
            **meta,
        )

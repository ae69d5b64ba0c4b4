"""Adapter gradients: tall, skinny products reduced over the rows, with no atomics.

    out = scale * (D o q)^T l     q [M, C], l [M, R], out [C, R]

dB [N, R] = g^T h and dA^T [K, R] = (D o x)^T dh are both of this form. The M rows are cut into
SPLIT_M ranges; each program writes its fp32 partial, and a second kernel adds the partials in a
fixed order, so that the result is the same bit for bit in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import TileConfig
from .device import device_guard, device_info
from .dropout import Dropout
from .gemm import dot_precision
from .tiles import keep_mask

_REDUCE_BLOCK = 1024


@triton.jit(do_not_specialize=["scale", "threshold"])
def lora_grad_kernel(
    q_ptr,
    l_ptr,
    out_ptr,
    seed_ptr,
    M,
    C,
    R,
    rows_per_split,
    stride_qm,
    stride_qc,
    stride_lm,
    stride_os,
    stride_oc,
    stride_or,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,  # columns of q: rows of the output tile
    BLOCK_N: tl.constexpr,  # ranks: columns of the output tile
    BLOCK_K: tl.constexpr,  # rows of q and l: the reduction
    EVEN_K: tl.constexpr,  # every split is a whole number of BLOCK_K
    PRECISION: tl.constexpr,
):
    pid_c = tl.program_id(0)
    pid_r = tl.program_id(1)
    pid_s = tl.program_id(2)
    scale = tl.cast(scale, tl.float32)
    offs_c = pid_c * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_K)
    in_c = offs_c < C
    in_r = offs_r < R
    cols = offs_c.to(tl.int64)
    ranks = offs_r.to(tl.int64)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = pid_s * rows_per_split
    for m in range(start, min(start + rows_per_split, M), BLOCK_K):
        rows = (m + offs_m).to(tl.int64)
        in_m = offs_m < (BLOCK_K if EVEN_K else M - m)
        q_ptrs = q_ptr + rows[:, None] * stride_qm + cols[None, :] * stride_qc
        q = tl.load(q_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        if seed_ptr is not None:
            keep = keep_mask(
                tl.load(seed_ptr), threshold, m + offs_m, pid_c * BLOCK_M, BLOCK_K, BLOCK_M
            )
            q = tl.where(keep, q, 0.0)
        l_ptrs = l_ptr + rows[:, None] * stride_lm + ranks[None, :]
        l = tl.load(l_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(q), l, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + pid_s.to(tl.int64) * stride_os
    out_ptrs += cols[:, None] * stride_oc + ranks[None, :] * stride_or
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_c[:, None] & in_r[None, :])


@triton.jit
def sum_partials_kernel(partial_ptr, out_ptr, numel, SPLIT_M, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride_s = tl.cast(numel, tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for s in range(SPLIT_M):
        acc += tl.load(partial_ptr + s * stride_s + offs, mask=offs < numel, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < numel)


def rows_in_split(M: int, tiles: int, block: int, num_sms: int) -> int:
    """Enough ranges of rows for two programs on every multiprocessor, in whole blocks."""
    splits = max(1, min(triton.cdiv(2 * num_sms, tiles), triton.cdiv(M, block)))
    return triton.cdiv(triton.cdiv(M, splits), block) * block


def sum_partials(partial: torch.Tensor, out: torch.Tensor, SPLIT_M: int) -> None:
    """out = the sum of SPLIT_M fp32 tensors that lie one after another from ``partial`` on."""
    grid = (triton.cdiv(out.numel(), _REDUCE_BLOCK),)
    sum_partials_kernel[grid](partial, out, out.numel(), SPLIT_M, BLOCK=_REDUCE_BLOCK)


def _launch(
    config: TileConfig,
    q: torch.Tensor,
    l: torch.Tensor,
    out: torch.Tensor,  # [C, R] view of the gradient: its strides carry the transpose
    dropout: Dropout | None,
) -> None:
    (M, C), R = q.shape, l.shape[1]
    if M == 0:
        out.zero_()
        return
    if C == 0:
        return
    tiles_c, tiles_r = triton.cdiv(C, config.BLOCK_M), triton.cdiv(R, config.BLOCK_N)
    num_sms = device_info(q.device).num_sms
    rows_per_split = rows_in_split(M, tiles_c * tiles_r, config.BLOCK_K, num_sms)
    SPLIT_M = triton.cdiv(M, rows_per_split)
    # Partials in the gradient's own order, so that adding them is one flat pass over memory.
    partial = out
    if SPLIT_M > 1:
        flat = torch.empty((SPLIT_M, out.numel()), dtype=torch.float32, device=out.device)
        partial = flat[0].as_strided(out.shape, out.stride())
    with device_guard(q.device):
        lora_grad_kernel[(tiles_c, tiles_r, SPLIT_M)](
            q,
            l,
            partial,
            dropout.seed if dropout else None,
            M,
            C,
            R,
            rows_per_split,
            *q.stride(),
            l.stride(0),
            out.numel(),
            *out.stride(),
            dropout.keep_scale if dropout else 1.0,
            dropout.threshold if dropout else 0,
            EVEN_K=M % config.BLOCK_K == 0,
            PRECISION=dot_precision(q.dtype),
            **config.meta(),
        )
        if SPLIT_M > 1:
            sum_partials(partial, out, SPLIT_M)


def grad_lora_a(
    config: TileConfig,
    x: torch.Tensor,
    dh: torch.Tensor,
    *,
    dtype: torch.dtype,
    dropout: Dropout | None,
) -> torch.Tensor:
    """dA [R, K] = dh^T (D o x) in ``dtype``; x [M, K] any strides, dh's rows contiguous."""
    grad = torch.empty((dh.shape[1], x.shape[1]), dtype=dtype, device=x.device)
    _launch(config, x, dh, grad.t(), dropout)
    return grad


def grad_lora_b(
    config: TileConfig, g: torch.Tensor, h: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """dB [N, R] = g^T h in ``dtype``; g [M, N] any strides, h's rows contiguous."""
    grad = torch.empty((g.shape[1], h.shape[1]), dtype=dtype, device=g.device)
    _launch(config, g, h, grad, None)
    return grad

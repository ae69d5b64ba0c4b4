"""Adapter gradients: tall, skinny products reduced over the rows, with no atomics.

    out = scale * (D o q)^T l     q [M, C], l [M, R], out [C, R]

dB [N, R] = g^T h and dA^T [K, R] = (D o x)^T dh are both of this form. The M rows are cut into
SPLIT_M ranges; each program writes its fp32 partial, and a second kernel adds the partials in a
fixed order, so that the result is the same bit for bit in every run. Both gradients of a layer
share a launch: their tiles fill the GPU together, with half the parts and half the launches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .alignment import is_odd
from .device import device_guard, device_info
from .dropout import Dropout, scale_and_threshold, seed_of
from .gemm import dot_precision
from .launch import Launcher
from .sizes import cdiv
from .tile_config import FP_FUSION, TileConfig
from .tiles import keep_mask

REDUCE_BLOCK = 1024


@triton.jit
def grad_tile(
    q_ptr,
    l_ptr,
    out_ptr,
    seed_ptr,
    pid_c,
    pid_r,
    pid_s,
    M,
    C,
    R,
    rows_per_split,
    stride_qm,
    stride_qc,
    stride_lm,
    stride_oc,
    stride_or,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
    out_ptrs = out_ptr + cols[:, None] * stride_oc + ranks[None, :] * stride_or
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_c[:, None] & in_r[None, :])


@triton.jit(do_not_specialize=["scale", "threshold"])
def lora_grad_kernel(
    q_ptr,
    l_ptr,
    out_ptr,
    seed_ptr,
    q2_ptr,  # the second product of a launch; None if there is one
    l2_ptr,
    out2_ptr,
    M,
    C,
    C2,
    R,
    rows_per_split,
    stride_qm,
    stride_qc,
    stride_lm,
    stride_os,
    stride_oc,
    stride_or,
    stride_q2m,
    stride_q2c,
    stride_l2m,
    stride_o2s,
    stride_o2c,
    stride_o2r,
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
    split = pid_s.to(tl.int64)
    if q2_ptr is None or pid_c < tl.cdiv(C, BLOCK_M):
        grad_tile(
            q_ptr, l_ptr, out_ptr + split * stride_os, seed_ptr, pid_c, pid_r, pid_s,
            M, C, R, rows_per_split, stride_qm, stride_qc, stride_lm, stride_oc, stride_or, scale,
            threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        pid_c -= tl.cdiv(C, BLOCK_M)
        grad_tile(
            q2_ptr, l2_ptr, out2_ptr + split * stride_o2s, None, pid_c, pid_r, pid_s,
            M, C2, R, rows_per_split, stride_q2m, stride_q2c, stride_l2m, stride_o2c, stride_o2r,
            1.0, threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip


@triton.jit
def add_partials(partial_ptr, out_ptr, numel, SPLIT_M, block, BLOCK: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride_s = tl.cast(numel, tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for s in range(SPLIT_M):
        acc += tl.load(partial_ptr + s * stride_s + offs, mask=offs < numel, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < numel)


@triton.jit
def sum_partials_kernel(
    partial_ptr,
    out_ptr,
    partial2_ptr,
    out2_ptr,
    numel,
    numel2,
    SPLIT_M,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    if partial2_ptr is None or block < tl.cdiv(numel, BLOCK):
        add_partials(partial_ptr, out_ptr, numel, SPLIT_M, block, BLOCK)
    else:
        block -= tl.cdiv(numel, BLOCK)
        add_partials(partial2_ptr, out2_ptr, numel2, SPLIT_M, block, BLOCK)


_launch_grads, _launch_sum = Launcher(lora_grad_kernel), Launcher(sum_partials_kernel)


def rows_in_split(M: int, tiles: int, block: int, num_sms: int) -> int:
    """Enough ranges of rows for two programs on every multiprocessor, in whole blocks."""
    splits = max(1, min(cdiv(2 * num_sms, tiles), cdiv(M, block)))
    return cdiv(cdiv(M, splits), block) * block


def sum_partials(
    partial: torch.Tensor,
    out: torch.Tensor,
    SPLIT_M: int,
    partial2: torch.Tensor | None = None,
    out2: torch.Tensor | None = None,
) -> None:
    """out = the sum of SPLIT_M fp32 tensors that lie one after another from ``partial`` on.

    The same of the second pair, where there is one, in the same launch.
    """
    numel, numel2 = out.numel(), 0 if out2 is None else out2.numel()
    blocks = cdiv(numel, REDUCE_BLOCK) + cdiv(numel2, REDUCE_BLOCK)
    tensors = (partial, out, partial2, out2)
    sizes = (numel, numel2, SPLIT_M)
    _launch_sum((blocks, 1, 1), tensors, sizes, BLOCK=REDUCE_BLOCK, **FP_FUSION)


class _Product(NamedTuple):
    """out [C, R] = q^T l for q [M, C] and l [M, R]; out's strides carry a transpose."""

    q: torch.Tensor
    l: torch.Tensor
    out: torch.Tensor

    def partial(self, SPLIT_M: int) -> torch.Tensor:
        """Room for the parts in the output's own order, so that adding them is one flat pass."""
        if SPLIT_M == 1:
            return self.out
        shape = (SPLIT_M, self.out.numel())
        flat = torch.empty(shape, dtype=torch.float32, device=self.out.device)
        return flat[0].as_strided(self.out.shape, self.out.stride())


def _launch(
    config: TileConfig, first: _Product, second: _Product | None, dropout: Dropout | None
) -> None:
    """One launch for both products, and one to add their parts. Dropout is on the first's q."""
    (M, C), R = first.q.shape, first.l.shape[1]
    products = [p for p in (first, second) if p is not None and p.out.numel()]
    if M == 0:
        for p in products:
            p.out.zero_()
        return
    if len(products) < 2:
        if not products:
            return
        dropout = dropout if products[0] is first else None
        first, second = products[0], None
        C = first.q.shape[1]
    if is_odd(*(p.q for p in products)):
        # Larger tiles, 4 warps or fewer registers spill; see `for_odd_rows`.
        config = replace(
            config,
            BLOCK_M=min(config.BLOCK_M, 64),
            BLOCK_K=min(config.BLOCK_K, 64),
            num_warps=8,
            maxnreg=config.maxnreg and 168,
        )
    tiles_c = cdiv(C, config.BLOCK_M)
    if second is not None:
        tiles_c += cdiv(second.q.shape[1], config.BLOCK_M)
    tiles_r = cdiv(R, config.BLOCK_N)
    num_sms = device_info(first.q.device).num_sms
    rows_per_split = rows_in_split(M, tiles_c * tiles_r, config.BLOCK_K, num_sms)
    SPLIT_M = cdiv(M, rows_per_split)
    partial = first.partial(SPLIT_M)
    partial2 = second.partial(SPLIT_M) if second is not None else None
    with device_guard(first.q):
        _launch_grads(
            (tiles_c, tiles_r, SPLIT_M),
            (
                first.q,
                first.l,
                partial,
                seed_of(dropout),
                second.q if second is not None else None,
                second.l if second is not None else None,
                partial2,
            ),
            (
                M,
                C,
                second.q.shape[1] if second is not None else 0,
                R,
                rows_per_split,
                *first.q.stride(),
                first.l.stride(0),
                first.out.numel(),
                *first.out.stride(),
                *(second.q.stride() if second is not None else (0, 0)),
                second.l.stride(0) if second is not None else 0,
                second.out.numel() if second is not None else 0,
                *(second.out.stride() if second is not None else (0, 0)),
            ),
            scale_and_threshold(dropout),
            EVEN_K=M % config.BLOCK_K == 0,
            PRECISION=dot_precision(first.q.dtype),
            **config.meta(),
        )
        if SPLIT_M > 1:
            out2 = second.out if second is not None else None
            sum_partials(partial, first.out, SPLIT_M, partial2, out2)


def lora_grads(
    config: TileConfig,
    x: torch.Tensor,
    dh: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor,
    *,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA and dB of `grad_lora_a` and `grad_lora_b` in one launch, and one more to add the parts."""
    dA = torch.empty((dh.shape[1], x.shape[1]), dtype=dtype_a, device=x.device)
    dB = torch.empty((g.shape[1], h.shape[1]), dtype=dtype_b, device=g.device)
    _launch(config, _Product(x, dh, dA.t()), _Product(g, h, dB), dropout)
    return dA, dB


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
    _launch(config, _Product(x, dh, grad.t()), None, dropout)
    return grad


def grad_lora_b(
    config: TileConfig, g: torch.Tensor, h: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """dB [N, R] = g^T h in ``dtype``; g [M, N] any strides, h's rows contiguous."""
    grad = torch.empty((g.shape[1], h.shape[1]), dtype=dtype, device=g.device)
    _launch(config, _Product(g, h, grad), None, None)
    return grad

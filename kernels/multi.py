"""Products with each row's own adapter: h, its expansion onto y in place, and the gradients.

    shrink   h = scaling_i * (D o x) A_i^T       forward; backward: dh = scaling_i * g B_i
    expand   y += D o (h B_i^T)                  forward; backward: dx += D o (dh A_i)
    grads    dA_i = dh^T (D o x), dB_i = g^T h   over the rows of adapter i

h and dh are [M, max r]: their rows are positions (see rows.py), and columns beyond a row's own
rank are neither written nor read. A program has one piece, and thereby one adapter.

Two ways lead to y. Expansion reads and writes y once more: 2 M N elements, nothing for a decoding
step (4 MB at M = 256, N = 4096: 1 us on an H100) and a tenth of the GEMM at M = 8192. Its pieces
run side by side, where a GEMM tile has to multiply by the adapters of its rows in turn, up to
BLOCK_M of them. So: few rows for each adapter, expansion; else `gemm_add_multi`, whose adapter part
is r / K of the GEMM a piece. (These are an H100's numbers by its data sheet, not measurements.)
Shrinking for a decoding step is split over K, to have loads in flight on every multiprocessor; the
parts are added in a fixed order by `expand`. No atomics anywhere.

(Punica's SGMV and BGMV, https://arxiv.org/abs/2310.18547, are the models for shrink and expand.)

With a stack of experts' adapters (table_ptr None; see experts.py), x may have a row for FAN rows of
the order: each token's, for as many experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .alignment import for_odd_rows, is_odd
from .device import device_guard, device_info
from .dropout import Dropout, scale_and_threshold, seed_of
from .gemm import dot_precision
from .launch import Launcher
from .pieces import load_adapter, load_piece, load_rank, rows_at
from .rows import Adapters, AdapterTable, RowGroups
from .sizes import ALIGNED, cdiv, padded
from .tile_config import FP_FUSION, TileConfig
from .tiles import keep_mask

MAX_SPLIT_K = 16
_REDUCE_BLOCK = 1024


@triton.jit(do_not_specialize=["scale", "threshold"])
def shrink_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    order_ptr,
    pieces_ptr,
    table_ptr,
    scalings_ptr,
    seed_ptr,
    K,
    k_per_split,
    R,
    stride_xm,
    stride_xk,
    stride_hs,
    stride_hm,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # ranks
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # every split is a whole number of BLOCK_K
    PRECISION: tl.constexpr,
    USE_A: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    FAN: tl.constexpr,
):
    adapter, first, last = load_piece(pieces_ptr, tl.program_id(0))
    first_rank = tl.program_id(1) * BLOCK_N
    pid_s = tl.program_id(2)
    if adapter < 0 or first >= last:
        return
    w_ptr, rank, stride_wr, stride_wk = load_adapter(
        table_ptr, w_ptr, adapter, R, K, USE_A, ALIGNED, RANK_DIVISOR
    )
    if first_rank >= rank:
        return
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    positions = first + tl.arange(0, BLOCK_M)
    in_m = positions < last
    offs_m = rows_at(order_ptr, positions, in_m) // FAN
    offs_r = first_rank + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_r = offs_r < rank
    rows = offs_m.to(tl.int64)[:, None]
    ranks = offs_r.to(tl.int64)[None, :]

    first_k = pid_s * k_per_split
    last_k = min(first_k + k_per_split, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first_k, last_k, BLOCK_K):
        ks = (k + offs_k).to(tl.int64)
        in_k = offs_k < (BLOCK_K if EVEN_K else last_k - k)
        x_ptrs = x_ptr + rows * stride_xm + ks[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, k, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        w_ptrs = w_ptr + ks[:, None] * stride_wk + ranks * stride_wr
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w.to(dtype), acc, input_precision=PRECISION)
    acc *= tl.cast(scale, tl.float32)
    if scalings_ptr is not None:
        acc *= tl.load(scalings_ptr + adapter)
    h_ptrs = h_ptr + pid_s.to(tl.int64) * stride_hs
    h_ptrs += positions.to(tl.int64)[:, None] * stride_hm + ranks
    tl.store(h_ptrs, acc.to(h_ptr.dtype.element_ty), mask=in_m[:, None] & in_r[None, :])


@triton.jit(do_not_specialize=["scale", "threshold"])
def expand_kernel(
    h_ptr,
    w_ptr,
    y_ptr,
    h_sum_ptr,
    order_ptr,
    pieces_ptr,
    table_ptr,
    seed_ptr,
    N,
    SPLIT_K,
    stride_hs,
    stride_hm,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # ranks
    PRECISION: tl.constexpr,
    USE_A: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
):
    adapter, first, last = load_piece(pieces_ptr, tl.program_id(0))
    pid_n = tl.program_id(1)
    if adapter < 0 or first >= last:
        return
    w_ptr, rank, stride_wr, stride_wn = load_adapter(
        table_ptr, w_ptr, adapter, 0, N, USE_A, ALIGNED, RANK_DIVISOR
    )
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    positions = first + tl.arange(0, BLOCK_M)
    in_m = positions < last
    offs_m = rows_at(order_ptr, positions, in_m)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_K)
    in_n = offs_n < N
    cols = offs_n.to(tl.int64)[None, :]
    h_rows = positions.to(tl.int64)[:, None] * stride_hm

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(0, rank, BLOCK_K):
        ranks = (r + offs_r).to(tl.int64)
        in_r = r + offs_r < rank
        in_h = in_m[:, None] & in_r[None, :]
        parts = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        h_ptrs = h_ptr + h_rows + ranks[None, :]
        for _ in range(SPLIT_K):
            parts += tl.load(h_ptrs, mask=in_h, other=0.0)
            h_ptrs += tl.cast(stride_hs, tl.int64)
        h = parts.to(dtype)  # [BLOCK_M, BLOCK_K]
        if h_sum_ptr is not None and pid_n == 0:
            tl.store(h_sum_ptr + h_rows + ranks[None, :], h, mask=in_h)
        w_ptrs = w_ptr + ranks[:, None] * stride_wr + cols * stride_wn
        w = tl.load(w_ptrs, mask=in_r[:, None] & in_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(h, w.to(dtype), acc, input_precision=PRECISION)
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * tl.cast(scale, tl.float32), 0.0)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + cols
    in_y = in_m[:, None] & in_n[None, :]
    y = tl.load(y_ptrs, mask=in_y, other=0.0)
    tl.store(y_ptrs, (y + acc).to(dtype), mask=in_y)


@triton.jit(do_not_specialize=["scale", "threshold"])
def multi_grad_kernel(
    q_ptr,
    l_ptr,
    out_ptr,
    order_ptr,
    pieces_ptr,
    table_ptr,
    seed_ptr,
    C,
    R,
    stride_qm,
    stride_qc,
    stride_lm,
    stride_os,  # 0: the piece is all of its adapter's rows, and its product the gradient
    scale,
    threshold,
    BLOCK_M: tl.constexpr,  # columns of q: rows of the output tile
    BLOCK_N: tl.constexpr,  # ranks: columns of the output tile
    BLOCK_K: tl.constexpr,  # rows of q and l: the reduction
    PRECISION: tl.constexpr,
    USE_A: tl.constexpr,
    FAN: tl.constexpr,
):
    piece = tl.program_id(2)
    adapter, first, last = load_piece(pieces_ptr, piece)
    first_col = tl.program_id(0) * BLOCK_M
    first_rank = tl.program_id(1) * BLOCK_N
    if adapter < 0 or first >= last:
        return
    rank, ranks_before = load_rank(table_ptr, adapter, R)
    if first_rank >= rank:
        return
    offs_c = first_col + tl.arange(0, BLOCK_M)
    offs_r = first_rank + tl.arange(0, BLOCK_N)
    in_c = offs_c < C
    in_r = offs_r < rank
    cols = offs_c.to(tl.int64)
    ranks = offs_r.to(tl.int64)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(first, last, BLOCK_K):
        positions = m + tl.arange(0, BLOCK_K)
        in_m = positions < last
        offs_m = rows_at(order_ptr, positions, in_m) // FAN
        q_ptrs = q_ptr + offs_m.to(tl.int64)[:, None] * stride_qm + cols[None, :] * stride_qc
        q = tl.load(q_ptrs, mask=in_m[:, None] & in_c[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, first_col, BLOCK_K, BLOCK_M)
            q = tl.where(keep, q, 0.0)
        l_ptrs = l_ptr + positions.to(tl.int64)[:, None] * stride_lm + ranks[None, :]
        l = tl.load(l_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(q), l, acc, input_precision=PRECISION)
    acc *= tl.cast(scale, tl.float32)
    if stride_os == 0:
        out_ptr += ranks_before * C
    else:
        out_ptr += piece.to(tl.int64) * stride_os
    # dA is [r, C], dB is [C, r]
    offsets = ranks[None, :] * C + cols[:, None] if USE_A else cols[:, None] * rank + ranks[None, :]
    mask = in_c[:, None] & in_r[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_pieces_kernel(
    partial_ptr,
    out_ptr,
    adapters_ptr,
    group_first_ptr,
    pieces_ptr,
    table_ptr,
    C,
    R,
    stride_ps,
    BLOCK: tl.constexpr,
):
    """Adds the parts of each adapter's gradient in the order of its rows."""
    group = tl.program_id(1)
    adapter = tl.load(adapters_ptr + group)
    if adapter < 0:
        return
    rank, ranks_before = load_rank(table_ptr, adapter, R)
    numel = tl.cast(rank, tl.int64) * C
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([BLOCK], tl.float32)
    for piece in range(tl.load(group_first_ptr + group), tl.load(group_first_ptr + group + 1)):
        _, first, last = load_piece(pieces_ptr, piece)
        if first < last:
            partial_ptrs = partial_ptr + tl.cast(piece, tl.int64) * stride_ps + offs
            acc += tl.load(partial_ptrs, mask=mask, other=0.0)
    out_ptrs = out_ptr + ranks_before * C + offs
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


_launch_shrink, _launch_expand = Launcher(shrink_kernel), Launcher(expand_kernel)
_launch_grads, _launch_sum = Launcher(multi_grad_kernel), Launcher(sum_pieces_kernel)


def _split_k(K: int, programs: int, block: int, num_sms: int) -> int:
    """Enough ranges of K for two programs on every multiprocessor, none empty; their length."""
    splits = min(cdiv(2 * num_sms, programs), cdiv(K, block), MAX_SPLIT_K)
    return cdiv(cdiv(K, max(splits, 1)), block) * block


def shrink(
    config: TileConfig,
    x: torch.Tensor,
    rows: RowGroups,
    adapters: Adapters,
    *,
    use_A: bool,
    in_parts: bool = False,
    dropout: Dropout | None = None,
    fan: int = 1,
) -> torch.Tensor:
    """h = scaling_i * (D o x) A_i^T (use_A) or scaling_i * x B_i, for each row's own adapter i.

    x [M, K], any strides; [M / fan, K] if each of its rows is ``fan`` of the order's. Returns
    h [M, max r] in x's dtype; if ``in_parts``, fp32 parts of it [SPLIT_K, M, max r]. Undefined
    where a row has no adapter and beyond the rank of its own.
    """
    M, K = rows.M, x.shape[1]
    w = (adapters.lora_As if use_A else adapters.lora_Bs)[0]
    if is_odd(x) or K % ALIGNED:  # K: of the adapters, which are contiguous
        config = for_odd_rows(config, x.dtype.itemsize)
    table = rows.pieces(config.BLOCK_M).table
    tiles_r = cdiv(adapters.max_rank, config.BLOCK_N)
    k_per_split = max(K, 1)
    if in_parts and K:
        num_sms = device_info(x.device).num_sms
        k_per_split = _split_k(K, max(len(table) * tiles_r, 1), config.BLOCK_K, num_sms)
    SPLIT_K = cdiv(max(K, 1), k_per_split)
    dtype = torch.float32 if in_parts else x.dtype
    h = torch.empty((SPLIT_K, M, adapters.max_rank), dtype=dtype, device=x.device)
    scale, threshold = scale_and_threshold(dropout)
    if len(table):
        with device_guard(x):
            _launch_shrink(
                (len(table), tiles_r, SPLIT_K),
                (
                    x,
                    w,
                    h,
                    rows.order,
                    table,
                    adapters.entries,
                    adapters.scalings,
                    seed_of(dropout),
                ),
                (K, k_per_split, adapters.max_rank, *x.stride(), *h.stride()[:2]),
                (adapters.scaling * scale, threshold),
                FAN=fan,
                EVEN_K=K % config.BLOCK_K == 0,
                PRECISION=dot_precision(x.dtype),
                **adapters.meta(use_A),
                **config.meta(),
            )
    return h if in_parts else h[0]


def expand(
    config: TileConfig,
    y: torch.Tensor,
    h: torch.Tensor,
    rows: RowGroups,
    adapters: AdapterTable,
    *,
    use_A: bool,
    store_h: bool,
    dropout: Dropout | None = None,
) -> torch.Tensor | None:
    """y += D o (h B_i^T) or, if ``use_A``, D o (h A_i), in place, for each row's own adapter i.

    y [M, N] contiguous, h [SPLIT_K, M, max r] as from `shrink`. Returns h's sum over SPLIT_K
    [M, max r] in y's dtype if ``store_h``.
    """
    N = y.shape[1]
    w = (adapters.lora_As if use_A else adapters.lora_Bs)[0]
    table = rows.pieces(config.BLOCK_M).table
    h_sum = torch.empty(h.shape[1:], dtype=y.dtype, device=y.device) if store_h else None
    if len(table) and N:
        meta = config.meta() | {"BLOCK_K": min(padded(adapters.max_rank), config.BLOCK_K)}
        with device_guard(y):
            _launch_expand(
                (len(table), cdiv(N, config.BLOCK_N), 1),
                (
                    h,
                    w,
                    y,
                    h_sum,
                    rows.order,
                    table,
                    adapters.entries,
                    seed_of(dropout),
                ),
                (N, h.shape[0], *h.stride()[:2]),
                scale_and_threshold(dropout),
                PRECISION=dot_precision(y.dtype),
                **adapters.meta(use_A),
                **meta,
            )
    return h_sum


def multi_grads(
    config: TileConfig,
    q: torch.Tensor,
    l: torch.Tensor,
    rows: RowGroups,
    adapters: Adapters,
    *,
    use_A: bool,
    dropout: Dropout | None = None,
    fan: int = 1,
) -> Any:
    """dA_i [r_i, C] = l^T (D o q) (use_A), or dB_i [C, r_i] = q^T l, over adapter i's own rows.

    q [M, C] any strides, or [M / fan, C] as for `shrink`; l [M, max r] with positions for rows. The
    gradients have their adapters' dtype and are parts of one tensor; that of an adapter without
    rows is zero. Of a stack they are one: dA [E, r, C] or dB [E, C, r].
    """
    M, C = rows.M, q.shape[1]
    if is_odd(q):
        config = replace(config, BLOCK_M=64)  # with 128 columns it spills; see `for_odd_rows`
    flat, gradients = adapters.gradients(C, use_A)
    if M and C:
        tiles_c = cdiv(C, config.BLOCK_M)
        tiles_r = cdiv(adapters.max_rank, config.BLOCK_N)
        tiles = tiles_c * tiles_r * rows.num_groups
        splits = cdiv(2 * device_info(q.device).num_sms, tiles)
        block = cdiv(cdiv(M, splits), config.BLOCK_K) * config.BLOCK_K
        pieces = rows.pieces(block)
        direct = block >= M  # one piece an adapter
        stride = 0 if direct else C * adapters.max_rank
        partial = flat
        if not direct:
            shape = (len(pieces.table), stride)
            partial = torch.empty(shape, dtype=torch.float32, device=q.device)
        with device_guard(q):
            if len(pieces.table):
                _launch_grads(
                    (tiles_c, tiles_r, len(pieces.table)),
                    (
                        q,
                        l,
                        partial,
                        rows.order,
                        pieces.table,
                        adapters.entries,
                        seed_of(dropout),
                    ),
                    (C, adapters.max_rank, *q.stride(), l.stride(0), stride),
                    scale_and_threshold(dropout),
                    FAN=fan,
                    PRECISION=dot_precision(q.dtype),
                    USE_A=use_A,
                    **config.meta(),
                )
            if not direct:
                _launch_sum(
                    (cdiv(stride, _REDUCE_BLOCK), rows.num_groups, 1),
                    (
                        partial,
                        flat,
                        rows.adapters,
                        pieces.first,
                        pieces.table,
                        adapters.entries,
                    ),
                    (C, adapters.max_rank, stride),
                    (),
                    BLOCK=_REDUCE_BLOCK,
                    **FP_FUSION,
                )
    return gradients

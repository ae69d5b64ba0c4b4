"""The LoRA GEMM: base product and adapter in one pass, one template for forward and dx.

    y = x W + h B (+ bias)      x [M, K], W [K, N], h [M, R], B [R, N], y [M, N]
    h = scale * x A             A [K, R]

Forward passes W = W0^T, A = A^T, B = B^T and gets y and h; the input gradient passes x = g,
W = W0, A = B, B = A and gets dx and dh. All are views: strides carry the transposes.

The kernel has three forms, told apart by which pointers are None:
    one pass   a_ptr given            x is loaded once and multiplied by both W and A
    second     a_ptr None, h_ptr given    h was made before; h B is R / BLOCK_R more K steps
    plain      both None              y = scale * (D o x) W + bias: how `second`'s h is made
DoRA (col_scale_ptr given) makes it y = c o (x W + h B) + bias, c [N] fp32, in the first two forms;
z_ptr, if given, gets x W + h B, which the gradient of c needs.

Dropout (seed_ptr given) is on x in the plain form and on h B in the second form, so that each
element of the mask is drawn once; in the one-pass form it would be drawn N / BLOCK_N times.

Many adapters in one batch (pieces_ptr given, second form): tiles are ranges of positions, `order`
says which row is at each, and the pieces which adapter's B multiplies which part of the tile's h.

W may be quantised (see quantized.py): its tiles are then turned into values as they are read, or
multiplied as they are by the codes of an x in fp8 (x_scale_ptr given).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .alignment import for_odd_rows, is_odd, may_be_odd
from .device import device_guard
from .dropout import Dropout, scale_and_threshold, seed_of
from .launch import Launcher
from .pieces import MAX_BLOCK_R, add_pieces
from .quantized import FP8_BLOCK, QuantizedMatrix, add_fp8_product, fp8_input, load_operand
from .rows import AdapterTable, RowGroups
from .sizes import ALIGNED, MIN_DOT, cdiv, padded
from .tile_config import TileConfig
from .tiles import add_product, grouped_tile, keep_mask

GROUP_M = 8  # rows of tiles that run side by side and share W's tiles in L2


class ColumnScale(NamedTuple):
    """DoRA's part of a call."""

    scale: torch.Tensor  # c [N], fp32, contiguous
    z: torch.Tensor | None  # [M, N] in x's dtype, contiguous: where to put y before c and bias


class Multi(NamedTuple):
    """Many adapters' part of a call."""

    rows: RowGroups
    adapters: AdapterTable
    use_A: bool  # h is multiplied by A [r, N]; else by B^T of B [N, r]


@triton.jit(do_not_specialize=["scale", "threshold"])
def lora_gemm_kernel(
    x_ptr,
    w_ptr,
    w_tables,  # None, or a QuantizedMatrix's tables: then w_ptr is its codes
    x_scale_ptr,  # None, or `fp8_input`'s scales: then x_ptr is its codes
    bias_ptr,
    a_ptr,
    h_ptr,
    b_ptr,
    y_ptr,
    col_scale_ptr,
    z_ptr,
    seed_ptr,
    order_ptr,
    pieces_ptr,
    tile_first_ptr,
    table_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_bias,
    stride_ak,
    stride_ar,
    stride_hm,
    stride_br,
    stride_bn,
    stride_ym,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_A: tl.constexpr = False,
    ALIGNED: tl.constexpr = False,
    RANK_DIVISOR: tl.constexpr = 1,
    W_LAYOUT: tl.constexpr = None,  # a QuantizedMatrix's layout
):
    ONE_PASS: tl.constexpr = a_ptr is not None
    SECOND: tl.constexpr = a_ptr is None and h_ptr is not None
    dtype: tl.constexpr = y_ptr.dtype.element_ty  # x's, unless that is in codes
    scale = tl.cast(scale, tl.float32)  # Inductor passes Python floats as fp64

    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    positions = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = (positions < M)[:, None]
    in_x = in_m
    offs_m = positions
    if order_ptr is not None:
        offs_m = tl.load(order_ptr + positions, mask=positions < M, other=0)
        in_x = tl.full([BLOCK_M, 1], True, tl.int1)  # beyond M, row 0 again, which is not stored
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    # int64 before any stride: tensors of more than 2^31 elements
    rows = offs_m.to(tl.int64)[:, None]
    cols = offs_n.to(tl.int64)[None, :]
    ks = offs_k.to(tl.int64)
    ranks = offs_r.to(tl.int64)
    in_n = (offs_n < N)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SECOND:
        if pieces_ptr is not None:
            acc = add_pieces(
                acc,
                pieces_ptr,
                tl.load(tile_first_ptr + pid_m),
                tl.load(tile_first_ptr + pid_m + 1),
                table_ptr,
                b_ptr,
                h_ptr,
                positions,
                cols,
                in_n,
                N,
                stride_hm,
                BLOCK_R,
                USE_A,
                ALIGNED,
                RANK_DIVISOR,
                PRECISION,
            )
        else:
            acc = add_product(
                acc,
                h_ptr,
                b_ptr,
                rows,
                cols,
                in_m,
                in_n,
                R,
                stride_hm,
                1,
                stride_br,
                stride_bn,
                BLOCK_R,
                False,
                PRECISION,
            )
        if seed_ptr is not None:
            # Before the K loop: the accumulator starts as D o (h B) and needs no second one.
            keep = keep_mask(
                tl.load(seed_ptr), threshold, offs_m, pid_n * BLOCK_N, BLOCK_M, BLOCK_N
            )
            acc = tl.where(keep, acc * scale, 0.0)

    x_ptrs = x_ptr + rows * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + ks[:, None] * stride_wk + cols * stride_wn
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    step_w = tl.cast(stride_wk, tl.int64) * BLOCK_K
    if ONE_PASS:
        acc_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        a_ptrs = a_ptr + ks[:, None] * stride_ak + ranks[None, :] * stride_ar
        step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < (BLOCK_K if EVEN_K else K - k)
        x = tl.load(x_ptrs, mask=in_x & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if x_scale_ptr is not None:
            tl.static_assert(BLOCK_K == FP8_BLOCK)
            scales_ptrs = x_scale_ptr + tl.cast(k // FP8_BLOCK, tl.int64) * M + offs_m
            acc = add_fp8_product(
                acc,
                x,
                tl.load(scales_ptrs, mask=offs_m < M, other=0.0),
                w_ptr,
                w_tables[0],
                pid_n * BLOCK_N,
                k,
                N,
                K,
                BLOCK_N,
                W_LAYOUT[0],
                W_LAYOUT[1],
            )
        elif W_LAYOUT is None:
            w = tl.load(w_ptrs, mask=in_k[:, None] & in_n, other=0.0)  # [BLOCK_K, BLOCK_N]
            w_ptrs += step_w
        else:
            w = load_operand(w_ptr, w_tables, k, pid_n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, W_LAYOUT)
        if not SECOND and seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, k, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        if x_scale_ptr is None:
            acc = tl.dot(x, w.to(dtype), acc, input_precision=PRECISION)
        x_ptrs += step_x
        if ONE_PASS:
            in_a = in_k[:, None] & (offs_r < R)[None, :]
            a = tl.load(a_ptrs, mask=in_a, other=0.0)  # [BLOCK_K, BLOCK_R]
            acc_h = tl.dot(x, a.to(dtype), acc_h, input_precision=PRECISION)
            a_ptrs += step_a

    if ONE_PASS:
        h = (acc_h * scale).to(dtype)  # [BLOCK_M, BLOCK_R]
        if h_ptr is not None and pid_n == 0:
            h_ptrs = h_ptr + rows * stride_hm + ranks[None, :]
            tl.store(h_ptrs, h, mask=in_m & (offs_r < R)[None, :])
        b_ptrs = b_ptr + ranks[:, None] * stride_br + cols * stride_bn
        b = tl.load(b_ptrs, mask=(offs_r < R)[:, None] & in_n, other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(h, b.to(dtype), acc, input_precision=PRECISION)
    elif not SECOND:
        acc *= scale
    if z_ptr is not None:
        tl.store(z_ptr + rows * N + cols, acc.to(dtype), mask=in_m & in_n)
    if col_scale_ptr is not None:
        acc *= tl.load(col_scale_ptr + cols, mask=in_n, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + rows * stride_ym + cols, acc.to(dtype), mask=in_m & in_n)


_launch_gemm = Launcher(lora_gemm_kernel)


def _launch(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor | QuantizedMatrix,
    *,
    bias: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    dora: ColumnScale | None = None,
    out: torch.Tensor | None = None,  # [M, N], its rows contiguous
    multi: Multi | None = None,  # then b is there for its dtype
) -> torch.Tensor:
    (M, K), N = x.shape, w.shape[1]
    R = b.shape[0] if b is not None else 1
    quantized = w if isinstance(w, QuantizedMatrix) else None
    y = x.new_empty(M, N) if out is None else out  # torch.empty would cost 0.5 us more
    if M == 0 or N == 0:
        return y
    w_strides = (0, 0) if isinstance(w, QuantizedMatrix) else w.stride()
    a_strides = a.stride() if a is not None else (0, 0)
    few_ranks = R % ALIGNED != 0
    if may_be_odd(config, x.dtype.itemsize) and not (quantized and quantized.takes_fp8):
        narrow = a is None and h is None and dropout is None and config.BLOCK_N <= 32  # no spills
        odd = quantized is not None and quantized.is_odd
        odd = odd or is_odd(*(t for t in (x, w, a, y) if isinstance(t, torch.Tensor)))
        if odd and not narrow:
            config = for_odd_rows(config, x.dtype.itemsize)
        few_ranks = few_ranks or is_odd(*(t for t in (h, b) if t is not None))
    BLOCK_R = padded(R) if a is not None else min(padded(R), config.BLOCK_K)
    if few_ranks and a is None:  # each element of h and b by itself: few of them at a time
        BLOCK_R = MIN_DOT
    pieces = None
    if multi:
        pieces = multi.rows.pieces(config.BLOCK_M, in_tiles=True)
        BLOCK_R = min(padded(multi.adapters.max_rank), config.BLOCK_K, MAX_BLOCK_R)
    precision, x_scales = dot_precision(x.dtype), None
    if quantized and quantized.takes_fp8:
        x, x_scales = fp8_input(x)
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    with device_guard(x):
        _launch_gemm(
            (tiles, 1, 1),
            (
                x,
                w if quantized is None else quantized.code_bytes(),
                None if quantized is None else quantized.tables,
                x_scales,
                bias,
                a,
                h,
                b,
                y,
                dora.scale if dora else None,
                dora.z if dora else None,
                seed_of(dropout),
                multi.rows.order if multi else None,
                pieces.table if pieces else None,
                pieces.first if pieces else None,
                multi.adapters.entries if multi else None,
            ),
            (
                M,
                N,
                K,
                R,
                *x.stride(),
                *w_strides,
                bias.stride(0) if bias is not None else 0,
                *a_strides,
                h.stride(0) if h is not None else 0,
                *(b.stride() if b is not None else (0, 0)),
                y.stride(0),
            ),
            (scale, scale_and_threshold(dropout)[1]),
            BLOCK_R=BLOCK_R,
            GROUP_M=GROUP_M,
            EVEN_K=K % config.BLOCK_K == 0,
            PRECISION=precision,
            **(multi.adapters.meta(multi.use_A) if multi else {}),
            W_LAYOUT=None if quantized is None else quantized.layout,
            **config.meta(),
        )
    return y


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 for fp32 operands only where torch itself may use it for its matrix products."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def gemm_one_pass(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    scale: float,
    store_h: bool,
    dora: ColumnScale | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = x w + h b + bias with h = scale * x a, in one launch.

    x [M, K], w [K, N], a [K, R], b [R, N], bias [N] or None: any strides; a and b in any floating
    dtype, the rest in x's. Returns y [M, N] and, if ``store_h``, h [M, R], both in x's dtype.
    """
    h = x.new_empty(x.shape[0], a.shape[1]) if store_h else None
    return _launch(config, x, w, bias=bias, a=a, h=h, b=b, scale=scale, dora=dora), h


def gemm_add_lora(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor | QuantizedMatrix,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    dora: ColumnScale | None = None,
) -> torch.Tensor:
    """y = x w + D o (h b) + bias; h [M, R] in x's dtype, its rows contiguous, the rest as above.

    ``w`` may be a `QuantizedMatrix` [K, N].
    """
    scale, _ = scale_and_threshold(dropout)
    return _launch(config, x, w, bias=bias, h=h, b=b, scale=scale, dropout=dropout, dora=dora)


def gemm_add_multi(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    multi: Multi,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """y = x w + D o (h b) + bias with each row's own b; h [M, max r] has positions for rows."""
    b = (multi.adapters.lora_As if multi.use_A else multi.adapters.lora_Bs)[0]
    scale, _ = scale_and_threshold(dropout)
    return _launch(config, x, w, bias=bias, h=h, b=b, scale=scale, dropout=dropout, multi=multi)


def gemm_scaled(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor | QuantizedMatrix,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = scale * (D o x) w + bias; w [K, N] in any floating dtype, y [M, N] contiguous in x's.

    ``out`` is where y goes: a view [M, N] in x's dtype whose rows are contiguous.
    """
    if dropout:
        scale *= dropout.keep_scale
    return _launch(config, x, w, bias=bias, scale=scale, dropout=dropout, out=out)

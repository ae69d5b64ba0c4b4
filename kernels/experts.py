"""The LoRA GEMM of a mixture of experts: each row by its own expert's W0, A and B.

    y = x W_e + D o (h B_e) + bias_e    e the row's expert; h = scale * (D o x) A_e by multi.py

Rows are visited expert by expert (see rows.py): a program has one piece of them, and thereby one
expert. It gathers its rows of x and scatters those of y itself, so that neither exists in the
experts' order, and x may be the tokens', each of which has several experts. A row of no expert is
zeros. Forward and input gradient are one template, as in gemm.py. W0 may be quantised (see
quantized.py), each expert in blocks of its own.

(The gather in the kernel: ScatterMoE, https://arxiv.org/abs/2403.08245.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .alignment import for_odd_rows, is_odd, may_be_odd
from .device import device_guard
from .dropout import Dropout, scale_and_threshold, seed_of
from .gemm import GROUP_M, dot_precision
from .launch import Launcher
from .pieces import MAX_BLOCK_R, add_adapter, load_piece, rows_at
from .quantized import QuantizedMatrix, add_quantized_product
from .rows import AdapterStack, RowGroups
from .sizes import ALIGNED, cdiv
from .tile_config import TileConfig
from .tiles import add_product, grouped_tile, keep_mask


@triton.jit(do_not_specialize=["num_pieces", "scale", "threshold"])
def experts_kernel(
    x_ptr,
    w_ptr,
    w_tables,  # None, or a QuantizedMatrix's tables: then w_ptr is its codes
    bias_ptr,
    h_ptr,
    b_ptr,
    y_ptr,
    seed_ptr,
    order_x_ptr,  # None: x has positions for rows
    order_y_ptr,  # None: y has
    pieces_ptr,
    num_pieces,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_we,
    scales_of_expert,  # of a quantised W0
    stride_wk,
    stride_wn,
    stride_be,
    stride_bias,
    stride_hm,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FAN: tl.constexpr,  # rows of the order that each of x's is
    FAN_Y: tl.constexpr,  # and each of the mask's on h B
    USE_A: tl.constexpr,
    W_LAYOUT: tl.constexpr,  # a QuantizedMatrix's layout
):
    # Pieces of one expert side by side, so that they share its W0's tiles in L2.
    piece, pid_n = grouped_tile(tl.program_id(0), num_pieces, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, first, last = load_piece(pieces_ptr, piece)
    if first >= last:
        return
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    positions = first + tl.arange(0, BLOCK_M)
    in_m = positions < last
    rows_y = rows_at(order_y_ptr, positions, in_m)
    rows_x = rows_at(order_x_ptr, positions, in_m) // FAN
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = offs_n.to(tl.int64)[None, :]
    in_m, in_n = in_m[:, None], (offs_n < N)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if expert >= 0:
        if h_ptr is not None:
            acc = add_adapter(
                acc,
                None,
                b_ptr,
                h_ptr,
                expert,
                R,
                positions.to(tl.int64)[:, None],
                cols,
                in_m,
                in_n,
                N,
                stride_hm,
                BLOCK_R,
                USE_A,
                False,
                1,
                PRECISION,
            )
            if seed_ptr is not None:
                rows_d, first_n = rows_y // FAN_Y, pid_n * BLOCK_N
                keep = keep_mask(tl.load(seed_ptr), threshold, rows_d, first_n, BLOCK_M, BLOCK_N)
                acc = tl.where(keep, acc * tl.cast(scale, tl.float32), 0.0)
        of_expert = w_ptr + tl.cast(expert, tl.int64) * stride_we
        if W_LAYOUT is None:
            acc = add_product(
                acc,
                x_ptr,
                of_expert,
                rows_x.to(tl.int64)[:, None],
                cols,
                in_m,
                in_n,
                K,
                stride_xm,
                stride_xk,
                stride_wk,
                stride_wn,
                BLOCK_K,
                EVEN_K,
                PRECISION,
            )
        else:
            acc = add_quantized_product(
                acc,
                x_ptr,
                of_expert,
                w_tables,
                tl.cast(expert, tl.int64) * scales_of_expert,
                rows_x.to(tl.int64)[:, None],
                pid_n * BLOCK_N,
                in_m,
                N,
                K,
                stride_xm,
                stride_xk,
                BLOCK_N,
                BLOCK_K,
                EVEN_K,
                W_LAYOUT,
                PRECISION,
            )
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + tl.cast(expert, tl.int64) * stride_be + cols * stride_bias
            acc += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + rows_y.to(tl.int64)[:, None] * N + cols
    tl.store(y_ptrs, acc.to(dtype), mask=in_m & in_n)


_launch_experts = Launcher(experts_kernel)


def gemm_experts(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor | QuantizedMatrix,
    rows: RowGroups,
    *,
    adapters: AdapterStack | None,
    h: torch.Tensor | None,
    use_A: bool,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    fan: int = 1,
    fan_y: int = 1,
    order_x: torch.Tensor | None,
    order_y: torch.Tensor | None,
) -> torch.Tensor:
    """y = x w_e + D o (h b_e) + bias_e for each row's expert e; y [M, N] in x's dtype.

    x [M / fan, K], w [E, K, N], bias [E, N]: any strides; w may be a `QuantizedMatrix` [K, N], of a
    stack. h [M, R] as from `shrink`, and b_e of ``adapters``: A's if ``use_A``, else B^T's; or none
    of both. D [M / fan_y, N]. ``order_x``, ``order_y``: that of ``rows`` where x or y has its rows
    for rows, None where it has positions.
    """
    M, (K, N) = rows.M, w.shape[-2:]
    y = x.new_empty(M, N)
    if M == 0 or N == 0:
        return y
    R = adapters.max_rank if adapters else 0
    matrices: tuple[torch.Tensor, ...] = (x, y)
    if isinstance(w, QuantizedMatrix):
        operand, tables, layout = w.code_bytes(), w.tables, w.layout
        w_strides = (w.code_stride, w.scale_stride, 0, 0)
        odd = w.is_odd
    else:
        operand, tables, layout = w, None, None
        stride_we, stride_wk, stride_wn = w.stride()
        w_strides = (stride_we, 0, stride_wk, stride_wn)
        odd, matrices = stride_we % ALIGNED != 0, (x, w[0], y)
    if odd or (may_be_odd(config, x.dtype.itemsize) and is_odd(*matrices)):
        config = for_odd_rows(config, x.dtype.itemsize)
    b = None
    if adapters:
        b = adapters.lora_A if use_A else adapters.lora_B
    scale, threshold = scale_and_threshold(dropout)
    table = rows.pieces(config.BLOCK_M).table
    with device_guard(x):
        _launch_experts(
            (len(table) * cdiv(N, config.BLOCK_N), 1, 1),
            (
                x,
                operand,
                tables,
                bias,
                h,
                b,
                y,
                seed_of(dropout),
                order_x,
                order_y,
                table,
            ),
            (
                len(table),
                N,
                K,
                R,
                *x.stride(),
                *w_strides,
                *(bias.stride() if bias is not None else (0, 0)),
                h.stride(0) if h is not None else 0,
            ),
            (scale, threshold),
            BLOCK_R=MAX_BLOCK_R,
            GROUP_M=GROUP_M,
            EVEN_K=K % config.BLOCK_K == 0,
            PRECISION=dot_precision(x.dtype),
            FAN=fan,
            FAN_Y=fan_y,
            USE_A=use_A,
            W_LAYOUT=layout,
            **config.meta(),
        )
    return y

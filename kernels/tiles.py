"""Small ``@triton.jit`` helpers shared by the kernels: program order and the dropout mask."""

import triton
import triton.language as tl

# Philox-4x32 with 7 rounds is the fewest that pass BigCrush (Salmon et al., "Parallel random
# numbers: as easy as 1, 2, 3", SC'11, table 2). `fused_lora.reference.keep_mask` draws the same.
PHILOX_ROUNDS = tl.constexpr(7)
# One Philox call gives 128 bits: eight decisions of 16 bits, for eight neighbouring columns.
COLUMNS_PER_DRAW = tl.constexpr(8)


@triton.jit
def grouped_tile(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Tile (pid_m, pid_n) of program `pid`: down GROUP_M rows first, so that L2 keeps W's tiles."""
    programs_in_group = GROUP_M * num_pid_n
    first_m = (pid // programs_in_group) * GROUP_M
    group_rows = min(num_pid_m - first_m, GROUP_M)
    pid_m = first_m + (pid % programs_in_group) % group_rows
    pid_n = (pid % programs_in_group) // group_rows
    return pid_m, pid_n


@triton.jit
def tile_places(pid_m, pid_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's rows; these as [BLOCK_M, 1] and its columns as [1, BLOCK_N]; and which are there."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # int64 before any stride: tensors of more than 2^31 elements
    rows = offs_m.to(tl.int64)[:, None]
    cols = offs_n.to(tl.int64)[None, :]
    return offs_m, rows, cols, (offs_m < M)[:, None], (offs_n < N)[None, :]


@triton.jit
def add_product(
    acc,
    x_ptr,
    w_ptr,
    rows,
    cols,
    in_m,
    in_n,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr = None,  # None: as many as the launch says
):
    """acc + x w for one tile: `rows` [BLOCK_M, 1] of x, `cols` [1, BLOCK_N] of w, both int64."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    ks = offs_k.to(tl.int64)
    x_ptrs = x_ptr + rows * stride_xm + ks[None, :] * stride_xk
    w_ptrs = w_ptr + ks[:, None] * stride_wk + cols * stride_wn
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    step_w = tl.cast(stride_wk, tl.int64) * BLOCK_K
    for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        in_k = offs_k < (BLOCK_K if EVEN_K else K - k)
        x = tl.load(x_ptrs, mask=in_m & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=in_k[:, None] & in_n, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w.to(dtype), acc, input_precision=PRECISION)
        x_ptrs += step_x
        w_ptrs += step_w
    return acc


@triton.jit
def keep_mask(
    seed, threshold, offs_m, first_col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """Dropout decisions for rows `offs_m` and columns `first_col + arange(BLOCK_COLS)`.

    Element (m, k) is kept iff its 16 bits, lane k % 8 of Philox(seed, counter = (k // 8, m, 0, 0)),
    are at least `threshold`. It depends on (seed, m, k) only: not on tiles, strides or kernel.
    """
    draws = first_col // COLUMNS_PER_DRAW + tl.arange(0, BLOCK_COLS // COLUMNS_PER_DRAW)
    zero = tl.zeros([BLOCK_ROWS, BLOCK_COLS // COLUMNS_PER_DRAW], tl.int32)
    c0 = zero + draws[None, :]
    c1 = zero + offs_m[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, PHILOX_ROUNDS)
    # join() adds a last axis, so the order below makes the axes (column / 8, word, half).
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes, [BLOCK_ROWS, BLOCK_COLS]) >= threshold

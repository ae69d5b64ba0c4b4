"""``@triton.jit`` helpers for rows with adapters of their own: the tables of rows.py, read."""

import triton
import triton.language as tl

from .tiles import add_product

MAX_BLOCK_R = 16  # of a GEMM tile's pieces: at 32, fp32 adapters cost large tiles' last registers


@triton.jit
def load_piece(pieces_ptr, piece):
    """Adapter, first position and last position + 1 of a piece."""
    entry = pieces_ptr + piece * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def rows_at(order_ptr, positions, mask):
    """The rows at these positions."""
    rows = positions  # a return here would not keep Triton from compiling what comes after it
    if order_ptr is not None:
        rows = tl.load(order_ptr + positions, mask=mask, other=0)
    return rows


@triton.jit
def load_rank(table_ptr, adapter, R):
    """An adapter's rank, and those of all before it together, an int64; ``R``: of a stack."""
    if table_ptr is None:
        rank = R
        ranks_before = tl.cast(adapter, tl.int64) * R
    else:
        rank = tl.load(table_ptr + adapter * 4 + 2).to(tl.int32)
        ranks_before = tl.load(table_ptr + adapter * 4 + 3)
    return rank, ranks_before


@triton.jit
def load_adapter(
    table_ptr,  # None: the adapters are a stack
    like_ptr,  # the stack; of a table any adapter's tensor, for the dtype
    adapter,
    R,  # of the stack
    width,
    USE_A: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
):
    """A [r, width] or B [width, r]: its address, r, and its strides along r and along width."""
    if table_ptr is None:
        address = like_ptr + tl.cast(adapter, tl.int64) * R * width
        rank = R
    else:
        entry = table_ptr + adapter * 4
        address = tl.load(entry if USE_A else entry + 1).to(like_ptr.dtype)
        if ALIGNED:
            address = tl.multiple_of(address, 16)
        rank = tl.multiple_of(tl.load(entry + 2).to(tl.int32), RANK_DIVISOR)
    return address, rank, width if USE_A else 1, 1 if USE_A else rank


@triton.jit
def add_adapter(
    acc,
    table_ptr,
    like_ptr,
    h_ptr,
    adapter,
    R,
    rows,  # positions, int64 [BLOCK_M, 1]
    cols,
    in_m,
    in_n,
    N,
    stride_hm,
    BLOCK_R: tl.constexpr,
    USE_A: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + h B of a tile's rows with one adapter's B^T (USE_A: A); see `load_adapter`."""
    b_ptr, rank, stride_br, stride_bn = load_adapter(
        table_ptr, like_ptr, adapter, R, N, USE_A, ALIGNED, RANK_DIVISOR
    )
    return add_product(
        acc,
        h_ptr,
        b_ptr,
        rows,
        cols,
        in_m,
        in_n,
        rank,
        stride_hm,
        1,
        stride_br,
        stride_bn,
        BLOCK_R,
        False,
        PRECISION,
        NUM_STAGES=1,  # one step at most ranks: nothing to overlap
    )


@triton.jit
def add_pieces(
    acc,
    pieces_ptr,
    first_piece,
    last_piece,
    table_ptr,
    like_ptr,
    h_ptr,
    positions,
    cols,
    in_n,
    N,
    stride_hm,
    BLOCK_R: tl.constexpr,
    USE_A: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + h B for one tile, each piece of it with its own adapter's B^T (USE_A: A)."""
    rows = positions.to(tl.int64)[:, None]
    for piece in range(first_piece, last_piece):
        adapter, first, last = load_piece(pieces_ptr, piece)
        if adapter >= 0 and first < last:
            acc = add_adapter(
                acc,
                table_ptr,
                like_ptr,
                h_ptr,
                adapter,
                0,
                rows,
                cols,
                ((positions >= first) & (positions < last))[:, None],
                in_n,
                N,
                stride_hm,
                BLOCK_R,
                USE_A,
                ALIGNED,
                RANK_DIVISOR,
                PRECISION,
            )
    return acc

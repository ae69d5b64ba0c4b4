"""The warp of specialized.py that loads: it fills the ring through the copy engine."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from . import persistent
from .specialized_ring import place_of, post, proxy_fence, ring_place

TICKET, FLAGS = persistent.TICKET, persistent.FLAGS
# Triton's own functions, compiled as Gluon's: they touch no layout.
finish, wait_for = gluon.jit(persistent.finish.fn), gluon.jit(persistent.wait_for.fn)

# Triton 3.9's name of it, and 3.6's.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def load_step(
    x_desc,
    w_desc,
    row,
    col,
    k,
    step,
    x_ring,
    w_ring,
    ready,
    empty,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    PIECES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
):
    """Starts the copies of x [PARTS * TILE_M, BLOCK_K] and of PIECES of w into the step's place."""
    TILE_M: gl.constexpr = x_desc.block_type.shape[0]
    WIDTH: gl.constexpr = w_desc.block_type.shape[0 if W_TRANSPOSED else 1]
    BYTES: gl.constexpr = PARTS * x_desc.block_type.nbytes + PIECES * w_desc.block_type.nbytes
    place, parity = ring_place(step, STAGES)
    mbarrier.wait(empty.index(place), parity ^ 1)
    barrier = ready.index(place)
    mbarrier.expect(barrier, BYTES)
    for part in gl.static_range(PARTS):
        x_tile = x_ring.index(place * PARTS + part)
        async_load(x_desc, [row + part * TILE_M, k], barrier, x_tile)
    w_tile = w_ring.index(place)
    for piece in gl.static_range(PIECES):
        if W_TRANSPOSED:
            w_piece = w_tile.slice(piece * WIDTH, WIDTH, dim=0)
            async_load(w_desc, [col + piece * WIDTH, k], barrier, w_piece)
        else:
            w_piece = w_tile.slice(piece * WIDTH, WIDTH, dim=1)
            async_load(w_desc, [k, col + piece * WIDTH], barrier, w_piece)


@gluon.jit
def load_product(
    x_desc,
    w_desc,
    row,
    col,
    step,
    x_ring,
    w_ring,
    ready,
    empty,
    sync_ptr,
    epoch,
    first_flag,
    K,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    PIECES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
):
    """Loads all of K for x w's tile, from `step` on; the step after it.

    With sync_ptr x is an h of this launch: each step of it waits for its PARTS flags.
    """
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    for k in range(0, K, BLOCK_K):
        if sync_ptr is not None:
            flags = sync_ptr + FLAGS + (first_flag + k // BLOCK_K) * PARTS
            for part in gl.static_range(PARTS):
                wait_for(flags + part, epoch)
            proxy_fence()
        load_step(
            x_desc, w_desc, row, col, k, step,
            x_ring, w_ring, ready, empty, STAGES, PARTS, PIECES, W_TRANSPOSED,
        )  # fmt: skip
        step += 1
    return step


@gluon.jit
def load_y_tile(
    x_desc,
    w_desc,
    x2_desc,
    w2_desc,
    x3_desc,
    w3_desc,
    h_desc,
    b_desc,
    row,
    col,
    step,
    x_ring,
    w_ring,
    ready,
    empty,
    sync_ptr,
    epoch,
    first_flag,
    K,
    K2,
    K3,
    R,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    PIECES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
):
    """Loads what a tile of y takes, from `step` on; the step after it."""
    step = load_product(
        x_desc, w_desc, row, col, step,
        x_ring, w_ring, ready, empty, None, 0, 0, K, STAGES, PARTS, PIECES, W_TRANSPOSED,
    )  # fmt: skip
    if x2_desc is not None:
        step = load_product(
            x2_desc, w2_desc, row, col, step,
            x_ring, w_ring, ready, empty, None, 0, 0, K2, STAGES, PARTS, PIECES, W_TRANSPOSED,
        )  # fmt: skip
    if x3_desc is not None:
        step = load_product(
            x3_desc, w3_desc, row, col, step,
            x_ring, w_ring, ready, empty, None, 0, 0, K3, STAGES, PARTS, PIECES, W_TRANSPOSED,
        )  # fmt: skip
    if b_desc is not None:
        step = load_product(
            h_desc, b_desc, row, col, step, x_ring, w_ring, ready, empty,
            sync_ptr, epoch, first_flag, R, STAGES, PARTS, PIECES, W_TRANSPOSED,
        )  # fmt: skip
    return step


@gluon.jit
def loader(
    x_desc,
    w_desc,
    x2_desc,
    w2_desc,
    x3_desc,
    w3_desc,
    a_desc,
    h_desc,
    b_desc,
    x_ring,
    w_ring,
    ready,
    empty,
    board,
    posted,
    taken,
    sync_ptr,
    epoch,
    num_m,
    num_n,
    num_r,
    halved,
    K,
    K2,
    K3,
    R,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    HALVES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
):
    """The loading warp: draws the items, or counts them, and loads what each takes in turn."""
    TILE_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    PIECES: gl.constexpr = 2 if HALVES else 1
    whole = num_m * (num_r + num_n) - halved
    items = whole + 2 * halved
    step = 0
    index = 0
    item = gl.program_id(0)
    if sync_ptr is not None:
        item = gl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
        post(item, index, board, posted, taken)
    while item < items:
        index += 1
        if sync_ptr is None:
            next_item = item + gl.num_programs(0)
        else:
            next_item = gl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
            post(next_item, index, board, posted, taken)
        pid_m, column, half = place_of(item, whole, num_m, num_r + num_n, GROUP_M, HALVES)
        row = pid_m * (PARTS * TILE_M)
        if column < num_r:  # of h
            if a_desc is not None:
                step = load_product(
                    x_desc, a_desc, row, column * BLOCK_K, step,
                    x_ring, w_ring, ready, empty, None, 0, 0, K, STAGES, PARTS, 1, W_TRANSPOSED,
                )  # fmt: skip
        else:
            col = (column - num_r) * BLOCK_N
            if HALVES and item >= whole:
                step = load_y_tile(
                    x_desc, w_desc, x2_desc, w2_desc, x3_desc, w3_desc, h_desc, b_desc,
                    row, col + half * (BLOCK_N // 2), step,
                    x_ring, w_ring, ready, empty, sync_ptr, epoch, pid_m * num_r, K, K2, K3, R,
                    STAGES, PARTS, 1, W_TRANSPOSED,
                )  # fmt: skip
            else:
                step = load_y_tile(
                    x_desc, w_desc, x2_desc, w2_desc, x3_desc, w3_desc, h_desc, b_desc,
                    row, col, step,
                    x_ring, w_ring, ready, empty, sync_ptr, epoch, pid_m * num_r, K, K2, K3, R,
                    STAGES, PARTS, PIECES, W_TRANSPOSED,
                )  # fmt: skip
        item = next_item
    if sync_ptr is not None:
        finish(sync_ptr, epoch)

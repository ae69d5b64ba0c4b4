"""The LoRA GEMM for Hopper by hand: warps that load and warps that multiply (Gluon).

The same products as persistent.py, whose work list, tickets and flags it shares:

    y = x W + h B (+ bias)      x [M, K], W [K, N], h [M, R], B [R, N], y [M, N]
    h = scale * x A             A [K, R]

A program has one warp that loads and two consumers of four warps each. The loader fills a ring of
`STAGES` places through the copy engine, as far ahead as there are free places, from one tile into
the next; a place holds one step, BLOCK_K of the reduction. h B is more steps of the same ring: the
loader reads h and B for x and W, and a consumer multiplies as much of the place as there are ranks.
Two barriers a place: `ready`, where the bytes of a step are awaited, and `empty`, where those who
read them say that they have. Consumers keep one product in flight while they wait for the next.
    cooperative   both work on each tile, on its upper and its lower half; the second begins when
                  the first has done LEAD steps, which it stays ahead, so that one multiplies while
                  the other stores
    ping-pong     they take turns with whole tiles: one stores while the other multiplies
With HALVES, tiles that would be a last round of less than half of the GPU become two items each, of
half the columns: y [2048, 5120] at 128 x 256 is 2.4 rounds of an H200, and should take 2.6, not 3.
Forms, told apart by which operands are None:
    second     h given                 h was made before by gemm.py
    produced   a and sync given        h is made by this launch, once; see persistent.py
    plain      b None                  y = x W: the base layer alone, to measure against
    group      x2, w2 (x3, w3) given   y = sum_i x_i W_i + h B: dx of layers that share their input
DoRA (col_scale_ptr given, and z_desc for what is before it) is as in gemm.py.
In the produced form the loader draws the tickets and posts each item on a board, and before it
reads a tile of h it waits for its flag. It is never behind its consumers and waits only for earlier
items, so that persistent.py's argument for progress holds. h is written by plain stores and read by
the copy engine, another path to memory: a proxy fence on either side of the flag.

On an H200 it has 0.98 of cuBLAS's speed at 8192 x 4096 x 4096, and persistent.py 0.93. What that
kernel's code at 128 x 256 x 64 does otherwise (as Triton 3.6 and 3.9 compile it): all warps load
and multiply, with 86 instructions and 4 barriers of 256 threads beside a step's 4 HGMMA, here 50 to
57 and 1 or 2 of 128. At each tile's end it drains the ring, waits for its stores one by one and
makes its mbarriers anew before it loads the next tile; here that is loaded meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import persistent, tiles
from .configs import MAX_GROUP, TileConfig, cdiv, is_transposed, padded
from .copy import aligned_copy
from .device import device_guard, device_info
from .gemm import ColumnScale
from .launch import Launcher, Tiled

EPOCH, TICKET, FLAGS = persistent.EPOCH, persistent.TICKET, persistent.FLAGS
# Triton's own functions, compiled as Gluon's: they touch no layout.
finish, grouped_tile, halves, publish, store_h, wait_for = (
    gluon.jit(function.fn)
    for function in (
        persistent.finish,
        tiles.grouped_tile,
        persistent.halves,
        persistent.publish,
        persistent.store_h,
        persistent.wait_for,
    )
)

# Triton 3.9's names of them, and 3.6's.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = gl.constexpr(4)  # a warp group: what a wgmma is issued by
BOARD = gl.constexpr(4)  # items that the loader is ahead of the consumers, at most
# Of a block's 64 K registers: 12 warps start with as many each, then most are the consumers'.
MAX_REGISTERS = 168
LOADER_REGISTERS, CONSUMER_REGISTERS = gl.constexpr(24), gl.constexpr(240)


@gluon.jit
def ring_place(count, PLACES: gl.constexpr):
    """The place of a ring's count-th use, and the parity of its barriers' phase."""
    return count % PLACES, count // PLACES & 1


@gluon.jit
def proxy_fence():
    """Orders plain accesses to global memory and the copy engine's."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, $1;",
        "=r,r",
        [0],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


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
def place_of(item, whole, num_m, columns, GROUP_M: gl.constexpr, HALVES: gl.constexpr):
    """An item's rows and column of tiles, and which half: it is one from the whole-th tile on."""
    tile = item
    half = 0
    if HALVES and item >= whole:
        tile = whole + (item - whole) // 2
        half = (item - whole) % 2
    pid_m, column = grouped_tile(tile, num_m, columns, GROUP_M)
    return pid_m, column, half


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


@gluon.jit
def post(item, index, board, posted, taken):
    """Puts an item, or one beyond the last, where both consumers read it."""
    place, parity = ring_place(index, BOARD)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(taken.index(place), parity ^ 1)
    board.index(place).store(gl.full([1], item, gl.int32, layout))
    mbarrier.arrive(posted.index(place))


@gluon.jit
def take(index, board, posted, taken):
    place, parity = ring_place(index, BOARD)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(posted.index(place), parity)
    item = gl.max(board.index(place).load(layout), 0)
    mbarrier.arrive(taken.index(place))
    return item


@gluon.jit
def multiply(
    acc,
    step,
    steps,
    first,
    x_ring,
    w_ring,
    ready,
    empty,
    follower,
    part,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    DEPTH: gl.constexpr,
    LEAD: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
):
    """acc += x w over `steps` steps from `step` on, of DEPTH each; the tile's began at `first`.

    A place is given back when the product after it has been started: the last one by the caller.
    With LEAD, the barrier `follower` hears of the step after which the other consumer may begin.
    """
    WIDTH: gl.constexpr = acc.shape[1]
    for this in range(step, step + steps):
        place, parity = ring_place(this, STAGES)
        x = x_ring.index(place * PARTS + part).slice(0, DEPTH, dim=1)
        w = w_ring.index(place)
        if W_TRANSPOSED:
            w = w.permute((1, 0))
        w = w.slice(0, DEPTH, dim=0).slice(0, WIDTH, dim=1)
        mbarrier.wait(ready.index(place), parity)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        before, _ = ring_place(this + STAGES - 1, STAGES)
        mbarrier.arrive(empty.index(before), pred=this > first)
        if LEAD > 0 and this == min(LEAD, steps) - 1:  # no predicate: it would be a barrier a step
            mbarrier.arrive(follower)
    return acc


@gluon.jit
def end_products(acc, last, empty, turn, STAGES: gl.constexpr, PARTS: gl.constexpr):
    """acc once its products are done, of which `last` is the last step. The next turn may begin."""
    if PARTS == 1:
        mbarrier.arrive(turn)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    place, _ = ring_place(last, STAGES)
    mbarrier.arrive(empty.index(place))
    return acc


@gluon.jit
def split_columns(tile, PARTS: gl.constexpr):
    """The tile as PARTS tiles side by side: 1, 2, 4, ..."""
    if PARTS == 1:
        return (tile,)
    else:
        left, right = halves(tile)
        return split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)


@gluon.jit
def store_y(y_desc, acc, y_stage, row, col, consumer: gl.constexpr, SUBTILES: gl.constexpr):
    """Stores a consumer's tile in SUBTILES parts, by way of staging memory that is free again."""
    WIDTH: gl.constexpr = y_desc.block_type.shape[1]
    STAGED: gl.constexpr = y_stage.shape[0] // CONSUMERS
    BUFFERS: gl.constexpr = STAGED if STAGED < SUBTILES else SUBTILES
    subtiles = split_columns(acc, SUBTILES)
    for i in gl.static_range(SUBTILES):
        tile = subtiles[i].to(y_desc.dtype)
        stage = y_stage.index(consumer * STAGED + i % BUFFERS)
        tma.store_wait(BUFFERS - 1)
        stage.store(tile)
        fence_async_shared()
        async_store(y_desc, [row, col + i * WIDTH], stage)


@gluon.jit
def make_y_tile(
    y_desc,
    z_desc,
    bias_ptr,
    col_scale_ptr,
    x_ring,
    w_ring,
    y_stage,
    ready,
    empty,
    turns,
    row,
    col,
    step,
    steps_k,
    steps_r,
    N,
    stride_bias,
    WIDTH: gl.constexpr,
    BLOCK_K: gl.constexpr,
    DEPTH_R: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    SUBTILES: gl.constexpr,
    LEAD: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    consumer: gl.constexpr,
):
    """A consumer's tile of y at (row, col), WIDTH columns, out of the ring from `step` on."""
    TILE_M: gl.constexpr = y_desc.block_type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, WIDTH, 16])
    part: gl.constexpr = consumer if PARTS == CONSUMERS else 0
    other: gl.constexpr = (consumer + 1) % CONSUMERS
    if bias_ptr is not None:
        offs_n = col + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
        bias_ptrs = bias_ptr + offs_n.to(gl.int64) * stride_bias
        bias = gl.load(bias_ptrs, mask=offs_n < N, other=0.0)
    acc = gl.zeros([TILE_M, WIDTH], gl.float32, layout)
    acc = multiply(
        acc, step, steps_k, step, x_ring, w_ring, ready, empty,
        turns.index(other), part, STAGES, PARTS, BLOCK_K, LEAD, W_TRANSPOSED,
    )  # fmt: skip
    acc = multiply(
        acc, step + steps_k, steps_r, step, x_ring, w_ring, ready, empty,
        turns.index(other), part, STAGES, PARTS, DEPTH_R, 0, W_TRANSPOSED,
    )  # fmt: skip
    last = step + steps_k + steps_r - 1
    acc = end_products(acc, last, empty, turns.index(other), STAGES, PARTS)
    if z_desc is not None:
        store_y(z_desc, acc, y_stage, row, col, consumer, SUBTILES)
    if col_scale_ptr is not None:  # loaded late: beside the products there are no registers for it
        scaled_n = col + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
        col_scale = gl.load(col_scale_ptr + scaled_n, mask=scaled_n < N, other=0.0)
        acc = acc * col_scale[None, :]
    if bias_ptr is not None:
        acc = acc + bias.to(gl.float32)[None, :]
    store_y(y_desc, acc, y_stage, row, col, consumer, SUBTILES)


@gluon.jit
def consume(
    y_desc,
    z_desc,
    bias_ptr,
    col_scale_ptr,
    h_ptr,
    x_ring,
    w_ring,
    y_stage,
    ready,
    empty,
    turns,
    board,
    posted,
    taken,
    sync_ptr,
    epoch,
    num_m,
    num_n,
    num_r,
    halved,
    M,
    N,
    K,
    K2,
    K3,
    R,
    stride_bias,
    scale,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    DEPTH_R: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    SUBTILES: gl.constexpr,
    LEAD: gl.constexpr,
    HALVES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    consumer: gl.constexpr,
):
    """A multiplying warp group: its part of each item, or each second item."""
    TILE_M: gl.constexpr = y_desc.block_type.shape[0]
    layout_h: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [CONSUMER_WARPS, 1], [16, BLOCK_K, 16]
    )
    part: gl.constexpr = consumer if PARTS == CONSUMERS else 0
    whole = num_m * (num_r + num_n) - halved
    items = whole + 2 * halved
    steps_k = gl.cdiv(K, BLOCK_K) + gl.cdiv(K2, BLOCK_K) + gl.cdiv(K3, BLOCK_K)
    steps_r = gl.cdiv(R, BLOCK_K)
    AHEAD: gl.constexpr = LEAD if consumer == 0 else 0
    other: gl.constexpr = (consumer + 1) % CONSUMERS
    step = 0
    index = 0
    item = gl.program_id(0)
    if sync_ptr is not None:
        item = take(index, board, posted, taken)
    while item < items:
        pid_m, column, half = place_of(item, whole, num_m, num_r + num_n, GROUP_M, HALVES)
        row = (pid_m * PARTS + part) * TILE_M
        mine = PARTS == CONSUMERS or index % CONSUMERS == consumer
        if LEAD > 0 and consumer > 0:
            mbarrier.wait(turns.index(consumer), 0)  # for the first item; it has ended for others
        if PARTS == 1 and mine:
            # A parity tells a phase of `ready` from the next only: the steps before must be there.
            mbarrier.wait(turns.index(consumer), (index // CONSUMERS + other) & 1)
        if column < num_r:  # of h
            if sync_ptr is not None and mine:
                acc = gl.zeros([TILE_M, BLOCK_K], gl.float32, layout_h)
                acc = multiply(
                    acc, step, steps_k, step, x_ring, w_ring, ready, empty,
                    turns.index(other), part, STAGES, PARTS, BLOCK_K, AHEAD, W_TRANSPOSED,
                )  # fmt: skip
                last = step + steps_k - 1
                acc = end_products(acc, last, empty, turns.index(other), STAGES, PARTS)
                offs_m = row + gl.arange(0, TILE_M, gl.SliceLayout(1, layout_h))
                offs_r = column * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout_h))
                store_h(h_ptr, (acc * scale).to(y_desc.dtype), offs_m, offs_r, M, R)
                proxy_fence()
                flag = (pid_m * num_r + column) * PARTS + part
                publish(sync_ptr + FLAGS + flag, epoch)
            step += steps_k
        else:
            col = (column - num_r) * BLOCK_N
            if HALVES and item >= whole:
                if mine:
                    make_y_tile(
                        y_desc, z_desc, bias_ptr, col_scale_ptr, x_ring, w_ring, y_stage,
                        ready, empty, turns, row, col + half * (BLOCK_N // 2), step, steps_k,
                        steps_r, N, stride_bias, BLOCK_N // 2, BLOCK_K, DEPTH_R, STAGES, PARTS,
                        SUBTILES // 2, AHEAD, W_TRANSPOSED, consumer,
                    )  # fmt: skip
            elif mine:
                make_y_tile(
                    y_desc, z_desc, bias_ptr, col_scale_ptr, x_ring, w_ring, y_stage,
                    ready, empty, turns, row, col, step, steps_k, steps_r, N, stride_bias,
                    BLOCK_N, BLOCK_K, DEPTH_R, STAGES, PARTS, SUBTILES, AHEAD,
                    W_TRANSPOSED, consumer,
                )  # fmt: skip
            step += steps_k + steps_r
        index += 1
        if sync_ptr is None:
            item += gl.num_programs(0)
        else:
            item = take(index, board, posted, taken)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["halved", "scale"])
def lora_specialized_kernel(
    x_desc,
    w_desc,
    x2_desc,
    w2_desc,
    x3_desc,
    w3_desc,
    a_desc,
    h_desc,
    b_desc,
    y_desc,
    z_desc,
    bias_ptr,
    col_scale_ptr,
    h_ptr,
    sync_ptr,
    M,
    N,
    K,
    R,  # 0 without b
    stride_bias,
    halved,  # tiles of y, the last ones, of which each half is an item of its own
    K2,  # 0 without x2, and K3 without x3
    K3,
    scale,
    BLOCK_M: gl.constexpr,  # rows of a tile of y, of one consumer or of both
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    DEPTH_R: gl.constexpr,  # ranks of h B at a time
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    SUBTILES: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    LEAD: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    HALVES: gl.constexpr = False,
):
    PARTS: gl.constexpr = CONSUMERS if COOPERATIVE else 1
    BUFFERS: gl.constexpr = 1 if SUBTILES == 1 else 2
    TILE_M: gl.constexpr = BLOCK_M // PARTS
    scale = gl.cast(scale, gl.float32)  # Inductor passes Python floats as fp64
    num_m = gl.cdiv(M, BLOCK_M)
    num_n = gl.cdiv(N, BLOCK_N)
    halved = halved if HALVES else 0
    K2 = 0 if x2_desc is None else K2
    K3 = 0 if x3_desc is None else K3
    epoch = 0
    num_r = 0
    if sync_ptr is not None:
        epoch = gl.load(sync_ptr + EPOCH) + 1
        num_r = gl.cdiv(R, BLOCK_K)

    x_ring = gl.allocate_shared_memory(
        x_desc.dtype, [STAGES * PARTS, TILE_M, BLOCK_K], x_desc.layout
    )
    W_RING: gl.constexpr = (
        [STAGES, BLOCK_N, BLOCK_K] if W_TRANSPOSED else [STAGES, BLOCK_K, BLOCK_N]
    )
    w_ring = gl.allocate_shared_memory(w_desc.dtype, W_RING, w_desc.layout)
    y_stage = gl.allocate_shared_memory(
        y_desc.dtype, [CONSUMERS * BUFFERS, TILE_M, BLOCK_N // SUBTILES], y_desc.layout
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(ready.index(place), count=1)
        mbarrier.init(empty.index(place), count=PARTS)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    board = gl.allocate_shared_memory(gl.int32, [BOARD, 1], flat)
    posted = gl.allocate_shared_memory(gl.int64, [BOARD, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [BOARD, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(BOARD):
        mbarrier.init(posted.index(place), count=1)
        mbarrier.init(taken.index(place), count=CONSUMERS)
    fence_async_shared()

    gl.warp_specialize(
        [
            (
                consume,
                (
                    y_desc, z_desc, bias_ptr, col_scale_ptr, h_ptr, x_ring, w_ring, y_stage,
                    ready, empty, turns, board, posted, taken, sync_ptr, epoch,
                    num_m, num_n, num_r, halved, M, N, K, K2, K3, R, stride_bias, scale,
                    BLOCK_N, BLOCK_K, DEPTH_R, GROUP_M, STAGES, PARTS,
                    SUBTILES, LEAD, HALVES, W_TRANSPOSED, 0,
                ),
            ),
            (
                consume,
                (
                    y_desc, z_desc, bias_ptr, col_scale_ptr, h_ptr, x_ring, w_ring, y_stage,
                    ready, empty, turns, board, posted, taken, sync_ptr, epoch,
                    num_m, num_n, num_r, halved, M, N, K, K2, K3, R, stride_bias, scale,
                    BLOCK_N, BLOCK_K, DEPTH_R, GROUP_M, STAGES, PARTS,
                    SUBTILES, LEAD, HALVES, W_TRANSPOSED, 1,
                ),
            ),
            (
                loader,
                (
                    x_desc, w_desc, x2_desc, w2_desc, x3_desc, w3_desc, a_desc, h_desc, b_desc,
                    x_ring, w_ring, ready, empty, board, posted, taken, sync_ptr, epoch,
                    num_m, num_n, num_r, halved, K, K2, K3, R,
                    BLOCK_N, GROUP_M, STAGES, PARTS, HALVES, W_TRANSPOSED,
                ),
            ),
        ],
        [CONSUMER_WARPS, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


_launch_specialized = Launcher(lora_specialized_kernel, descriptors=11)


@functools.cache
def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """Of a tile of 16-bit elements, as wgmma and the copy engine swizzle it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.float16)


def _tiled(t: torch.Tensor, rows: int, columns: int, turned: bool = False) -> Tiled:
    """Tiles [rows, columns] of t; ``turned``: of t^T's, as memory holds them."""
    block = [columns, rows] if turned else [rows, columns]
    return Tiled(t.t() if turned else t, block, _layout(*block))


def _fit(t: torch.Tensor, dtype: torch.dtype, turned: bool = False) -> torch.Tensor:
    """t, or a copy of it that tiles can be copied from: h of an odd rank, an adapter in fp32."""
    view = t.t() if turned else t
    step, inner = view.stride()
    aligned = step and step * dtype.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
    if t.dtype != dtype or inner != 1 or not aligned:
        view = aligned_copy(view, dtype)
    return view.t() if turned else view


def _padded_row(columns: int) -> int:
    return (columns + 7) // 8 * 8  # 16 bytes


def last_round(config: TileConfig, num_m: int, num_n: int, tiles_h: int, num_sms: int) -> int:
    """How many tiles of y are left for a round that more than half of the GPU would sit out.

    A tile of h counts for a half: it is narrower, but x is as tall. None where such tiles are not
    all in the last group, where those of h come first.
    """
    left = (num_m * num_n + cdiv(tiles_h, 2)) % num_sms
    assert config.GROUP_M is not None
    last_group = (num_m - 1) % config.GROUP_M + 1
    return left if left <= num_sms // 2 and left <= last_group * num_n else 0


def _launch(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    more: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    bias: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scale: float = 1.0,
    dora: ColumnScale | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y, and h where it is made here (a given). ``more``: x_i and w_i of the form for groups."""
    (M, K), N = x.shape, w.shape[1]
    R = b.shape[0] if b is not None else 0
    turned = is_transposed(w)
    parts = CONSUMERS.value if config.COOPERATIVE else 1
    rows, BLOCK_N, BLOCK_K = config.BLOCK_M // parts, config.BLOCK_N, config.BLOCK_K
    width = BLOCK_N // 2 if config.HALVES else BLOCK_N  # what is copied of w and b at a time
    width_y = BLOCK_N // (config.SUBTILES or 1)
    others: list[Tiled | None] = [None] * (2 * MAX_GROUP - 2)
    Ks = [0] * (MAX_GROUP - 1)
    for i, (x_i, w_i) in enumerate(more):
        others[2 * i : 2 * i + 2] = (
            _tiled(x_i, rows, BLOCK_K),
            _tiled(w_i, BLOCK_K, width, turned),
        )
        Ks[i] = x_i.shape[1]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    num_m, num_n = cdiv(M, config.BLOCK_M), cdiv(N, BLOCK_N)
    items, tiles_h = num_m * num_n, 0
    synchronised: AbstractContextManager[torch.Tensor | None] = nullcontext()
    if a is not None:
        h = torch.empty((M, _padded_row(R)), dtype=x.dtype, device=x.device)
        tiles_h = num_m * cdiv(R, BLOCK_K)
        items += tiles_h
        synchronised = persistent.sync_buffer(x.device, tiles_h * parts)
    num_sms = device_info(x.device).num_sms
    halved = 0
    if config.HALVES:
        halved = last_round(config, num_m, num_n, tiles_h, num_sms)
        items += halved
    with device_guard(x), synchronised as sync:
        _launch_specialized(
            (min(num_sms, items), 1, 1),
            (
                _tiled(x, rows, BLOCK_K),
                _tiled(w, BLOCK_K, width, turned),
                *others,
                _tiled(_fit(a, x.dtype, turned), BLOCK_K, BLOCK_K, turned)
                if a is not None
                else None,
                _tiled(_fit(h, x.dtype), rows, BLOCK_K) if h is not None else None,
                _tiled(_fit(b, x.dtype, turned), BLOCK_K, width, turned) if b is not None else None,
                _tiled(y, rows, width_y),
                _tiled(dora.z, rows, width_y) if dora and dora.z is not None else None,
                bias,
                dora.scale if dora else None,
                h if a is not None else None,
                sync,
            ),
            (M, N, K, _padded_row(R), bias.stride(0) if bias is not None else 0, halved, *Ks),
            (scale,),
            DEPTH_R=min(padded(R), BLOCK_K),
            STAGES=config.num_stages,
            W_TRANSPOSED=turned,
            maxnreg=MAX_REGISTERS,
            **config.meta(),
        )
    if a is None or h is None:
        return y, None
    return y, h if h.shape[1] == R else h[:, :R].contiguous()


def specialized_add_lora(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dora: ColumnScale | None = None,
) -> torch.Tensor:
    """`persistent.persistent_add_lora` by specialised warps, without dropout, but with DoRA."""
    return _launch(config, x, w, bias=bias, h=h, b=b, dora=dora)[0]


def specialized_produced(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`persistent.persistent_produced` by specialised warps, without dropout."""
    y, h = _launch(config, x, w, bias=bias, a=a, b=b, scale=scale)
    assert h is not None
    return y, h


def specialized_group(
    config: TileConfig,
    xs: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    h: torch.Tensor | None,
    b: torch.Tensor | None,
) -> torch.Tensor:
    """y [M, N] = sum_i x_i w_i + h b for up to 3 members: `group.gemm_group`'s, without dropout.

    x_i [M, K_i]; w_i [K_i, N], laid out as the first is; h [M, R] and b [R, N] are all members'
    beside and below each other, or None.
    """
    more = list(zip(xs[1:], ws[1:], strict=True))
    return _launch(config, xs[0], ws[0], more=more, h=h, b=b)[0]


def specialized_plain(config: TileConfig, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """y = x w: the base product alone, which the others are measured against."""
    return _launch(config, x, w)[0]

"""The warps of specialized.py that multiply, and store their tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import persistent
from .specialized_ring import place_of, proxy_fence, ring_place, take

FLAGS = persistent.FLAGS
# Triton's own functions, compiled as Gluon's: they touch no layout.
halves, publish, store_h = (
    gluon.jit(function.fn)
    for function in (persistent.halves, persistent.publish, persistent.store_h)
)

# Triton 3.9's name of it, and 3.6's.
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = gl.constexpr(4)  # a warp group: what a wgmma is issued by


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

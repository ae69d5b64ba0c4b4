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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import persistent
from .alignment import aligned_row, is_transposed, rows_obstacle
from .configs import MAX_GROUP
from .copy import aligned_copy
from .device import device_guard, device_info
from .gemm import ColumnScale
from .launch import Launcher, Tiled
from .sizes import cdiv, padded
from .specialized_consumer import CONSUMER_WARPS, CONSUMERS, consume
from .specialized_loader import loader
from .specialized_ring import BOARD
from .tile_config import TileConfig

EPOCH = persistent.EPOCH
# Of a block's 64 K registers: 12 warps start with as many each, then most are the consumers'.
MAX_REGISTERS = 168
LOADER_REGISTERS, CONSUMER_REGISTERS = gl.constexpr(24), gl.constexpr(240)


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
    if t.dtype == dtype and rows_obstacle(t, turned) is None:
        return t
    copy = aligned_copy(t.t() if turned else t, dtype)
    return copy.t() if turned else copy


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
        h = torch.empty((M, aligned_row(R)), dtype=x.dtype, device=x.device)
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
            (M, N, K, aligned_row(R), bias.stride(0) if bias is not None else 0, halved, *Ks),
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

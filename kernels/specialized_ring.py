"""What both kinds of specialized.py's warps use: the ring, the board, and the order of items."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import tiles

grouped_tile = gluon.jit(tiles.grouped_tile.fn)  # Triton's own: it touches no layout

BOARD = gl.constexpr(4)  # items that the loader is ahead of the consumers, at most


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

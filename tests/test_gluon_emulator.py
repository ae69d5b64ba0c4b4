"""The emulator of Gluon finds what is wrong: small kernels, right and with one fault each."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from gluon_emulator import Deadlock, Emulated
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused_lora.kernels.specialized_consumer import async_store
from fused_lora.kernels.specialized_loader import async_load
from fused_lora.kernels.specialized_ring import proxy_fence

SIZE, TILES, SEEDS = 16, 6, 25
LAYOUT = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])


@gluon.jit
def load_tiles(x_desc, ring, ready, empty, tiles, FAULT: gl.constexpr):
    for tile in range(tiles):
        place = tile % 2
        parity = tile // 2 & 1
        if FAULT != "no wait for the place":
            mbarrier.wait(empty.index(place), parity ^ 1)
        size = x_desc.block_type.nbytes
        mbarrier.expect(ready.index(place), size - 2 if FAULT == "other bytes" else size)
        async_load(x_desc, [tile * 16, 0], ready.index(place), ring.index(place))


@gluon.jit
def double_tiles(y_desc, ring, stage, ready, empty, tiles, FAULT: gl.constexpr):
    for tile in range(tiles):
        place = tile % 2
        parity = tile // 2 & 1
        if FAULT == "wrong parity":
            parity = parity ^ 1
        if FAULT != "no wait for the copy":
            mbarrier.wait(ready.index(place), parity)
        if FAULT == "given back too early":
            mbarrier.arrive(empty.index(place))
        acc = gl.zeros([16, 16], gl.float32, LAYOUT)
        acc = warpgroup_mma(ring.index(place), ring.index(place), acc, is_async=True)
        if FAULT == "given back in the middle":
            mbarrier.arrive(empty.index(place))
        acc = warpgroup_mma_wait(1 if FAULT == "no wait for the product" else 0, deps=(acc,))
        if FAULT != "given back too early" and FAULT != "given back in the middle":
            if FAULT != "not given back":
                mbarrier.arrive(empty.index(place))
            if FAULT == "given back twice":
                mbarrier.arrive(empty.index(place))
        if FAULT != "no wait for the store":
            tma.store_wait(0)
        stage.store(acc.to(y_desc.dtype))
        if FAULT != "no fence":
            fence_async_shared()
        async_store(y_desc, [tile * 16, 0], stage)
    tma.store_wait(0)


@gluon.jit
def double_kernel(x_desc, y_desc, tiles, FAULT: gl.constexpr):
    ring = gl.allocate_shared_memory(x_desc.dtype, [2, 16, 16], x_desc.layout)
    stage = gl.allocate_shared_memory(y_desc.dtype, [16, 16], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        if FAULT != "not initialised":
            mbarrier.init(ready.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    gl.warp_specialize(
        [
            (double_tiles, (y_desc, ring, stage, ready, empty, tiles, FAULT)),
            (load_tiles, (x_desc, ring, ready, empty, tiles, FAULT)),
        ],
        [1],
        [24],
    )


def _run(seed, fault):
    x = torch.randn(TILES * SIZE, SIZE).half()
    y = torch.full_like(x, float("nan"))
    layout = gl.NVMMASharedLayout.get_default_for([SIZE, SIZE], gl.float16)
    x_desc, y_desc = (TensorDescriptor.from_tensor(t, [SIZE, SIZE], layout) for t in (x, y))
    Emulated(double_kernel, seed)[(1,)](x_desc, y_desc, TILES, FAULT=fault, num_warps=4)
    tiles = x.float().view(TILES, SIZE, SIZE)
    torch.testing.assert_close(y.view(TILES, SIZE, SIZE), (tiles @ tiles).half())


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_right_kernel_is_right_in_any_order(seed):
    _run(seed, "")


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("no wait for the copy", "not close"),
        ("no wait for the place", "more arrivals"),
        ("wrong parity", "waits for"),
        ("other bytes", "waits for"),
        ("given back too early", "not close"),
        ("given back in the middle", "not close"),
        ("given back twice", "more arrivals"),
        ("not given back", "waits for"),
        ("no wait for the product", "was not waited for"),
        ("no wait for the store", "not close"),
        ("no fence", "not close"),
        ("not initialised", "is not initialised"),
    ],
)
def test_a_fault_is_found(fault, what):
    """Not in every order: in some of these."""
    found = []
    for seed in range(SEEDS):
        try:
            _run(seed, fault)
        except (AssertionError, RuntimeError) as error:
            found.append(str(error))
    assert any(what in message for message in found), found


def test_a_deadlock_says_who_waits_for_what():
    with pytest.raises(Deadlock) as caught:
        _run(0, "not given back")
    assert "program 0 worker 0 load_tiles waits for phase 0 of empty[0] of 2" in str(caught.value)
    assert "program 0 default waits for phase 1 of ready[0] of 2, where 1 have ended" in str(
        caught.value
    )


@gluon.jit
def store_and_copy_kernel(x_ptr, x_desc, y_desc, FENCE: gl.constexpr):
    stage = gl.allocate_shared_memory(x_desc.dtype, [16, 16], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    rows = gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))
    at = rows[:, None] * 16 + columns[None, :]
    ones = gl.full([16, 16], 1.0, x_desc.dtype, LAYOUT)
    gl.store(x_ptr + at, ones, mask=at < 256)
    if FENCE:
        proxy_fence()
    mbarrier.expect(ready.index(0), x_desc.block_type.nbytes)
    async_load(x_desc, [0, 0], ready.index(0), stage)
    mbarrier.wait(ready.index(0), 0)
    async_store(y_desc, [0, 0], stage)


@pytest.mark.parametrize("fence", [False, True])
def test_plain_stores_to_global_memory_reach_the_copy_engine_by_a_fence(fence):
    """h is written by one program and copied by another one."""
    layout = gl.NVMMASharedLayout.get_default_for([SIZE, SIZE], gl.float16)
    x, y = (torch.zeros(SIZE, SIZE, dtype=torch.float16) for _ in range(2))
    x_desc, y_desc = (TensorDescriptor.from_tensor(t, [SIZE, SIZE], layout) for t in (x, y))
    Emulated(store_and_copy_kernel, 0)[(1,)](x, x_desc, y_desc, FENCE=fence)
    assert y.eq(1 if fence else 0).all()

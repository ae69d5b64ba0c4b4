"""The persistent TMA kernel: its four forms, the produced form's protocol, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from pairs import pairs

from fused_lora import reference
from fused_lora.kernels import persistent
from fused_lora.kernels.alignment import tma_obstacle
from fused_lora.kernels.dropout import Dropout
from fused_lora.kernels.persistent import (
    persistent_add_lora,
    persistent_one_pass,
    persistent_plain,
    persistent_produced,
)
from fused_lora.kernels.tile_config import TileConfig

M, N, K, R = 69, 136, 40, 24
DTYPES = [(torch.float32, 1e-6), (torch.float16, 2e-3)]  # of the result's norm: a few roundings
TILE = TileConfig(32, 32, 32, 4, 3, GROUP_M=2, SUBTILES=1)
TILES = [
    pytest.param(TILE, id="32x32"),
    pytest.param(replace(TILE, BLOCK_N=64, SUBTILES=2), id="32x64 in 2"),
    pytest.param(replace(TILE, BLOCK_M=16, BLOCK_N=64, SUBTILES=4, GROUP_M=8), id="16x64 in 4"),
]


class Operands:
    """Random operands, laid out as the forward reads them or as the input gradient does."""

    def __init__(self, device, dtype, *, transposed, m=M, k=K, r=R, p=0.0):
        def normal(rows, columns):
            shape = (columns, rows) if transposed else (rows, columns)
            t = (torch.randn(*shape) * max(rows, 1) ** -0.5).to(device, dtype)
            return t.t() if transposed else t

        wide = torch.randn(m, k + 8).to(device, dtype)
        self.x = wide[:, :k]  # rows that do not follow each other
        self.w, self.a, self.b = normal(k, N), normal(k, r), normal(r, N)
        self.bias = torch.randn(N).to(device, dtype)
        self.dropout, self.keep_k, self.keep_n = None, 1.0, 1.0
        if p:
            self.dropout = Dropout(torch.tensor([5], device=device), round(p * 65536))
            scale = self.dropout.keep_scale
            self.keep_k = reference.keep_mask(*self.dropout, m, k).double() * scale
            self.keep_n = reference.keep_mask(*self.dropout, m, N).double() * scale

    def h(self, keep=1.0):
        return 0.5 * (keep * self.x.double()) @ self.a.double()

    def y(self, h, keep=1.0):
        lora = keep * (h.double() @ self.b.double())
        return self.x.double() @ self.w.double() + lora + self.bias.double()


def _assert_close(got, exact, tolerance):
    assert ((got.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_one_pass(device, dtype, tolerance, transposed, tile):
    o = Operands(device, dtype, transposed=transposed)
    y, h = persistent_one_pass(tile, o.x, o.w, o.a, o.b, bias=o.bias, scale=0.5, store_h=True)
    _assert_close(h, o.h(), tolerance)
    _assert_close(y, o.y(o.h()), tolerance)


@pytest.mark.parametrize("r", [24, 96])  # in one chunk and in two
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_second(device, dtype, tolerance, tile, p, r):
    o = Operands(device, dtype, transposed=False, r=r, p=p)
    h = o.h().to(dtype)
    y = persistent_add_lora(tile, o.x, o.w, h, o.b, bias=o.bias, dropout=o.dropout)
    _assert_close(y, o.y(h, o.keep_n), tolerance)


@pytest.mark.parametrize("r", [24, 96])  # one tile of h and several
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_produced(device, dtype, tolerance, tile, r):
    """Over one sync buffer: each launch finds the flags and tickets of the one before."""
    options = {"transposed": [False, True], "p": [0.0, 0.3], "drop_x": [True, False]}
    for transposed, p, drop_x in pairs(**options):
        o = Operands(device, dtype, transposed=transposed, r=r, p=p)
        y, h = persistent_produced(
            tile, o.x, o.w, o.a, o.b, bias=o.bias, scale=0.5, dropout=o.dropout, drop_x=drop_x
        )
        _assert_close(h, o.h(o.keep_k if drop_x else 1.0), tolerance)
        _assert_close(y, o.y(h, 1.0 if drop_x else o.keep_n), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_plain(device, dtype, tolerance):
    o = Operands(device, dtype, transposed=True)
    _assert_close(persistent_plain(TILE, o.x, o.w), o.x.double() @ o.w.double(), tolerance)


def _sync(device):
    return next(b for (d, _), b in persistent._sync_buffers.items() if d.type == device.type)


def test_a_launch_leaves_the_counters_at_zero_and_its_epoch_in_the_flags(device):
    o = Operands(device, torch.float16, transposed=True)
    persistent._sync_buffers.clear()
    for launch in (1, 2, 3):
        for m in (M, 16):  # a smaller problem in between leaves older epochs behind its own flags
            persistent_produced(TILE, o.x[:m], o.w, o.a, o.b, bias=None, scale=1.0)
        epoch, finished, ticket = _sync(device)[:3].tolist()
        assert (epoch, finished, ticket) == (2 * launch, 0, 0)
        flags = _sync(device)[32:35].tolist()
        assert flags == [2 * launch, 2 * launch - 1, 2 * launch - 1]


def test_a_larger_problem_gets_a_larger_buffer(device):
    o = Operands(device, torch.float16, transposed=True)
    persistent._sync_buffers.clear()
    persistent_produced(TILE, o.x[:8], o.w, o.a, o.b, bias=None, scale=1.0)
    before = _sync(device).numel()
    y, h = persistent_produced(TILE, o.x, o.w, o.a, o.b, bias=o.bias, scale=0.5)
    assert _sync(device).numel() > before
    _assert_close(y, o.y(h), 2e-3)


def test_a_launch_that_raises_takes_its_buffer_along(device, monkeypatch):
    """The interpreter, interrupted half-way: the next launch must not go on with its tickets."""

    def interrupted(grid, tensors, *_, **__):
        sync = next(t for t in tensors if t is not None and t.dtype == torch.int32)
        sync[persistent.TICKET.value] = 2
        raise KeyboardInterrupt

    o = Operands(device, torch.float16, transposed=True)
    with monkeypatch.context() as patch:
        patch.setattr(persistent, "_launch_persistent", interrupted)
        with pytest.raises(KeyboardInterrupt):
            persistent_produced(TILE, o.x, o.w, o.a, o.b, bias=None, scale=1.0)
    y, h = persistent_produced(TILE, o.x, o.w, o.a, o.b, bias=o.bias, scale=0.5)
    _assert_close(y, o.y(h), 2e-3)


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_m", "num_n", "num_r"), [(1, 1, 1), (5, 3, 1), (9, 2, 2)])
def test_every_item_comes_after_what_it_waits_for(group_m, num_m, num_n, num_r):
    """The work list, as the kernel numbers it: each tile once, h before the y that reads it."""
    group_items = group_m * (num_r + num_n)
    made, tiles = set(), set()
    for item in range(num_m * (num_r + num_n)):
        first_m = item // group_items * group_m
        rows = min(group_m, num_m - first_m)
        row, column = first_m + item % group_items % rows, item % group_items // rows
        if column < num_r:
            assert (row, column) not in made
            made.add((row, column))
        else:
            assert all((row, r) in made for r in range(num_r))
            tiles.add((row, column - num_r))
    assert len(made) == num_m * num_r
    assert len(tiles) == num_m * num_n


def _simulate(num_programs, resident, waits_for, items, rng):
    """Programs that prefetch one ticket each, of which only some get to run at all."""
    done, ticket, holding = set(), 0, {}
    waiting = list(range(num_programs))
    running = [waiting.pop(0) for _ in range(min(resident, num_programs))]

    def draw():
        nonlocal ticket
        ticket += 1
        return ticket - 1

    for program in running:
        holding[program] = [draw(), draw()]
    steps = 0
    while running:
        ready = [p for p in running if waits_for(holding[p][0]) <= done]
        assert ready, "nobody can go on"
        program = rng.choice(ready)
        item, following = holding[program]
        if item < items:
            done.add(item)
            holding[program] = [following, draw()]
        else:
            running.remove(program)
            if waiting:
                newcomer = waiting.pop(0)
                running.append(newcomer)
                holding[newcomer] = [draw(), draw()]
        steps += 1
    assert done == set(range(items))


@pytest.mark.parametrize("resident", [1, 2, 7])
def test_progress_with_any_number_of_resident_programs(resident):
    """The docstring's argument, on the work list: any interleaving finishes."""
    import random

    num_m, num_n, num_r, group_m = 9, 4, 2, 4
    group_items, items = group_m * (num_r + num_n), num_m * (num_r + num_n)

    def waits_for(item):
        first = item // group_items * group_items
        rows = min(group_m, num_m - item // group_items * group_m)
        row, column = (item - first) % rows, (item - first) // rows
        if column < num_r or item >= items:
            return set()
        return {first + r * rows + row for r in range(num_r)}

    for seed in range(50):
        _simulate(7, resident, waits_for, items, random.Random(seed))


def test_a_flag_that_never_comes_ends_in_a_trap(device, monkeypatch):
    """A wrong epoch stands for a lost producer. The interpreter has no inline assembly to trap."""
    if device.type == "cuda":
        pytest.skip("a trap ends the process's CUDA context")
    import triton
    import triton.language as tl

    monkeypatch.setattr(persistent, "MAX_SPINS", tl.constexpr(10))

    @triton.jit
    def wait(flag_ptr):
        persistent.wait_for(flag_ptr, 2)

    flag = torch.ones(1, dtype=torch.int32)
    with pytest.raises(Exception, match="inline_asm"):
        wait[(1,)](flag)


def test_obstacles():
    x, w = torch.empty(8, 64).half(), torch.empty(64, 32).half()
    assert tma_obstacle(x, w, torch.empty(16, 64).half().t()) is None
    assert tma_obstacle(x, torch.empty(32, 64).half().t()) is None
    assert "y: a row of 30" in tma_obstacle(x, torch.empty(30, 64).half().t())
    assert "x: got strides (1, 8)" in tma_obstacle(torch.empty(64, 8).half().t(), w)
    assert "x: got strides (70, 1)" in tma_obstacle(torch.empty(8, 70).half()[:, :64], w)
    assert "W: got strides (128, 2)" in tma_obstacle(
        x, torch.empty(64, 64, 2).half()[..., 0][:, :32]
    )
    assert "A: got strides (4, 1)" in tma_obstacle(x, w, torch.empty(64, 4).half())
    assert "x: its first element" in tma_obstacle(torch.empty(8, 72).half()[:, 1:65], w)
    assert "a size is 0" in tma_obstacle(x[:0], w)

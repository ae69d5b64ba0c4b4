"""The LoRA GEMM on tensor descriptors (TMA), by persistent programs: Hopper and later.

The same products as gemm.py, whose names, roundings and dropout it shares:

    y = x W + h B (+ bias)      x [M, K], W [K, N], h [M, R], B [R, N], y [M, N]
    h = scale * x A             A [K, R]

One program a multiprocessor works through tiles of y. x, W, A and y go through tensor descriptors:
one thread issues a tile's copy, no address is computed and no edge masked. h and B, a few kilobytes
a tile, are loaded before the K loop and multiplied after it, so that their latency is hidden.
Forms, told apart by which operands are None:
    one pass   a given, sync None     x is multiplied by both W and A
    second     a None, h given        h was made before by gemm.py
    produced   a and sync given       h is made by this launch, once, see below
    plain      a and h None           y = scale * x W: the base layer alone, to measure against

The produced form's work list holds, for each group of GROUP_M rows of tiles, first the tiles of h
and then the tiles of y; x comes from L2 for one of the two. A program draws its next item from a
ticket counter. A tile of y needs its rows of h only after its own K loop, and waits there.

Why it makes progress, whatever else runs on the GPU and however few programs are resident:
    1. Tickets ascend, so an item's program has been running since before any later item was drawn.
    2. Tiles of h wait for nothing. A tile of y waits only for tiles of h, which come earlier.
    3. So the lowest unfinished item never waits: all it could wait for is earlier, hence finished.
       Its program works on it, or on an item it drew before, which would be lower still.
A program draws the ticket after next while it still works; 3 holds for that too. Waiting is bounded
all the same: after MAX_SPINS looks the kernel traps, and torch raises at the next synchronisation.

Publishing h: plain stores, a barrier, then one release exchange of the tile's flag; a consumer's
acquire of it and the barrier in its broadcast order the plain loads after them. A flag is up when
it holds this launch's epoch. The launch's last program adds one to the epoch and returns the ticket
counter to 0: nothing is cleared by another launch, and a CUDA graph may replay it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from .alignment import is_transposed
from .configs import MAX_CHUNK_R
from .device import device_guard, device_info
from .dropout import Dropout, scale_and_threshold, seed_of
from .gemm import dot_precision
from .launch import Launcher, Tiled, hearing
from .sizes import cdiv, padded
from .tile_config import TileConfig
from .tiles import grouped_tile, keep_mask

# Words of the sync buffer before the flags: the epoch of the launch before, the programs of this
# one that have finished, and the next ticket.
EPOCH, FINISHED, TICKET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FLAGS = tl.constexpr(32)  # the flags start on another cache line
MAX_SPINS = tl.constexpr(1 << 22)  # seconds; a tile of h takes microseconds


@triton.jit
def load_tile(desc, k, n, TRANSPOSED: tl.constexpr):
    """Tile of an operand [K, N] at (k, n); TRANSPOSED where memory holds it as [N, K]."""
    if TRANSPOSED:
        tile = desc.load([n, k]).T
    else:
        tile = desc.load([k, n])
    return tile


@triton.jit
def multiply(
    x_desc,
    w_desc,
    a_desc,
    acc,
    acc_h,
    row,
    col,
    K,
    seed_ptr,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc += (D o x) w and, where a is given, acc_h += x a, over all of K."""
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            offs_m = row + tl.arange(0, BLOCK_M)
            keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, k, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        w = load_tile(w_desc, k, col, W_TRANSPOSED)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
        if a_desc is not None:
            a = load_tile(a_desc, k, 0, A_TRANSPOSED)  # [BLOCK_K, BLOCK_R]
            acc_h = tl.dot(x, a.to(x.dtype), acc_h, input_precision=PRECISION)
    return acc, acc_h


@triton.jit
def load_h(h_ptr, offs_m, offs_r, M, R):
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r.to(tl.int64)[None, :]
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    # Past L1: in the produced form another multiprocessor has just written it.
    return tl.load(h_ptrs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def store_h(h_ptr, h, offs_m, offs_r, M, R):
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r.to(tl.int64)[None, :]
    tl.store(h_ptrs, h, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


@triton.jit
def load_b(b_ptr, offs_r, offs_n, R, N, stride_br, stride_bn):
    b_ptrs = b_ptr + offs_r.to(tl.int64)[:, None] * stride_br
    b_ptrs += offs_n.to(tl.int64)[None, :] * stride_bn
    return tl.load(b_ptrs, mask=(offs_r < R)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def wait_for(flag_ptr, epoch):
    """Returns once the flag holds `epoch`; traps if it never does."""
    spins = 0
    while (tl.atomic_add(flag_ptr, 0, sem="acquire") != epoch) & (spins < MAX_SPINS):
        spins += 1
    if spins >= MAX_SPINS:
        tl.inline_asm_elementwise(
            "trap; mov.u32 $0, $1;", "=r,r", [spins], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def finish(sync_ptr, epoch):
    """The end of a program: it has read the epoch, and drawn a ticket that no item has."""
    if tl.atomic_add(sync_ptr + FINISHED, 1) == tl.num_programs(0) - 1:  # so have all others
        tl.store(sync_ptr + TICKET, 0)
        tl.store(sync_ptr + FINISHED, 0)
        tl.store(sync_ptr + EPOCH, epoch)


@triton.jit
def publish(flag_ptr, epoch):
    """Raises a flag, for what every thread here has stored."""
    tl.debug_barrier()  # every thread's part of h, then the one thread's flag
    tl.atomic_xchg(flag_ptr, epoch, sem="release")


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns: no data moves between threads."""
    BLOCK_M: tl.constexpr = tile.shape[0]
    HALF_N: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, [BLOCK_M, 2, HALF_N]), [0, 2, 1]))


@triton.jit
def drop(tile, seed, threshold, offs_m, col):
    """D o tile, in halves: the whole mask and a large tile do not fit the registers together."""
    BLOCK_M: tl.constexpr = tile.shape[0]
    HALF_N: tl.constexpr = tile.shape[1] // 2
    left, right = halves(tile)
    keep = keep_mask(seed, threshold, offs_m, col, BLOCK_M, HALF_N)
    left = tl.where(keep, left, 0.0)
    keep = keep_mask(seed, threshold, offs_m, col + HALF_N, BLOCK_M, HALF_N)
    right = tl.where(keep, right, 0.0)
    both = tl.permute(tl.join(left, right), [0, 2, 1])
    return tl.reshape(both, [BLOCK_M, 2 * HALF_N])


@triton.jit
def store_tile(desc, tile, row, col, SUBTILES: tl.constexpr):
    """Stores a tile through the descriptor in 1, 2 or 4 parts: the staging memory is one part's."""
    WIDTH: tl.constexpr = tile.shape[1] // SUBTILES
    if SUBTILES == 1:
        desc.store([row, col], tile.to(desc.dtype))
    else:
        left, right = halves(tile)
        if SUBTILES == 2:
            desc.store([row, col], left.to(desc.dtype))
            desc.store([row, col + WIDTH], right.to(desc.dtype))
        else:
            first, second = halves(left)
            third, fourth = halves(right)
            desc.store([row, col], first.to(desc.dtype))
            desc.store([row, col + WIDTH], second.to(desc.dtype))
            desc.store([row, col + 2 * WIDTH], third.to(desc.dtype))
            desc.store([row, col + 3 * WIDTH], fourth.to(desc.dtype))


@triton.jit
def make_h_tile(
    x_desc,
    a_desc,
    h_ptr,
    flag_ptr,
    epoch,
    seed_ptr,
    pid_m,
    pid_r,
    M,
    K,
    R,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile [BLOCK_M, BLOCK_R] of h = scale (D o x) A, published for the other programs."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    acc, _ = multiply(
        x_desc,
        a_desc,
        None,
        acc,
        acc,
        pid_m * BLOCK_M,
        pid_r * BLOCK_R,
        K,
        seed_ptr,
        threshold,
        BLOCK_M,
        BLOCK_K,
        A_TRANSPOSED,
        A_TRANSPOSED,
        PRECISION,
    )
    store_h(h_ptr, (acc * scale).to(x_desc.dtype), offs_m, offs_r, M, R)
    publish(flag_ptr, epoch)


@triton.jit
def make_y_tile(
    x_desc,
    w_desc,
    a_desc,
    y_desc,
    bias_ptr,
    h_ptr,
    b_ptr,
    flags_ptr,
    epoch,
    seed_ptr,
    pid_m,
    pid_n,
    M,
    N,
    K,
    R,
    stride_bias,
    stride_br,
    stride_bn,
    scale,
    keep_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK_R: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    SUBTILES: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile [BLOCK_M, BLOCK_N] of y: one pass where a is given, else with h from memory."""
    # h B is what a tile ends with, from operands that were loaded before its K loop; but a mask
    # must be on it before x W is added, and many ranks are too many to hold.
    LORA_LAST: tl.constexpr = b_ptr is not None and ONE_CHUNK and seed_ptr is None
    LORA_FIRST: tl.constexpr = b_ptr is not None and not LORA_LAST
    H_FROM_MEMORY: tl.constexpr = LORA_LAST and a_desc is None
    row = pid_m * BLOCK_M
    col = pid_n * BLOCK_N
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    chunk = tl.arange(0, CHUNK_R)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + offs_n.to(tl.int64) * stride_bias
        bias = tl.load(bias_ptrs, mask=offs_n < N, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if LORA_LAST:
        b = load_b(b_ptr, chunk, offs_n, R, N, stride_br, stride_bn).to(x_desc.dtype)
        if H_FROM_MEMORY and flags_ptr is None:
            h = load_h(h_ptr, offs_m, chunk, M, R)
    if LORA_FIRST:
        for r in tl.range(0, R, CHUNK_R, num_stages=1):
            offs_r = r + chunk
            b = load_b(b_ptr, offs_r, offs_n, R, N, stride_br, stride_bn)  # [CHUNK_R, BLOCK_N]
            if flags_ptr is not None:
                wait_for(flags_ptr + r // BLOCK_R, epoch)
            h = load_h(h_ptr, offs_m, offs_r, M, R)  # [BLOCK_M, CHUNK_R]
            acc = tl.dot(h, b.to(h.dtype), acc, input_precision=PRECISION)
        if seed_ptr is not None:
            acc = drop(acc * keep_scale, tl.load(seed_ptr), threshold, offs_m, col)
    acc, acc_h = multiply(
        x_desc,
        w_desc,
        a_desc,
        acc,
        acc_h,
        row,
        col,
        K,
        None,
        threshold,
        BLOCK_M,
        BLOCK_K,
        W_TRANSPOSED,
        A_TRANSPOSED,
        PRECISION,
    )
    if a_desc is not None:
        h = (acc_h * scale).to(x_desc.dtype)
        if h_ptr is not None and pid_n == 0:
            store_h(h_ptr, h, offs_m, chunk, M, R)
    if H_FROM_MEMORY and flags_ptr is not None:
        wait_for(flags_ptr, epoch)
        h = load_h(h_ptr, offs_m, chunk, M, R)
    if LORA_LAST:
        acc = tl.dot(h, b, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += bias.to(tl.float32)[None, :]
    store_tile(y_desc, acc, row, col, SUBTILES)


@triton.jit(do_not_specialize=["scale", "keep_scale", "threshold"])
def lora_persistent_kernel(
    x_desc,
    w_desc,
    a_desc,
    y_desc,
    bias_ptr,
    h_ptr,
    b_ptr,
    sync_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    stride_bias,
    stride_br,
    stride_bn,
    scale,
    keep_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # ranks of a tile of h
    CHUNK_R: tl.constexpr,  # ranks of h B at a time
    ONE_CHUNK: tl.constexpr,  # R <= CHUNK_R
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    DROP_X: tl.constexpr,  # dropout is on x in h = scale (D o x) A, else on h B
    PRECISION: tl.constexpr,
):
    scale = tl.cast(scale, tl.float32)  # Inductor passes Python floats as fp64
    keep_scale = tl.cast(keep_scale, tl.float32)
    seed_x_ptr = seed_ptr if DROP_X else None
    seed_y_ptr = None if DROP_X else seed_ptr
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    if sync_ptr is None:
        programs = tl.num_programs(0)
        for tile in range(tl.program_id(0), num_m * num_n, programs):
            pid_m, pid_n = grouped_tile(tile, num_m, num_n, GROUP_M)
            make_y_tile(
                x_desc, w_desc, a_desc, y_desc, bias_ptr, h_ptr, b_ptr, None, 0, seed_y_ptr,
                pid_m, pid_n, M, N, K, R, stride_bias, stride_br, stride_bn,
                scale, keep_scale, threshold, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, CHUNK_R,
                ONE_CHUNK, SUBTILES, W_TRANSPOSED, A_TRANSPOSED, PRECISION,
            )  # fmt: skip
    else:
        epoch = tl.load(sync_ptr + EPOCH) + 1
        num_r = tl.cdiv(R, BLOCK_R)
        item = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
        while item < num_m * (num_r + num_n):
            next_item = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
            pid_m, column = grouped_tile(item, num_m, num_r + num_n, GROUP_M)  # below num_r: of h
            flags_ptr = sync_ptr + FLAGS + pid_m * num_r
            if column < num_r:
                make_h_tile(
                    x_desc, a_desc, h_ptr, flags_ptr + column, epoch, seed_x_ptr,
                    pid_m, column, M, K, R, scale, threshold,
                    BLOCK_M, BLOCK_K, BLOCK_R, A_TRANSPOSED, PRECISION,
                )  # fmt: skip
            else:
                make_y_tile(
                    x_desc, w_desc, None, y_desc, bias_ptr, h_ptr, b_ptr, flags_ptr, epoch,
                    seed_y_ptr, pid_m, column - num_r, M, N, K, R, stride_bias, stride_br,
                    stride_bn, scale, keep_scale, threshold, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
                    CHUNK_R, ONE_CHUNK, SUBTILES, W_TRANSPOSED, A_TRANSPOSED, PRECISION,
                )  # fmt: skip
            item = next_item
        finish(sync_ptr, epoch)


_launch_persistent = Launcher(lora_persistent_kernel, descriptors=4)


def _tiled(w: torch.Tensor, rows: int, columns: int) -> Tiled:
    """Tiles [rows, columns] of w, read as memory holds it: load_tile turns them round."""
    return Tiled(w.t(), [columns, rows]) if is_transposed(w) else Tiled(w, [rows, columns])


def rank_blocks(R: int, drop_y: bool) -> tuple[int, int]:
    """BLOCK_R and CHUNK_R: what the registers hold beside a tile's accumulator."""
    last = not drop_y and R <= MAX_CHUNK_R  # LORA_LAST: h B has its operands loaded at the start
    return min(padded(R), 128), min(padded(R), MAX_CHUNK_R if last else 32)


_sync_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}


def _kept_zeros(words: int, device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    with torch.cuda.stream(stream):
        return torch.zeros(words, dtype=torch.int32, device=device)


@contextmanager
def sync_buffer(device: torch.device, flags: int) -> Iterator[torch.Tensor]:
    """The produced form's flags: zeros at first, then as the launch before has left them.

    Launches share one where the stream orders them. A captured graph may run on any stream and
    gets its own, which it clears itself. One that raises (an interpreted launch may be interrupted
    half-way, tickets drawn) takes its buffer along.
    """
    words = FLAGS.value + triton.next_power_of_2(flags)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield torch.zeros(words, dtype=torch.int32, device=device)
        return
    cuda = device.type == "cuda"
    key = device, driver.active.get_current_stream(device.index) if cuda else 0
    buffer = _sync_buffers.pop(key, None)
    if buffer is None or buffer.numel() < words:
        stream = torch.cuda.current_stream(device) if cuda else None
        # The CUDA graphs of torch.compile put what this thread allocates where nothing may stay.
        with ThreadPoolExecutor(1) as other:
            buffer = other.submit(_kept_zeros, words, device, stream).result()
    if hearing.recorder is not None:
        hearing.recorder.hear_of_loan(partial(sync_buffer, device, flags), buffer)
    yield buffer
    _sync_buffers[key] = buffer


def _launch(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    produced: bool = False,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    drop_x: bool = False,
) -> torch.Tensor:
    (M, K), N = x.shape, w.shape[1]
    R = b.shape[0] if b is not None else 1
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return y
    BLOCK_R, CHUNK_R = rank_blocks(R, dropout is not None and not drop_x)
    rows = cdiv(M, config.BLOCK_M)
    tiles = rows * cdiv(N, config.BLOCK_N)
    programs = device_info(x.device).num_sms * config.programs_per_sm
    synchronised: AbstractContextManager[torch.Tensor | None] = nullcontext()
    if produced:
        columns_h = cdiv(R, BLOCK_R)
        tiles += rows * columns_h
        synchronised = sync_buffer(x.device, rows * columns_h)
        if x.device.type == "cpu":  # the interpreter runs one program after the other
            programs = 1
    with device_guard(x), synchronised as sync:
        _launch_persistent(
            (min(programs, tiles), 1, 1),
            (
                _tiled(x, config.BLOCK_M, config.BLOCK_K),
                _tiled(w, config.BLOCK_K, config.BLOCK_N),
                _tiled(a, config.BLOCK_K, BLOCK_R) if a is not None else None,
                Tiled(y, [config.BLOCK_M, config.BLOCK_N // (config.SUBTILES or 1)]),
                bias,
                h,
                b,
                sync,
                seed_of(dropout),
            ),
            (
                M,
                N,
                K,
                R,
                bias.stride(0) if bias is not None else 0,
                *(b.stride() if b is not None else (0, 0)),
            ),
            (scale, *scale_and_threshold(dropout)),
            BLOCK_R=BLOCK_R,
            CHUNK_R=CHUNK_R,
            ONE_CHUNK=R <= CHUNK_R,
            W_TRANSPOSED=is_transposed(w),
            A_TRANSPOSED=a is not None and is_transposed(a),
            DROP_X=drop_x,
            PRECISION=dot_precision(x.dtype),
            **config.meta(),
        )
    return y


def persistent_one_pass(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    scale: float,
    store_h: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`gemm.gemm_one_pass` on tensor descriptors, for what has no `alignment.tma_obstacle`."""
    h = x.new_empty((x.shape[0], a.shape[1])) if store_h else None
    return _launch(config, x, w, bias=bias, a=a, h=h, b=b, scale=scale), h


def persistent_add_lora(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """`gemm.gemm_add_lora` on tensor descriptors. A part of a group's h is copied."""
    return _launch(config, x, w, bias=bias, h=h.contiguous(), b=b, dropout=dropout)


def persistent_produced(
    config: TileConfig,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None = None,
    drop_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x w + h b + bias and h = scale * x a, which the launch makes once and then reads.

    Dropout is on x in h (``drop_x``: the forward), or on h b (the input gradient).
    """
    h = x.new_empty((x.shape[0], a.shape[1]))
    if dropout and drop_x:
        scale *= dropout.keep_scale
    y = _launch(
        config,
        x,
        w,
        bias=bias,
        a=a,
        h=h,
        b=b,
        produced=True,
        scale=scale,
        dropout=dropout,
        drop_x=drop_x,
    )
    return y, h


def persistent_plain(config: TileConfig, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """y = x w: the base product alone, which the others are measured against."""
    return _launch(config, x, w)

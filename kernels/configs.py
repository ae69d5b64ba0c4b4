"""Tile configurations: which exist, which are valid where, and which one a call gets.

`ship` lists every configuration that `choose_config` can return for a GPU; the tests compile all
of them. The order of the hand-scheduled ones is an H200's; of the others it is the usual one for
Triton GEMMs. Resource limits were read from compiled kernels (`benchmarks.compile_report`).
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeGuard, get_args

import torch

from .device import DeviceInfo

# Which product a configuration is for: the forms of gemm.py, grads.py, group.py, skinny.py,
# expand.py, multi.py, persistent.py and specialized.py.
TmaKind = Literal["tma_one_pass", "tma_second", "tma_produced"]
SpecializedKind = Literal["ws_second", "ws_produced", "ws_group"]
# "quantized" is gemm.py's second form with a quantised W, "fp8" the same with an x in fp8 too;
# "expand" is expand.py's, and multi.py's of the same name; "expand_group" group.py's.
Kind = Literal[
    "one_pass",
    "second",
    "quantized",
    "fp8",
    "plain",
    "grad",
    "group",
    "skinny",
    "expand",
    "expand_group",
    "multi_grad",
    TmaKind,
    SpecializedKind,
]

# An option of every launch: FMA contraction is Triton's default up to 3.9, no longer from 3.10 on.
FP_FUSION: dict[str, Any] = {"enable_fp_fusion": True}
MAX_RANK = 512
# Beyond it h's accumulator takes as much as y's, and the model prefers to make h first anyway.
MAX_ONE_PASS_RANK = 64
MAX_GROUP = 3  # members of one launch: its code is as long as they are many
MIN_DOT = 16  # tl.dot takes no smaller side
ALIGNED = 16  # Triton knows of strides and sizes whether they are multiples of it
MAX_SKINNY_M = 64
MAX_SPLIT_K = 8  # in skinny.py: the sum is unrolled, and compiled once for each
TMA_ALIGNMENT = 16  # bytes
# A tile's time for an element of y is 1 + this / BLOCK_M + this / BLOCK_N: 128 x 128 at 0.95 of the
# speed of 128 x 256, and 64 x 64 at 0.79. An estimate, of what CUTLASS's profiler usually says.
_OPERANDS = 16
MAX_CHUNK_R = 64  # ranks of h B whose operands a persistent program holds while it multiplies x W


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program: output [BLOCK_M, BLOCK_N], BLOCK_K of the reduction at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    # Of the persistent kernels only; None elsewhere.
    GROUP_M: int | None = None  # rows of tiles that run side by side and share W's tiles in L2
    SUBTILES: int | None = None  # parts that y's tile is stored in: 1, 2 or 4
    COOPERATIVE: bool | None = None  # both consumers work on one tile, else on one each
    LEAD: int | None = None  # steps that the first of them is ahead of the second on their tile
    HALVES: bool | None = None  # a last round of few tiles is one of halves of them
    programs_per_sm: int = 1
    # With a bound, ptxas spills no more than it must; without one, now and then in the K loop, to
    # have registers for another block, which a pipeline of copies has no need of.
    maxnreg: int | None = None

    def meta(self) -> dict[str, int | bool]:
        """The keyword arguments of a launch: the tile and the compiler's options."""
        return self._meta

    @functools.cached_property
    def _meta(self) -> dict[str, int | bool]:  # `asdict` at every launch would cost 10 us
        given = {k: v for k, v in asdict(self).items() if v is not None and k != "programs_per_sm"}
        return given | FP_FUSION


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv`, which is for kernels too, takes 1 us."""
    return -(-a // b)


def padded(size: int) -> int:
    """The side of a tile that holds ``size``: a power of two that tl.dot takes."""
    return max(MIN_DOT, 1 << (size - 1).bit_length())


# Largest tile first: the most arithmetic per byte. Smaller ones fill the GPU when M or N is small.
_GEMM_16BIT = (
    TileConfig(128, 256, 64, num_warps=8, num_stages=3),
    TileConfig(128, 256, 32, num_warps=8, num_stages=3),
    TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 64, 64, num_warps=4, num_stages=3),
    # Few rows: as many bytes of W on their way as fit.
    TileConfig(16, 64, 64, num_warps=4, num_stages=5, maxnreg=168),
    TileConfig(16, 64, 64, num_warps=4, num_stages=3, maxnreg=168),
)
# Where rows begin anywhere: see `for_odd_rows`.
_ODD_16BIT = TileConfig(64, 64, 32, num_warps=8, num_stages=3)
# W's tile is in registers, in fp32, between its codes and the product; and it is read in codes, so
# that a large tile saves less than it does for a plain W.
_QUANTIZED_16BIT = (
    TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 128, 64, num_warps=8, num_stages=3),
    TileConfig(64, 64, 64, num_warps=4, num_stages=4),
    TileConfig(16, 64, 64, num_warps=4, num_stages=4),
)
# BLOCK_K is the columns that share a scale of x; their product is there beside y's accumulator.
_FP8_16BIT = (
    TileConfig(128, 128, 128, num_warps=8, num_stages=4),
    TileConfig(128, 128, 128, num_warps=8, num_stages=3),
    TileConfig(64, 128, 128, num_warps=8, num_stages=3),
    TileConfig(64, 64, 128, num_warps=8, num_stages=3),
    TileConfig(16, 64, 128, num_warps=4, num_stages=4),
)
_FP8_32BIT = (
    TileConfig(32, 32, 128, num_warps=4, num_stages=2),
    TileConfig(16, 32, 128, num_warps=4, num_stages=2),
)
# fp32 products are exact (FMA, no tensor cores), there for checking: larger tiles spill.
_GEMM_32BIT = (
    TileConfig(32, 32, 16, num_warps=4, num_stages=3),
    TileConfig(16, 32, 16, num_warps=4, num_stages=3),
)
# h = x A reads x once: N is the rank, and only many small row tiles keep every SM loading.
_PLAIN_16BIT = (
    TileConfig(64, 64, 128, num_warps=4, num_stages=6),  # 27 us on an H200 at 8192 x 4096, r 16
    TileConfig(64, 64, 64, num_warps=4, num_stages=4),  # 35 us
    TileConfig(32, 64, 128, num_warps=4, num_stages=6),
    TileConfig(16, 64, 128, num_warps=4, num_stages=4),
    TileConfig(16, 64, 64, num_warps=4, num_stages=4),  # where the one above does not fit
)
# y [M <= 64, N] in ranges of K: as many bytes in flight as fit, few rows to multiply.
_SKINNY_16BIT = (
    TileConfig(16, 64, 64, num_warps=4, num_stages=4),
    TileConfig(32, 64, 64, num_warps=4, num_stages=4),
    TileConfig(64, 64, 64, num_warps=8, num_stages=3),
)
_SKINNY_32BIT = (
    TileConfig(16, 32, 32, num_warps=4, num_stages=3),
    TileConfig(64, 32, 32, num_warps=8, num_stages=3),  # 32 rows spill 16 bytes on sm_100
)
_tma = functools.partial(TileConfig, BLOCK_K=64, GROUP_M=8)
# One program a multiprocessor, unless it says two. A smaller part of y's tile in its way to the
# copy engine leaves memory for another stage; larger groups share more of W in L2.
_TMA_16BIT = (
    _tma(128, 256, num_warps=8, num_stages=4, SUBTILES=4),
    _tma(128, 256, num_warps=8, num_stages=4, SUBTILES=4, GROUP_M=16),
    _tma(128, 256, num_warps=8, num_stages=3, SUBTILES=2),
    _tma(256, 128, num_warps=8, num_stages=3, SUBTILES=2),
    _tma(128, 128, num_warps=8, num_stages=4, SUBTILES=2),
    _tma(128, 128, num_warps=4, num_stages=3, SUBTILES=4, programs_per_sm=2),
)
# A consumer has four warps.
_specialized = functools.partial(
    TileConfig, BLOCK_K=64, num_warps=4, GROUP_M=8, COOPERATIVE=True, LEAD=0
)
# A consumer's part of y is in its registers whole: 64 x 256 or 128 x 128.
_SPECIALIZED_16BIT = (
    _specialized(256, 128, num_stages=4, SUBTILES=4, LEAD=2),  # never far from the best
    _specialized(128, 256, num_stages=4, SUBTILES=4, LEAD=2),
    _specialized(128, 256, num_stages=4, SUBTILES=4, LEAD=2, GROUP_M=16),
    _specialized(128, 256, num_stages=4, SUBTILES=4),
    _specialized(128, 128, num_stages=5, SUBTILES=2, COOPERATIVE=False),
    _specialized(64, 256, num_stages=4, SUBTILES=2, COOPERATIVE=False),
    _specialized(128, 128, num_stages=6, SUBTILES=1, LEAD=2),
)
# y + h B: bound by memory, and with many adapters there are few rows of one side by side.
_EXPAND_16BIT = (
    TileConfig(32, 128, 64, num_warps=4, num_stages=2),  # 8 warps: 45 instead of 40 us on an H200
    TileConfig(16, 128, 64, num_warps=4, num_stages=2),
)
# 128 columns at a time: 78 instead of 60 us with dropout on an H200, at 8192 x 4096, r 16.
_GRAD_16BIT = (TileConfig(64, 64, 64, num_warps=4, num_stages=4, maxnreg=168),)
# What a table may choose instead, measured on its GPU: ranks above 16 and other GPUs than an H200
# were not, for the tiles above.
_BY_HALVES = (
    _specialized(128, 256, num_stages=4, SUBTILES=4, LEAD=2, HALVES=True),
    _specialized(128, 256, num_stages=4, SUBTILES=4, HALVES=True),
)
_ON_TRIAL: dict[Kind, tuple[TileConfig, ...]] = {
    "ws_second": _BY_HALVES,
    "ws_produced": _BY_HALVES,
    "plain": (
        TileConfig(64, 64, 128, num_warps=4, num_stages=4),
        TileConfig(64, 64, 128, num_warps=8, num_stages=4),
        TileConfig(64, 64, 64, num_warps=4, num_stages=8),
        TileConfig(128, 64, 64, num_warps=8, num_stages=4),
        TileConfig(32, 64, 128, num_warps=4, num_stages=4),
        TileConfig(32, 64, 64, num_warps=4, num_stages=8),
    ),
    "grad": (
        TileConfig(64, 64, 64, num_warps=8, num_stages=4, maxnreg=128),
        TileConfig(64, 64, 128, num_warps=4, num_stages=3, maxnreg=168),
        TileConfig(64, 64, 32, num_warps=4, num_stages=6, maxnreg=168),
        TileConfig(128, 64, 64, num_warps=8, num_stages=4, maxnreg=168),
    ),
}
# Rows through `order` take registers too.
_MULTI_GRAD_16BIT = (TileConfig(128, 64, 64, num_warps=8, num_stages=3, maxnreg=128),)
_GRAD_32BIT = (TileConfig(64, 32, 32, num_warps=4, num_stages=3),)
# Of each kind, for products in 16 bits and in fp32.
_TILES: dict[Kind, tuple[tuple[TileConfig, ...], tuple[TileConfig, ...]]] = {
    "one_pass": (_GEMM_16BIT, _GEMM_32BIT),
    "second": (_GEMM_16BIT, _GEMM_32BIT),
    "quantized": (_QUANTIZED_16BIT, _GEMM_32BIT),
    "fp8": (_FP8_16BIT, _FP8_32BIT),
    "plain": (_PLAIN_16BIT, _GEMM_32BIT),
    "grad": (_GRAD_16BIT, _GRAD_32BIT),
    "group": (_GEMM_16BIT, _GEMM_32BIT),
    "skinny": (_SKINNY_16BIT, _SKINNY_32BIT),
    "expand": (_EXPAND_16BIT, _GEMM_32BIT),
    "expand_group": (_EXPAND_16BIT, _GEMM_32BIT),
    "multi_grad": (_MULTI_GRAD_16BIT, _GRAD_32BIT),
    "tma_one_pass": (_TMA_16BIT, ()),
    "tma_second": (_TMA_16BIT, ()),
    "tma_produced": (_TMA_16BIT, ()),
    "ws_second": (_SPECIALIZED_16BIT, ()),
    "ws_produced": (_SPECIALIZED_16BIT, ()),
    "ws_group": (_SPECIALIZED_16BIT, ()),
}


def is_tma(kind: Kind) -> TypeGuard[TmaKind]:
    """Whether a kind is a form of the persistent kernel, which only Hopper and later have."""
    return kind in get_args(TmaKind)


def is_specialized(kind: Kind) -> TypeGuard[SpecializedKind]:
    """Whether a kind is a form of the hand-scheduled kernel, which only Hopper has."""
    return kind in get_args(SpecializedKind)


def is_valid(
    config: TileConfig,
    kind: Kind,
    r: int,
    itemsize: int,
    dropout: bool,
    device: DeviceInfo,
    dora: bool = False,
) -> bool:
    """Whether the tile fits the shared memory and the registers; the one place that decides it.

    ``itemsize`` is the bytes per element of x (2 or 4); adapters count as fp32, their widest.
    """
    if kind in ("one_pass", "tma_one_pass") and (dropout or r > MAX_ONE_PASS_RANK):
        return False
    if is_tma(kind):
        return _is_valid_tma(config, kind, r, itemsize, dropout, device)
    if is_specialized(kind):
        return not dropout and _is_valid_specialized(config, itemsize, device)
    block_r = padded(r) if kind == "one_pass" else 0
    native_fp8 = kind == "fp8" and device.capability >= 89
    of_x = 1 if native_fp8 else itemsize
    of_w = 4 if kind == "plain" else of_x  # W is an adapter there
    operands = config.BLOCK_K * (of_x * config.BLOCK_M + of_w * config.BLOCK_N)
    adapter = 4 * config.BLOCK_K * block_r
    loops = 2 if kind == "skinny" else 1  # over W and over A, each with memory of its own
    if loops * config.num_stages * (operands + adapter) > device.shared_memory:
        return False
    threads = 32 * config.num_warps
    accumulators = config.BLOCK_M * (config.BLOCK_N + block_r) / threads
    # W's tile is in registers too, as values.
    if (kind == "quantized" and device.capability < 90) or (kind == "fp8" and not native_fp8):
        return accumulators <= 32
    if dropout and kind == "plain" and config.BLOCK_M > 32:  # on x: 38 instead of 32 us on an H200
        return False
    if dropout:  # drawing a mask takes about five words per eight elements on top
        # A group has two accumulators.
        return accumulators <= (32 if kind in ("group", "expand_group") else 64)
    if dora and accumulators > 96:  # two outputs and a scale: the largest tiles spill
        return False
    if itemsize == 4 and kind == "one_pass":
        return accumulators <= 16  # rows of A are in registers too, where products are FMAs
    if device.capability >= 90:
        return accumulators <= 144
    # Before Hopper the operands of a product are in registers too, BLOCK_K of them at a time.
    return accumulators <= (128 if config.BLOCK_K <= 32 else 96)


def _is_valid_tma(
    config: TileConfig, kind: TmaKind, r: int, itemsize: int, dropout: bool, device: DeviceInfo
) -> bool:
    if device.capability < 90:
        return False
    # Triton 3.6 compiles it to an empty kernel there.
    if kind == "tma_one_pass" and device.capability >= 100:
        return False
    # On Blackwell the accumulator leaves tensor memory whole for the mask.
    if dropout and device.capability >= 100 and config.BLOCK_M * config.BLOCK_N > 128 * 128:
        return False
    M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    block_r = padded(r)
    if kind == "tma_produced" and M * min(block_r, 128) > 64 * 32 * config.num_warps:
        return False  # h's accumulator, and a fp32 A on its way to memory in x's dtype
    shared = config.num_stages * itemsize * K * (M + N)
    staged_y = itemsize * M * N // (config.SUBTILES or 1)
    held = block_r if r <= MAX_CHUNK_R and not dropout else 0  # ranks of b and h held for the end
    if kind == "tma_produced":  # the ticket loop gives y's part the operands' memory
        shared += itemsize * N * held
    elif kind == "tma_second":
        shared += staged_y + itemsize * (M + N) * held
    else:
        shared += staged_y + itemsize * N * held
        shared += (4 * config.num_stages + itemsize) * K * block_r  # and a, in x's dtype as well
    shared += 1024  # barriers, and the reserve of each block
    return shared * config.programs_per_sm <= device.shared_memory + 1024


def _is_valid_specialized(config: TileConfig, itemsize: int, device: DeviceInfo) -> bool:
    if not 90 <= device.capability < 100:  # wgmma is Hopper's alone
        return False
    M, N, SUBTILES = config.BLOCK_M, config.BLOCK_N, config.SUBTILES or 1
    if config.HALVES and SUBTILES == 1:  # half of them is stored for half a tile
        return False
    shared = config.num_stages * itemsize * config.BLOCK_K * (M + N)
    consumer_rows = M // 2 if config.COOPERATIVE else M
    shared += 2 * min(SUBTILES, 2) * itemsize * consumer_rows * N // SUBTILES  # staged parts of y
    shared += 1024  # barriers, and what Triton keeps of its own
    return shared <= device.shared_memory and consumer_rows * N <= 128 * 128


@functools.lru_cache(maxsize=1024)
def ship(
    kind: Kind, r: int, itemsize: int, dropout: bool, device: DeviceInfo, dora: bool = False
) -> tuple[TileConfig, ...]:
    """The valid configurations for this kind of call, largest first; empty if there is none."""
    of_16_bits, of_32_bits = _TILES[kind]
    configs = _as_wide_as_the_rank(of_16_bits if itemsize == 2 else of_32_bits, kind, r)
    return tuple(c for c in configs if is_valid(c, kind, r, itemsize, dropout, device, dora))


@functools.lru_cache(maxsize=1024)
def tunable(
    kind: Kind, r: int, itemsize: int, dropout: bool, device: DeviceInfo, dora: bool = False
) -> tuple[TileConfig, ...]:
    """All that a table may choose: what `ship` gives, and what no default is made of."""
    more = _as_wide_as_the_rank(_ON_TRIAL.get(kind, ()) if itemsize == 2 else (), kind, r)
    more = tuple(c for c in more if is_valid(c, kind, r, itemsize, dropout, device, dora))
    return tuple(dict.fromkeys(ship(kind, r, itemsize, dropout, device, dora) + more))


def _as_wide_as_the_rank(
    configs: tuple[TileConfig, ...], kind: Kind, r: int
) -> tuple[TileConfig, ...]:
    """Of those kernels whose output is."""
    if kind not in ("plain", "grad", "multi_grad"):
        return configs
    return tuple(replace(c, BLOCK_N=min(c.BLOCK_N, padded(r))) for c in configs)


@functools.lru_cache(maxsize=4096)
def choose_config(
    kind: Kind,
    M: int,
    N: int,
    r: int,
    itemsize: int,
    dropout: bool,
    device: DeviceInfo,
    dora: bool = False,
    groups: int = 1,
) -> TileConfig:
    """The valid tile that should be done with the output [M, N], of each of ``groups``, first.

    Multiprocessors work through tiles in rounds, the last of which may be mostly empty; and a tile
    of BLOCK_M x BLOCK_N reads BLOCK_M + BLOCK_N operands for each step of K, so that a small one is
    slower for what it computes. None is more than half empty rows, if there is another. Raises
    ValueError where `ship` is empty.
    """
    valid = ship(kind, r, itemsize, dropout, device, dora)
    if not valid:
        raise ValueError(f"no {kind} tile configuration takes rank {r} on {device}")
    if kind in ("grad", "multi_grad"):  # split over the rows, so that one tile fills any GPU
        return valid[0]
    if kind == "skinny":  # likewise
        return next((c for c in valid if c.BLOCK_M >= M), valid[-1])
    valid = tuple(c for c in valid if c.BLOCK_M <= 2 * padded(M)) or valid[-1:]

    def cost(config: TileConfig) -> float:
        side_m, side_n = config.BLOCK_M, config.BLOCK_N
        return computed(config, M, N, device, groups) * (
            1 + _OPERANDS / side_m + _OPERANDS / side_n
        )

    return min(valid, key=cost)


def for_odd_rows(config: TileConfig, itemsize: int) -> TileConfig:
    """The tile for a product one of whose operands `is_odd`.

    Each of its elements has an address of its own, and larger tiles spill: 8 to 2000 bytes a
    thread. Of some that do, the ptxas of Triton 3.6 makes wgmmas that read registers which nothing
    has written (illegal accesses on an H200, or wrong results). Tiles of fewer rows have none.
    """
    if not may_be_odd(config, itemsize):
        return config
    return replace(_ODD_16BIT, BLOCK_N=min(config.BLOCK_N, _ODD_16BIT.BLOCK_N))


def may_be_odd(config: TileConfig, itemsize: int) -> bool:
    """Whether the tile multiplies by wgmma, so that odd operands matter: to look takes 2 us."""
    return itemsize == 2 and config.BLOCK_M >= 64


def is_odd(*matrices: torch.Tensor) -> bool:
    """Whether Triton loads the elements of one of them one by one.

    It looks at strides, which are 1 or multiples of 16, and at addresses, which are of 16 bytes.
    """
    for matrix in matrices:
        outer, inner = matrix.stride()
        if any(stride > 1 and stride % ALIGNED for stride in (outer, inner)):
            return True
        if matrix.data_ptr() % 16 or (1 not in (outer, inner) and max(outer, inner) > 0):
            return True
    return False


def is_odd_rank(r: int) -> bool:
    """Whether ranks are loaded one by one, and more than one tile of them: in persistent.py they
    spill then.
    """
    return r > MIN_DOT and r % ALIGNED != 0


def computed(config: TileConfig, M: int, N: int, device: DeviceInfo, groups: int = 1) -> int:
    """Elements that a GPU has time for in the rounds of tiles that y [M, N] takes; M N at least.

    ``groups``: how many such outputs there are.
    """
    tiles = groups * cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    programs = device.num_sms * config.programs_per_sm
    return cdiv(tiles, programs) * programs * config.BLOCK_M * config.BLOCK_N


def split_k(config: TileConfig, N: int, K: int, R: int, device: DeviceInfo) -> int:
    """Ranges of K in skinny.py: for two programs a multiprocessor, of steps for its pipeline."""
    tiles = cdiv(N, config.BLOCK_N) + cdiv(R, config.BLOCK_N)
    wanted = cdiv(2 * device.num_sms, tiles)
    return max(1, min(wanted, MAX_SPLIT_K, K // (2 * config.BLOCK_K)))


def is_transposed(w: torch.Tensor) -> bool:
    """Whether memory holds w by columns."""
    return w.stride(1) != 1


def tma_obstacle(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor | None = None) -> str | None:
    """Why x [M, K], w [K, N] and a [K, R] cannot all be read by TMA, or y written; None if so.

    The copy engine takes base pointers and row strides of a multiple of 16 bytes, and a row's
    elements side by side; of w and a either dimension may be the row.
    """
    if 0 in x.shape or 0 in w.shape:
        return "a size is 0"
    if w.shape[1] * x.element_size() % TMA_ALIGNMENT:
        return f"y: a row of {w.shape[1]} is not a multiple of {TMA_ALIGNMENT} bytes"
    for name, tensor in (("x", x), ("W", w), ("A", a)):
        if tensor is None:
            continue
        if why := rows_obstacle(tensor, name != "x" and is_transposed(tensor)):
            return f"{name}: {why}"
    return None


def rows_obstacle(t: torch.Tensor, turned: bool = False) -> str | None:
    """Why the copy engine cannot read the rows of t, ``turned``: of t^T; None if it can."""
    outer, inner = t.stride()[::-1] if turned else t.stride()
    step = outer * t.element_size()
    if inner != 1 or step == 0 or step % TMA_ALIGNMENT:
        return (
            f"got strides {t.stride()} of {t.element_size()} bytes, "
            f"TMA wants rows of neighbours, {TMA_ALIGNMENT} bytes or a multiple apart"
        )
    if t.data_ptr() % TMA_ALIGNMENT:
        return f"its first element is not at a multiple of {TMA_ALIGNMENT} bytes"
    return None


def aligned_row(columns: int) -> int:
    """``columns`` of 16 bits, rounded up to what the copy engine wants rows to be apart."""
    return cdiv(columns, TMA_ALIGNMENT // 2) * (TMA_ALIGNMENT // 2)

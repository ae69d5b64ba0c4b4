"""Which tile configurations are valid where, and which one a call gets.

`ship` lists every configuration that `choose_config` can return for a GPU; the tests compile all
of them. Resource limits were read from compiled kernels (`benchmarks.compile_report`).
"""

from __future__ import annotations

import functools
from dataclasses import replace

from .device import DeviceInfo
from .sizes import cdiv, padded
from .tile_config import ON_TRIAL, TILES, Kind, TileConfig, TmaKind, is_specialized, is_tma

MAX_RANK = 512
# Beyond it h's accumulator takes as much as y's, and the model prefers to make h first anyway.
MAX_ONE_PASS_RANK = 64
MAX_GROUP = 3  # members of one launch: its code is as long as they are many
MAX_SKINNY_M = 64
MAX_SPLIT_K = 8  # in skinny.py: the sum is unrolled, and compiled once for each
# A tile's time for an element of y is 1 + this / BLOCK_M + this / BLOCK_N: 128 x 128 at 0.95 of the
# speed of 128 x 256, and 64 x 64 at 0.79. An estimate, of what CUTLASS's profiler usually says.
_OPERANDS = 16
MAX_CHUNK_R = 64  # ranks of h B whose operands a persistent program holds while it multiplies x W


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
    of_16_bits, of_32_bits = TILES[kind]
    configs = _as_wide_as_the_rank(of_16_bits if itemsize == 2 else of_32_bits, kind, r)
    return tuple(c for c in configs if is_valid(c, kind, r, itemsize, dropout, device, dora))


@functools.lru_cache(maxsize=1024)
def tunable(
    kind: Kind, r: int, itemsize: int, dropout: bool, device: DeviceInfo, dora: bool = False
) -> tuple[TileConfig, ...]:
    """All that a table may choose: what `ship` gives, and what no default is made of."""
    more = _as_wide_as_the_rank(ON_TRIAL.get(kind, ()) if itemsize == 2 else (), kind, r)
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

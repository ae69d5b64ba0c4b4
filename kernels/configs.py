"""Tile configurations: which exist, which are valid where, and which one a call gets.

`ship` lists every configuration that `choose_config` can return for a GPU; the tests compile all
of them. No GPU has measured them yet: the order below is the usual one for Triton GEMMs, and the
resource limits were read from compiled kernels (`python -m benchmarks.compile_report`).
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Literal

from .device import DeviceInfo

# Which product a configuration is for: the three forms of gemm.py, then grads.py and group.py.
Kind = Literal["one_pass", "second", "plain", "grad", "group"]

MAX_RANK = 512
# Beyond it h's accumulator takes as much as y's, and the model prefers to make h first anyway.
MAX_ONE_PASS_RANK = 64
MAX_GROUP = 3  # members of one launch: its code is as long as they are many
MIN_DOT = 16  # tl.dot takes no smaller side


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program: output [BLOCK_M, BLOCK_N], BLOCK_K of the reduction at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int | bool]:
        """The keyword arguments of a launch: the tile and the compiler's options."""
        # FMA contraction is Triton's default up to 3.9 and no longer from 3.10 on.
        return {**asdict(self), "enable_fp_fusion": True}


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
    TileConfig(16, 64, 64, num_warps=4, num_stages=3),
)
# fp32 products are exact (FMA, no tensor cores), there for checking: larger tiles spill.
_GEMM_32BIT = (
    TileConfig(32, 32, 16, num_warps=4, num_stages=3),
    TileConfig(16, 32, 16, num_warps=4, num_stages=3),
)
# h = x A reads x once: N is the rank, and only many small row tiles keep every SM loading.
_PLAIN_16BIT = (
    TileConfig(64, 64, 64, num_warps=4, num_stages=4),
    TileConfig(16, 64, 128, num_warps=4, num_stages=4),
)
_GRAD_16BIT = (TileConfig(128, 64, 64, num_warps=4, num_stages=3),)
_GRAD_32BIT = (TileConfig(64, 32, 32, num_warps=4, num_stages=3),)


def _candidates(kind: Kind, itemsize: int) -> tuple[TileConfig, ...]:
    if kind == "grad":
        return _GRAD_16BIT if itemsize == 2 else _GRAD_32BIT
    if itemsize == 4:
        return _GEMM_32BIT
    return _PLAIN_16BIT if kind == "plain" else _GEMM_16BIT


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
    if kind == "one_pass" and (dropout or r > MAX_ONE_PASS_RANK):
        return False
    block_r = padded(r) if kind == "one_pass" else 0
    operands = itemsize * config.BLOCK_K * (config.BLOCK_M + config.BLOCK_N)
    adapter = 4 * config.BLOCK_K * block_r
    if config.num_stages * (operands + adapter) > device.shared_memory:
        return False
    threads = 32 * config.num_warps
    accumulators = config.BLOCK_M * (config.BLOCK_N + block_r) / threads
    if dropout:  # drawing a mask takes about five words per eight elements on top
        return accumulators <= (32 if kind == "group" else 64)  # a group has two accumulators
    if dora and accumulators > 96:  # two outputs and a scale: the largest tiles spill
        return False
    if device.capability >= 90:
        return accumulators <= 144
    # Before Hopper the operands of a product are in registers too, BLOCK_K of them at a time.
    return accumulators <= (128 if config.BLOCK_K <= 32 else 96)


@functools.lru_cache(maxsize=1024)
def ship(
    kind: Kind, r: int, itemsize: int, dropout: bool, device: DeviceInfo, dora: bool = False
) -> tuple[TileConfig, ...]:
    """The valid configurations for this kind of call, largest first; empty if there is none."""
    configs = _candidates(kind, itemsize)
    if kind in ("plain", "grad"):  # the output is as wide as the rank
        configs = tuple(replace(c, BLOCK_N=min(c.BLOCK_N, padded(r))) for c in configs)
    return tuple(c for c in configs if is_valid(c, kind, r, itemsize, dropout, device, dora))


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
) -> TileConfig:
    """The largest valid tile that gives every multiprocessor one of the output [M, N].

    Where none does, the one that makes the most tiles; in either case none that is more than half
    empty rows, if there is another. Raises ValueError where `ship` is empty.
    """
    valid = ship(kind, r, itemsize, dropout, device, dora)
    if not valid:
        raise ValueError(f"no {kind} tile configuration takes rank {r} on {device}")
    if kind == "grad":  # split over the reduction, so that one tile size fills any GPU
        return valid[0]
    valid = tuple(c for c in valid if c.BLOCK_M <= 2 * padded(M)) or valid[-1:]

    def tiles(config: TileConfig) -> int:
        return -(-M // config.BLOCK_M) * -(-N // config.BLOCK_N)

    return next((c for c in valid if tiles(c) >= device.num_sms), max(valid, key=tiles))

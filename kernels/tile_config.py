"""Tile configurations: what one is, and which there are of every kind of product.

The order of the hand-scheduled ones is an H200's; of the others it is the usual one for Triton
GEMMs. Which of them a call may have, and has, is configs.py's to say.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeGuard, get_args

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
# Where rows begin anywhere: see `alignment.for_odd_rows`.
ODD_16BIT = TileConfig(64, 64, 32, num_warps=8, num_stages=3)
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
ON_TRIAL: dict[Kind, tuple[TileConfig, ...]] = {
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
TILES: dict[Kind, tuple[tuple[TileConfig, ...], tuple[TileConfig, ...]]] = {
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

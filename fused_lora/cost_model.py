"""Predicted times of the strategies, on measured ceilings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .calls import Call, rounds_input
from .codes import FOUR_BIT
from .kernels.alignment import for_odd_rows
from .kernels.configs import choose_config, computed, split_k
from .kernels.device import DeviceInfo, has_fp8
from .kernels.sizes import ALIGNED, cdiv, padded
from .kernels.tile_config import Kind, TileConfig
from .quantized_weight import Layout
from .strategies import WAYS, obstacle
from .tables import Strategy

# Measured ceilings of the model: bf16 operations and bytes a second. Other GPUs get the H100's.
CEILINGS = {"H100": (798e12, 3.0e12), "H200": (788e12, 4.3e12)}
# What a large product in a kernel has of cuBLAS's speed, by the GPU's generation: on Hopper as
# measured on an H200 (`benchmarks.base_product` at 8192 x 4096 x 4096) in gemm.py, persistent.py
# (less where it multiplies by A too) and specialized.py; elsewhere estimates, from what others have
# measured of Triton's tutorial: 0.89 to 0.96 on an A100 (triton-lang/triton issue 6523).
_OF_CUBLAS = {8: 0.92}
_OF_CUBLAS_NEWER = 0.85
_OF_CUBLAS_ON_HOPPER: dict[Kind, float] = {
    "tma_one_pass": 0.82,
    "tma_second": 0.92,
    "tma_produced": 0.92,
    "ws_second": 0.98,
    "ws_produced": 0.98,
}
_OF_CUBLAS_ON_HOPPER_BY_POINTERS = 0.71
_ODD_OF_CUBLAS = 0.3  # with the tile that odd rows get: an estimate
LAUNCH = 4e-6  # seconds that a second, dependent launch adds: an estimate
_LATENCY = 0.7e-6  # seconds that a load from a busy memory takes: an estimate
# Codes that become values in the K loop in a second: about 12 instructions each, on 132 SMs of 128
# lanes at 1.7 GHz. Counted, not measured.
_DECODED = 2.4e12


def ceilings(device: DeviceInfo) -> tuple[float, float]:
    """Operations and bytes a second that the model counts with."""
    known = (found for gpu, found in CEILINGS.items() if gpu in device.name)
    return next(known, CEILINGS["H100"])


def of_cublas(device: DeviceInfo, kind: Kind) -> float:
    """What a kernel's multiplications are expected to reach of cuBLAS's speed."""
    if device.capability // 10 == 9:
        return _OF_CUBLAS_ON_HOPPER.get(kind, _OF_CUBLAS_ON_HOPPER_BY_POINTERS)
    return _OF_CUBLAS.get(device.capability // 10, _OF_CUBLAS_NEWER)


def predicted_seconds(call: Call, device: DeviceInfo) -> dict[Strategy, float]:
    """Time of each strategy that can take the call, by the design's model on measured ceilings.

    one_pass    the base product; the tensor cores also multiply by A: r_pad / BLOCK_N
    split       one more read of x and one more launch
    one_launch  one more read of x
    skinny      one read of W; parts of y written and read; one more launch
    library     as split, and one more read and write of y and a third launch: by cuBLAS, or, where
                the input gradient drops h B, by a kernel of ours

    The base product takes whole rounds of tiles (`configs.computed`). However few bytes move, a
    program goes through K a BLOCK_K at a time, and num_stages - 1 of these are on their way while
    it waits for one. skinny has K in ranges. cuBLAS's tiles are taken to be ours, and its
    multiplications faster than a kernel's (`of_cublas`), in which tma_ and ws_ strategies differ
    from their namesakes. The launch of y does not pay here for a mask that it draws.

    Only in_loop takes an x that is rounded to fp8 as well: codes are written once, nothing decoded.

    A quantised W0 adds to each of them N K (c + s) / bandwidth and a launch, for its scratch of
    values, with c and s the bytes of a code and of an element of x. in_loop instead is split with
    c for s in the base product's traffic, and each tile of W0 becomes values once for every BLOCK_M
    rows of x: ceil(M / BLOCK_M) N K / DECODED more. That grows with M where the scratch does not:
    in_loop is for few rows. An estimate: no GPU has measured DECODED, an instruction count.
    """
    M, N, K, r = call.M, call.N, call.K, call.r
    itemsize = call.dtype.itemsize
    flops, bandwidth = ceilings(device)
    odd = bool(N % ALIGNED or K % ALIGNED)

    def loading(tile: TileConfig, moved: float, K: int = K) -> float:
        """Seconds to move ``moved`` bytes, by programs that go through K of the reduction."""
        waiting = _LATENCY * cdiv(K, tile.BLOCK_K) / (tile.num_stages - 1)
        return max(moved / bandwidth, waiting)

    def product(kind: Kind, N: int, dropout: bool = False) -> tuple[TileConfig, float]:
        """Tile of the launch for y [M, N], and its multiplications in seconds."""
        tile = choose_config(kind, M, N, r, itemsize, dropout, device)
        rate = of_cublas(device, kind)
        if odd and kind in ("one_pass", "second"):
            tile, rate = for_odd_rows(tile, itemsize), _ODD_OF_CUBLAS
        return tile, 2 * computed(tile, M, N, device) * K / (flops * rate)

    touch_y = 2 * itemsize * M * N / bandwidth
    if M * N * K == 0:
        return {"split": LAUNCH, "library": touch_y + 2 * LAUNCH}
    moved = itemsize * (M * K + K * N + M * N)
    read_x = itemsize * M * K / bandwidth
    if rounds_input(call):
        native = has_fp8(call.device)
        moved = itemsize * (M * N + 2 * M * K) + N * K + 2 * M * K * (1 if native else itemsize)
        tile, gemm = product("fp8", N)
        return {"in_loop": max(gemm / (2 if native else 1), loading(tile, moved)) + 2 * LAUNCH}

    def time(strategy: Strategy) -> float:
        way = WAYS[strategy]
        if way.kind is None:
            tile = choose_config("second", M, N, r, itemsize, False, device)
            gemm = 2 * computed(tile, M, N, device) * K / flops
            return max(gemm, loading(tile, moved)) + read_x + touch_y + 2 * LAUNCH
        if strategy == "skinny":
            tile = choose_config(way.kind, M, N, r, itemsize, False, device)
            splits = split_k(tile, N, K, r, device)
            parts = 2 * 4 * M * (N + r) * splits
            return loading(tile, moved + parts, cdiv(K, splits)) + LAUNCH
        if strategy == "in_loop":
            tile, gemm = product(way.kind, N, call.dropout)
            decoding = cdiv(M, tile.BLOCK_M) * N * K / _DECODED
            saved = N * K * (itemsize - code_bytes)
            return max(gemm, loading(tile, moved - saved)) + read_x + LAUNCH + decoding
        tile, gemm = product(way.kind, N)
        if way.h == "same pass":
            return max(gemm * (1 + padded(r) / tile.BLOCK_N), loading(tile, moved))
        making_h = read_x + (LAUNCH if way.h == "before" else 0)
        return max(gemm, loading(tile, moved)) + making_h

    code_bytes = bytes_of(call.quantized) if call.quantized else 0.0
    scratch = N * K * (code_bytes + itemsize) / bandwidth + LAUNCH if call.quantized else 0.0
    possible = [s for s in WAYS if obstacle(call, s, device) is None]
    return {s: time(s) + (0.0 if s == "in_loop" else scratch) for s in possible}


def bytes_of(layout: Layout) -> float:
    """Of a code."""
    return 0.5 if layout.format in FOUR_BIT else 1.0


def decodes_in_loop(
    shape: Sequence[int], layout: Layout, tiles: int, dtype: torch.dtype, device: DeviceInfo
) -> bool:
    """Whether a launch over experts' codes, ``shape`` [E, N, K], should make values of them itself.

    It does for each of its ``tiles`` of rows, each of one expert. A scratch tensor of all values is
    written once, whatever experts have rows, and read instead of the codes.
    """
    E, N, K = shape
    _, bandwidth = ceilings(device)
    values, codes = dtype.itemsize, bytes_of(layout)
    scratch = E * N * K * (values + codes) / bandwidth + LAUNCH
    scratch += min(E, tiles) * N * K * (values - codes) / bandwidth
    decoding: float = tiles * N * K / _DECODED
    return decoding <= scratch

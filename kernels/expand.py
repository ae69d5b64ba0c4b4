"""The adapter's part onto a finished product, in place: what cuBLAS's has no epilogue for.

    y += D o (h b)      h [M, R], b [R, N], y [M, N]

cuBLAS multiplies x W faster than our kernels, by more than this costs: one more read and write of
y, h and b being small. `Tensor.addmm_` does the same without a mask; with one it would need h b and
the mask in tensors of their own.

y is the product rounded to its dtype; the sum is in fp32, and rounded once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import device_guard
from .dropout import Dropout, scale_and_threshold, seed_of
from .gemm import dot_precision
from .launch import Launcher
from .sizes import cdiv, padded
from .tile_config import TileConfig
from .tiles import add_product, keep_mask, tile_places


@triton.jit(do_not_specialize=["scale", "threshold"])
def add_lora_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    seed_ptr,
    M,
    N,
    R,
    stride_ym,
    stride_hm,
    stride_br,
    stride_bn,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # ranks
    PRECISION: tl.constexpr,
):
    # Along the rows: what runs side by side shares h, and touches y where the memory has it.
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    offs_m, rows, cols, in_m, in_n = tile_places(pid_m, pid_n, M, N, BLOCK_M, BLOCK_N)

    y_ptrs = y_ptr + rows * stride_ym + cols
    y = tl.load(y_ptrs, mask=in_m & in_n, other=0.0)  # first: it is what takes the time
    acc = add_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        h_ptr,
        b_ptr,
        rows,
        cols,
        in_m,
        in_n,
        R,
        stride_hm,
        1,
        stride_br,
        stride_bn,
        BLOCK_K,
        False,
        PRECISION,
    )
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), threshold, offs_m, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * tl.cast(scale, tl.float32), 0.0)
    tl.store(y_ptrs, (y.to(tl.float32) + acc).to(y.dtype), mask=in_m & in_n)


_launch_add_lora = Launcher(add_lora_kernel)


def add_lora(
    config: TileConfig,
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    dropout: Dropout | None,
) -> None:
    """y += D o (h b), in place.

    y [M, N] and h [M, R] in one dtype, their rows contiguous; b [R, N] in any floating dtype and of
    any strides.
    """
    (M, N), R = y.shape, b.shape[0]
    if M == 0 or N == 0:
        return
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    meta = config.meta() | {"BLOCK_K": min(padded(R), config.BLOCK_K)}
    with device_guard(y):
        _launch_add_lora(
            (tiles, 1, 1),
            (y, h, b, seed_of(dropout)),
            (M, N, R, y.stride(0), h.stride(0), *b.stride()),
            scale_and_threshold(dropout),
            PRECISION=dot_precision(y.dtype),
            **meta,
        )

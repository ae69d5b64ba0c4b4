"""A copy of a matrix in another dtype, with rows that a tensor descriptor can have.

`Tensor.copy_` does the same; but a call that does nothing except launch kernels of ours is replayed
(`replay`), and adapters in fp32 over a 16-bit layer, PEFT's default, are copied in every call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .alignment import aligned_row
from .device import device_guard
from .launch import Launcher
from .sizes import cdiv
from .tile_config import FP_FUSION

_ELEMENTS = 2048  # a program's: 4 warps, 16 each


@triton.jit
def copy_kernel(
    out_ptr,
    t_ptr,
    M,
    N,
    stride_om,
    stride_tm,
    stride_tn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    mask = (rows < M) & (cols < N)
    t = tl.load(t_ptr + rows * stride_tm + cols * stride_tn, mask=mask, other=0.0)
    tl.store(out_ptr + rows * stride_om + cols, t.to(out_ptr.dtype.element_ty), mask=mask)


_launch_copy = Launcher(copy_kernel)


def aligned_copy(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t [M, N], of any strides, in ``dtype``: rows that are contiguous and begin at 16 bytes.

    What lies between the rows is not written. ``dtype`` has 16 bits.
    """
    M, N = t.shape
    out = torch.empty((M, aligned_row(N)), dtype=dtype, device=t.device)[:, :N]
    if t.numel():
        BLOCK_N = min(triton.next_power_of_2(N), _ELEMENTS)
        BLOCK_M = _ELEMENTS // BLOCK_N
        with device_guard(t):
            _launch_copy(
                (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), 1),
                (out, t),
                (M, N, out.stride(0), *t.stride()),
                (),
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                num_warps=4,
                **FP_FUSION,
            )
    return out

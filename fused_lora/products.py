"""Matrix products, in fp32 where the CPU has no instructions for their dtype.

PyTorch multiplies bf16 (fp16) element by element on such a CPU, which is any without AVX-512 and
most laptops. 512 x 576 x 576 in bf16 on one core of an EPYC with AVX2: x W0^T 41 ms and g W0 356,
where fp32 takes 5. So operands become fp32, a part of each at a time; sums are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def _without_instructions() -> frozenset[torch.dtype]:
    found = {torch.bfloat16, torch.float16}
    if torch._C._has_mkldnn:  # oneDNN
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found.remove(torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            found.remove(torch.float16)
    return frozenset(found)


# Of the CPU, once: Dynamo traces what asks (compiled autograd).
WITHOUT_INSTRUCTIONS = _without_instructions()
# Elements that are there in fp32 of the left and of the right operand: 4 and 1 MB. A quarter of the
# right one's takes 1.2 to 1.9 times as long with 32 rows, and twice as many as long as these.
_LEFT, _RIGHT = 1 << 20, 1 << 18
# What a cast of an element and the other operators of a product in fp32 cost, in multiplications.
_CAST, _OVERHEAD = 4, 100_000


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies such numbers by itself."""
    return dtype not in WITHOUT_INSTRUCTIONS


def in_fp32(dtype: torch.dtype, device: torch.device, M: int, N: int, K: int) -> bool:
    """Whether [M, K] x [K, N] is multiplied in fp32: with few rows the casts would cost more."""
    if has_instructions(dtype) or device.type != "cpu":
        return False
    return M * N * K > _CAST * (M * K + K * N + M * N) + _OVERHEAD


def _wants_fp32(a: Tensor, b: Tensor) -> bool:
    return in_fp32(a.dtype, a.device, a.shape[0], b.shape[1], a.shape[1])


def slices(length: int, step: int) -> Iterator[slice]:
    """A side of a tensor, ``step`` at a time; the last one may go over the end."""
    for start in range(0, length, step):
        yield slice(start, start + step)


def _in_parts(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, *, add: bool) -> Tensor:
    """out = a b + bias, or += with ``add``."""
    (M, K), N = a.shape, b.shape[1]
    for rows in slices(M, max(1, _LEFT // K)):
        left = a[rows].float()
        for cols in slices(N, max(1, _RIGHT // K)):
            right = b[:, cols].float()
            if add:
                part = out[rows, cols].float().addmm_(left, right)
            elif bias is not None:
                part = torch.addmm(bias[cols].float(), left, right)
            else:
                part = left @ right
            out[rows, cols] = part
    return out


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b [M, N] for a [M, K] and b [K, N] of one dtype, into ``out`` if it is given."""
    if not _wants_fp32(a, b):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]))
    return _in_parts(out, a, b, None, add=False)


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += a b in place."""
    if not _wants_fp32(a, b):
        return y.addmm_(a, b)
    return _in_parts(y, a, b, None, add=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias [M, N] for x [M, K] and weight [N, K]."""
    M, (N, K) = x.shape[0], weight.shape
    if not in_fp32(x.dtype, x.device, M, N, K):
        return F.linear(x, weight, bias)
    y = x.new_empty((M, N))
    return _in_parts(y, x, weight.t(), bias, add=False)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a b [batch, M, N] for a [batch, M, K] and b [batch, K, N]; a batch of several is small."""
    batch, M, K = a.shape
    N = b.shape[2]
    if not in_fp32(a.dtype, a.device, batch * M, N, K):
        return torch.bmm(a, b)
    if batch == 1:
        return mm(a[0], b[0])[None]
    return torch.bmm(a.float(), b.float()).to(a.dtype)

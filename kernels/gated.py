"""The input of an MLP's last layer: x = act(gate) o up, and its gradient. One pass each.

    x = act(e) o u
    de = dx o u o act'(e),  du = dx o act(e)          e (the gate), u, x, dx [M, K]

In a mixture of experts each row of dx has a factor, and <dx, x> of each is wanted too: the pass
that reads dx, e and u makes them, and x itself, where there were three more.

Every activation is act(e) = e s(e), so that act'(e) = s(e) + e s'(e); all in fp32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .device import device_guard
from .launch import Launcher
from .sizes import cdiv
from .tile_config import FP_FUSION

# Bound by memory: a program has a part of one row, eight elements a thread, so that 16 bits are
# loaded 16 bytes at a time.
_TILE: dict[str, Any] = {"BLOCK_K": 1024, "num_warps": 4} | FP_FUSION


@triton.jit
def _share(e, ACTIVATION: tl.constexpr):
    """s(e) and s'(e)."""
    if ACTIVATION == "gelu":  # the normal distribution and its density
        share = 0.5 + 0.5 * tl.erf(e * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * e * e)
    elif ACTIVATION == "gelu_pytorch_tanh":  # (1 + tanh(z / 2)) / 2 = sigmoid(z)
        share = tl.sigmoid(1.5957691216057308 * (e + 0.044715 * e * e * e))
        slope = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * e * e)
    else:
        tl.static_assert(ACTIVATION == "silu")
        share = tl.sigmoid(e)
        slope = share * (1.0 - share)
    return share, slope


@triton.jit
def _load(gate_ptr, up_ptr, K, stride_em, stride_ek, stride_um, stride_uk, BLOCK_K: tl.constexpr):
    """The program's part of gate and up in fp32, and where it lies in a contiguous [M, K]."""
    m = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = cols < K
    cols = cols.to(tl.int64)
    e = tl.load(gate_ptr + m * stride_em + cols * stride_ek, mask=mask, other=0.0)  # [BLOCK_K]
    u = tl.load(up_ptr + m * stride_um + cols * stride_uk, mask=mask, other=0.0)  # [BLOCK_K]
    return e.to(tl.float32), u.to(tl.float32), m * K + cols, mask


@triton.jit
def gated_kernel(
    gate_ptr,
    up_ptr,
    x_ptr,
    K,
    stride_em,
    stride_ek,
    stride_um,
    stride_uk,
    ACTIVATION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    e, u, at, mask = _load(gate_ptr, up_ptr, K, stride_em, stride_ek, stride_um, stride_uk, BLOCK_K)
    share, _ = _share(e, ACTIVATION)
    x = e * share * u
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward_kernel(
    dx_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    scale_ptr,  # [M] or None
    dots_ptr,  # [blocks of K, M] or None
    K,
    stride_em,
    stride_ek,
    stride_um,
    stride_uk,
    stride_dm,  # of dgate and dup
    ACTIVATION: tl.constexpr,
    KEEP_X: tl.constexpr,  # in dx's place
    BLOCK_K: tl.constexpr,
):
    e, u, at, mask = _load(gate_ptr, up_ptr, K, stride_em, stride_ek, stride_um, stride_uk, BLOCK_K)
    dx = tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_K]
    share, slope = _share(e, ACTIVATION)
    x = e * share * u
    row = tl.program_id(0).to(tl.int64)
    if dots_ptr is not None:
        block = tl.program_id(1).to(tl.int64)
        tl.store(dots_ptr + block * tl.num_programs(0) + row, tl.sum(dx * x))
    if KEEP_X:
        tl.store(dx_ptr + at, x.to(dx_ptr.dtype.element_ty), mask=mask)
    if scale_ptr is not None:
        dx *= tl.load(scale_ptr + row).to(tl.float32)
    dgate = dx * u * (share + e * slope)
    dup = dx * (e * share)
    # dgate may be in dx's place: each element is loaded by the thread that stores it.
    at += row * (stride_dm - K)
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(gated_kernel)
_launch_backward = Launcher(gated_backward_kernel)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) o up [M, K], contiguous, for gate and up [M, K] of one dtype and any strides."""
    M, K = gate.shape
    x = torch.empty((M, K), dtype=gate.dtype, device=gate.device)
    if x.numel():
        with device_guard(gate):
            _launch(
                (M, cdiv(K, _TILE["BLOCK_K"]), 1),
                (gate, up, x),
                (K, *gate.stride(), *up.stride()),
                ACTIVATION=activation,
                **_TILE,
            )
    return x


def gated_backward(
    dx: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    keep_x: bool = False,
    dots: bool = False,
) -> torch.Tensor | None:
    """The gradients of gate and up for scale * dx, dx [M, K] and scale [M] contiguous.

    dgate and dup [M, K] of one stride, their rows contiguous. dgate may be dx; or with ``keep_x``
    dx becomes x = act(gate) o up. With ``dots`` the result is <dx, x> [M] of each row, fp32.
    """
    M, K = gate.shape
    blocks = cdiv(K, _TILE["BLOCK_K"])
    parts = torch.empty((blocks, M), dtype=torch.float32, device=dx.device) if dots else None
    if dx.numel():
        with device_guard(gate):
            _launch_backward(
                (M, blocks, 1),
                (dx, gate, up, dgate, dup, scale, parts),
                (K, *gate.stride(), *up.stride(), dgate.stride(0)),
                ACTIVATION=activation,
                KEEP_X=keep_x,
                **_TILE,
            )
    return None if parts is None else parts.sum(0)

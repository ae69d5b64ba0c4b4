"""The last projection of a mixture of experts, and the router's sum over a token's experts.

    y[t] = sum_j p[t, j] (a W_e^T + bias_e + h B_e^T)[t, j]    e the expert of (t, j)

a is in the experts' order and y in the tokens'. The gradient of p[t, j], <g[t], o[t, j]>, is
<da, a> + <g[t], bias_e> with da the gradient of a for p = 1, which needs no o (SonicMoE,
https://arxiv.org/abs/2512.14080). p counts where it is smallest: in h, dh and da.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .expert_backends import Path, grad_A, grad_B, project, project_back
from .expert_stack import Experts
from .products import WITHOUT_INSTRUCTIONS, mm, slices

_CHUNK = 1 << 24  # elements whose products are there at a time


def project_combined(
    path: Path, a: Tensor, p: Tensor, layer: Experts, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y [T, N] in a's dtype, and h [M, r], for p [T, k] and a [T k, K]."""
    out, h = project(path, a, layer, bias)
    return _combined(out.view(*p.shape, out.shape[1]), p), h


class Passed(NamedTuple):
    """What a mixture's middle makes of da, the gradient of a where p is 1."""

    a: Tensor | None  # for dA
    dots: Tensor | None  # <da, a> of each row [M], for dp
    back: Callable[[], Tensor] | None  # gives what is passed on of p o da, once a is not needed


class CombineGradients(NamedTuple):
    """Those that were asked for."""

    passed: Tensor | None
    dp: Tensor | None  # [T, k]
    dA: Tensor | None
    dB: Tensor | None


def combine_backward(
    path: Path,
    g: Tensor,
    p: Tensor,
    layer: Experts,
    bias: Tensor | None,
    h: Tensor | None,
    experts: Tensor,
    middle: Callable[[Tensor | None, Tensor], Passed],
    *,
    need_da: bool,
    need_dA: bool,
) -> CombineGradients:
    """For g = dL/dy [T, N]; dB if h is given. experts [M] is each row's.

    ``middle`` is called with da [M, K], whose memory it may take, and p's rows [M, 1].
    """
    order = layer.rows.order
    assert order is not None
    p_rows = p.flatten().index_select(0, order)[:, None]
    dp = dA = dB = None
    da, dh = project_back(path, g, layer, need_dx=need_da, need_dh=need_dA)
    a, dots, back = middle(da, p_rows)
    del da
    if dots is not None:
        dp = torch.empty_like(p.flatten())
        dp = dp.index_copy_(0, order.long(), dots.to(p.dtype)).view_as(p)
        if bias is not None:
            dp += _of_bias(g, bias, experts, p)
    if need_dA and dh is not None and a is not None:
        dA = grad_A(path, a, dh.mul_(p_rows), layer)
    del a, dh
    if h is not None:
        dB = grad_B(path, g, (h * p_rows).to(g.dtype), layer)
    return CombineGradients(None if back is None else back(), dp, dA, dB)


def _combined(out: Tensor, p: Tensor) -> Tensor:
    """sum_j p[t, j] * out[t, j], [T, N] of out [T, k, N], in its dtype, rounded once."""
    slow = out.dtype in WITHOUT_INSTRUCTIONS and out.device.type == "cpu"
    # A GPU may multiply fp32 matrices in tf32, which these are none of.
    if p.dtype != out.dtype or slow or (out.is_cuda and out.dtype == torch.float32):
        return (out * p[..., None]).sum(1).to(out.dtype)
    return torch.bmm(p[:, None], out).squeeze_(1)


def dots_of(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each row of the two [M, K], summed in fp32 or better."""
    exact = torch.promote_types(a.dtype, torch.float32)
    dots = torch.empty(len(a), dtype=exact, device=a.device)
    for rows in slices(len(a), max(1, _CHUNK // max(1, a.shape[1]))):
        # In fp16 they could overflow; in bf16 they cost a GPU 8 bytes an element and not 20.
        left = a[rows].float() if a.dtype == torch.float16 else a[rows]
        dots[rows] = torch.sum(left * b[rows], 1, dtype=exact)
    return dots


def _of_bias(g: Tensor, bias: Tensor, experts: Tensor, p: Tensor) -> Tensor:
    """<g[t], bias of (t, j)'s expert> [T, k], by the products with all of them."""
    of_all = mm(g, bias.to(g.dtype).t()).to(p.dtype)  # [T, E]
    of_none = of_all.new_zeros((len(g), 1))
    index = experts.view_as(p) % (len(bias) + 1)  # -1, no expert, is the last
    return torch.cat((of_all, of_none), dim=1).gather(1, index.long())

"""The pure PyTorch truth that everything else is checked against. Imports nothing of ours.

    h = (D o x) A^T        D: dropout mask, on the adapter branch only
    y = x W0^T + bias + scaling * h B^T

(LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685, eq. 3, with PyTorch's layouts.)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_PHILOX_ROUNDS = 7
_LANE_VALUES = 1 << 16
_LOW_WORD = 0xFFFF_FFFF
# Counters per pass of keep_mask: its few int64 temporaries then stay in a core's L2 cache.
_CHUNK = 1 << 16
# Elements of a mask below which the operators of 16-bit lanes cost more than they save.
_FEW = 2048
FP8_BLOCK = 128  # columns of a rounded x that share a scale


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = _PHILOX_ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 (Salmon et al., SC'11) on 32-bit words held in int64 tensors.

    The words of the counter broadcast: what is the same in a row or a column is computed once.
    """
    c0, c1, c2, c3 = counter
    steps = torch.arange(rounds, device=key[0].device)
    k0s, k1s = key[0] + steps * 0x9E3779B9, key[1] + steps * 0xBB67AE85
    for k0, k1 in zip(k0s.unbind(), k1s.unbind(), strict=True):
        # 64-bit products, wrapped but bit-exact. Upper halves are garbage until they are masked.
        p0, p1 = (c0 & _LOW_WORD) * 0xD2511F53, (c2 & _LOW_WORD) * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ (c1 ^ k0), p1, (p0 >> 32) ^ (c3 ^ k1), p0
    return c0 & _LOW_WORD, c1 & _LOW_WORD, c2 & _LOW_WORD, c3 & _LOW_WORD


def dropout_threshold(dropout_p: float) -> int:
    """The dropout probability in units of 2^-16; an element is kept iff its lane is at least it."""
    return min(round(dropout_p * _LANE_VALUES), _LANE_VALUES - 1)


def keep_mask(seed: Tensor, threshold: int, M: int, K: int) -> Tensor:
    """The dropout mask of a call: bool [M, K], True where x is kept.

    Element (m, k) is kept iff lane k % 8 (16 bits) of Philox(seed, counter = (k // 8, m, 0, 0)) is
    at least ``threshold``: a function of (seed, m, k) alone, the same on every device and backend.
    But for a negative seed on a CPU, which is what `lora_linear` draws there, PyTorch's path takes
    the `drawn_mask` of a generator with that seed: in int64 operators Philox takes 2 to 15 times as
    long.
    ``seed``: int64 tensor of one element, which also says the device; or the mask itself, bool.
    """
    if seed.dtype == torch.bool:
        return seed
    if seed.device.type == "cpu" and seed.item() < 0:
        return drawn_mask(threshold, M, K, generator=torch.Generator().manual_seed(int(seed)))
    draws = -(-K // 8)
    keep = torch.empty((M, draws, 8), dtype=torch.bool, device=seed.device)
    columns = torch.arange(draws, device=seed.device)
    zero = torch.zeros((1, 1), dtype=torch.int64, device=seed.device)
    key = (seed & _LOW_WORD, seed >> 32 & _LOW_WORD)
    rows_per_chunk = max(1, _CHUNK // max(draws, 1))
    for first in range(0, M, rows_per_chunk):
        rows = torch.arange(first, min(first + rows_per_chunk, M), device=seed.device)
        words = philox_4x32((columns[None, :], rows[:, None], zero, zero), key)
        packed = torch.empty((len(rows), draws, 4), dtype=torch.int32, device=seed.device)
        for i, word in enumerate(words):
            packed[..., i] = word
        # As 16-bit lanes, low half first; signed, so that their upper bit is to be flipped.
        lanes = packed.view(torch.int16).bitwise_xor_(-_LANE_VALUES // 2)
        torch.ge(lanes, threshold - _LANE_VALUES // 2, out=keep[first : first + len(rows)])
    return keep.view(M, draws * 8)[:, :K]


def drawn_mask(
    threshold: int,
    M: int,
    K: int,
    dtype: torch.dtype = torch.bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A dropout mask [M, K] in ``dtype``, 1 where x is kept, from a generator on the CPU.

    None is PyTorch's own. Four elements share a draw of 64 bits, 16 each; but a few of them
    PyTorch draws one by one, as in `F.dropout`.
    """
    if M * K <= _FEW:
        mask = torch.empty((M, K), dtype=dtype, device="cpu")
        return mask.bernoulli_(1 - threshold / _LANE_VALUES, generator=generator)
    if K % 4 == 0 and M * K <= 4 * _CHUNK:
        return _drawn(threshold, (M, K // 4), generator).to(dtype)
    words = -(-M * K // 4)
    keep = torch.empty(4 * words, dtype=dtype, device="cpu")
    for piece in torch.split(keep, 4 * _CHUNK):
        piece.copy_(_drawn(threshold, (len(piece) // 4,), generator))
    return keep[: M * K].view(M, K)


def _drawn(threshold: int, words: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    drawn = torch.empty(words, dtype=torch.int64, device="cpu")
    drawn.random_(-(2**63), None, generator=generator)
    # Compared in place, as int16: into a bool, PyTorch takes ten times as long.
    return drawn.view(torch.int16).ge_(threshold - _LANE_VALUES // 2)


def fp8_activations(x: Tensor) -> Tensor:
    """x [..., K] rounded to fp8 e4m3, its gradient that of the identity.

    Each row's 128 columns, the last ones maybe fewer, have a scale of their own, amax / 448
    (DeepSeek-V3, https://arxiv.org/abs/2412.19437, sec. 3.3). Values are code times scale, rounded
    once to x's dtype.
    """
    *lead, K = x.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    blocks = F.pad(x.detach().float(), (0, -K % FP8_BLOCK))
    blocks = blocks.view(*lead, blocks.shape[-1] // FP8_BLOCK, FP8_BLOCK)
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    # By products alone, which every device rounds alike: a quotient by 448 is one of them on GPUs.
    codes = (blocks * (amax.reciprocal() * 448.0)).to(torch.float8_e4m3fn)
    values = codes.to(exact) * (amax * (1 / 448.0)).to(exact)
    rounded = values.flatten(-2)[..., :K].to(x.dtype)
    return x + (rounded - x.detach())  # exact: 0, or within a factor of 2 of each other


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    activations: Literal["fp8"] | None = None,
) -> Tensor:
    """y = x W0^T + bias + scaling * (D o x) A^T B^T, differentiated by PyTorch's own autograd.

    x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N]; y [..., N] in x's dtype.
    The products run in x's dtype; adapters of another dtype are cast to it, as under autocast.
    ``seed`` (int64, one element) says which dropout mask; None is the next `drawn_mask`. With
    ``activations`` "fp8", `fp8_activations` (x) takes x's place in x W0^T.
    """
    dropped = x
    threshold = dropout_threshold(dropout_p)
    if threshold > 0:
        M, K = x.shape[:-1].numel(), x.shape[-1]
        if seed is None:
            keep = drawn_mask(threshold, M, K).to(x.device).view(x.shape)
        else:
            keep = keep_mask(seed, threshold, M, K).view(x.shape)
        keep_scale = _LANE_VALUES / (_LANE_VALUES - threshold)
        dropped = torch.where(keep, x * keep_scale, torch.zeros_like(x))
    h = F.linear(dropped, lora_A.to(x.dtype))
    if activations is not None:
        x = fp8_activations(x)
    return F.linear(x, weight, bias) + F.linear(h, lora_B.to(x.dtype)) * scaling


def lora_linear_gated(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    activation: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu",
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`lora_linear` of x = act(gate) o up (SwiGLU, GeGLU), as transformers' MLPs compute it."""
    if activation == "silu":
        acted = F.silu(gate)
    else:
        acted = F.gelu(gate, approximate="none" if activation == "gelu" else "tanh")
    return lora_linear(
        acted * up,
        weight,
        lora_A,
        lora_B,
        scaling=scaling,
        bias=bias,
        dropout_p=dropout_p,
        seed=seed,
    )


def lora_linear_experts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    expert_indices: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`lora_linear` with each row's own expert e of a stack, one expert after the other.

    weight [E, N, K], lora_A [E, r, K], lora_B [E, N, r] (or None, both), bias [E, N];
    expert_indices [...], x [..., K], or [..., K] without the last of these dimensions, of which
    each row then counts for all of that. y [*expert_indices.shape, N], zeros where an index is no
    expert's. The mask is one of x.
    """
    chosen = expert_indices.flatten()
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    fan = len(chosen) // max(len(rows), 1)
    threshold = dropout_threshold(dropout_p)
    keep = None
    if threshold > 0:
        seed = seed if seed is not None else torch.randint(2**63 - 1, (1,), device=x.device)
        keep = keep_mask(seed, threshold, *rows.shape)
    y = x.new_zeros((len(chosen), weight.shape[1]))
    for e, W in enumerate(weight):
        index = (chosen == e).nonzero().flatten()
        source = index // max(fan, 1)
        b = None if bias is None else bias[e]
        if lora_A is None or lora_B is None:
            part = F.linear(rows[source], W, b)
        else:
            part = lora_linear(
                rows[source],
                W,
                lora_A[e],
                lora_B[e],
                scaling=scaling,
                bias=b,
                dropout_p=dropout_p,
                seed=None if keep is None else keep[source],
            )
        y = y.index_add(0, index, part)
    return y.view(*expert_indices.shape, y.shape[1])


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """y = m / ||W0 + scaling * B A|| o (x W0^T + scaling * x A^T B^T) + bias, by autograd.

    Shapes as above, magnitude m [N]. The norm, of each row, is a constant to the gradient (DoRA,
    https://arxiv.org/abs/2402.09353, sec. 4.3). The column scale is fp32 or better.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    direction = weight.to(exact) + scaling * lora_B.to(exact) @ lora_A.to(exact)
    norm: Tensor = torch.linalg.vector_norm(direction, dim=1).detach()
    z = lora_linear(x, weight, lora_A, lora_B, scaling=scaling)
    y = z * (magnitude.to(exact) / norm)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)

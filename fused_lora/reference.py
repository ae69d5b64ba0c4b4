"""The pure PyTorch truth that everything else is checked against. Imports nothing of ours.

    h = (D o x) A^T        D: dropout mask, on the adapter branch only
    y = x W0^T + bias + scaling * h B^T

(LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685, eq. 3, with PyTorch's layouts.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PHILOX_ROUNDS = 7
_LANE_VALUES = 1 << 16
_LOW_WORD = 0xFFFF_FFFF
# Counters per pass of keep_mask: its dozen int64 temporaries then stay in a core's L2 cache.
_CHUNK = 1 << 16


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = _PHILOX_ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 (Salmon et al., SC'11) on 32-bit words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products, wrapped but bit-exact
        c0, c1, c2, c3 = (
            (p1 >> 32 & _LOW_WORD) ^ c1 ^ k0,
            p1 & _LOW_WORD,
            (p0 >> 32 & _LOW_WORD) ^ c3 ^ k1,
            p0 & _LOW_WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_WORD, (k1 + 0xBB67AE85) & _LOW_WORD
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """The dropout probability in units of 2^-16; an element is kept iff its lane is at least it."""
    return min(round(dropout_p * _LANE_VALUES), _LANE_VALUES - 1)


def keep_mask(seed: Tensor, threshold: int, M: int, K: int) -> Tensor:
    """The dropout mask of a call: bool [M, K], True where x is kept.

    Element (m, k) is kept iff lane k % 8 (16 bits) of Philox(seed, counter = (k // 8, m, 0, 0)) is
    at least ``threshold``: a function of (seed, m, k) alone, the same on every device and backend.
    ``seed``: int64 tensor of one element, which also says the device.
    """
    draws = -(-K // 8)
    keep = torch.empty((M, draws * 8), dtype=torch.bool, device=seed.device)
    columns = torch.arange(draws, device=seed.device)
    key = (seed & _LOW_WORD, seed >> 32 & _LOW_WORD)
    rows_per_chunk = max(1, _CHUNK // max(draws, 1))
    for first in range(0, M, rows_per_chunk):
        rows = torch.arange(first, min(first + rows_per_chunk, M), device=seed.device)
        c0 = columns.repeat(len(rows))
        c1 = rows.repeat_interleave(draws)
        zero = torch.zeros_like(c0)
        words = torch.stack(philox_4x32((c0, c1, zero, zero), key), dim=-1)
        lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [.., 4, 2]: low half first
        keep[first : first + len(rows)] = (lanes >= threshold).view(len(rows), -1)
    return keep[:, :K]


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
) -> Tensor:
    """y = x W0^T + bias + scaling * (D o x) A^T B^T, differentiated by PyTorch's own autograd.

    x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N]; y [..., N] in x's dtype.
    The products run in x's dtype; adapters of another dtype are cast to it, as under autocast.
    ``seed`` (int64, one element) says which dropout mask; None draws one.
    """
    dropped = x
    threshold = dropout_threshold(dropout_p)
    if threshold > 0:
        if seed is None:
            seed = torch.empty(1, dtype=torch.int64, device=x.device).random_()
        K = x.shape[-1]
        keep = keep_mask(seed, threshold, x.numel() // max(K, 1), K).view(x.shape)
        keep_scale = _LANE_VALUES / (_LANE_VALUES - threshold)
        dropped = torch.where(keep, x * keep_scale, torch.zeros_like(x))
    h = F.linear(dropped, lora_A.to(x.dtype))
    return F.linear(x, weight, bias) + F.linear(h, lora_B.to(x.dtype)) * scaling

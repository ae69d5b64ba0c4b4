"""What a dropout mask is made of: a seed on the device and a 16-bit threshold."""

from __future__ import annotations

from typing import NamedTuple

import torch

LANE_VALUES = 1 << 16  # each decision compares 16 random bits with the threshold


class Dropout(NamedTuple):
    """Dropout of one call: the mask is a pure function of ``seed`` and ``threshold``.

    The seed stays on the device (one int64 element), so that drawing it needs no synchronisation
    and a CUDA graph draws a new one at each replay.
    """

    seed: torch.Tensor  # on PyTorch's path it may be the mask [M, K] itself
    threshold: int  # an element is kept iff its 16 bits are at least this

    @property
    def keep_scale(self) -> float:
        """1 / P(keep)."""
        return keep_scale(self.threshold)


def dropout_of(seed: torch.Tensor | None, threshold: int) -> Dropout | None:
    """None without a seed."""
    return None if seed is None else Dropout(seed, threshold)


def seed_of(dropout: Dropout | None) -> torch.Tensor | None:
    """What a kernel gets for its seed."""
    return None if dropout is None else dropout.seed


def scale_and_threshold(dropout: Dropout | None) -> tuple[float, int]:
    """What a kernel gets of it besides the seed; it reads neither where there is none."""
    return (dropout.keep_scale, dropout.threshold) if dropout else (1.0, 0)


def dropout_threshold(p: float) -> int:
    """p in units of 2^-16, below 2^16 so that the scale stays finite."""
    return min(round(p * LANE_VALUES), LANE_VALUES - 1)


def keep_scale(threshold: int) -> float:
    """1 / P(keep), from the threshold itself, so that E[D o x] = x holds exactly."""
    return LANE_VALUES / (LANE_VALUES - threshold)

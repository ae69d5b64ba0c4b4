"""Sizes: what tl.dot and Triton's loads want of them, and how many tiles cover one."""

from __future__ import annotations

MIN_DOT = 16  # tl.dot takes no smaller side
ALIGNED = 16  # Triton knows of strides and sizes whether they are multiples of it


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv`, which is for kernels too, takes 1 us."""
    return -(-a // b)


def padded(size: int) -> int:
    """The side of a tile that holds ``size``: a power of two that tl.dot takes."""
    return max(MIN_DOT, 1 << (size - 1).bit_length())

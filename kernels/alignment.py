"""How matrices lie in memory: what Triton's wide loads and the copy engine can read."""

from __future__ import annotations

from dataclasses import replace

import torch

from .sizes import ALIGNED, MIN_DOT, cdiv
from .tile_config import ODD_16BIT, TileConfig

TMA_ALIGNMENT = 16  # bytes


def for_odd_rows(config: TileConfig, itemsize: int) -> TileConfig:
    """The tile for a product one of whose operands `is_odd`.

    Each of its elements has an address of its own, and larger tiles spill: 8 to 2000 bytes a
    thread. Of some that do, the ptxas of Triton 3.6 makes wgmmas that read registers which nothing
    has written (illegal accesses on an H200, or wrong results). Tiles of fewer rows have none.
    """
    if not may_be_odd(config, itemsize):
        return config
    return replace(ODD_16BIT, BLOCK_N=min(config.BLOCK_N, ODD_16BIT.BLOCK_N))


def may_be_odd(config: TileConfig, itemsize: int) -> bool:
    """Whether the tile multiplies by wgmma, so that odd operands matter: to look takes 2 us."""
    return itemsize == 2 and config.BLOCK_M >= 64


def is_odd(*matrices: torch.Tensor) -> bool:
    """Whether Triton loads the elements of one of them one by one.

    It looks at strides, which are 1 or multiples of 16, and at addresses, which are of 16 bytes.
    """
    for matrix in matrices:
        outer, inner = matrix.stride()
        if any(stride > 1 and stride % ALIGNED for stride in (outer, inner)):
            return True
        if matrix.data_ptr() % 16 or (1 not in (outer, inner) and max(outer, inner) > 0):
            return True
    return False


def is_odd_rank(r: int) -> bool:
    """Whether ranks are loaded one by one, and more than one tile of them: in persistent.py they
    spill then.
    """
    return r > MIN_DOT and r % ALIGNED != 0


def is_transposed(w: torch.Tensor) -> bool:
    """Whether memory holds w by columns."""
    return w.stride(1) != 1


def tma_obstacle(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor | None = None) -> str | None:
    """Why x [M, K], w [K, N] and a [K, R] cannot all be read by TMA, or y written; None if so.

    The copy engine takes base pointers and row strides of a multiple of 16 bytes, and a row's
    elements side by side; of w and a either dimension may be the row.
    """
    if 0 in x.shape or 0 in w.shape:
        return "a size is 0"
    if w.shape[1] * x.element_size() % TMA_ALIGNMENT:
        return f"y: a row of {w.shape[1]} is not a multiple of {TMA_ALIGNMENT} bytes"
    for name, tensor in (("x", x), ("W", w), ("A", a)):
        if tensor is None:
            continue
        if why := rows_obstacle(tensor, name != "x" and is_transposed(tensor)):
            return f"{name}: {why}"
    return None


def rows_obstacle(t: torch.Tensor, turned: bool = False) -> str | None:
    """Why the copy engine cannot read the rows of t, ``turned``: of t^T; None if it can."""
    outer, inner = t.stride()[::-1] if turned else t.stride()
    step = outer * t.element_size()
    if inner != 1 or step == 0 or step % TMA_ALIGNMENT:
        return (
            f"got strides {t.stride()} of {t.element_size()} bytes, "
            f"TMA wants rows of neighbours, {TMA_ALIGNMENT} bytes or a multiple apart"
        )
    if t.data_ptr() % TMA_ALIGNMENT:
        return f"its first element is not at a multiple of {TMA_ALIGNMENT} bytes"
    return None


def aligned_row(columns: int) -> int:
    """``columns`` of 16 bits, rounded up to what the copy engine wants rows to be apart."""
    return cdiv(columns, TMA_ALIGNMENT // 2) * (TMA_ALIGNMENT // 2)

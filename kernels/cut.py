"""The pieces of rows.py, where the GPU alone knows the groups: in one launch.

PyTorch's operators would be some twenty launches for each size of pieces, in every layer of a
mixture of experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import device_guard
from .launch import Launcher
from .sizes import cdiv
from .tile_config import FP_FUSION

_ELEMENTS = 4096  # of [BLOCK_P, GROUPS], which is in registers


@triton.jit(do_not_specialize=["num_groups", "num_pieces"])
def cut_kernel(
    offsets_ptr,
    adapters_ptr,
    table_ptr,
    first_ptr,
    num_groups,
    num_pieces,
    block,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    groups = tl.arange(0, GROUPS)
    in_groups = groups < num_groups
    begins = tl.load(offsets_ptr + groups, mask=in_groups, other=0)
    ends = tl.load(offsets_ptr + groups + 1, mask=in_groups, other=0)
    pieces_of = (ends - begins + block - 1) // block
    last = tl.cumsum(pieces_of, 0)  # pieces up to and with the group
    if tl.program_id(0) == 0:
        tl.store(first_ptr + groups + 1, last, mask=in_groups)
        tl.store(first_ptr + groups, last - pieces_of, mask=groups == 0)

    pieces = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    # Of each piece its group's; those beyond the last one are of none, and empty.
    at = (pieces[:, None] >= (last - pieces_of)[None, :]) & (pieces[:, None] < last[None, :])
    adapters = tl.load(adapters_ptr + groups, mask=in_groups, other=-1)
    first_of = begins - (last - pieces_of) * block
    start = tl.sum(tl.where(at, first_of[None, :], 0), 1)
    end = tl.sum(tl.where(at, ends[None, :], 0), 1)
    adapter = tl.sum(tl.where(at, adapters[None, :] + 1, 0), 1) - 1
    start += pieces * block
    entries = table_ptr + pieces * 3
    mask = pieces < num_pieces
    tl.store(entries, adapter, mask=mask)
    tl.store(entries + 1, start, mask=mask)
    tl.store(entries + 2, tl.minimum(start + block, end), mask=mask)


_launch_cut = Launcher(cut_kernel)


def cut(
    M: int, block: int, adapters: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Pieces`' table and first, of up to ``block`` positions of each group; some are empty."""
    num_groups = len(adapters)
    num_pieces = M // block + num_groups
    table = offsets.new_empty((num_pieces, 3))
    first = offsets.new_empty(num_groups + 1)
    GROUPS = 1 << (num_groups - 1).bit_length()
    BLOCK_P = max(1, min(1 << (num_pieces - 1).bit_length(), _ELEMENTS // GROUPS))
    with device_guard(offsets):
        _launch_cut(
            (cdiv(num_pieces, BLOCK_P), 1, 1),
            (offsets, adapters, table, first),
            (num_groups, num_pieces, block),
            GROUPS=GROUPS,
            BLOCK_P=BLOCK_P,
            num_warps=4,
            **FP_FUSION,
        )
    return table, first

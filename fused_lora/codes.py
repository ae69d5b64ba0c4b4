"""Formats of a quantised W0: their codes, and the values that these stand for.

nf4, fp4   bitsandbytes' layout, byte for byte: W0 flat, row after row, in blocks of
           ``block_size`` with one scale (absmax) each; the codes are places in a table of 16
           values; the scales themselves are quantised too with ``double_quant``
           (QLoRA, https://arxiv.org/abs/2305.14314)
mxfp4      the same layout, with powers of two for scales: see mxfp4.py
int8       one scale absmax / 127 a row; bitsandbytes' codes (LLM.int8's weights)
fp8        e4m3 with one scale for the whole or one for each 128 x 128 block, absmax / 448;
           on request x is rounded to fp8 too (``activations``)
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor

from .mxfp4 import MAGNITUDES

Format = Literal["nf4", "fp4", "mxfp4", "int8", "fp8"]
FOUR_BIT: tuple[Format, ...] = ("nf4", "fp4", "mxfp4")
Activations = Literal["fp8"]
FORMATS: tuple[Format, ...] = get_args(Format)
FP8 = torch.float8_e4m3fn
CODE_DTYPES: dict[Format, torch.dtype] = {
    "nf4": torch.uint8,
    "fp4": torch.uint8,
    "mxfp4": torch.uint8,
    "int8": torch.int8,
    "fp8": FP8,
}
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what is quantised
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own
NESTED_BLOCK = 256  # scales that share one of their own

# The quantiles of a normal distribution that the paper gives (appendix E), in fp32.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# By the three bits after the sign: bitsandbytes' own float with a bias of 2, before it is scaled.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def codebook_of(format: Format, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format, by code."""
    if format == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32, device=device)
    of_format = MAGNITUDES if format == "mxfp4" else _FP4_MAGNITUDES
    magnitudes = torch.tensor(of_format, dtype=torch.float32, device=device)
    values = torch.cat((magnitudes, -magnitudes))
    return values if format == "mxfp4" else values / magnitudes.max()


@functools.cache
def nested_codebook() -> Tensor:
    """The 256 values that scales are quantised to: bitsandbytes' dynamic map.

    Seven decades, each with twice the fractions of the one below (8-bit Approximations for
    Parallelism in Deep Learning, https://arxiv.org/abs/1511.04561).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        fractions = (10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += fractions + [-fraction for fraction in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def blocks_of(size: int, block: int) -> int:
    """How many blocks a side has."""
    return -(-size // block) if block else 1


def spread(scales: Tensor, rows: slice, block: int) -> Tensor:
    """The scales of each of ``rows``, from those of their blocks of rows."""
    if block in (0, 1):
        return scales[rows] if block else scales
    first, last = rows.start // block, blocks_of(rows.stop, block)
    scales = scales[first:last].repeat_interleave(block, dim=0)
    return scales[: rows.stop - rows.start]


def scale_blocks(values: Tensor, scales: Tensor, cols: slice, block: int) -> None:
    """values *= scales in place, with a scale for each block of columns from ``cols.start`` on."""
    if block == 0:
        values.mul_(scales)
        return
    scales = scales[:, cols.start // block : blocks_of(cols.stop, block)]
    whole = values.shape[1] // block
    blocks = values[:, : whole * block].view(len(values), whole, block)
    blocks.mul_(scales[:, :whole, None])
    values[:, whole * block :].mul_(scales[:, whole:])  # the last one, if it is cut off


def unpack_pairs(codes: Tensor, codebook: Tensor) -> Tensor:
    """The values of packed 4-bit codes, flat, in fp32."""
    # By byte, and as one element of 8 bytes: on a CPU five times as fast as rows of two.
    pairs = torch.cartesian_prod(codebook, codebook).view(torch.int64).view(-1)
    return pairs.index_select(0, codes.view(-1).int()).view(torch.float32)


def eight_bit_values(codes: Tensor) -> Tensor:
    """The values of int8 or e4m3 codes without their scales, in fp32."""
    if codes.dtype != FP8 or codes.device.type != "cpu":
        return codes.to(torch.float32)
    # PyTorch's conversion takes five times as long as a table's look-up.
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(FP8).to(torch.float32)
    return values.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)

"""Weights in 4- or 8-bit codes: how a tile of one is read, and the kernel that expands a whole one.

    W[n, k] = value(code[n, k]) * scale[n // SCALE_ROWS, k // SCALE_COLS]

    nf4, fp4   uint8, two codes a byte, the even column in the upper half (bitsandbytes' layout);
               value is a table of 16. Scales of SCALE_COLS columns each, in fp32 or nested:
               scale[b] = table[code[b]] * nested[b // 256] + offset
    int8       value is the code itself; one fp32 scale a row
    fp8        e4m3 (float8_e4m3fn); fp32 scales of the whole, of rows or of 2-D blocks

A size of 0 in place of SCALE_ROWS or SCALE_COLS is the whole side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .device import device_guard

NESTED_BLOCK = tl.constexpr(256)  # scales that share one scale of theirs, as in bitsandbytes


class Tables(NamedTuple):
    """What codes are turned into values with; a kernel gets it as one argument."""

    scales: torch.Tensor  # fp32, or uint8 if nested
    codebook: torch.Tensor | None  # [16], for 4-bit codes
    nested_scales: torch.Tensor | None = None
    nested_codebook: torch.Tensor | None = None  # [256]
    nested_offset: torch.Tensor | None = None  # [1]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantised weight [rows, cols] as the launchers take it in place of a tensor."""

    codes: torch.Tensor  # row after row, contiguous
    tables: Tables
    rows: int
    cols: int
    block: tuple[int, int]  # SCALE_ROWS, SCALE_COLS; the latter a power of two that divides cols
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it stands for, [cols, rows] if transposed."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)

    def t(self) -> QuantizedMatrix:
        """Its transpose: the same codes, read the other way."""
        return replace(self, transposed=not self.transposed)

    @property
    def layout(self) -> tuple[int, int, bool]:
        """The constants that a kernel is compiled for."""
        return (*self.block, self.transposed)

    def code_bytes(self) -> torch.Tensor:
        """The codes as the kernels load them: e4m3 as bytes, since sm_80 has no such type."""
        fp8 = self.codes.dtype == torch.float8_e4m3fn
        return self.codes.view(torch.uint8) if fp8 else self.codes


@triton.jit
def _load_scales(tables, blocks, mask):
    scales = tl.load(tables[0] + blocks, mask=mask, other=0)
    if tables[2] is not None:
        values = tl.load(tables[3] + scales.to(tl.int32))
        nested = tl.load(tables[2] + blocks // NESTED_BLOCK, mask=mask, other=0.0)
        scales = values * nested + tl.load(tables[4])
    return scales


@triton.jit
def load_weight(
    codes_ptr,
    tables,
    first_row,
    first_col,
    num_rows,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
):
    """Tile [BLOCK_ROWS, BLOCK_COLS] of a weight in fp32; finite but arbitrary outside of it."""
    PER_BYTE: tl.constexpr = 2 if tables[1] is not None else 1
    rows = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    bytes_in_row = tl.cast(num_cols, tl.int64) // PER_BYTE
    at = (first_col // PER_BYTE + tl.arange(0, BLOCK_COLS // PER_BYTE)).to(tl.int64)[None, :]
    codes = tl.load(
        codes_ptr + rows * bytes_in_row + at, mask=in_rows & (at < bytes_in_row), other=0
    )
    if PER_BYTE == 2:
        halves = codes.to(tl.int32)
        index = tl.reshape(tl.join(halves >> 4, halves & 15), [BLOCK_ROWS * BLOCK_COLS])
        # Looked up in shared memory. Loads from the table's address would each be a copy of four
        # bytes in the loop's pipeline, with a whole tile of fp32 to put them in.
        codebook = tl.load(tables[1] + tl.arange(0, 16))
        values = tl.reshape(tl.gather(codebook, index, 0), [BLOCK_ROWS, BLOCK_COLS])
    elif codes_ptr.dtype.element_ty == tl.uint8:
        # e4m3's bits in fp16's place: the exponent's bias is 8 less there, subnormals included.
        wide = codes.to(tl.int16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        values = codes.to(tl.float32)

    GROUP: tl.constexpr = BLOCK_COLS if SCALE_COLS == 0 else min(SCALE_COLS, BLOCK_COLS)
    GROUPS: tl.constexpr = BLOCK_COLS // GROUP
    starts = first_col + tl.arange(0, GROUPS) * GROUP
    blocks = tl.zeros([BLOCK_ROWS, GROUPS], tl.int64)
    scales_in_row = 1
    if SCALE_COLS != 0:
        scales_in_row = tl.cdiv(num_cols, SCALE_COLS)
        blocks += (starts // SCALE_COLS)[None, :]
    if SCALE_ROWS != 0:
        blocks += rows // SCALE_ROWS * scales_in_row
    scales = _load_scales(tables, blocks, in_rows & (starts < num_cols)[None, :])
    if GROUPS == 1:
        return values * scales
    grouped = tl.reshape(values, [BLOCK_ROWS, GROUPS, GROUP]) * scales[:, :, None]
    return tl.reshape(grouped, [BLOCK_ROWS, BLOCK_COLS])


@triton.jit
def dequantize_kernel(
    codes_ptr,
    tables,
    out_ptr,
    num_rows,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_col = tl.program_id(1) * BLOCK_COLS
    w = load_weight(
        codes_ptr,
        tables,
        first_row,
        first_col,
        num_rows,
        num_cols,
        BLOCK_ROWS,
        BLOCK_COLS,
        LAYOUT[0],
        LAYOUT[1],
    )
    rows = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    cols = (first_col + tl.arange(0, BLOCK_COLS))[None, :]
    out_ptrs = out_ptr + rows * num_cols + cols
    mask = (rows < num_rows) & (cols < num_cols)
    tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask=mask)


DEQUANTIZE_TILE = {"BLOCK_ROWS": 16, "BLOCK_COLS": 256, "num_warps": 4}


def dequantize(w: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in ``dtype``: new storage, contiguous as its codes are."""
    out = torch.empty((w.rows, w.cols), dtype=dtype, device=w.codes.device)
    if out.numel():
        tile = DEQUANTIZE_TILE
        grid = (triton.cdiv(w.rows, tile["BLOCK_ROWS"]), triton.cdiv(w.cols, tile["BLOCK_COLS"]))
        with device_guard(out.device):
            dequantize_kernel[grid](
                w.code_bytes(), w.tables, out, w.rows, w.cols, LAYOUT=w.layout, **tile
            )
    return out.t() if w.transposed else out

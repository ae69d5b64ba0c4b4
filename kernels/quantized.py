"""Weights in 4- or 8-bit codes: how a tile of one is read, and the kernel that expands a whole one.

    W[n, k] = value(code[n, k]) * scale[n // SCALE_ROWS, k // SCALE_COLS]

    4 bits     uint8, two codes a byte, the even column in the upper half (bitsandbytes' layout);
               value is a table of 16. Scales of SCALE_COLS columns each, in fp32 or nested:
               scale[b] = table[code[b]] * nested[b // 256] + offset
    int8       value is the code itself; one fp32 scale a row
    fp8        e4m3 (float8_e4m3fn); fp32 scales of the whole, of rows or of 2-D blocks

A size of 0 in place of SCALE_ROWS or SCALE_COLS is the whole side.

A weight in fp8 may ask for an x in fp8 (`fp8_input`): then codes are multiplied by codes, and the
scales of both go on the product of FP8_BLOCK columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .device import device_guard, has_fp8
from .launch import Launcher
from .sizes import ALIGNED, cdiv
from .tile_config import FP_FUSION, Kind

NESTED_BLOCK = tl.constexpr(256)  # scales that share one scale of theirs, as in bitsandbytes
FP8_BLOCK = tl.constexpr(128)  # columns of an fp8 x that share a scale
FP8_MAX = tl.constexpr(448.0)
FP8_TINY = tl.constexpr(1e-12)  # the least amax of such columns: its reciprocal is finite


class Tables(NamedTuple):
    """What codes are turned into values with; a kernel gets it as one argument."""

    scales: torch.Tensor  # fp32, or uint8 if nested
    codebook: torch.Tensor | None  # [16], for 4-bit codes
    nested_scales: torch.Tensor | None = None
    nested_codebook: torch.Tensor | None = None  # [256]
    nested_offset: torch.Tensor | None = None  # [1]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantised weight [rows, cols] as the launchers take it in place of a tensor.

    Or the first expert's of a stack, which the others' follow.
    """

    codes: torch.Tensor  # row after row, contiguous
    tables: Tables
    rows: int
    cols: int
    block: tuple[int, int]  # SCALE_ROWS, SCALE_COLS; the latter a power of two that divides cols
    transposed: bool = False
    fp8_activations: bool = False  # x is rounded to fp8 before it is multiplied by the transpose

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it stands for, [cols, rows] if transposed."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)

    def t(self) -> QuantizedMatrix:
        """Its transpose: the same codes, read the other way."""
        return replace(self, transposed=not self.transposed)

    @property
    def kind(self) -> Kind:
        """Whose tile configurations a product with it in the K loop takes."""
        return "fp8" if self.takes_fp8 else "quantized"

    @property
    def layout(self) -> tuple[int, int, bool]:
        """The constants that a kernel is compiled for."""
        return (*self.block, self.transposed)

    @property
    def code_row(self) -> int:
        """Bytes of a row of codes."""
        return self.cols if self.tables.codebook is None else self.cols // 2

    @property
    def code_stride(self) -> int:
        """Bytes from an expert's codes to the next one's."""
        return self.rows * self.code_row

    @property
    def scale_stride(self) -> int:
        """Scales of an expert."""
        rows, cols = self.block
        return (cdiv(self.rows, rows) if rows else 1) * (cdiv(self.cols, cols) if cols else 1)

    @property
    def takes_fp8(self) -> bool:
        """Whether it is multiplied by an x in fp8: y = x W0^T is, dx = g W0 is not."""
        return self.fp8_activations and self.transposed

    @property
    def is_odd(self) -> bool:
        """As `alignment.is_odd` of a matrix: rows of codes are not read 16 bytes at a time."""
        return self.code_row % ALIGNED != 0

    def code_bytes(self) -> torch.Tensor:
        """The codes as the kernels load them: e4m3 as bytes where the GPU has no such type."""
        as_bytes = self.codes.dtype == torch.float8_e4m3fn and not has_fp8(self.codes.device)
        return self.codes.view(torch.uint8) if as_bytes else self.codes


@triton.jit
def _load_scales(tables, blocks, mask):
    scales = tl.load(tables[0] + blocks, mask=mask, other=0)
    if tables[2] is not None:
        values = tl.load(tables[3] + scales.to(tl.int32))
        nested = tl.load(tables[2] + blocks // NESTED_BLOCK, mask=mask, other=0.0)
        scales = values * nested + tl.load(tables[4])
    return scales


@triton.jit
def _load_codes(
    codes_ptr,
    first_row,
    first_col,
    num_rows,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PER_BYTE: tl.constexpr = 1,
):
    """Tile [BLOCK_ROWS, BLOCK_COLS / PER_BYTE] of the codes; zero bytes outside."""
    rows = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    bytes_in_row = tl.cast(num_cols, tl.int64) // PER_BYTE
    at = (first_col // PER_BYTE + tl.arange(0, BLOCK_COLS // PER_BYTE)).to(tl.int64)[None, :]
    mask = (rows < num_rows) & (at < bytes_in_row)
    zero: tl.constexpr = 0.0 if codes_ptr.dtype.element_ty.is_floating() else 0
    return tl.load(codes_ptr + rows * bytes_in_row + at, mask=mask, other=zero)


@triton.jit
def _e4m3_values(codes):
    """Codes in fp8, or its bytes, as fp16."""
    if codes.dtype == tl.uint8:
        # e4m3's bits in fp16's place: the exponent's bias is 8 less there, subnormals included. Its
        # one NaN, all ones, carries into the exponent's upper bit.
        wide = codes.to(tl.int8, bitcast=True).to(tl.int16)
        bits = ((wide << 7) & -0x4001) | ((((wide & 0x7F) + 1) & 0x80) << 7)
        return bits.to(tl.float16, bitcast=True) * 256.0
    return codes.to(tl.float16)


@triton.jit
def _round_to_e4m3(x):
    """The nearest value of e4m3, in fp32, for |x| <= 448; ties to even."""
    # Added to x, 1.5 * 2^20 * 2^e leaves three bits behind the first of a number with exponent e;
    # below 2^-6 e4m3's steps are all alike.
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
    magic = ((exponent + (20 << 23)) | 0x400000).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@triton.jit
def fp8_input_kernel(
    x_ptr, codes_ptr, scales_ptr, M, K, stride_xm, stride_xk, BLOCK_M: tl.constexpr
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    cols = (block * FP8_BLOCK + tl.arange(0, FP8_BLOCK))[None, :]
    in_m = rows < M
    mask = in_m[:, None] & (cols < K)
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols * stride_xk, mask=mask, other=0.0)
    x = x.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), 1), FP8_TINY)
    x *= (tl.div_rn(1.0, amax) * FP8_MAX)[:, None]
    # Not left to the conversion: for sm_89 Triton 3.6 makes it out of two, the first towards zero.
    x = _round_to_e4m3(x)
    codes_ptrs = codes_ptr + rows[:, None] * K + cols
    tl.store(codes_ptrs, x.to(codes_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + block * M + rows, amax * (1 / FP8_MAX), mask=in_m)


_launch_fp8_input = Launcher(fp8_input_kernel)
# Contracted, x * s + magic would be rounded once, and a tie of the reference's be none here.
FP8_INPUT_TILE = {"BLOCK_M": 32, "num_warps": 4, "enable_fp_fusion": False}


def fp8_input(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] of x [M, K] and their scales [ceil(K / FP8_BLOCK), M], amax / 448 in fp32.

    Codes are e4m3, or the same values in fp16 where the GPU has no such type. Once for all tiles:
    in the K loop of a product the rounding would take longer than the tensor cores do.
    `fused_lora.reference.fp8_activations` makes the same ones.
    """
    (M, K), block = x.shape, FP8_BLOCK.value
    dtype = torch.float8_e4m3fn if has_fp8(x.device) else torch.float16
    codes = torch.empty((M, K), dtype=dtype, device=x.device)
    scales = torch.empty((cdiv(K, block), M), dtype=torch.float32, device=x.device)
    if codes.numel():
        tile = FP8_INPUT_TILE
        grid = (cdiv(M, tile["BLOCK_M"]), len(scales), 1)
        with device_guard(x):
            _launch_fp8_input(grid, (x, codes, scales), (M, K, *x.stride()), (), **tile)
    return codes, scales


@triton.jit
def add_fp8_product(
    acc,
    x,
    x_scales,
    codes_ptr,
    scales_ptr,
    first_row,
    first_col,
    num_rows,
    num_cols,
    BLOCK_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLS: tl.constexpr,
):
    """acc + x w^T for FP8_BLOCK columns of codes x [BLOCK_M, FP8_BLOCK], scales x_scales [BLOCK_M].

    w's scales must be one in these columns, and go on the product with x's (DeepSeek-V3,
    https://arxiv.org/abs/2412.19437, sec. 3.3): tensor cores sum fp8 products in less than fp32.
    """
    codes = _load_codes(codes_ptr, first_row, first_col, num_rows, num_cols, BLOCK_ROWS, FP8_BLOCK)
    if x.dtype == tl.float8e4nv:
        product = tl.dot(x, tl.trans(codes))
    else:
        product = tl.dot(x, tl.trans(_e4m3_values(codes)))

    ONE_SCALE: tl.constexpr = SCALE_ROWS == 0 or SCALE_ROWS % BLOCK_ROWS == 0
    rows = (first_row + tl.arange(0, 1 if ONE_SCALE else BLOCK_ROWS)).to(tl.int64)
    at = tl.zeros_like(rows)
    scales_in_row = 1
    if SCALE_COLS != 0:
        scales_in_row = tl.cdiv(num_cols, SCALE_COLS)
        at += first_col // SCALE_COLS
    if SCALE_ROWS != 0:
        at += rows // SCALE_ROWS * scales_in_row
    scales = tl.load(scales_ptr + at, mask=rows < num_rows, other=0.0)
    return acc + product * (x_scales[:, None] * scales[None, :])


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
    first_scale=0,
):
    """Tile [BLOCK_ROWS, BLOCK_COLS] of a weight in fp32; finite but arbitrary outside of it."""
    PER_BYTE: tl.constexpr = 2 if tables[1] is not None else 1
    rows = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    codes = _load_codes(
        codes_ptr, first_row, first_col, num_rows, num_cols, BLOCK_ROWS, BLOCK_COLS, PER_BYTE
    )
    if PER_BYTE == 2:
        halves = codes.to(tl.int32)
        index = tl.reshape(tl.join(halves >> 4, halves & 15), [BLOCK_ROWS * BLOCK_COLS])
        # Looked up in shared memory. Loads from the table's address would each be a copy of four
        # bytes in the loop's pipeline, with a whole tile of fp32 to put them in.
        codebook = tl.load(tables[1] + tl.arange(0, 16))
        values = tl.reshape(tl.gather(codebook, index, 0), [BLOCK_ROWS, BLOCK_COLS])
    elif codes.dtype == tl.int8:
        values = codes.to(tl.float32)
    else:
        values = _e4m3_values(codes).to(tl.float32)

    GROUP: tl.constexpr = BLOCK_COLS if SCALE_COLS == 0 else min(SCALE_COLS, BLOCK_COLS)
    GROUPS: tl.constexpr = BLOCK_COLS // GROUP
    starts = first_col + tl.arange(0, GROUPS) * GROUP
    blocks = tl.zeros([BLOCK_ROWS, GROUPS], tl.int64) + first_scale
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
def load_operand(
    codes_ptr,
    tables,
    k,
    first_n,
    K,
    N,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAYOUT: tl.constexpr,
    first_scale=0,
):
    """Tile [BLOCK_K, BLOCK_N] of a product's right operand [K, N], as `load_weight`."""
    if LAYOUT[2]:
        w = tl.trans(
            load_weight(
                codes_ptr,
                tables,
                first_n,
                k,
                N,
                K,
                BLOCK_N,
                BLOCK_K,
                LAYOUT[0],
                LAYOUT[1],
                first_scale,
            )
        )
    else:
        w = load_weight(
            codes_ptr,
            tables,
            k,
            first_n,
            K,
            N,
            BLOCK_K,
            BLOCK_N,
            LAYOUT[0],
            LAYOUT[1],
            first_scale,
        )
    return w


@triton.jit
def add_quantized_product(
    acc,
    x_ptr,
    codes_ptr,
    tables,
    first_scale,
    rows,
    first_n,
    in_m,
    N,
    K,
    stride_xm,
    stride_xk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`add_product` of x by codes: acc + x w for `rows` [BLOCK_M, 1] of x, int64."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < (BLOCK_K if EVEN_K else K - k)
        x = tl.load(x_ptrs, mask=in_m & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = load_operand(codes_ptr, tables, k, first_n, K, N, BLOCK_K, BLOCK_N, LAYOUT, first_scale)
        acc = tl.dot(x, w.to(dtype), acc, input_precision=PRECISION)
        x_ptrs += step_x
    return acc


@triton.jit
def dequantize_kernel(
    codes_ptr,
    tables,
    out_ptr,
    num_rows,
    num_cols,
    code_stride,  # from one expert's to the next one's
    scale_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_col = tl.program_id(1) * BLOCK_COLS
    expert = tl.program_id(2).to(tl.int64)
    w = load_weight(
        codes_ptr + expert * code_stride,
        tables,
        first_row,
        first_col,
        num_rows,
        num_cols,
        BLOCK_ROWS,
        BLOCK_COLS,
        LAYOUT[0],
        LAYOUT[1],
        expert * scale_stride,
    )
    rows = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    cols = (first_col + tl.arange(0, BLOCK_COLS))[None, :]
    out_ptrs = out_ptr + (expert * num_rows + rows) * num_cols + cols
    mask = (rows < num_rows) & (cols < num_cols)
    tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask=mask)


_launch_dequantize = Launcher(dequantize_kernel)
DEQUANTIZE_TILE = {"BLOCK_ROWS": 16, "BLOCK_COLS": 256, "num_warps": 4} | FP_FUSION


def dequantize(w: QuantizedMatrix, dtype: torch.dtype, experts: int | None = None) -> torch.Tensor:
    """The matrix in ``dtype``: new storage, contiguous as its codes are.

    With ``experts`` those of as many in a row, [experts, rows, cols].
    """
    out = torch.empty((experts or 1, w.rows, w.cols), dtype=dtype, device=w.codes.device)
    if out.numel():
        tile = DEQUANTIZE_TILE
        grid = (cdiv(w.rows, tile["BLOCK_ROWS"]), cdiv(w.cols, tile["BLOCK_COLS"]), len(out))
        sizes = (w.rows, w.cols, w.code_stride, w.scale_stride)
        with device_guard(out):
            _launch_dequantize(
                grid, (w.code_bytes(), w.tables, out), sizes, LAYOUT=w.layout, **tile
            )
    out = out.mT if w.transposed else out
    return out[0] if experts is None else out

"""`QuantizedWeight`: a frozen W0 [N, K], or one for each expert, in 4- or 8-bit codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import mxfp4
from .codes import (
    BLOCK_SIZES,
    CODE_DTYPES,
    FORMATS,
    FOUR_BIT,
    NESTED_BLOCK,
    SOURCE_DTYPES,
    Activations,
    Format,
    blocks_of,
    eight_bit_values,
    scale_blocks,
    spread,
    unpack_pairs,
)

# Bytes of W0's values that a call holds at a time on the PyTorch path. On a CPU larger chunks fall
# out of the cache, and their memory goes back to the system and has to be mapped anew.
_CHUNK = 16 << 20
_CPU_CHUNK = 2 << 20
# Of large ones so many are there in fp32 before they are rounded to 16 bits, in a CPU's cache: in
# 0.9 (nf4) or 0.7 (int8) of the time of four times as many, and in less memory.
_IN_CACHE = 1 << 17


@dataclass(frozen=True)
class Layout:
    """How a `QuantizedWeight` is laid out; what a choice of kernel depends on."""

    format: Format
    block: tuple[int, int]  # rows and columns that share a scale; 0 is the whole side
    nested: bool  # the scales are quantised too
    tiled: bool  # no block goes over the end of a row: tiles can be read by themselves
    activations: Activations | None  # what x becomes before it is multiplied by W0


class QuantizedWeight(nn.Module):
    """A frozen weight [N, K] in codes, in the place of a parameter; or experts' weights [E, N, K].

    The codes of a stack of experts are those of its rows, [E N, K], one expert after the other; no
    block of 8-bit codes is of two experts.

    Its state dict has the tensors below and nothing else; ``to`` moves them, and a change of dtype
    changes only ``dtype``, never the codes or scales. Values: `dequantize`.

    Attributes:
        codes: uint8 [ceil(N K / 2)] (4-bit formats), int8 [N, K] or float8_e4m3fn [N, K]; of a
            stack of E experts E times as many, and in 8 bits [E, N, K].
        scales: fp32, or uint8 with double quantisation and mxfp4. 4-bit: one for each block of the
            flat weight; else [ceil(N / block rows), ceil(K / block columns)], of each expert.
        codebook: fp32 [16] (4-bit formats) or None.
        nested_scales, nested_codebook, nested_offset: fp32 [ceil(scales / 256)], [256] and [1]
            where scales are uint8, or None: scale = codebook[scales] * nested_scale + offset.
        shape: (N, K) or (E, N, K). dtype: what `dequantize` gives unless told.
        layout: see `Layout`.
        activations: None, or for fp8 weights "fp8": see `quantize_fp8`.

    Raises:
        TypeError, ValueError: the tensors do not fit together: a wrong dtype, truncated codes, too
            few scales, a block size that bitsandbytes does not have, several devices; or
            activations that this format cannot have.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    codebook: nn.Parameter | None
    nested_scales: nn.Parameter | None
    nested_codebook: nn.Parameter | None
    nested_offset: nn.Parameter | None

    def __init__(
        self,
        format: Format,
        codes: Tensor,
        scales: Tensor,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        block: tuple[int, int],
        codebook: Tensor | None = None,
        nested_scales: Tensor | None = None,
        nested_codebook: Tensor | None = None,
        nested_offset: Tensor | None = None,
        activations: Activations | None = None,
    ) -> None:
        super().__init__()
        _check_form(format, shape, block, nested=nested_scales is not None)
        tiled = format not in FOUR_BIT or shape[-1] % block[1] == 0
        self.layout = Layout(format, block, nested_scales is not None, tiled, activations)
        self.shape, self.dtype = torch.Size(shape), dtype
        tensors = {
            "codes": codes,
            "scales": scales,
            "codebook": codebook,
            "nested_scales": nested_scales,
            "nested_codebook": nested_codebook,
            "nested_offset": nested_offset,
        }
        self._check(tensors)
        for name, tensor in tensors.items():
            # Parameters, not buffers: DistributedDataParallel sends buffers around at each step.
            frozen = None
            if tensor is not None:  # contiguous, as the kernels read it
                frozen = nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
            self.register_parameter(name, frozen)

    def _check(self, tensors: dict[str, Tensor | None]) -> None:
        format, size = self.layout.format, self.numel()
        four_bit = format in FOUR_BIT
        check_activations(self.activations)
        if self.activations is not None and format != "fp8":
            raise ValueError(
                f"activations: got {self.activations!r} for a weight in {format}, wanted one in fp8"
            )
        if self.dtype not in (*SOURCE_DTYPES, torch.float64):
            raise TypeError(f"dtype: got {self.dtype}, wanted a floating dtype of 16 bits or more")
        wanted: dict[str, tuple[torch.dtype, int]] = {}
        if four_bit:
            blocks = -(-size // self.layout.block[1])
            wanted["codes"] = (torch.uint8, -(-size // 2))
            wanted["codebook"] = (torch.float32, 16)
        else:
            blocks = self._matrices() * self._blocks()
            wanted["codes"] = (CODE_DTYPES[format], size)
        wanted["scales"] = (torch.uint8 if self.layout.nested else torch.float32, blocks)
        if self.layout.nested:
            wanted["nested_scales"] = (torch.float32, -(-blocks // NESTED_BLOCK))
            wanted["nested_codebook"] = (torch.float32, 256)
            wanted["nested_offset"] = (torch.float32, 1)
        for name, tensor in tensors.items():
            if (tensor is None) != (name not in wanted):
                is_there = "is missing" if tensor is None else "is given"
                raise TypeError(f"{name}: {is_there}, but format {format!r} says otherwise")
            if tensor is None:
                continue
            dtype, numel = wanted[name]
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a torch.Tensor")
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, wanted {dtype} for {format}")
            if tensor.numel() != numel:
                raise ValueError(
                    f"{name}: got {tensor.numel()} elements, wanted {numel} for {format} of "
                    f"{list(self.shape)} in blocks of {self.layout.block}"
                )
            if name == "codes" and not four_bit and tensor.shape != self.shape:
                raise ValueError(f"codes: got {list(tensor.shape)}, wanted {list(self.shape)}")
            assert tensors["codes"] is not None
            if tensor.device != tensors["codes"].device:
                raise ValueError(f"{name}: is on {tensor.device}, codes on another device")

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def activations(self) -> Activations | None:
        """What x becomes before it is multiplied by W0; None: nothing."""
        return self.layout.activations

    def numel(self) -> int:
        """How many values there are, whatever the codes take."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and tables."""
        return sum(p.nbytes for p in self.parameters())

    def _matrices(self) -> int:
        """E of a stack of experts, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def _blocks(self) -> int:
        """How many scales a matrix has, where no block is of two."""
        (N, K), (block_rows, block_cols) = self.shape[-2:], self.layout.block
        return blocks_of(N, block_rows) * blocks_of(K, block_cols)

    def dequantize(self, dtype: torch.dtype | None = None, experts: slice | None = None) -> Tensor:
        """W0 in ``dtype`` (None: the weight's own); each value is rounded once, from fp32.

        ``experts``: of a stack these alone, [their number, N, K]. On a GPU all of it is one kernel
        where it can be. Raises TypeError if dtype is no floating one, ValueError for experts of a
        matrix.
        """
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, wanted a floating dtype")
        if experts is not None and len(self.shape) != 3:
            raise ValueError(f"experts: got {experts} of a weight {list(self.shape)}, wanted None")
        if not isinstance(experts, slice | None):
            raise TypeError(f"experts: got {type(experts).__name__}, wanted a slice or None")
        if experts is None and self.device.type == "cuda" and self.layout.tiled:
            from .strategies import device_obstacle

            if device_obstacle(self.device) is None:
                from .kernels.quantized import dequantize

                return dequantize(self.matrix(), dtype, *self.shape[:-2])
        if len(self.shape) == 3:
            wanted = range(self.shape[0])[slice(None) if experts is None else experts]
            values = self.codes.new_empty((len(wanted), *self.shape[1:]), dtype=dtype)
            for expert, out in zip(wanted, values, strict=True):
                out.copy_(self._matrix(torch.float32, expert))
            return values
        return self._matrix(dtype)

    def _matrix(self, dtype: torch.dtype, expert: int = 0) -> Tensor:
        """The whole weight, or that of an expert, [N, K]."""
        N, K = self.shape[-2:]
        if self.layout.tiled:
            return self._tile(slice(0, N), slice(0, K), dtype, self._scales_of(expert), expert)
        assert self.codebook is not None
        # Blocks of flat values, of which an expert may begin and end within one.
        first, last, size = expert * N * K, (expert + 1) * N * K, self.layout.block[1]
        blocks = slice(first // size, -(-last // size))
        start = blocks.start * size
        codes = self.codes.view(-1)[start // 2 : -(-last // 2)]
        values = unpack_pairs(codes, self.codebook)[: last - start]
        values = F.pad(values, (0, -len(values) % size)).view(-1, size)
        values = values * self._scales(blocks)[:, None]
        return values.view(-1)[first - start : last - start].view(N, K).to(dtype)

    def row_tiles(self, dtype: torch.dtype, expert: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """W0, or an expert's, some rows at a time; whole where blocks go over the ends of rows."""
        return self._tiles(dtype, expert, of_rows=True)

    def column_tiles(self, dtype: torch.dtype, expert: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """W0, or an expert's, some columns at a time, as `row_tiles`."""
        return self._tiles(dtype, expert, of_rows=False)

    def _tiles(
        self, dtype: torch.dtype, expert: int, *, of_rows: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        N, K = self.shape[-2:]
        length, width = (N, K) if of_rows else (K, N)
        if not self.layout.tiled:
            yield slice(0, length), self._matrix(dtype, expert)
            return
        scales = self._scales_of(expert)
        most = _CPU_CHUNK if self.device.type == "cpu" else _CHUNK
        step = most // max(1, width * dtype.itemsize)
        for chunk in _in_blocks(length, step, max(self.layout.block)):
            rows, cols = (chunk, slice(0, K)) if of_rows else (slice(0, N), chunk)
            yield chunk, self._tile(rows, cols, dtype, scales, expert)

    def _tile(
        self, rows: slice, cols: slice, dtype: torch.dtype, scales: Tensor, expert: int
    ) -> Tensor:
        """An expert's W0[rows, cols], from the start of a block on, with all the scales of it."""
        height, width = rows.stop - rows.start, cols.stop - cols.start
        if self.device.type != "cpu" or dtype.itemsize > 2 or height * width <= 4 * _IN_CACHE:
            return self._values(rows, cols, scales, expert).to(dtype)
        tile = self.codes.new_empty((height, width), dtype=dtype)
        for part in _in_blocks(height, _IN_CACHE // width, self.layout.block[0]):
            of_all = slice(rows.start + part.start, rows.start + part.stop)
            tile[part] = self._values(of_all, cols, scales, expert)
        return tile

    def _values(self, rows: slice, cols: slice, scales: Tensor, expert: int) -> Tensor:
        """A tile in fp32."""
        (N, K), (block_rows, block_cols) = self.shape[-2:], self.layout.block
        if self.codebook is None:
            scales = scales.view(blocks_of(N, block_rows), blocks_of(K, block_cols))
            codes = self.codes[expert] if len(self.shape) == 3 else self.codes
            values = eight_bit_values(codes[rows, cols])
            scale_blocks(values, spread(scales, rows, block_rows), cols, block_cols)
            return values
        codes = self.codes.view(self._matrices(), N, K // 2)[expert, rows]
        codes = codes[:, cols.start // 2 : cols.stop // 2].contiguous()
        blocks = slice(cols.start // block_cols, cols.stop // block_cols)
        scales = scales.view(N, K // block_cols)[rows, blocks].contiguous()
        values = unpack_pairs(codes, self.codebook).view(*scales.shape, block_cols)
        return values.mul_(scales[..., None]).view(len(codes), 2 * codes.shape[1])

    def _check_tables(self) -> None:
        """TypeError if something has cast what `to` does not."""
        table = self.scales if self.codebook is None else self.codebook
        if table.dtype != torch.float32:
            raise TypeError(
                f"weight: its tables are in {table.dtype}, wanted torch.float32. FSDP2's "
                "MixedPrecisionPolicy(param_dtype=...) casts them; leave it out: the layers take "
                "fp32 adapters and an x in 16 bits as they are"
            )

    def _scales_of(self, expert: int) -> Tensor:
        """An expert's, where no block is of two."""
        blocks = self._blocks()
        return self._scales(slice(expert * blocks, (expert + 1) * blocks))

    def _scales(self, blocks: slice) -> Tensor:
        """Those of ``blocks`` in fp32, flat."""
        self._check_tables()
        scales = self.scales.view(-1)
        if self.nested_scales is None:
            return scales[blocks]
        assert self.nested_codebook is not None
        assert self.nested_offset is not None
        start = blocks.start // NESTED_BLOCK * NESTED_BLOCK
        values = self.nested_codebook.index_select(0, scales[start : blocks.stop].int())
        whole = slice(start, start + values.numel())
        scale_blocks(values[None], self.nested_scales[None], whole, NESTED_BLOCK)
        return values.add_(self.nested_offset)[blocks.start - start :]

    def matrix(self) -> Any:
        """What the kernels' launchers take in place of a tensor; ``layout.tiled`` ones only."""
        from .kernels.quantized import QuantizedMatrix, Tables

        self._check_tables()
        tables = Tables(
            self.scales,
            self.codebook,
            self.nested_scales,
            self.nested_codebook,
            self.nested_offset,
        )
        N, K = self.shape[-2:]
        return QuantizedMatrix(
            self.codes,
            tables,
            N,
            K,
            self.layout.block,
            fp8_activations=self.activations == "fp8",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        # fn is any of to(), half(), cuda(), share_memory(), ... It sees bytes, so that it moves
        # and never casts; and an empty tensor of our dtype, which says what it casts to.
        def as_bytes(t: Tensor) -> Tensor:
            return fn(t.view(torch.uint8)).view(t.dtype)

        super()._apply(as_bytes, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, own in self._parameters.items():
            given = state_dict.get(prefix + name)
            if own is not None and given is not None and given.dtype != own.dtype:
                error_msgs.append(f"{prefix}{name}: got {given.dtype}, wanted {own.dtype}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        layout = self.layout
        parts = [f"{layout.format}, shape={list(self.shape)}, dtype={self.dtype}"]
        parts.append(f"block={layout.block}")
        if layout.nested and layout.format != "mxfp4":
            parts.append("double_quant=True")
        if layout.activations:
            parts.append(f"activations={layout.activations!r}")
        return ", ".join(parts)


Weight = Tensor | QuantizedWeight  # a base weight W0


def _in_blocks(length: int, step: int, block: int) -> Iterator[slice]:
    """A side of a weight, ``step`` at a time or what more makes its blocks whole."""
    block = max(1, block)
    step = blocks_of(max(1, step), block) * block
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _check_form(
    format: Format, shape: tuple[int, ...], block: tuple[int, int], *, nested: bool
) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, wanted one of {', '.join(FORMATS)}")
    for name, given, lengths in (("shape", shape, (2, 3)), ("block", block, (2,))):
        sizes = given if isinstance(given, tuple | list) else ()
        if len(sizes) not in lengths or any(type(n) is not int or n < 0 for n in sizes):
            wanted = "two integers, or three" if 3 in lengths else "two integers"
            raise TypeError(f"{name}: got {given!r}, wanted {wanted}")
    if format not in FOUR_BIT:
        if any(size & (size - 1) for size in block):
            raise ValueError(f"block: got {block}, wanted powers of two or 0")
    elif format == "mxfp4" and (block != (1, mxfp4.BLOCK) or not nested):
        got = f"{block}{'' if nested else ' and no nested_scales'}"
        raise ValueError(f"block: got {got}, wanted {(1, mxfp4.BLOCK)} and nested scales for mxfp4")
    elif block[0] != 1 or block[1] not in BLOCK_SIZES:
        raise ValueError(f"block: got {block}, wanted (1, one of {BLOCK_SIZES})")


def check_activations(activations: object) -> None:
    """Raises ValueError unless activations is None or "fp8"."""
    if activations not in (None, *get_args(Activations)):
        raise ValueError(f"activations: got {activations!r}, wanted None or 'fp8'")

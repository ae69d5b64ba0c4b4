"""`QuantizedWeight`: a frozen W0 [N, K] in 4- or 8-bit codes, and the functions that make one.

nf4, fp4   bitsandbytes' layout, byte for byte: W0 flat, row after row, in blocks of
           ``block_size`` with one scale (absmax) each; the codes are places in a table of 16
           values; the scales themselves are quantised too with ``double_quant``
           (QLoRA, https://arxiv.org/abs/2305.14314)
int8       one scale absmax / 127 a row; bitsandbytes' codes (LLM.int8's weights)
fp8        e4m3 with one scale for the whole or one for each 128 x 128 block, absmax / 448;
           on request x is rounded to fp8 too (``activations``)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Format = Literal["nf4", "fp4", "int8", "fp8"]
Activations = Literal["fp8"]
Quantizer = Callable[[Tensor], "QuantizedWeight"]
FORMATS: tuple[Format, ...] = get_args(Format)
FP8 = torch.float8_e4m3fn
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own
_NESTED_BLOCK = 256
_FP8_BLOCK = 128
_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODE_DTYPES: dict[Format, torch.dtype] = {
    "nf4": torch.uint8,
    "fp4": torch.uint8,
    "int8": torch.int8,
    "fp8": FP8,
}
# Values of W0 that a call holds at a time on the PyTorch path. On a CPU larger chunks fall out of
# the cache, and their memory goes back to the system and has to be mapped anew.
_CHUNK = 8 << 20
_CPU_CHUNK = 1 << 19

# The quantiles of a normal distribution that the paper gives (appendix E), in fp32.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# By the three bits after the sign: bitsandbytes' own float with a bias of 2, before it is scaled.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _codebook(format: Format, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format, by code."""
    if format == "nf4":
        return torch.tensor(_NF4, device=device)
    magnitudes = torch.tensor(_FP4_MAGNITUDES, device=device)
    return torch.cat((magnitudes, -magnitudes)) / magnitudes.max()


@functools.cache
def _nested_codebook() -> Tensor:
    """The 256 values that scales are quantised to: bitsandbytes' dynamic map.

    Seven decades, each with twice the fractions of the one below (8-bit Approximations for
    Parallelism in Deep Learning, https://arxiv.org/abs/1511.04561).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        fractions = (10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += fractions + [-fraction for fraction in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True)
class Layout:
    """How a `QuantizedWeight` is laid out; what a choice of kernel depends on."""

    format: Format
    block: tuple[int, int]  # rows and columns that share a scale; 0 is the whole side
    nested: bool  # the scales are quantised too
    tiled: bool  # no block goes over the end of a row: tiles can be read by themselves
    activations: Activations | None  # what x becomes before it is multiplied by W0


class QuantizedWeight(nn.Module):
    """A frozen weight [N, K] in codes, in the place of a parameter.

    Its state dict has the tensors below and nothing else; ``to`` moves them, and a change of dtype
    changes only ``dtype``, never the codes or scales. Values: `dequantize`.

    Attributes:
        codes: uint8 [ceil(N K / 2)] (nf4, fp4), int8 [N, K] or float8_e4m3fn [N, K].
        scales: fp32, or uint8 with double quantisation. 4-bit: one for each block of the flat
            weight; else [ceil(N / block rows), ceil(K / block columns)].
        codebook: fp32 [16] (nf4, fp4) or None.
        nested_scales, nested_codebook, nested_offset: fp32 [ceil(scales / 256)], [256] and [1]
            with double quantisation, or None: scale = codebook[scales] * nested_scale + offset.
        shape: (N, K). dtype: what `dequantize` gives unless told. layout: see `Layout`.
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
        shape: tuple[int, int],
        dtype: torch.dtype,
        block: tuple[int, int],
        codebook: Tensor | None = None,
        nested_scales: Tensor | None = None,
        nested_codebook: Tensor | None = None,
        nested_offset: Tensor | None = None,
        activations: Activations | None = None,
    ) -> None:
        super().__init__()
        tiled = format not in ("nf4", "fp4") or shape[1] % block[1] == 0
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
        format, (N, K), (block_rows, block_cols) = self.layout.format, self.shape, self.layout.block
        four_bit = format in ("nf4", "fp4")
        check_activations(self.activations)
        if self.activations is not None and format != "fp8":
            raise ValueError(
                f"activations: got {self.activations!r} for a weight in {format}, wanted one in fp8"
            )
        if self.dtype not in (*_SOURCE_DTYPES, torch.float64):
            raise TypeError(f"dtype: got {self.dtype}, wanted a floating dtype of 16 bits or more")
        if four_bit and (block_rows != 1 or block_cols not in _BLOCK_SIZES):
            raise ValueError(f"block: got {self.layout.block}, wanted (1, one of {_BLOCK_SIZES})")
        if not four_bit and any(size & (size - 1) for size in self.layout.block):
            raise ValueError(f"block: got {self.layout.block}, wanted powers of two or 0")
        wanted: dict[str, tuple[torch.dtype, int]] = {}
        if four_bit:
            blocks = -(-N * K // block_cols)
            wanted["codes"] = (torch.uint8, -(-N * K // 2))
            wanted["codebook"] = (torch.float32, 16)
        else:
            blocks = _blocks(N, block_rows) * _blocks(K, block_cols)
            wanted["codes"] = (_CODE_DTYPES[format], N * K)
        wanted["scales"] = (torch.uint8 if self.layout.nested else torch.float32, blocks)
        if self.layout.nested:
            wanted["nested_scales"] = (torch.float32, -(-blocks // _NESTED_BLOCK))
            wanted["nested_codebook"] = (torch.float32, 256)
            wanted["nested_offset"] = (torch.float32, 1)
        for name, tensor in tensors.items():
            if (tensor is None) != (name not in wanted):
                is_there = "is missing" if tensor is None else "is given"
                raise TypeError(f"{name}: {is_there}, but format {format!r} says otherwise")
            if tensor is None:
                continue
            dtype, numel = wanted[name]
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, wanted {dtype} for {format}")
            if tensor.numel() != numel:
                raise ValueError(
                    f"{name}: got {tensor.numel()} elements, wanted {numel} for {format} of "
                    f"{[N, K]} in blocks of {self.layout.block}"
                )
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
        """N K, whatever the codes take."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and tables."""
        return sum(p.nbytes for p in self.parameters())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0 [N, K] in ``dtype`` (None: the weight's own); each value is rounded once, from fp32.

        On a GPU it is one kernel where it can be. Raises TypeError if dtype is no floating one.
        """
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, wanted a floating dtype")
        if self.device.type == "cuda" and self.layout.tiled and torch.version.cuda:
            from .kernels.quantized import dequantize

            return dequantize(self.matrix(), dtype)
        N, K = self.shape
        scales = self._all_scales()
        if self.layout.tiled:
            return self._tile(slice(0, N), slice(0, K), dtype, scales)
        assert self.codebook is not None
        size = self.layout.block[1]
        values = _unpack(self.codes, self.codebook)[: N * K]
        values = F.pad(values, (0, -(N * K) % size)).view(-1, size) * scales[:, None]
        return values.view(-1)[: N * K].view(N, K).to(dtype)

    def row_tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """W0 some rows at a time; whole where blocks go over the ends of rows."""
        (N, K), scales = self.shape, self._all_scales()
        for rows in self._chunks(N, K):
            yield rows, self._tile(rows, slice(0, K), dtype, scales)

    def column_tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """W0 some columns at a time, as `row_tiles`."""
        (N, K), scales = self.shape, self._all_scales()
        for cols in self._chunks(K, N):
            yield cols, self._tile(slice(0, N), cols, dtype, scales)

    def _chunks(self, length: int, width: int) -> Iterator[slice]:
        step = max(1, (_CPU_CHUNK if self.device.type == "cpu" else _CHUNK) // max(1, width))
        unit = max(*self.layout.block, 1)  # blocks stay whole
        step = length if not self.layout.tiled else -(-step // unit) * unit
        for start in range(0, length, max(step, 1)):
            yield slice(start, min(start + step, length))

    def _tile(self, rows: slice, cols: slice, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """W0[rows, cols] for slices that start at the start of a block, with all the scales."""
        if not self.layout.tiled:
            return self.dequantize(dtype)
        (N, K), (block_rows, block_cols) = self.shape, self.layout.block
        if self.codebook is None:
            scales = scales.view(_blocks(N, block_rows), _blocks(K, block_cols))
            values = _eight_bit_values(self.codes[rows, cols])
            _scale_blocks(values, _spread(scales, rows, block_rows), cols, block_cols)
            return values.to(dtype)
        codes = self.codes.view(N, K // 2)[rows, cols.start // 2 : cols.stop // 2].contiguous()
        blocks = slice(cols.start // block_cols, cols.stop // block_cols)
        scales = scales.view(N, K // block_cols)[rows, blocks].contiguous()
        values = _unpack(codes, self.codebook).view(*scales.shape, block_cols)
        return values.mul_(scales[..., None]).view(len(codes), 2 * codes.shape[1]).to(dtype)

    def _check_tables(self) -> None:
        """TypeError if something has cast what `to` does not."""
        table = self.scales if self.codebook is None else self.codebook
        if table.dtype != torch.float32:
            raise TypeError(
                f"weight: its tables are in {table.dtype}, wanted torch.float32. FSDP2's "
                "MixedPrecisionPolicy(param_dtype=...) casts them; leave it out: the layers take "
                "fp32 adapters and an x in 16 bits as they are"
            )

    def _all_scales(self) -> Tensor:
        """The scales in fp32, flat."""
        self._check_tables()
        scales = self.scales.view(-1)
        if self.nested_scales is None:
            return scales
        assert self.nested_codebook is not None
        assert self.nested_offset is not None
        values = self.nested_codebook.index_select(0, scales.int())
        whole = slice(0, values.numel())
        _scale_blocks(values[None], self.nested_scales[None], whole, _NESTED_BLOCK)
        return values.add_(self.nested_offset)

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
        N, K = self.shape
        return QuantizedMatrix(
            self.codes,
            tables,
            N,
            K,
            self.layout.block,
            fp8_activations=self.activations == "fp8",
        )

    def requantize(self, weight: Tensor) -> QuantizedWeight:
        """``weight`` [N, K] in this one's format, block size and dtype."""
        format, block = self.layout.format, self.layout.block
        if format in ("nf4", "fp4"):
            new = _quantize_4bit(format, weight, self.layout.nested, block[1])
        elif format == "int8":
            new = quantize_int8(weight)
        else:
            new = quantize_fp8(weight, block_size=block[1] or None, activations=self.activations)
        new.dtype = self.dtype
        return new

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
        if layout.nested:
            parts.append("double_quant=True")
        if layout.activations:
            parts.append(f"activations={layout.activations!r}")
        return ", ".join(parts)


def _blocks(size: int, block: int) -> int:
    return -(-size // block) if block else 1


def _spread(scales: Tensor, rows: slice, block: int) -> Tensor:
    """The scales of each of ``rows``, from those of their blocks of rows."""
    if block in (0, 1):
        return scales[rows] if block else scales
    first, last = rows.start // block, _blocks(rows.stop, block)
    scales = scales[first:last].repeat_interleave(block, dim=0)
    return scales[: rows.stop - rows.start]


def _scale_blocks(values: Tensor, scales: Tensor, cols: slice, block: int) -> None:
    """values *= scales in place, with a scale for each block of columns from ``cols.start`` on."""
    if block == 0:
        values.mul_(scales)
        return
    scales = scales[:, cols.start // block : _blocks(cols.stop, block)]
    whole = values.shape[1] // block
    blocks = values[:, : whole * block].view(len(values), whole, block)
    blocks.mul_(scales[:, :whole, None])
    values[:, whole * block :].mul_(scales[:, whole:])  # the last one, if it is cut off


def _unpack(codes: Tensor, codebook: Tensor) -> Tensor:
    """The values of packed 4-bit codes, flat, in fp32."""
    # By byte, and as one element of 8 bytes: on a CPU five times as fast as rows of two.
    pairs = torch.cartesian_prod(codebook, codebook).view(torch.int64).view(-1)
    return pairs.index_select(0, codes.view(-1).int()).view(torch.float32)


def _eight_bit_values(codes: Tensor) -> Tensor:
    """The values of int8 or e4m3 codes without their scales, in fp32."""
    if codes.dtype != FP8 or codes.device.type != "cpu":
        return codes.to(torch.float32)
    # PyTorch's conversion takes five times as long as a table's look-up.
    values = torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.float32)
    return values.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def quantize_nf4(
    weight: Tensor, *, double_quant: bool = True, block_size: int = 64
) -> QuantizedWeight:
    """NF4 codes of ``weight`` [N, K] (fp32, bf16 or fp16), the same bytes as bitsandbytes makes.

    Those of `bitsandbytes.functional.quantize_4bit` with ``compress_statistics=double_quant``, on
    the weight's device: its CPU build rounds the scales through a table of 65,536 steps, its CUDA
    build to the nearest, and so do we.

    Raises TypeError or ValueError: no 2-D weight of these dtypes, one that is empty, not finite or
    on the meta device, a block size that bitsandbytes does not have.
    """
    return _quantize_4bit("nf4", weight, double_quant, block_size)


def quantize_fp4(
    weight: Tensor, *, double_quant: bool = True, block_size: int = 64
) -> QuantizedWeight:
    """FP4 codes; the rest as for `quantize_nf4`."""
    return _quantize_4bit("fp4", weight, double_quant, block_size)


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """int8 codes of ``weight`` [N, K], a scale for each row, codes as bitsandbytes' Int8Params.

    As there, the weight goes through fp16 first. Raises what `quantize_nf4` raises, and ValueError
    for values beyond fp16.
    """
    _check_weight(weight)
    half = weight.detach().to(torch.float16)
    absmax = half.abs().amax(dim=1).float()
    if not torch.isfinite(absmax).all():
        raise ValueError("weight: has values beyond 65504, which int8's fp16 step cannot hold")
    codes = torch.round(half * _reciprocal(absmax, 127.0)[:, None]).to(torch.int8)
    return _eight_bit("int8", weight, codes, absmax / 127.0, (1, 0))


def quantize_fp8(
    weight: Tensor, *, block_size: int | None = 128, activations: Activations | None = None
) -> QuantizedWeight:
    """e4m3 codes of ``weight`` [N, K]; a scale for each 128 x 128 block, or one (None).

    With ``activations="fp8"`` layers over it round x to e4m3 too, in every call, before they
    multiply it by W0: each row's 128 columns with a scale of their own, amax / 448 (DeepSeek-V3's
    recipe, https://arxiv.org/abs/2412.19437). GPUs from compute capability 8.9 on then multiply
    codes by codes, at twice the rate; others get the same numbers. The rounding changes y, as much
    as that of W0 does. The adapter has x as it is, and the gradients count the rounding as the
    identity: g is not rounded, and dx = g W0 + ... is that of W0's values in g's dtype. Merged, a
    layer does not round x any more. ``quantize=functools.partial(quantize_fp8, activations="fp8")``
    is for `inject`.

    Raises what `quantize_nf4` raises.
    """
    _check_weight(weight)
    check_activations(activations)
    if block_size not in (None, _FP8_BLOCK):
        raise ValueError(f"block_size: got {block_size!r}, wanted {_FP8_BLOCK} or None")
    N, K = weight.shape
    values = weight.detach().float()
    if block_size is None:
        scales = values.abs().amax().view(1, 1) / torch.finfo(FP8).max
        codes = values * _reciprocal(scales)
        return _eight_bit("fp8", weight, codes.to(FP8), scales, (0, 0), activations)
    padded = F.pad(values, (0, -K % block_size, 0, -N % block_size))
    rows, cols = padded.shape[0] // block_size, padded.shape[1] // block_size
    tiles = padded.view(rows, block_size, cols, block_size)
    scales = tiles.abs().amax(dim=(1, 3)) / torch.finfo(FP8).max
    codes = tiles * _reciprocal(scales)[:, None, :, None]
    codes = codes.flatten(2, 3).flatten(0, 1)[:N, :K].to(FP8)
    return _eight_bit("fp8", weight, codes, scales, (block_size, block_size), activations)


_QUANTIZERS: dict[Format, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": quantize_nf4,
    "fp4": quantize_fp4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
}


def check_format(format: object) -> None:
    """Raises ValueError unless format is one of `FORMATS`, or a function."""
    if not callable(format) and format not in FORMATS:
        raise ValueError(
            f"quantize: got {format!r}, wanted one of {', '.join(FORMATS)}, or a function such as "
            "quantize_nf4"
        )


def check_activations(activations: object) -> None:
    """Raises ValueError unless activations is None or "fp8"."""
    if activations not in (None, *get_args(Activations)):
        raise ValueError(f"activations: got {activations!r}, wanted None or 'fp8'")


def quantize(weight: Tensor, format: Format | Quantizer) -> QuantizedWeight:
    """``weight`` [N, K] in codes, as quantize_nf4, quantize_fp4, quantize_int8 or quantize_fp8.

    Or by a function, which is how their options are given. Raises TypeError or ValueError if it
    gives no `QuantizedWeight` of that shape.
    """
    check_format(format)
    quantized = format(weight) if callable(format) else _QUANTIZERS[format](weight)
    if not isinstance(quantized, QuantizedWeight):
        got = type(quantized).__name__
        raise TypeError(f"quantize: the function gave a {got}, wanted a QuantizedWeight")
    if quantized.shape != weight.shape:
        raise ValueError(
            f"quantize: the function gave {list(quantized.shape)} for a weight {list(weight.shape)}"
        )
    return quantized


def _check_weight(weight: object) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, wanted a torch.Tensor")
    if weight.dtype not in _SOURCE_DTYPES or weight.layout != torch.strided:
        wanted = ", ".join(str(dtype) for dtype in _SOURCE_DTYPES)
        raise TypeError(f"weight: got {weight.dtype}, {weight.layout}, wanted dense {wanted}")
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted [N, K], not empty")
    if weight.device.type == "meta":
        raise ValueError("weight: is on the meta device and has no values")
    if not torch.isfinite(weight).all():
        raise ValueError("weight: has values that are not finite")


def _reciprocal(absmax: Tensor, numerator: float = 1.0) -> Tensor:
    """numerator / absmax, 0 where absmax is: a block of zeros has codes of zero."""
    return torch.where(absmax > 0, numerator / absmax, 0.0)


def _eight_bit(
    format: Format,
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    block: tuple[int, int],
    activations: Activations | None = None,
) -> QuantizedWeight:
    return QuantizedWeight(
        format,
        codes,
        scales,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype,
        block=block,
        activations=activations,
    )


def _quantize_4bit(
    format: Format, weight: Tensor, double_quant: bool, block_size: int
) -> QuantizedWeight:
    _check_weight(weight)
    if block_size not in _BLOCK_SIZES:
        raise ValueError(f"block_size: got {block_size!r}, wanted one of {_BLOCK_SIZES}")
    codebook = _codebook(format, weight.device)
    order = torch.argsort(codebook)
    bounds = (codebook[order[:-1]] + codebook[order[1:]]) / 2
    flat = weight.detach().reshape(-1).float()
    whole = flat.numel() // block_size * block_size
    blocks = flat[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    # bitsandbytes multiplies whole blocks and divides the last one: the same bytes need the same.
    places = torch.empty_like(flat, dtype=torch.int32)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    torch.bucketize(scaled.view(-1), bounds, out_int32=True, out=places[:whole])
    if whole < flat.numel():
        last = flat[whole:].abs().amax().clamp(min=1e-38)
        places[whole:] = torch.bucketize((flat[whole:] / last).clamp_(-1, 1), bounds)
        absmax = torch.cat((absmax, last[None]))
    if flat.numel() % 2:
        places = F.pad(places, (0, 1), value=int(torch.bucketize(torch.zeros(()), bounds.cpu())))
    codes = (places if format == "nf4" else order[places]).to(torch.uint8)
    packed = codes[0::2] << 4 | codes[1::2]
    tables: dict[str, Any] = {"codebook": codebook}
    if double_quant:
        offset = absmax.mean()
        absmax, tables["nested_scales"] = _quantize_scales(absmax - offset)
        # A copy: transformers saves no model whose tensors share memory.
        tables["nested_codebook"] = _nested_codebook().to(weight.device, copy=True)
        tables["nested_offset"] = offset.view(1)
    N, K = weight.shape
    return QuantizedWeight(
        format, packed, absmax, shape=(N, K), dtype=weight.dtype, block=(1, block_size), **tables
    )


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits in blocks of 256, and the blocks' own scales."""
    codebook = _nested_codebook()
    bounds = ((codebook[:-1] + codebook[1:]) / 2).to(scales.device)
    blocks = F.pad(scales, (0, -scales.numel() % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * _reciprocal(absmax)[:, None]
    if scales.device.type == "cpu":  # bitsandbytes' CPU build rounds to one of 65,536 steps first
        step = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).int()
        scaled = -1.0 + 2.0 * step.float() / 65535
    codes = torch.bucketize(scaled, bounds, out_int32=True)
    if scales.device.type == "cpu":
        codes.masked_fill_(absmax[:, None] == 0, 0)
    return codes.to(torch.uint8).view(-1)[: scales.numel()], absmax

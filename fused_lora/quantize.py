"""The functions that put a weight into codes; what codes there are: codes.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, mxfp4
from .codes import (
    BLOCK_SIZES,
    CODE_DTYPES,
    FORMATS,
    FOUR_BIT,
    FP8,
    NESTED_BLOCK,
    SOURCE_DTYPES,
    Activations,
    Format,
    blocks_of,
    codebook_of,
    nested_codebook,
)
from .quantized_weight import QuantizedWeight, check_activations

Quantizer = Callable[[Tensor], QuantizedWeight]
# Of a whole model: for all layers, or for those whose paths a pattern matches.
Quantize = Format | Quantizer | Mapping[str, Format | Quantizer | None] | None
_FP8_BLOCK = 128


def quantize_nf4(
    weight: Tensor, *, double_quant: bool = True, block_size: int = 64
) -> QuantizedWeight:
    """NF4 codes of ``weight`` [N, K] (fp32, bf16 or fp16), the same bytes as bitsandbytes makes.

    Or of experts' weights [E, N, K], any strides: of one of them at a time, where no block is of
    two, and in memory for no more.

    Those of `bitsandbytes.functional.quantize_4bit` with ``compress_statistics=double_quant``, on
    the weight's device: its CPU build rounds the scales through a table of 65,536 steps, its CUDA
    build to the nearest, and so do we.

    Raises TypeError or ValueError: no weight of these shapes and dtypes, one that is empty, not
    finite or on the meta device, a block size that bitsandbytes does not have.
    """
    return _quantize_4bit("nf4", weight, double_quant, block_size)


def quantize_fp4(
    weight: Tensor, *, double_quant: bool = True, block_size: int = 64
) -> QuantizedWeight:
    """FP4 codes; the rest as for `quantize_nf4`."""
    return _quantize_4bit("fp4", weight, double_quant, block_size)


def quantize_mxfp4(weight: Tensor) -> QuantizedWeight:
    """MXFP4 codes of ``weight`` [N, K] or [E, N, K]: see mxfp4.py.

    Of a weight that was in MXFP4, as gpt-oss's experts are before transformers makes them bf16, the
    values stay what they are. Raises what `quantize_nf4` raises.
    """
    _check_weight(weight)
    matrices = _with_whole_blocks(weight, mxfp4.BLOCK)
    codes, scales = zip(*map(mxfp4.in_codes, matrices), strict=True)
    exponents, device = torch.cat(scales), weight.device
    fp32: Any = {"dtype": torch.float32, "device": device}
    return QuantizedWeight(
        "mxfp4",
        torch.cat(codes),
        exponents,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        block=(1, mxfp4.BLOCK),
        codebook=codebook_of("mxfp4", device),
        # A copy: transformers saves no model whose tensors share memory.
        nested_codebook=mxfp4.scale_codebook().to(device, copy=True),
        nested_scales=torch.ones(blocks_of(len(exponents), NESTED_BLOCK), **fp32),
        nested_offset=torch.zeros(1, **fp32),
    )


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """int8 codes of ``weight`` [N, K], a scale for each row, codes as bitsandbytes' Int8Params.

    Or of experts' [E, N, K].

    As there, the weight goes through fp16 first. Raises what `quantize_nf4` raises, and ValueError
    for values beyond fp16.
    """
    _check_weight(weight)
    return _quantize_int8(weight, (1, 0))


def quantize_fp8(
    weight: Tensor, *, block_size: int | None = 128, activations: Activations | None = None
) -> QuantizedWeight:
    """e4m3 codes of ``weight`` [N, K]; a scale for each 128 x 128 block, or one (None).

    Or of experts' weights [E, N, K], each with blocks of its own.

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
    if block_size is not None:
        checks.check_integer("block_size", block_size, 1)
    if block_size not in (None, _FP8_BLOCK):
        raise ValueError(f"block_size: got {block_size!r}, wanted {_FP8_BLOCK} or None")
    return _quantize_fp8(weight, (block_size or 0, block_size or 0), activations)


_QUANTIZERS: dict[Format, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": quantize_nf4,
    "fp4": quantize_fp4,
    "mxfp4": quantize_mxfp4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
}


def check_format(format: object, name: str = "quantize") -> None:
    """Raises ValueError unless format is one of `FORMATS`, or a function."""
    if not callable(format) and format not in FORMATS:
        raise ValueError(
            f"{name}: got {format!r}, wanted one of {', '.join(FORMATS)}, or a function such as "
            "quantize_nf4"
        )


def quantize(weight: Tensor, format: Format | Quantizer) -> QuantizedWeight:
    """``weight`` [N, K] or [E, N, K] in codes, as quantize_nf4, quantize_fp4, ... make them.

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


def quantize_like(like: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """``weight`` [N, K] or [E, N, K] in the format, block size and dtype of ``like``."""
    format, block = like.layout.format, like.layout.block
    if format == "mxfp4":
        new = quantize_mxfp4(weight)
    elif format in FOUR_BIT:
        new = _quantize_4bit(format, weight, like.layout.nested, block[1])
    else:
        _check_weight(weight)
        if format == "int8":
            new = _quantize_int8(weight, block)
        else:
            new = _quantize_fp8(weight, block, like.activations)
        new.scales.data = new.scales.view(like.scales.shape)
    new.dtype = like.dtype
    return new


def _check_weight(weight: object) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, wanted a torch.Tensor")
    if weight.dtype not in SOURCE_DTYPES or weight.layout != torch.strided:
        wanted = ", ".join(str(dtype) for dtype in SOURCE_DTYPES)
        raise TypeError(f"weight: got {weight.dtype}, {weight.layout}, wanted dense {wanted}")
    if weight.ndim not in (2, 3) or not weight.numel():
        got = f"weight: got shape {list(weight.shape)}"
        raise ValueError(f"{got}, wanted [N, K], or [E, N, K] of experts, not empty")
    if weight.device.type == "meta":
        raise ValueError("weight: is on the meta device and has no values")
    if not all(torch.isfinite(matrix).all() for matrix in _matrices(weight)):
        raise ValueError("weight: has values that are not finite")


def _matrices(weight: Tensor) -> Tensor:
    """Those of a stack, one after the other; or the only one."""
    return weight.detach()[None] if weight.ndim == 2 else weight.detach()


def _with_whole_blocks(weight: Tensor, block: int) -> list[Tensor]:
    """Its matrices; or all as one, where a block would be of two of them."""
    matrices = list(_matrices(weight))
    return matrices if matrices[0].numel() % block == 0 else [weight.detach()]


def _reciprocal(absmax: Tensor, numerator: float = 1.0) -> Tensor:
    """numerator / absmax, 0 where absmax is: a block of zeros has codes of zero."""
    return torch.where(absmax > 0, numerator / absmax, 0.0)


def _in_blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """values [N, K], with zeros to fill the last ones, as [blocks, rows, blocks, columns]."""
    N, K = values.shape
    rows, columns = block[0] or N, block[1] or K
    padded = F.pad(values, (0, -K % columns, 0, -N % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


def _out_of_blocks(tiles: Tensor, N: int, K: int) -> Tensor:
    return tiles.flatten(2, 3).flatten(0, 1)[:N, :K]


def _quantize_int8(weight: Tensor, block: tuple[int, int]) -> QuantizedWeight:
    def in_codes(matrix: Tensor) -> tuple[Tensor, Tensor]:
        tiles = _in_blocks(matrix.to(torch.float16), block)
        absmax = tiles.abs().amax(dim=(1, 3)).float()
        if not torch.isfinite(absmax).all():
            raise ValueError("weight: has values beyond 65504, which int8's fp16 step cannot hold")
        codes = torch.round(tiles * _reciprocal(absmax, 127.0)[:, None, :, None]).to(torch.int8)
        return codes, (absmax / 127.0).view(-1)

    return _eight_bit("int8", weight, in_codes, block)


def _quantize_fp8(
    weight: Tensor, block: tuple[int, int], activations: Activations | None
) -> QuantizedWeight:
    def in_codes(matrix: Tensor) -> tuple[Tensor, Tensor]:
        tiles = _in_blocks(matrix.float(), block)
        scales = tiles.abs().amax(dim=(1, 3)) / torch.finfo(FP8).max
        return tiles * _reciprocal(scales)[:, None, :, None], scales

    return _eight_bit("fp8", weight, in_codes, block, activations)


def _eight_bit(
    format: Format,
    weight: Tensor,
    in_codes: Callable[[Tensor], tuple[Tensor, Tensor]],
    block: tuple[int, int],
    activations: Activations | None = None,
) -> QuantizedWeight:
    """``in_codes`` makes the codes of a matrix, in blocks, and their scales."""
    codes = torch.empty(weight.shape, dtype=CODE_DTYPES[format], device=weight.device)
    scales = []
    for matrix, out in zip(_matrices(weight), _matrices(codes), strict=True):
        tiles, own = in_codes(matrix)
        out.copy_(_out_of_blocks(tiles, *matrix.shape))
        scales.append(own)
    return QuantizedWeight(
        format,
        codes,
        scales[0] if weight.ndim == 2 else torch.stack(scales),
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        block=block,
        activations=activations,
    )


def _quantize_4bit(
    format: Format, weight: Tensor, double_quant: bool, block_size: int
) -> QuantizedWeight:
    _check_weight(weight)
    checks.check_flag("double_quant", double_quant)
    checks.check_integer("block_size", block_size, 1)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: got {block_size!r}, wanted one of {BLOCK_SIZES}")
    codebook = codebook_of(format, weight.device)
    matrices = _with_whole_blocks(weight, block_size)
    parts = [_four_bit_codes(format, matrix, codebook, block_size) for matrix in matrices]
    packed, absmax = (torch.cat(part) for part in zip(*parts, strict=True))
    tables: dict[str, Any] = {"codebook": codebook}
    if double_quant:
        offset = absmax.mean()
        absmax, tables["nested_scales"] = _quantize_scales(absmax - offset)
        # A copy: transformers saves no model whose tensors share memory.
        tables["nested_codebook"] = nested_codebook().to(weight.device, copy=True)
        tables["nested_offset"] = offset.view(1)
    return QuantizedWeight(
        format,
        packed,
        absmax,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        block=(1, block_size),
        **tables,
    )


def _four_bit_codes(
    format: Format, matrix: Tensor, codebook: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Packed codes of whole blocks, the last of which may be cut off, and their absmax."""
    order = torch.argsort(codebook)
    bounds = (codebook[order[:-1]] + codebook[order[1:]]) / 2
    flat = matrix.reshape(-1).float()
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
        places = F.pad(places, (0, 1), value=int(torch.bucketize(bounds.new_zeros(()), bounds)))
    codes = (places if format == "nf4" else order[places]).to(torch.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits in blocks of 256, and the blocks' own scales."""
    codebook = nested_codebook()
    bounds = ((codebook[:-1] + codebook[1:]) / 2).to(scales.device)
    blocks = F.pad(scales, (0, -scales.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * _reciprocal(absmax)[:, None]
    if scales.device.type == "cpu":  # bitsandbytes' CPU build rounds to one of 65,536 steps first
        step = ((scaled.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).int()
        scaled = -1.0 + 2.0 * step.float() / 65535
    codes = torch.bucketize(scaled, bounds, out_int32=True)
    if scales.device.type == "cpu":
        codes.masked_fill_(absmax[:, None] == 0, 0)
    return codes.to(torch.uint8).view(-1)[: scales.numel()], absmax

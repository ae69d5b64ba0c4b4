"""MXFP4: e2m1 values in blocks of 32 with a power of two each, the codes that gpt-oss comes in.

OCP Microscaling Formats (MX) v1.0, sec. 5.3 and 6.3. Laid out as the other 4-bit formats are, with
the scales' exponents (e8m0) for their nested codes: 4.25 bits a value.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the three bits after the sign
_BIAS = 127  # of the exponents
_EXPONENT_OF_MAX = 2  # 6 = 1.5 * 2^2


@functools.cache
def scale_codebook() -> Tensor:
    """2^(code - 127) for each of the 256 codes, the last of which is no number's."""
    return _power_of_two(torch.arange(256, device="cpu") - _BIAS)


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in fp32, from -127 to 127; exact on any device."""
    bits = (exponents.int() + _BIAS) << 23
    return torch.where(bits == 0, 1 << 22, bits).view(torch.float32)  # 2^-127 is subnormal


def in_codes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes of the matrix, row after row, and the uint8 exponents of its blocks.

    Weights that were in MXFP4 get the same values again. Others are rounded to the nearest, ties to
    even, and cut off at 6 times the scale, 2^(floor(log2(absmax)) - 2).
    """
    flat = matrix.reshape(-1).float()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    _, exponents = torch.frexp(blocks.abs().amax(dim=1))  # absmax = m 2^e, m in [0.5, 1); or e = 0
    exponents = (exponents - 1 - _EXPONENT_OF_MAX).clamp_(min=-_BIAS)
    scaled = (blocks * _power_of_two(-exponents)[:, None]).flatten()
    places = torch.bucketize(scaled.abs(), _bounds().to(flat.device), out_int32=True)
    codes = (places | torch.signbit(scaled).int() << 3)[: flat.numel() + flat.numel() % 2]
    codes = codes.to(torch.uint8)
    return codes[0::2] << 4 | codes[1::2], (exponents + _BIAS).to(torch.uint8)


@functools.cache
def _bounds() -> Tensor:
    """The last float that is rounded down, between each two magnitudes."""
    values = torch.tensor(MAGNITUDES, dtype=torch.float32, device="cpu")
    middles = (values[:-1] + values[1:]) / 2
    below = torch.nextafter(middles, middles.new_zeros(()))
    odd = torch.arange(len(middles), device="cpu") % 2 == 1  # a tie goes up from an odd code
    return torch.where(odd, below, middles)

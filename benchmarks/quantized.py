"""Layers over a quantised W0: the problem, and who is measured.

fused        `FusedLoRALinear` over the codes
in_loop      its kernels with the codes read in the GEMM's own loop
scratch      its kernels over a W0 made anew in every forward and backward (where x is rounded: in
             backward alone)
dequantise   the same in plain PyTorch: PEFT's formula over `dequantize`, then F.linear
peft_bnb     PEFT's own layer over bitsandbytes' Linear4bit or Linear8bitLt
unquantised  `lora_linear` over the values, kept: the time to reach, at its memory
linear       the frozen layer alone, over the values
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Problem
from torch import Tensor, nn

from fused_lora import (
    QuantizedWeight,
    quantize_fp4,
    quantize_fp8,
    quantize_int8,
    quantize_nf4,
    reference,
)
from fused_lora.tables import Strategy

from .providers import (
    Layer,
    Provider,
    by_name,
    chosen,
    fused,
    kernels_cannot,
    linear,
    peft_layer,
    with_plan,
)
from .shapes import FORMATS

_QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": quantize_nf4,
    "nf4 single": lambda weight: quantize_nf4(weight, double_quant=False),
    "fp4": quantize_fp4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "fp8 activations": lambda weight: quantize_fp8(weight, activations="fp8"),
}
assert tuple(_QUANTIZERS) == FORMATS


@dataclass
class QuantizedProblem(Problem):
    """A problem whose weight [N, K] is what ``codes`` stands for."""

    codes: QuantizedWeight


def quantized(p: Problem, format: str) -> QuantizedProblem:
    """The problem with its weight in codes, and in its place their values.

    Where x is rounded, it is one that rounding leaves as it is: all providers have one result.
    """
    codes = _QUANTIZERS[format](p.weight)
    x = reference.fp8_activations(p.x) if codes.activations else p.x
    values = {"x": x, "weight": codes.dequantize(), "codes": codes}
    return QuantizedProblem(**{**vars(p), **values})


class _Dequantise(torch.autograd.Function):
    """x W0^T with nothing of W0 kept between forward and backward, as bitsandbytes does it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.weight.dequantize(g.dtype), None


def dequantised(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The base product, over values that are there while it lasts."""
    rounded = reference.fp8_activations(x) if weight.activations else x
    y: Tensor = _Dequantise.apply(rounded, weight)
    return y


def _dequantise(p: QuantizedProblem) -> Layer:
    def layer(x: Tensor) -> Tensor:
        base = dequantised(x, p.codes)
        update = F.linear(F.linear(x.to(p.lora_A.dtype), p.lora_A), p.lora_B)
        return (base + update * p.scaling).to(x.dtype)

    return layer


def _unquantised(p: QuantizedProblem) -> Layer:
    return fused(Problem(**{name: value for name, value in vars(p).items() if name != "codes"}))


def _bitsandbytes(p: QuantizedProblem) -> nn.Module:
    """Its layer over our codes, which have its layout; no tensor is copied."""
    import bitsandbytes as bnb

    N, K = p.codes.shape
    layout, tensors = p.codes.layout, {name: t.data for name, t in p.codes.named_parameters()}
    codes, scales = tensors["codes"], tensors["scales"]
    linear: Any
    if layout.format == "int8":
        linear = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, device="meta")
        linear.weight = bnb.nn.Int8Params(codes, False, CB=codes, SCB=scales.view(-1) * 127)
        linear.is_loaded_in_8bit = True
        return linear
    options = {"quant_type": layout.format, "blocksize": layout.block[1]}
    state = bnb.functional.QuantState(
        scales, shape=p.codes.shape, code=tensors["codebook"], dtype=p.x.dtype, **options
    )
    if layout.nested:
        state.offset = tensors["nested_offset"].view(())
        state.state2 = bnb.functional.QuantState(
            tensors["nested_scales"],
            code=tensors["nested_codebook"],
            blocksize=256,
            dtype=torch.float32,
        )
        state.nested = True
    linear = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=p.x.dtype, device="meta")
    linear.weight = bnb.nn.Params4bit(
        codes.view(-1, 1), quant_state=state, module=linear, bnb_quantized=True, **options
    )
    linear.is_loaded_in_4bit = True
    return linear


def _peft_bnb(p: QuantizedProblem) -> Layer:
    layer: Layer = peft_layer(p, _bitsandbytes(p), {"default": (p.lora_A, p.lora_B)})
    return layer


def _peft_bnb_cannot(p: QuantizedProblem) -> str | None:
    for package in ("peft", "bitsandbytes"):
        if not importlib.util.find_spec(package):
            return f"{package} is not installed"
    if p.codes.layout.format == "fp8":
        return "bitsandbytes has no fp8 layer"
    return None


def _code_bytes(p: QuantizedProblem) -> int:
    return p.codes.nbytes


def _with_plan(name: str, strategy: Strategy) -> Provider:
    build = with_plan(strategy)
    return Provider(name, build, True, "triton", obstacle=kernels_cannot, weight_bytes=_code_bytes)


QUANTIZED = by_name(
    Provider("fused", fused, ours=True, choice=chosen, weight_bytes=_code_bytes),
    _with_plan("in_loop", "in_loop"),
    _with_plan("scratch", "split"),
    Provider("dequantise", _dequantise, weight_bytes=_code_bytes),
    Provider("peft_bnb", _peft_bnb, obstacle=_peft_bnb_cannot, weight_bytes=_code_bytes),
    Provider("unquantised", _unquantised, ours=True),
    Provider("linear", linear, adapter=False),
)
CPU_QUANTIZED = ("fused", "dequantise", "peft_bnb", "unquantised", "linear")

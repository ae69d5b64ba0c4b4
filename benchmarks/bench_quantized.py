"""`make bench`: a LoRA layer over a quantised base weight, forward and backward, and what it holds.

Every provider is checked against the dequantised weight's own layer before it is timed. Providers:

    fused        `lora_linear` over the codes
    dequantise   the whole W0 made anew in forward and again in backward, as bitsandbytes + PEFT do
    unquantised  `lora_linear` over the dequantised weight, kept: the time to reach, at its memory

The peak beyond what is held before the call, and the bytes of the weight, are in ``extra_info``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora import lora_linear, quantize_fp8, quantize_int8, quantize_nf4
from fused_lora.quantize import QuantizedWeight

from . import measure

CUDA = torch.cuda.is_available()
R = 16
QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": quantize_nf4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
}
# M, N, K: rows as in training and in decoding; on a GPU Llama-3.1-8B's gate, up.
SHAPES = [(8192, 14336, 4096), (16, 14336, 4096)] if CUDA else [(512, 1536, 576), (16, 1536, 576)]
DTYPE = torch.bfloat16 if CUDA else torch.float32


class _Dequantise(torch.autograd.Function):
    """x W0^T with nothing of W0 kept between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.weight.dequantize(g.dtype), None


Layer = Callable[[Tensor, QuantizedWeight, Tensor, Tensor, Tensor], Tensor]
PROVIDERS: dict[str, Layer] = {
    "fused": lambda x, q, W, A, B: lora_linear(x, q, A, B, scaling=2.0),
    "dequantise": lambda x, q, W, A, B: _Dequantise.apply(x, q) + 2.0 * F.linear(F.linear(x, A), B),
    "unquantised": lambda x, q, W, A, B: lora_linear(x, W, A, B, scaling=2.0),
}


@pytest.mark.benchmark(min_rounds=5, max_time=0.4, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M {} N {} K {}".format(*s))
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantized(benchmark, device, kind, shape, provider):
    M, N, K = shape
    benchmark.group = f"{kind} M {M} N {N} K {K} r {R} {DTYPE}, forward+backward"

    def normal(*sides: int) -> Tensor:
        return (torch.randn(*sides) * sides[-1] ** -0.5).to(device, DTYPE)

    q = QUANTIZERS[kind](normal(N, K))
    W = q.dequantize(DTYPE)
    x, A, B, g = normal(M, K), normal(R, K), normal(N, R), normal(M, N)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    layer = PROVIDERS[provider]

    def call() -> tuple[Tensor, ...]:
        y = layer(x, q, W, A, B)
        return (y, *torch.autograd.grad(y, leaves, g))

    expected = F.linear(x, W) + 2.0 * F.linear(F.linear(x, A), B)
    wanted = (expected, *torch.autograd.grad(expected, leaves, g))
    for got, exact in zip(call(), wanted, strict=True):
        assert (got - exact).norm() < 0.02 * exact.norm()
    held = W if provider == "unquantised" else q
    tensors = [held] if isinstance(held, Tensor) else list(held.state_dict().values())
    benchmark.extra_info["weight_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
    benchmark.extra_info["peak_bytes"] = measure.peak_memory(call, device)

    def finished() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(finished)

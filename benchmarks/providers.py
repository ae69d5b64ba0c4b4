"""Who is measured: every way of computing the layer, as `build(problem) -> x -> y`.

All take the same tensors and do the same work: y with what backward needs saved. The name
"linear" is the frozen layer alone, without an adapter: the bound.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Problem
from torch import Tensor, nn

from fused_lora import LoRALinearFunction, lora_linear
from fused_lora.dispatch import Backend, Plan, Strategy, checked_call, kernel_obstacle
from fused_lora.functional import draw_seeds
from fused_lora.kernels.configs import ship
from fused_lora.kernels.device import device_info
from fused_lora.kernels.dropout import dropout_threshold

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way of computing the layer."""

    name: str
    build: Callable[[Problem], Layer]
    ours: bool = False  # draws the mask that the oracle knows
    backend: Backend = "auto"
    adapter: bool = True
    # Why it cannot take a problem; None if it can.
    obstacle: Callable[[Problem], str | None] = lambda p: None


def _fused(p: Problem) -> Layer:
    return lambda x: lora_linear(
        x, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, bias=p.bias, dropout_p=p.dropout_p
    )


def _with_plan(strategy: Strategy) -> Callable[[Problem], Layer]:
    """One strategy of the kernels for forward and dx, whatever "auto" would choose."""
    plan = Plan("triton", strategy, strategy)

    def build(p: Problem) -> Layer:
        threshold = dropout_threshold(p.dropout_p)

        def layer(x: Tensor) -> Tensor:
            seed = draw_seeds(1, x.device, "triton") if threshold else None
            y: Tensor = LoRALinearFunction.apply(
                x, p.weight, p.lora_A, p.lora_B, p.bias, p.scaling, seed, threshold, plan
            )
            return y

        return layer

    return build


def _kernels_cannot(p: Problem) -> str | None:
    call = checked_call(p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.dropout_p > 0)
    obstacle = kernel_obstacle(call)
    return None if obstacle is None else str(obstacle)


def _one_pass_cannot(p: Problem) -> str | None:
    fits = ship(
        "one_pass",
        p.lora_A.shape[0],
        p.x.dtype.itemsize,
        p.dropout_p > 0,
        device_info(p.x.device),
    )
    return _kernels_cannot(p) or (None if fits else "no one-pass tile takes this rank or dropout")


def _linear(p: Problem) -> Layer:
    return lambda x: F.linear(x, p.weight, p.bias)


def _expression(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """PEFT's `lora.Linear.forward` (0.21) in plain PyTorch: its operations in its order."""
    result = F.linear(x, weight, bias)
    dropped = F.dropout(x.to(lora_A.dtype), dropout_p)
    update = F.linear(F.linear(dropped, lora_A), lora_B)
    return (result + update * scaling).to(result.dtype)


_compiled_expression = torch.compile(_expression, fullgraph=True, dynamic=False)


def _takes_all(call: Callable[..., Tensor]) -> Callable[[Problem], Layer]:
    return lambda p: lambda x: call(x, p.weight, p.lora_A, p.lora_B, p.bias, p.scaling, p.dropout_p)


def _compiled(p: Problem) -> Layer:
    """One compilation for each layer and every M: as in training on sequences of any length."""
    torch._dynamo.config.recompile_limit = 1024  # else it ends, at the ninth layer, with an error
    torch._functorch.config.donated_buffer = False  # else backward cannot be timed alone
    torch._dynamo.maybe_mark_dynamic(p.x, 0)
    return _takes_all(_compiled_expression)(p)


def _peft(p: Problem) -> Layer:
    """PEFT's own layer over the problem's own tensors."""
    from peft import LoraConfig, get_peft_model

    r, K = p.lora_A.shape
    linear = nn.utils.skip_init(
        nn.Linear, K, p.weight.shape[0], bias=False, device=p.x.device, dtype=p.x.dtype
    )
    config = LoraConfig(
        r=r, lora_alpha=p.scaling * r, lora_dropout=p.dropout_p, target_modules=["proj"]
    )
    model = get_peft_model(nn.Sequential(OrderedDict(proj=linear)), config)
    layer = model.base_model.model.proj.train()
    tensors = {
        layer.base_layer: p.weight,
        layer.lora_A["default"]: p.lora_A,
        layer.lora_B["default"]: p.lora_B,
    }
    for module, tensor in tensors.items():
        del module.weight  # a parameter; the problem's leaves stay what they are
        module.weight = tensor
    layer.base_layer.register_parameter("bias", None)
    if p.bias is not None:
        del layer.base_layer.bias
        layer.base_layer.bias = p.bias
    layer_call: Layer = layer
    return layer_call


class _AddmmFunction(torch.autograd.Function):
    """The layer by hand in the style of Unsloth's: `addmm_` in place of sums, dx onto one tensor.

    Saves the dropped x and the mask, as `F.dropout` would.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout_p: float,
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y = F.linear(x, weight, bias)
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        h = dropped @ A.t()
        y.addmm_(h, B.t(), alpha=scaling)
        ctx.save_for_backward(dropped, mask, weight, lora_A, lora_B, h)
        ctx.scaling, ctx.keep_scale = scaling, 1 / (1 - dropout_p)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, weight, lora_A, lora_B, h = ctx.saved_tensors
        dh = g @ lora_B.to(g.dtype)
        dA = (dh.t() @ dropped).mul_(ctx.scaling)
        dB = (g.t() @ h).mul_(ctx.scaling)
        dx = g @ weight
        A = lora_A.to(g.dtype)
        if mask is None:
            dx.addmm_(dh, A, alpha=ctx.scaling)
        else:
            dx.addcmul_(dh @ A, mask.to(g.dtype), value=ctx.scaling * ctx.keep_scale)
        dbias = g.sum(0) if ctx.needs_input_grad[4] else None
        return dx, None, dA.to(lora_A.dtype), dB.to(lora_B.dtype), dbias, None, None


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("fused", _fused, ours=True),
        Provider("one_pass", _with_plan("one_pass"), True, "triton", obstacle=_one_pass_cannot),
        Provider(
            "split", _with_plan("split"), ours=True, backend="triton", obstacle=_kernels_cannot
        ),
        Provider("linear", _linear, adapter=False),
        # The real one where it is installed. Rows of the two are never mixed.
        Provider("peft", _peft)
        if importlib.util.find_spec("peft")
        else Provider("peft_formula", _takes_all(_expression)),
        Provider("addmm", _takes_all(_AddmmFunction.apply)),
        Provider("compile", _compiled),
    )
}
EAGER = "peft" if "peft" in PROVIDERS else "peft_formula"
# torch.compile takes half a minute a layer on a CPU: there it is measured when it is asked for.
CPU_PROVIDERS = ("fused", "linear", EAGER, "addmm")

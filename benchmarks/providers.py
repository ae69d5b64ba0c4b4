"""Who is measured: every way of computing a plain layer, as `build(problem) -> x -> y`.

All take the same tensors and do the same work: y with what backward needs saved. The name
"linear" is the frozen layer alone, without an adapter: the bound. `quantized` and `multi` have
those of the other kinds of cases.
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

from fused_lora import FusedLoRALinear, LoRALinearFunction
from fused_lora.calls import Backend, Call, checked_call
from fused_lora.dispatch import Plan, plan
from fused_lora.kernels.configs import ship
from fused_lora.kernels.device import device_info
from fused_lora.kernels.dropout import dropout_threshold
from fused_lora.seeds import draw_seeds
from fused_lora.strategies import kernel_obstacle
from fused_lora.tables import Strategy

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way of computing the layer."""

    name: str
    build: Callable[[Any], Layer]
    ours: bool = False  # draws the mask that the oracle knows
    backend: Backend = "auto"
    adapter: bool = True
    # Why it cannot take a problem; None if it can.
    obstacle: Callable[[Any], str | None] = lambda p: None
    # What "auto" decided for the problem, e.g. "triton one_pass/split" (forward/dx).
    choice: Callable[[Any], str] = lambda p: ""
    # Bytes of the frozen weight that it holds between calls.
    weight_bytes: Callable[[Any], int] = lambda p: int(p.weight.nbytes)


def frozen(p: Problem) -> Any:
    """W0 as a layer holds it: the codes where there are any."""
    codes = getattr(p, "codes", None)
    return p.weight if codes is None else codes


def fused(p: Problem) -> Layer:
    """`FusedLoRALinear`, which decides by itself, over the problem's own tensors."""
    base, r = frozen(p), p.lora_A.shape[0]
    with torch.random.fork_rng():  # what it starts from is random
        layer = FusedLoRALinear.from_linear(
            plain_linear(p) if isinstance(base, Tensor) else base,
            r,
            p.scaling * r,
            lora_dropout=p.dropout_p,
            adapter_dtype=p.lora_A.dtype,
        )
    for name in ("lora_A", "lora_B"):  # the problem's leaves stay what they are
        layer._parameters[name] = getattr(p, name)
    return layer


def with_plan(strategy: Strategy) -> Callable[[Problem], Layer]:
    """One strategy of the kernels for forward and dx, whatever "auto" would choose."""
    fixed = Plan("triton", strategy, strategy)

    def build(p: Problem) -> Layer:
        threshold = dropout_threshold(p.dropout_p)

        def layer(x: Tensor) -> Tensor:
            seed = draw_seeds(1, x.device, "triton") if threshold else None
            y: Tensor = LoRALinearFunction.apply(
                x, frozen(p), p.lora_A, p.lora_B, p.bias, p.scaling, seed, threshold, fixed
            )
            return y

        return layer

    return build


def _call(p: Problem) -> Call:
    return checked_call(p.x, frozen(p), p.lora_A, p.lora_B, p.bias, p.dropout_p > 0)


def chosen(p: Problem) -> str:
    """What `lora_linear` decides for it."""
    auto = plan(_call(p), "auto")
    return f"{auto.backend} {auto.strategy}/{auto.strategy_dx}"


def kernels_cannot(p: Problem) -> str | None:
    """Why the kernels cannot take it."""
    obstacle = kernel_obstacle(_call(p))
    return None if obstacle is None else str(obstacle)


def _one_pass_cannot(p: Problem) -> str | None:
    fits = ship(
        "one_pass",
        p.lora_A.shape[0],
        p.x.dtype.itemsize,
        p.dropout_p > 0,
        device_info(p.x.device),
    )
    return kernels_cannot(p) or (None if fits else "no one-pass tile takes this rank or dropout")


def linear(p: Problem) -> Layer:
    """The frozen layer alone, over plain weights."""
    return lambda x: F.linear(x, p.weight, p.bias)


def peft_expression(
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


_compiled_expression = torch.compile(peft_expression, fullgraph=True, dynamic=False)


def _takes_all(call: Callable[..., Tensor]) -> Callable[[Problem], Layer]:
    return lambda p: lambda x: call(x, p.weight, p.lora_A, p.lora_B, p.bias, p.scaling, p.dropout_p)


def _compiled(p: Problem) -> Layer:
    """One compilation for each layer and every M: as in training on sequences of any length."""
    torch._dynamo.config.recompile_limit = 1024  # else it ends, at the ninth layer, with an error
    torch._functorch.config.donated_buffer = False  # else backward cannot be timed alone
    torch._dynamo.maybe_mark_dynamic(p.x, 0)
    return _takes_all(_compiled_expression)(p)


def peft_layer(p: Problem, base: nn.Module, adapters: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """PEFT's own layer over ``base``, with the problem's own A and B for each name."""
    from peft import LoraConfig, get_peft_model

    (first, (A, _)), *_ = adapters.items()
    r = A.shape[0]
    config = LoraConfig(
        r=r, lora_alpha=p.scaling * r, lora_dropout=p.dropout_p, target_modules=["proj"]
    )
    model = nn.Sequential(OrderedDict(proj=base))
    for library in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # what PEFT goes by
        setattr(model, library, getattr(base, library, False))
    wrapped = get_peft_model(model, config, adapter_name=first)
    for name in [*adapters][1:]:
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model.proj.train()
    for name, (A, B) in adapters.items():
        for module, tensor in ((layer.lora_A[name], A), (layer.lora_B[name], B)):
            module._parameters["weight"] = tensor  # the problem's leaves stay what they are
    return layer


def plain_linear(p: Problem) -> nn.Linear:
    """`nn.Linear` over the problem's weight and bias."""
    N, K = p.weight.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = nn.Parameter(p.weight, requires_grad=False)
    if p.bias is not None:
        del linear.bias
        linear.bias = p.bias
    return linear


def _peft(p: Problem) -> Layer:
    layer: Layer = peft_layer(p, plain_linear(p), {"default": (p.lora_A, p.lora_B)})
    return layer


def _peft_fused(p: Problem) -> Layer:
    """PEFT's layer after `fused_lora.peft.fuse`."""
    from fused_lora.peft import fuse

    with torch.random.fork_rng():  # what it starts from is random
        layer = _peft(p)
    fuse(layer)  # type: ignore[arg-type]
    return layer


def _many_rows(p: Problem) -> str | None:
    few = p.x.shape[:-1].numel() <= 64
    return None if few else "over many rows it differs from fused by nothing that counts"


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


def by_name(*providers: Provider) -> dict[str, Provider]:
    """A table of them."""
    return {provider.name: provider for provider in providers}


# The real one where it is installed. Rows of the two are never mixed.
_eager = (
    (Provider("peft", _peft), Provider("peft_fused", _peft_fused, True, obstacle=_many_rows))
    if importlib.util.find_spec("peft")
    else (Provider("peft_formula", _takes_all(peft_expression)),)
)
EAGER = _eager[0].name
PROVIDERS = by_name(
    Provider("fused", fused, ours=True, choice=chosen),
    Provider("one_pass", with_plan("one_pass"), True, "triton", obstacle=_one_pass_cannot),
    Provider("split", with_plan("split"), True, "triton", obstacle=kernels_cannot),
    Provider("linear", linear, adapter=False),
    *_eager,
    Provider("addmm", _takes_all(_AddmmFunction.apply)),
    Provider("compile", _compiled),
)
# torch.compile takes half a minute a layer on a CPU: there it is measured when it is asked for.
CPU_PROVIDERS = ("fused", "linear", *(provider.name for provider in _eager), "addmm")

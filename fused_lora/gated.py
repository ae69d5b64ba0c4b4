"""An MLP's last layer on x = act(gate) o up, which it makes itself (SwiGLU, GeGLU).

Eager PyTorch keeps four tensors of the intermediate size for an MLP's backward pass: gate, up,
act(gate) and x. Here they are gate and up, on PyTorch's path act(gate) too; the others are made
again. (GLU: Shazeer, https://arxiv.org/abs/2002.05202)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import backends, checks
from .arguments import Arguments
from .autocast import autocast
from .autograd import Codes, as_saved, bias_gradient, check_first_derivative, to_save
from .calls import Backend, checked_call
from .dispatch import Decision, Plan, plan, replays_of
from .functional import call_layer
from .kernels.dropout import dropout_of, dropout_threshold
from .observed import is_differentiated, is_observed
from .quantized_weight import Weight
from .seeds import draw_for
from .torch_backend import gated

if TYPE_CHECKING:
    from .kernels.replay import Replays

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]  # transformers' names


class LoRALinearGatedFunction(torch.autograd.Function):
    """`LoRALinearFunction` of x = act(gate) o up, which is not saved: gate and up are.

    For gate and up of which at least one is differentiated: else saving x would be less. The
    gradients of gate and up are made in the memory of x, made again, and of x's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: Activation,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        seed: Tensor | None,
        threshold: int,
        plan: Plan,
        replays: Replays | None,
    ) -> Tensor:
        """gate and up [..., K], the others as `LoRALinearFunction.forward` takes them."""
        needs_B = ctx.needs_input_grad[5]
        x, acted = backends.gated(gate, up, activation, plan)
        operands = (x, weight, lora_A, lora_B, bias, scaling, dropout_of(seed, threshold), plan)
        y, h = backends.forward(*operands, need_h=needs_B, replays=replays)
        W = to_save(weight)
        ctx.save_for_backward(gate, up, acted, W, lora_A, lora_B, h, seed)
        ctx.quantized = Codes.of(weight)
        ctx.activation, ctx.scaling, ctx.threshold = activation, scaling, threshold
        ctx.plan, ctx.replays = plan, replays
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        check_first_derivative("lora_linear_gated")
        gate, up, acted, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        needs_gate, needs_up, _, _, needs_A, _, needs_bias = ctx.needs_input_grad[:7]
        how = (ctx.activation, ctx.plan)
        x = backends.gated(gate, up, *how, acted)[0] if needs_A else None
        dx, dA, dB = backends.backward(
            g,
            x,
            as_saved(weight, ctx.quantized),
            lora_A,
            lora_B,
            h,
            ctx.scaling,
            dropout_of(seed, ctx.threshold),
            ctx.plan,
            need_dx=True,
            replays=ctx.replays,
        )
        assert dx is not None
        dgate, dup = backends.gated_backward(dx, gate, up, acted, *how, spare=x)
        dbias = bias_gradient(g, needs_bias)
        return (
            dgate if needs_gate else None,
            dup if needs_up else None,
            None,
            None,
            dA,
            dB,
            dbias,
            *[None] * 5,
        )


def lora_linear_gated(
    gate: Tensor,
    up: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    activation: Activation = "silu",
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """y = x W0^T + bias + scaling * (D o x) A^T B^T with x = act(gate) o up, as by `lora_linear`.

    What it saves over ``lora_linear(F.silu(gate) * up, ...)``: for backward it keeps gate and up,
    where that keeps act(gate) and x too; and the passes of act and of the product, one forward
    (three tensors are read or written instead of five) and, after x is made again, one backward
    (five instead of nine).

    Args:
        gate, up: [..., K] of one shape, dtype and device, any strides.
        activation: act, by transformers' names: "silu" (SwiGLU), "gelu" or "gelu_pytorch_tanh"
            (GeGLU). Computed in fp32 in the kernels, and x rounded once.
        weight, lora_A, lora_B, scaling, bias, dropout_p, backend: as for `lora_linear` of x.

    Returns:
        y [..., N] in the inputs' dtype (under autocast: in the autocast dtype).

    Raises what `lora_linear` does; TypeError or ValueError if gate and up do not fit together,
    ValueError for an unknown activation.

    Under torch.compile, torch.func's transforms and dispatch modes, for tensor subclasses such as
    DTensor, for inputs that autocast changes, and for a small x on a CPU (up to 64 rows,
    or 2^18 elements of x and y), x is made by PyTorch.
    """
    given = Arguments(weight, lora_A, lora_B, scaling, bias, dropout_p, backend)
    return call_gated(gate, up, activation, given)


def call_gated(gate: Tensor, up: Tensor, activation: Activation, given: Arguments) -> Tensor:
    """`lora_linear_gated` of what a layer passes on."""
    _check(gate, up, activation, given.weight)
    decided = _decided(gate, up, given)
    if decided is None or not (is_differentiated(gate) or is_differentiated(up)):
        # In the latter case x alone is kept, if anything, for the adapter's gradient.
        x = _made(gate, up, activation, decided)
        del gate, up  # the caller may have no other
        return call_layer(x, given)
    (_, plan, scaling, threshold, replays), layer = decided
    apply: Any = LoRALinearGatedFunction.apply
    operands = (gate, up, activation, *layer[:3], layer.bias, scaling, draw_for(decided[0]))
    y: Tensor = apply(*operands, threshold, plan, replays)
    return y


def gated_input(gate: Tensor, up: Tensor, activation: Activation, given: Arguments) -> Tensor:
    """x = act(gate) o up alone, of a call that nobody records."""
    return _made(gate, up, activation, _decided(gate, up, given))


def are_alike(gate: Tensor, up: Tensor) -> bool:
    """Whether the two can go to `call_gated`."""
    return (gate.shape, gate.dtype, gate.device) == (up.shape, up.dtype, up.device)


def _decided(gate: Tensor, up: Tensor, given: Arguments) -> tuple[Decision, Arguments] | None:
    """The decision for the layer's call on x, which is like gate; the layer as autocast has it.

    None where PyTorch is to make x, and `call_layer` to decide.
    """
    if is_observed() or not _are_plain(gate, up, *given.tensors()):
        return None
    x, weight, bias = autocast(gate, given.weight, given.bias)
    layer = given._replace(weight=weight, bias=bias)
    checks.check_options(weight, layer.scaling, layer.dropout_p, layer.backend)
    threshold = dropout_threshold(layer.dropout_p)
    call = checked_call(x, weight, layer.lora_A, layer.lora_B, bias, threshold > 0)
    chosen = plan(call, layer.backend)
    if x is not gate or chosen.composed:
        return None
    decision = Decision(call, chosen, float(layer.scaling), threshold)
    return decision._replace(replays=replays_of(gate.shape, decision)), layer


def _made(
    gate: Tensor, up: Tensor, activation: Activation, decided: tuple[Decision, Arguments] | None
) -> Tensor:
    if decided is None or decided[0].plan.backend == "torch":
        return gated(gate, up, activation)
    return backends.gated(gate, up, activation, decided[0].plan)[0]


def _are_plain(*tensors: Tensor) -> bool:
    plain = (Tensor, nn.Parameter)
    return all(type(t) in plain and not t.is_neg() and not t.is_inference() for t in tensors)


def _check(gate: object, up: object, activation: object, weight: Weight) -> None:
    if activation not in get_args(Activation):
        wanted = ", ".join(get_args(Activation))
        raise ValueError(f"activation: got {activation!r}, wanted one of {wanted}")
    for name, tensor in (("gate", gate), ("up", up)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a torch.Tensor")
    assert isinstance(gate, Tensor)
    assert isinstance(up, Tensor)
    checks.check_dtype("gate's dtype", gate.dtype)
    if up.dtype != gate.dtype:
        raise TypeError(f"up: got dtype {up.dtype}, wanted gate's, {gate.dtype}")
    if up.device != gate.device:
        raise ValueError(f"up: is on {up.device}, wanted gate's device, {gate.device}")
    if up.shape != gate.shape:
        raise ValueError(f"up: got shape {list(up.shape)}, wanted gate's, {list(gate.shape)}")
    sizes = list(getattr(weight, "shape", ()))
    if len(sizes) == 2 and (gate.ndim == 0 or gate.shape[-1] != sizes[1]):
        raise ValueError(
            f"gate: got shape {list(gate.shape)}, wanted [..., {sizes[1]}] to fit weight {sizes}"
        )

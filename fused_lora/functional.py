"""`lora_linear` and `explain`: the checked ways in."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, dora_ops, ops, torch_backend
from .arguments import Arguments
from .autocast import autocast
from .autograd import LoRALinearFunction
from .calls import Backend, checked_call
from .dispatch import FEW_ROWS, Decision, plan, replays_of
from .dora import DoRALinearFunction
from .explanation import Explanation, explain_call
from .kernels.dropout import dropout_of, dropout_threshold
from .observed import check_frozen, fold_scaling, is_observed, is_recorded, is_trained
from .packing import pack
from .products import has_instructions
from .quantized_weight import QuantizedWeight, Weight
from .recall import recall, remember
from .reference import fp8_activations
from .seeds import draw_for, draw_seed
from .sharded import is_distributed
from .strategies import Form


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """y = x W0^T + bias + scaling * (D o x) A^T B^T (LoRA, https://arxiv.org/abs/2106.09685).

    Args:
        x: input [..., K], floating point, any strides.
        weight: frozen base weight W0 [N, K] in x's dtype, any strides; or a `QuantizedWeight`,
            whose values are made in x's dtype, a tile at a time or in a scratch tensor that the
            call drops again: nothing of them is kept for the backward. Gets no gradient.
        lora_A, lora_B: adapter [r, K] and [N, r], in any floating dtype; they are multiplied in
            x's dtype with fp32 accumulation, as under autocast, and their gradients have their own
            dtype. No copy of x is made for fp32 adapters over a bf16 x. But a small x on a CPU
            that multiplies x's dtype (see products.py; up to 64 rows, or 2^18 elements of x and y)
            is multiplied in the adapters' dtype where that is the wider one, as PEFT does.
        scaling: alpha / r (rsLoRA: alpha / sqrt(r)); finite. Not differentiated.
        bias: [N] in x's dtype, or None; trainable if it requires a gradient.
        dropout_p: probability in [0, 1) of dropping an element of the adapter's input, rounded to
            a multiple of 2^-16. Applied whenever it is not 0; from torch's generator for x's
            device (what mask: `reference.keep_mask`, on a CPU `reference.drawn_mask`).
        backend: "triton" (raises if the kernels cannot take the call), "torch", or "auto".

    Returns:
        y [..., N] in x's dtype (under autocast: in the autocast dtype), contiguous.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    return call_layer(x, Arguments(weight, lora_A, lora_B, scaling, bias, dropout_p, backend))


def call_layer(x: Tensor, given: Arguments, *, lasting: bool = True) -> Tensor:
    """`lora_linear` of what a layer passes on.

    ``lasting``: whether the same tensors may come again, and none is made for this call alone.
    """
    observed = is_observed()
    if lasting and not observed:
        known: Decision | None = recall("lora_linear", x, (given,))
        if known is not None:
            return _run(known, x, given)
    cast, weight, bias = autocast(x, given.weight, given.bias)
    layer = given._replace(weight=weight, bias=bias)
    if is_distributed() and isinstance(weight, Tensor):
        from . import layouts

        checks.check_options(weight, layer.scaling, layer.dropout_p, layer.backend)
        cast = layouts.arrived(cast)
        tensors = (cast, weight, layer.lora_A, layer.lora_B, bias)
        if layouts.has_dtensor(*tensors):
            layout = layouts.Layout.of(*tensors)
            cast, weight, lora_A, lora_B, bias = layout.to_local(*tensors)
            layer = layer._replace(weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
            y = _on_device(cast, layer, observed=observed, shard=layout.shard)
            return layout.from_local(y)
    own = lasting and cast is x and weight is given.weight and bias is given.bias
    return _on_device(cast, layer, observed=observed, own=own)


def base_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x W0^T + bias: a layer whose adapter is merged, or that has none. A quantised W0 is whole."""
    if not isinstance(weight, QuantizedWeight):
        return F.linear(x, weight, bias)
    x, _, bias = autocast(x, weight, bias)
    if weight.activations is not None:
        x = fp8_activations(x)
    return F.linear(x, weight.dequantize(x.dtype), bias)


def _on_device(
    x: Tensor, layer: Arguments, *, observed: bool, own: bool = False, shard: int | None = None
) -> Tensor:
    """One device's part: bare autograd in plain eager mode, operators for everything else.

    ``own``: whether these are the caller's own tensors, which may come again. ``shard``: which part
    of the logical x this one is. Each part gets a dropout mask of its own.
    """
    weight, lora_A, lora_B, scaling, bias, dropout_p, backend = layer
    checks.check_options(weight, scaling, dropout_p, backend)
    threshold = dropout_threshold(dropout_p)
    if not observed:
        call = checked_call(x, weight, lora_A, lora_B, bias, threshold > 0)
        decision = Decision(call, plan(call, backend), float(scaling), threshold)
        if own and call.plain_tensors:
            known = decision._replace(replays=replays_of(x.shape, decision))
            remember(known, "lora_linear", x, (layer,))
        return _run(decision, x, layer, shard)
    checks.check_tensors(x, weight, lora_A, lora_B, bias)
    check_frozen(weight)
    compiling = torch.compiler.is_compiling()
    if compiling and isinstance(weight, Tensor) and _is_inductors(x, layer):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # 0.2 s, SymPy

        if not statically_known_true(math.prod(x.shape[:-1]) <= FEW_ROWS):
            # To cast so few rows is less than to cast A and B.
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return torch_backend.formula(x, weight, lora_A, lora_B, bias, scaling)
    seed = draw_seed(x.device, backend, shard or 0) if threshold else None
    lora_B, scaling = fold_scaling(lora_B, scaling)
    apply: Any = ops.lora_linear_op if compiling else ops.LoRALinearOpFunction.apply
    rest = (*pack(weight), scaling, seed, threshold, backend, is_trained(lora_B))
    y: Tensor = apply(x, lora_A, lora_B, bias, *rest)[0]
    return y


def _is_inductors(x: Tensor, layer: Arguments) -> bool:
    """Whether Inductor gets the formula instead of an operator, whose call on a CPU takes longer.

    0.85 of the time at 32 x 576 in fp32, 0.99 at 512 x 2048, 0.68 and 0.97 in bf16, and what
    follows is made with the sum. Not with dropout: Inductor draws each element by itself, 2 times
    the operator's time at 512 x 576. Not in an export (which PyTorch 2.11 takes every graph for):
    it may run on another device.
    """
    if x.device.type != "cpu" or layer.backend == "triton" or layer.dropout_p > 0.0:
        return False
    if not has_instructions(x.dtype) or torch.compiler.is_exporting():
        return False
    A, B = layer.lora_A.dtype, layer.lora_B.dtype
    return A == B and torch.promote_types(x.dtype, A) == A


def _run(decision: Decision, x: Tensor, layer: Arguments, shard: int | None = None) -> Tensor:
    weight, lora_A, lora_B, _, bias, _, _ = layer
    _, chosen, scaling, threshold, replays = decision
    if chosen.composed and shard is None:
        assert isinstance(weight, Tensor)
        return torch_backend.composed(x, weight, lora_A, lora_B, bias, scaling, threshold)
    seed = draw_for(decision, shard)
    y: Tensor
    if not is_recorded():
        dropout = dropout_of(seed, threshold)
        operands = (x, weight, lora_A, lora_B, bias)
        y, _ = backends.forward(*operands, scaling, dropout, chosen, need_h=False, replays=replays)
        return y
    y = LoRALinearFunction.apply(
        x, weight, lora_A, lora_B, bias, scaling, seed, threshold, chosen, replays
    )
    return y


def _check_magnitude(weight: Weight, magnitude: object) -> None:
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"magnitude: got {type(magnitude).__name__}, wanted a torch.Tensor")
    checks.check_dtype("magnitude's dtype", magnitude.dtype)
    N = weight.shape[0]
    if magnitude.shape != (N,):
        raise ValueError(f"magnitude: got shape {list(magnitude.shape)}, wanted [{N}]")
    if magnitude.device != weight.device:
        raise ValueError(f"magnitude: is on {magnitude.device}, wanted x's device, {weight.device}")


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """y = m / ||W0 + scaling * B A|| o (x W0^T + scaling * x A^T B^T) + bias (DoRA).

    https://arxiv.org/abs/2402.09353, as in PEFT: the norm, of each row, is a constant to the
    gradient (sec. 4.3). It is computed in every call, in fp32, without W0 + scaling * B A in
    memory; a row of zeros, where PEFT gives NaN, has y = bias.

    Args:
        x, weight, lora_A, lora_B, bias, scaling, backend: as for `lora_linear`. The norm of a
            `QuantizedWeight` (QDoRA) is that of its values before they are rounded to x's dtype.
        magnitude: m [N], any floating dtype; its gradient has the same.
        dropout_p: in [0, 1). As PEFT defines it, dropout here is on x in front of W0 too:
            y = W0 (x - x_d) + bias + DoRA(x_d), x_d = `F.dropout`(x). That is a second product
            with W0 and a saved copy of x, so a slow thing anywhere.

    Returns:
        y [..., N] in x's dtype (under autocast: in the autocast dtype), contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`; TypeError for a DTensor.
    """
    checks.check_options(weight, scaling, dropout_p, backend)
    if is_distributed() and isinstance(weight, Tensor):
        from . import layouts

        x = layouts.arrived(x)
        if layouts.has_dtensor(x, weight, lora_A, lora_B, magnitude, bias):
            raise TypeError("x, weight, ...: got a DTensor, which dora_linear does not take yet")
    exact_weight = weight
    x, weight, bias = autocast(x, weight, bias)
    observed = is_observed()
    if observed:
        checks.check_tensors(x, weight, lora_A, lora_B, bias)
        check_frozen(weight)
    else:
        call = checked_call(x, weight, lora_A, lora_B, bias, False)
        chosen = plan(call, backend, "dora")
    _check_magnitude(weight, magnitude)
    if dropout_p > 0.0:
        dropped = F.dropout(x, dropout_p)
        if isinstance(weight, QuantizedWeight):
            # By what reads codes: with an adapter that counts 0 times and gets no gradient.
            frozen = (lora_A.detach(), lora_B.detach())
            base = lora_linear(
                x - dropped, weight, *frozen, scaling=0.0, bias=bias, backend=backend
            )
        else:
            base = F.linear(x - dropped, weight, bias)
        return base + dora_linear(
            dropped, exact_weight, lora_A, lora_B, magnitude, scaling=scaling, backend=backend
        )
    if observed:
        lora_B, scaling = fold_scaling(lora_B, scaling)
        packed = pack(weight) if weight is exact_weight else pack(weight, exact_weight)
        compiling = torch.compiler.is_compiling()
        apply: Any = dora_ops.dora_linear_op if compiling else dora_ops.DoRALinearOpFunction.apply
        rest = (*packed, scaling, backend, is_trained(lora_B), is_trained(magnitude))
        y: Tensor = apply(x, lora_A, lora_B, magnitude, bias, *rest)[0]
        return y
    scaling = float(scaling)
    replays = replays_of(x.shape, Decision(call, chosen, scaling, threshold=0))
    with torch.no_grad():
        norm = backends.dora_norm(exact_weight, lora_A, lora_B, scaling, chosen, replays)
    numbers = (scaling, chosen, replays)
    y = DoRALinearFunction.apply(x, weight, lora_A, lora_B, magnitude, norm, bias, *numbers)
    return y


def explain(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Explanation:
    """Which backend and strategy `lora_linear` takes for these arguments, and why not the others.

    With ``magnitude`` the same of `dora_linear`. Takes and raises what they do; computes nothing.
    ``print`` the result to read it.
    """
    checks.check_options(weight, scaling, dropout_p, backend)
    x, weight, bias = autocast(x, weight, bias)
    dropout = dropout_threshold(dropout_p) > 0 and magnitude is None
    if is_distributed() and isinstance(weight, Tensor):
        from . import layouts

        tensors = (x, weight, lora_A, lora_B, bias)
        if layouts.has_dtensor(*tensors):
            x, weight, lora_A, lora_B, bias = layouts.Layout.of(*tensors).to_local(*tensors)
    call = checked_call(x, weight, lora_A, lora_B, bias, dropout)
    form: Form = "layer" if magnitude is None else "dora"
    found = explain_call(call, backend, (x, weight, lora_A, lora_B), form)
    if magnitude is not None:
        _check_magnitude(weight, magnitude)
        why = (
            "one more read of W0 for the norm; the column scale is "
            + ("in the epilogue" if found.backend == "triton" else "one more pass over y")
            + ("; dropout costs a second product with W0" if dropout_p > 0.0 else "")
        )
        found = found.with_reasons({"dora": why})
    return found

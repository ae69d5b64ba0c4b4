"""`lora_linear_multi`: one frozen weight, many adapters, each row of the batch with its own."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import multi_backends
from .adapter_set import AdapterSet, adapter_set
from .dispatch import (
    Backend,
    Call,
    Explanation,
    _facts,
    ceilings,
    checked_call,
    explain_call,
    plan,
    transposed,
)
from .functional import Weight, _autocast, _check_options, _distributed, _draw_seed
from .kernels.configs import padded
from .kernels.device import device_info
from .kernels.dropout import Dropout, dropout_threshold
from .kernels.rows import AdapterLayout, RowGroups
from .multi_backends import Adapted, MultiPlan, Strategy
from .multi_rows import Segments, row_groups
from .quantize import QuantizedWeight

_LAUNCH = 4e-6  # seconds that another, dependent launch adds: an estimate
# A piece's product waits for its loads, which the GEMM's K loop does not.
_UNPIPELINED = 3
_TILE_M = 128
_MAX_CALLS = 256
EXPAND_ROWS = 256  # up to here y is nothing beside the weight, and the GEMM cannot fill a GPU


_TENSORS = 9  # the place of the first adapter among the function's arguments


class LoRALinearMultiFunction(torch.autograd.Function):
    """`LoRALinearFunction` with each row's own adapter: x [..., K] -> y [..., N].

    Saves x, h [M, max r], the weights and the dropout seed. Gradients for x, the bias and every
    adapter that needs one, the same bit for bit in every run.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        scalings: tuple[float, ...],
        seed: Tensor | None,
        threshold: int,
        rows: RowGroups,
        plan: MultiPlan,
        layout: AdapterLayout | None,
        *adapters: Tensor,
    ) -> Tensor:
        """``adapters``: every A, then every B; ``layout``: where they lie, if that is known."""
        number = len(scalings)
        As, Bs = adapters[:number], adapters[number:]
        dropout = None if seed is None else Dropout(seed, threshold)
        layer = Adapted(weight, As, Bs, scalings, dropout, rows, layout)
        need = ctx.needs_input_grad
        needs_A, needs_B = any(need[_TENSORS : _TENSORS + number]), any(need[_TENSORS + number :])
        y, h = multi_backends.forward(x, layer, bias, plan, need_h=needs_B)
        ctx.save_for_backward(
            x if needs_A else None,
            weight if isinstance(weight, Tensor) else None,
            h,
            seed if need[0] or needs_A else None,
            *adapters,
        )
        # Without tensors that are saved: it would keep them alive, and past their hooks.
        quantized = weight if isinstance(weight, QuantizedWeight) else None
        ctx.rest = (quantized, scalings, threshold, rows, plan, layout)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lora_linear_multi: its gradients cannot be differentiated again "
                "(create_graph=True)"
            )
        x, weight, h, seed, *adapters = ctx.saved_tensors
        quantized, scalings, threshold, rows, plan, layout = ctx.rest
        number, need = len(scalings), ctx.needs_input_grad
        As, Bs = adapters[:number], adapters[number:]
        dropout = None if seed is None else Dropout(seed, threshold)
        weight = weight if quantized is None else quantized
        layer = Adapted(weight, As, Bs, scalings, dropout, rows, layout).unpacked()
        dx, dAs, dBs = multi_backends.backward(g, x, layer, h, plan, need_dx=need[0])
        dbias = g.sum_to_size(g.shape[-1:]) if need[2] else None
        gradients: list[Tensor | None] = [*dAs, *dBs]
        if not all(need[_TENSORS:]):
            pairs = zip(gradients, need[_TENSORS:], strict=True)
            gradients = [grad if needed else None for grad, needed in pairs]
        return dx, None, dbias, *[None] * (_TENSORS - 3), *gradients


def lora_linear_multi(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    scalings: float | Sequence[float],
    adapter_indices: Tensor | Sequence[int] | None = None,
    segments: Segments | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """y = x W0^T + bias + scaling_i * (D o x) A_i^T B_i^T, with i the adapter of each row of x.

    Equal to calling `lora_linear` once for each adapter with the same dropout mask and taking each
    row from its own; the base product is made once, no row is padded, and no adapter is copied.

    Args:
        x, weight, bias, dropout_p, backend: as for `lora_linear`. M is the number of rows of x.
        lora_As, lora_Bs: adapters [r_i, K] and [N, r_i], of any ranks. The kernels want all A's
            in one dtype, and all B's.
        scalings: one for all adapters, or one for each.
        adapter_indices: the index of each row's adapter, -1 for none: integers [M], or a tensor
            of x's shape without its last dimension. A tensor on the GPU is waited for once, to
            check its values (again if it is changed), and not under CUDA graph capture.
        segments: instead of indices, (index, rows) for each stretch of rows, as in a batch of
            packed sequences; index -1 for none. Nothing waits for the GPU. Tables of segments and
            adapters are made at their first call, which CUDA graph capture therefore must not be.

    Returns:
        y [..., N] in x's dtype, contiguous. The gradient of an adapter without rows is zero.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range.
        RuntimeError: ``backend="triton"`` where the kernels cannot run; under torch.compile.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "lora_linear_multi: is not traced by torch.compile yet; call it from a function under "
            "torch.compiler.disable"
        )
    x, bias, layer, needs_grad, _, chosen = _checked(
        x, weight, lora_As, lora_Bs, scalings, adapter_indices, segments, bias, dropout_p, backend
    )
    threshold = dropout_threshold(dropout_p)
    seed = _draw_seed(x.device, backend) if threshold else None
    if torch.is_grad_enabled() and needs_grad:
        trained: Tensor = LoRALinearMultiFunction.apply(
            x,
            layer.weight,
            bias,
            layer.scalings,
            seed,
            threshold,
            layer.rows,
            chosen,
            layer.layout,
            *layer.lora_As,
            *layer.lora_Bs,
        )
        return trained
    # Hundreds of adapters on their way through autograd would cost more than a decoding step.
    if seed is not None:
        layer = layer._replace(dropout=Dropout(seed, threshold))
    return multi_backends.forward(x, layer, bias, chosen, need_h=False)[0]


def explain_multi(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    scalings: float | Sequence[float] = 1.0,
    adapter_indices: Tensor | Sequence[int] | None = None,
    segments: Segments | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Explanation:
    """Which backend and strategy `lora_linear_multi` takes for these arguments, and why.

    Takes and raises what it does; computes nothing.
    """
    _, _, layer, _, call, chosen = _checked(
        x, weight, lora_As, lora_Bs, scalings, adapter_indices, segments, bias, dropout_p, backend
    )
    if chosen.backend == "torch":
        mixed = adapter_set(lora_As, lora_Bs, scalings).mixed if backend != "torch" else None
        why = f"not taken: {mixed}"
        reasons = {"triton": why} if mixed else dict(explain_call(call, backend, ()).reasons)
        reasons["library"] = "taken: F.linear, then a product for each adapter added in place"
        return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)
    reasons = {"torch": "not taken: the kernels take this call"}
    for strategy, extra in predicted_extra(call, layer.rows.num_groups).items():
        verdict = "taken" if strategy == chosen.strategy else "not taken"
        reasons[strategy] = (
            f"{verdict}: predicted extra cost over the base GEMM {extra:.1%} "
            "(a model, not a measurement)"
        )
    if call.quantized is not None:
        how = "tiles become values in the base product's K loop"
        if not chosen.in_loop:
            how = "turned into values once, in a scratch tensor"
        reasons["quantised W0"] = f"{call.quantized.format}, {how}"
    return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)


def predicted_extra(call: Call, groups: int) -> dict[Strategy, float]:
    """Cost of adding h B as a fraction of the base GEMM's time; making h costs both the same.

    split    each piece of a tile is r_pad / K of the GEMM, and its loads are waited for
    expand   one more read and write of y, and one more launch
    """
    flops, bandwidth = ceilings(device_info(call.device))
    gemm = 2 * call.M * call.N * call.K / flops
    if gemm == 0:
        return {"split": 0.0, "expand": 0.0}
    tiles = -(-call.M // _TILE_M)
    pieces_per_tile = (tiles + groups) / tiles
    touch_y = 2 * call.dtype.itemsize * call.M * call.N / bandwidth
    return {
        "split": _UNPIPELINED * pieces_per_tile * padded(call.r) / call.K,
        "expand": (touch_y + _LAUNCH) / gemm,
    }


def _strategy(call: Call, groups: int) -> Strategy:
    if call.M <= EXPAND_ROWS:
        return "expand"
    extra = predicted_extra(call, groups)
    return min(extra, key=extra.__getitem__)


@functools.lru_cache(maxsize=4096)
def plan_multi(call: Call, groups: int, backend: Backend) -> MultiPlan:
    """The decision for a batch with this many adapters in it, "none" being one."""
    chosen = plan(call, backend)
    if chosen.backend == "torch":
        return MultiPlan("torch", "library", "library")
    strategy, strategy_dx = _strategy(call, groups), _strategy(transposed(call), groups)
    return MultiPlan(
        "triton",
        strategy,
        strategy_dx,
        in_loop=chosen.strategy == "in_loop" and strategy == "expand",
        in_loop_dx=chosen.strategy_dx == "in_loop" and strategy_dx == "expand",
    )


def _checked(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: float | Sequence[float],
    adapter_indices: Tensor | Sequence[int] | None,
    segments: Segments | None,
    bias: Tensor | None,
    dropout_p: float,
    backend: Backend,
) -> tuple[Tensor, Tensor | None, Adapted, bool, Call, MultiPlan]:
    """x and bias as autocast would have them, the layer without its dropout, whether anything
    needs a gradient, and the decision."""
    known = adapter_set(lora_As, lora_Bs, scalings)
    _check_options(weight, 1.0, dropout_p, backend)
    x, weight, bias = _autocast(x, weight, bias)
    if _distributed():
        from . import parallel

        plain = None if isinstance(weight, QuantizedWeight) else weight
        kinds = [t for i in known.kinds for t in (lora_As[i], lora_Bs[i])]
        if parallel.has_dtensor(x, plain, bias, *kinds):
            raise TypeError("lora_linear_multi: got DTensors, wanted plain tensors")
    call = _checked_call(x, weight, lora_As, lora_Bs, bias, dropout_threshold(dropout_p) > 0, known)
    rows = row_groups(x.shape[:-1], x.device, len(lora_As), adapter_indices, segments)
    layer = Adapted(weight, lora_As, lora_Bs, known.scalings, None, rows, known.layout)
    if backend != "torch" and known.mixed:
        if backend == "triton":
            raise TypeError(f'backend="triton" cannot take this call: {known.mixed}')
        backend = "torch"
    needs_grad = known.needs_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    return x, bias, layer, needs_grad, call, plan_multi(call, rows.num_groups, backend)


def _checked_call(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor | None,
    dropout: bool,
    known: AdapterSet,
) -> Call:
    """The call as its largest adapter alone would be; each kind of adapter is checked once."""
    try:
        key = (_facts(x), _facts(weight), None if bias is None else _facts(bias), dropout)
    except AttributeError:
        key = None
    if key in known.calls:
        return known.calls[key]
    calls = []
    for i in known.kinds:
        try:
            calls.append(checked_call(x, weight, lora_As[i], lora_Bs[i], bias, dropout))
        except (TypeError, ValueError) as error:
            message = re.sub(r"\b(lora_[AB])\b", rf"\1s[{i}]", str(error))
            raise type(error)(message) from None
    largest = max(calls, key=lambda call: call.r)
    call = replace(largest, plain_tensors=all(call.plain_tensors for call in calls))
    if len(known.calls) >= _MAX_CALLS:
        known.calls.clear()
    known.calls[key] = call
    return call

"""`lora_linear_multi`: one frozen weight, many adapters, each row of the batch with its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import checks, multi_backends, multi_ops
from .adapter_set import check_lists
from .autocast import autocast
from .autograd import Codes, as_saved, bias_gradient, check_first_derivative, to_save
from .calls import Backend
from .explanation import Explanation, describe_quantized, explain_call
from .kernels.dropout import Dropout, dropout_of, dropout_threshold
from .kernels.rows import AdapterLayout, RowGroups
from .multi_backends import Adapted, MultiPlan
from .multi_dispatch import checked, predicted_extra
from .multi_rows import Segments, check_one
from .observed import check_frozen, fold_scaling, has_tangent
from .packing import pack
from .quantized_weight import Weight
from .seeds import draw_seed

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
        dropout = dropout_of(seed, threshold)
        layer = Adapted(weight, As, Bs, scalings, dropout, rows, layout)
        need = ctx.needs_input_grad
        needs_A, needs_B = any(need[_TENSORS : _TENSORS + number]), any(need[_TENSORS + number :])
        y, h = multi_backends.forward(x, layer, bias, plan, need_h=needs_B)
        ctx.save_for_backward(
            x if needs_A else None,
            to_save(weight),
            h,
            seed if need[0] or needs_A else None,
            *adapters,
        )
        # Without tensors that are saved: it would keep them alive, and past their hooks.
        ctx.rest = (Codes.of(weight), scalings, threshold, rows, plan, layout)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        check_first_derivative("lora_linear_multi", "lora_linear")
        x, weight, h, seed, *adapters = ctx.saved_tensors
        quantized, scalings, threshold, rows, plan, layout = ctx.rest
        number, need = len(scalings), ctx.needs_input_grad
        As, Bs = adapters[:number], adapters[number:]
        dropout = dropout_of(seed, threshold)
        weight = as_saved(weight, quantized)
        layer = Adapted(weight, As, Bs, scalings, dropout, rows, layout).unpacked()
        dx, dAs, dBs = multi_backends.backward(g, x, layer, h, plan, need_dx=need[0])
        dbias = bias_gradient(g, need[2])
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
    row from its own; the base product is made once, no row is padded, and no adapter is copied (by
    PyTorch's path, small ones are: see `multi_backends.batches`).

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
        RuntimeError: ``backend="triton"`` where the kernels cannot run; under torch.func.

    Under torch.compile it is one operator; what is wrong with the rows is found when it runs. Any M
    and any values of ``adapter_indices`` are the same graph; another number of segments, or others
    of their indices, is another one.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("lora_linear_multi: torch.func's transforms are not supported")
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        checks.check_options(weight, 1.0, dropout_p, backend)
        x, weight, bias = autocast(x, weight, bias)
        check_one(adapter_indices, segments)
        scales = check_lists(lora_As, lora_Bs, scalings)
        for A, B in zip(lora_As, lora_Bs, strict=True):
            checks.check_tensors(x, weight, A, B, bias)
        return _observed(
            x,
            weight,
            lora_As,
            lora_Bs,
            scales,
            adapter_indices,
            segments,
            bias,
            dropout_threshold(dropout_p),
            backend,
        )
    found = checked(
        x, weight, lora_As, lora_Bs, scalings, adapter_indices, segments, bias, dropout_p, backend
    )
    x, bias, layer, threshold = found.x, found.bias, found.layer, dropout_threshold(dropout_p)
    seed = draw_seed(x.device, backend) if threshold else None
    trains = found.known.needs_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    # Of forward-mode AD too: the Function refuses what plain kernels would give no tangent.
    if (torch.is_grad_enabled() and trains) or forward_ad._current_level >= 0:
        trained: Tensor = LoRALinearMultiFunction.apply(
            x,
            layer.weight,
            bias,
            layer.scalings,
            seed,
            threshold,
            layer.rows,
            found.plan,
            layer.layout,
            *layer.lora_As,
            *layer.lora_Bs,
        )
        return trained
    # Hundreds of adapters on their way through autograd would cost more than a decoding step.
    if seed is not None:
        layer = layer._replace(dropout=Dropout(seed, threshold))
    return multi_backends.forward(x, layer, bias, found.plan, need_h=False)[0]


def _observed(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    adapter_indices: Tensor | Sequence[int] | None,
    segments: Segments | None,
    bias: Tensor | None,
    threshold: int,
    backend: Backend,
) -> Tensor:
    """By the registered operator, which checks what is not known while tracing: the rows."""
    check_frozen(weight)
    if not torch.compiler.is_compiling():
        duals = [t for t in (x, bias, *lora_As, *lora_Bs) if t is not None and has_tangent(t)]
        if duals:
            raise RuntimeError("lora_linear_multi: has no forward-mode derivatives")
    folded = [fold_scaling(B, s) for B, s in zip(lora_Bs, scalings, strict=True)]
    Bs, scales = [B for B, _ in folded], [s for _, s in folded]
    if adapter_indices is not None and not isinstance(adapter_indices, Tensor):
        adapter_indices = torch.tensor(adapter_indices, device="cpu")
    for i, segment in enumerate(segments or ()):
        if len(segment) != 2:  # the numbers themselves the operator looks at
            raise TypeError(f"segments[{i}]: got {segment!r}, wanted (adapter's index, rows)")
    flat = [part for segment in segments or () for part in segment]
    need_h = torch.is_grad_enabled() and any([B.requires_grad for B in Bs])
    seed = draw_seed(x.device, backend) if threshold else None
    weights, spec = pack(weight)
    y: Tensor = multi_ops.lora_linear_multi_op(
        x,
        weights,
        spec,
        list(lora_As),
        Bs,
        bias,
        scales,
        adapter_indices,
        flat,
        seed,
        threshold,
        backend,
        need_h,
    )[0]
    return y


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
    x, _, layer, known, call, chosen = checked(
        x, weight, lora_As, lora_Bs, scalings, adapter_indices, segments, bias, dropout_p, backend
    )
    if chosen.backend == "torch":
        mixed = known.mixed if backend != "torch" else None
        why = f"not taken: {mixed}"
        reasons = {"triton": why} if mixed else dict(explain_call(call, backend, ()).reasons)
        in_turn = layer.wide(x.dtype) is not None
        sizes = [len(batch.adapters) for batch in layer.batches(x.dtype)]
        several = [size for size in sizes if size > 1 and not in_turn]
        singles = sum(sizes) - sum(several)
        how = f"taken: F.linear, then the products of {singles} adapters in turn"
        if several:
            how += f" and of {sum(several)} side by side in {len(several)} bmm"
        reasons["library"] = f"{how}, added in place"
        reasons.pop("autograd", None)  # it has a node of its own for few rows too
        return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)
    reasons = {"torch": "not taken: the kernels take this call"}
    for strategy, extra in predicted_extra(call, layer.rows.num_groups).items():
        verdict = "taken" if strategy == chosen.strategy else "not taken"
        reasons[strategy] = (
            f"{verdict}: predicted extra cost over the base GEMM {extra:.1%} "
            "(a model, not a measurement)"
        )
    if call.quantized is not None:
        reasons["quantised W0"] = describe_quantized(call, "triton", chosen.in_loop)
    return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)

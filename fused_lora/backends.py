"""Runs a plan: forward and backward of one call on the backend that was chosen for it.

Both take x and g of any number of dimensions; autocast has done its work before and is off here.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import torch_backend
from .autocast import no_autocast
from .dispatch import Plan
from .kernels.dropout import Dropout, seed_of
from .quantized_weight import Weight

if TYPE_CHECKING:
    from .kernels.replay import Replays


@functools.cache
def _kernels() -> ModuleType:
    """The kernel path, imported where it is first used: there is a PyTorch without Triton."""
    return importlib.import_module(".triton_backend", __package__)


def as_matrix(t: Tensor) -> Tensor:
    """[..., C] -> [M, C], a view wherever the strides allow one; sizes of 0 too."""
    if t.ndim == 2:
        return t
    return t.flatten(0, -2) if t.ndim > 1 else t.unsqueeze(0)


def as_gradient(g: Tensor, backend: str) -> Tensor:
    """g as a matrix of values: kernels would read past a wrapper and miss a lazy negation."""
    if backend == "triton" and (type(g) is not Tensor or g.is_neg()):
        g = g.clone()  # of an unfinished collective, only an operator waits for it
    return as_matrix(g)


def _parts(weight: Weight | None) -> Iterable[Tensor | None]:
    """Its tensors. A backward that makes no dx has no weight."""
    if weight is None or isinstance(weight, Tensor):
        return (weight,)
    return weight._parameters.values()


def _parts_of_all(weights: Sequence[Weight]) -> Iterable[Tensor | None]:
    return itertools.chain.from_iterable(map(_parts, weights))


def _replayed(
    replays: Replays | None,
    name: Hashable,
    operands: Callable[[], Sequence[Tensor | None]],
    run: Callable[[], tuple[Any, ...]],
) -> tuple[Any, ...]:
    """``run()``, or its launches again where all that differs is in its operands.

    replays: of calls that differ in their tensors' values, addresses and strides; None if none may
    be replayed. name: of what is run, and of which of its results are wanted.
    """
    if replays is None or torch.compiler.is_compiling():  # compiled autograd traces a backward
        return run()
    return replays(name, operands(), run)


def _shaped_as(x: Tensor, y: Tensor) -> Tensor:
    """y [M, N] as [..., N], itself: of a view, autograd would refuse changes in place."""
    return y if x.ndim == 2 else y.resize_(*x.shape[:-1], y.shape[-1])


def forward(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    plan: Plan,
    *,
    need_h: bool,
    replays: Replays | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and, if needed, h = scaling * (D o x) A^T [M, r], both in x's dtype."""

    def run() -> tuple[Tensor, Tensor | None]:
        arguments = (as_matrix(x), weight, lora_A, lora_B, bias, scaling, dropout)
        h: Tensor | None
        with no_autocast(x):
            if plan.backend == "triton":
                y, h = _kernels().forward(*arguments, plan, need_h=need_h)
            else:
                y, h = torch_backend.forward(*arguments)
        return _shaped_as(x, y), h if need_h else None

    def operands() -> Sequence[Tensor | None]:
        return x, *_parts(weight), lora_A, lora_B, bias, seed_of(dropout)

    y, h = _replayed(replays, ("forward", need_h), operands, run)
    return y, h


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    plan: Plan,
    *,
    need_dx: bool,
    replays: Replays | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [..., K], dA and dB for g = dL/dy [..., N]: dA iff x is given, dB iff h is given."""
    g2 = as_gradient(g, plan.backend)

    def run() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x2 = None if x is None else as_matrix(x)
        arguments = (g2, x2, weight, lora_A, lora_B, h, scaling, dropout)
        with no_autocast(g):
            if plan.backend == "triton":
                dx, dA, dB = _kernels().backward(*arguments, plan, need_dx=need_dx)
            else:
                dx, dA, dB = torch_backend.backward(*arguments, need_dx=need_dx)
        return None if dx is None else dx.view(*g.shape[:-1], dx.shape[-1]), dA, dB

    def operands() -> Sequence[Tensor | None]:
        return g2, x, *_parts(weight), lora_A, lora_B, h, seed_of(dropout)

    dx, dA, dB = _replayed(replays, ("backward", need_dx), operands, run)
    return dx, dA, dB


def gated(
    gate: Tensor, up: Tensor, activation: str, plan: Plan, acted: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x = act(gate) o up [..., K] and what to keep of it, which is ``acted`` when it is made again.

    On PyTorch's path act(gate): of a CPU's time an exponential is more than what memory takes.
    """
    if plan.backend == "torch":
        acted = torch_backend.activated(gate, activation) if acted is None else acted
        return acted * up, acted
    from .kernels.gated import gated as launch

    return launch(as_matrix(gate), as_matrix(up), activation).view(gate.shape), None


def gated_backward(
    dx: Tensor,
    gate: Tensor,
    up: Tensor,
    acted: Tensor | None,
    activation: str,
    plan: Plan,
    *,
    spare: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients [..., K] of gate, in the memory of dx, and of up, in that of ``spare``.

    Unless its strides are those of a permuted gate, which could be no view as a matrix.
    """
    dup = spare if spare is not None and spare.is_contiguous() else torch.empty_like(dx)
    dx2, gate2, up2 = as_matrix(dx), as_matrix(gate), as_matrix(up)
    outputs = (dx2, as_matrix(dup))  # views
    if acted is not None:
        acted2 = as_matrix(acted)
        torch_backend.gated_backward(dx2, gate2, up2, acted2, activation, *outputs)
    else:
        from .kernels.gated import gated_backward as launch

        launch(dx2, gate2, up2, activation, *outputs)
    return dx, dup


def dora_norm(
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    plan: Plan,
    replays: Replays | None = None,
) -> Tensor:
    """||W0 + scaling * B A|| of each row, [N], in fp32 or better; inf for rows of zeros."""
    if plan.backend == "torch":
        with no_autocast(lora_A):
            norm = torch_backend.weight_norm(weight, lora_A, lora_B, scaling)
            return norm.masked_fill_(norm == 0, torch.inf)
    from .kernels.dora import weight_norm

    def run() -> tuple[Tensor]:
        w = weight if isinstance(weight, Tensor) else weight.matrix()
        return (weight_norm(w, lora_A, lora_B, scale=scaling),)

    def operands() -> Sequence[Tensor | None]:
        return lora_A, *_parts(weight), lora_B

    # Under autocast W0 has another dtype here than in the layer's product.
    found: Tensor = _replayed(replays, ("norm", weight.dtype), operands, run)[0]
    return found


def dora_forward(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    scaling: float,
    plan: Plan,
    *,
    need_h: bool,
    need_z: bool,
    replays: Replays | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = c o z + bias [..., N] and, if needed, h [M, r] and z = x W0^T + h B^T [M, N].

    column_scale: c [N] in fp32 or better.
    """

    def run() -> tuple[Tensor, Tensor | None, Tensor | None]:
        x2 = as_matrix(x)
        h: Tensor | None
        z: Tensor | None
        with no_autocast(x):
            if plan.backend == "triton":
                from .kernels.gemm import ColumnScale

                z = x.new_empty((x2.shape[0], weight.shape[0])) if need_z else None
                dora = ColumnScale(column_scale, z)
                arguments = (x2, weight, lora_A, lora_B, bias, scaling, None, plan)
                y, h = _kernels().forward(*arguments, need_h=need_h, dora=dora)
            else:
                z, h = torch_backend.forward(x2, weight, lora_A, lora_B, None, scaling, None)
                y = torch_backend.scale_columns(z, column_scale, bias)
        return _shaped_as(x, y), h if need_h else None, z if need_z else None

    def operands() -> Sequence[Tensor | None]:
        return x, *_parts(weight), lora_A, lora_B, column_scale, bias

    y, h, z = _replayed(replays, ("dora forward", need_h, need_z), operands, run)
    return y, h, z


def dora_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    h: Tensor | None,
    z: Tensor | None,
    scaling: float,
    plan: Plan,
    *,
    need_dx: bool,
    replays: Replays | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB as of `backward` for g' = c o g; and, if z is given, sum_M g o z [N]."""
    g2 = as_gradient(g, plan.backend)

    def run() -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if plan.backend == "triton":
            from .kernels.dora import scale_columns_backward
        else:
            from .torch_backend import scale_columns_backward
        gs, dot = scale_columns_backward(g2, column_scale, z)
        arguments = (gs.view(g.shape), x, weight, lora_A, lora_B, h, scaling, None, plan)
        return *backward(*arguments, need_dx=need_dx), dot

    def operands() -> Sequence[Tensor | None]:
        return g2, x, *_parts(weight), lora_A, lora_B, column_scale, h, z

    dx, dA, dB, dot = _replayed(replays, ("dora backward", need_dx), operands, run)
    return dx, dA, dB, dot


def forward_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
    plans: Sequence[Plan],
    replays: Replays | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Every y_i [..., N_i], and the scaled h_i side by side [M, sum r_i], in x's dtype."""

    def run() -> tuple[Tensor, ...]:
        arguments = (as_matrix(x), weights, lora_As, lora_Bs, biases, scalings, dropouts)
        with no_autocast(x):
            if plans[0].backend == "triton":
                ys, h = _kernels().forward_group(*arguments, plans)
            else:
                ys, h = torch_backend.forward_group(*arguments)
        return *(_shaped_as(x, y) for y in ys), h

    def operands() -> Sequence[Tensor | None]:
        seeds = map(seed_of, dropouts)
        return x, *_parts_of_all(weights), *lora_As, *lora_Bs, *biases, *seeds

    *ys, h = _replayed(replays, "group forward", operands, run)
    return ys, h


def backward_group(
    gs: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    scalings: Sequence[float],
    dropouts: Sequence[Dropout | None],
    plans: Sequence[Plan],
    *,
    need_dx: bool,
    replays: Replays | None = None,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """dx [..., K], the sum over the members, and dA_i iff x is given, dB_i iff h_i is."""
    gs2 = [as_gradient(g, plans[0].backend) for g in gs]

    def run() -> tuple[Tensor | None, ...]:
        x2 = None if x is None else as_matrix(x)
        arguments = (gs2, x2, weights, lora_As, lora_Bs, hs, scalings, dropouts)
        with no_autocast(gs[0]):
            if plans[0].backend == "triton":
                dx, dAs, dBs = _kernels().backward_group(*arguments, plans, need_dx=need_dx)
            else:
                dx, dAs, dBs = torch_backend.backward_group(*arguments, need_dx=need_dx)
        return None if dx is None else dx.view(*gs[0].shape[:-1], dx.shape[-1]), *dAs, *dBs

    def operands() -> Sequence[Tensor | None]:
        seeds = map(seed_of, dropouts)
        return *gs2, x, *_parts_of_all(weights), *lora_As, *lora_Bs, *hs, *seeds

    dx, *gradients = _replayed(replays, ("group backward", need_dx), operands, run)
    return dx, gradients[: len(gs)], gradients[len(gs) :]

"""`lora_linear_experts`: a mixture of experts, each with a frozen weight and an adapter of its own.

The experts of a model are one tensor [E, N, K], and each row of the batch goes to some of them.
Nothing of the weights' size is made: W_e + scaling * B_e A_e of all experts, as PEFT has it, would
be a second copy of them in every forward, kept for the backward, and their whole gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, flops
from .autocast import autocast, autocast_enabled
from .autograd import alias, raise_second_derivative
from .backends import as_gradient, as_matrix
from .calls import Backend, Call, are_plain
from .dispatch import takes_kernels, why_torch
from .expert_backends import (
    Experts,
    Path,
    contiguous,
    grad_A,
    grad_B,
    project,
    project_back,
)
from .explanation import Explanation
from .functional import check_options, draw_seeds, is_recorded
from .kernels.dropout import dropout_of, dropout_threshold
from .kernels.rows import RowGroups, groups_of_indices
from .multi_rows import INTEGERS
from .uncompiled import uncompiled


@dataclass(frozen=True)
class Routing:
    """Where each row of a batch goes: made once for all projections of a batch's experts."""

    groups: RowGroups
    shape: torch.Size  # of the indices
    experts: Tensor  # int32 [M]: each row's, -1 for none


def routing_of(expert_indices: Tensor, num_experts: int) -> Routing:
    """The rows' order by expert; an index that is no expert's is none. Waits for no GPU."""
    flat = expert_indices.flatten().long()  # in int8 there is no 200 to compare with
    known = (flat >= 0) & (flat < num_experts)
    experts = torch.where(known, flat.to(torch.int32), -1)
    return Routing(groups_of_indices(experts, num_experts), expert_indices.shape, experts)


class LoRALinearExpertsFunction(torch.autograd.Function):
    """`LoRALinearFunction` with each row's own expert: x -> y [*indices.shape, N].

    Saves x, h [M, r], the weights and the dropout seed: not x in the experts' order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        threshold: int,
        call: ExpertsCall,
    ) -> Tensor:
        """``seed``: of the dropout mask."""
        needs_x, _, needs_A, needs_B = ctx.needs_input_grad[:4]
        layer = call.layer(weight.to(x.dtype), lora_A, lora_B, seed, threshold)
        y, h = _forward(x, layer, bias, call)
        ctx.save_for_backward(
            x if needs_A else None,
            alias(weight),
            None if lora_A is None else alias(lora_A),
            None if lora_B is None else alias(lora_B),
            h if needs_B else None,
            seed if needs_x or needs_A else None,
        )
        ctx.call, ctx.threshold, ctx.shape = call, threshold, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        if torch.is_grad_enabled():
            raise_second_derivative("lora_linear_experts")
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        call, needs_x = ctx.call, ctx.needs_input_grad[0]
        weight = weight.to(g.dtype) if needs_x else weight
        layer = call.layer(weight, lora_A, lora_B, seed, ctx.threshold)
        path, g2 = call.path, as_gradient(g, call.path)
        dx, dh = project_back(path, g2, layer, need_dx=needs_x, need_dh=x is not None)
        dA = None if x is None or dh is None else grad_A(path, as_matrix(x), dh, layer)
        dB = None if h is None else grad_B(path, g2, h, layer)
        return None if dx is None else dx.view(ctx.shape), None, dA, dB, *[None] * 4


@dataclass(frozen=True)
class ExpertsCall:
    """A call's decision, and how its rows lie."""

    path: Path
    routing: Routing
    scaling: float
    fan: int

    def layer(
        self,
        weight: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        seed: Tensor | None,
        threshold: int,
    ) -> Experts:
        """What the backends take."""
        dropout, rows = dropout_of(seed, threshold), self.routing.groups
        lora_A, lora_B = contiguous(lora_A), contiguous(lora_B)  # once for all launches of a pass
        return Experts(weight, lora_A, lora_B, self.scaling, dropout, rows, self.fan)


def _forward(
    x: Tensor, layer: Experts, bias: Tensor | None, call: ExpertsCall
) -> tuple[Tensor, Tensor | None]:
    y, h = project(call.path, as_matrix(x), layer, bias)
    return y.resize_(*call.routing.shape, y.shape[-1]), h  # not view(): see multi_backends.forward


@uncompiled
def lora_linear_experts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    expert_indices: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """y = x W_e^T + bias_e + scaling * (D o x) A_e^T B_e^T, with e the expert of each row.

    A layer of a mixture of experts, as by `lora_linear` for each of them. Nothing waits for a GPU
    that runs the kernels; PyTorch's path does, for how many rows each expert has.

    Args:
        x: [*I, K] for expert_indices [*I]; or [*I[:-1], K], where each row goes to all experts
            that I's last dimension lists for it (a router's top k), and D is one mask for them.
        weight: frozen base weights [E, N, K] in x's dtype, any strides; transformers' layers with
            ``is_transposed`` pass theirs as ``weight.mT``.
        lora_A, lora_B: the experts' adapters [E, r, K] and [E, N, r], in any floating dtype, or
            both None: the frozen layer. Not contiguous ones are copied.
        expert_indices: integers [*I] on x's device. Any but 0 to E - 1 is no expert, and its row of
            y zeros, as expert parallelism has it for the experts of others.
        scaling, dropout_p, backend: as for `lora_linear`.
        bias: frozen, [E, N] in x's dtype.

    Returns:
        y [*I, N] in x's dtype (under autocast: in the autocast dtype), contiguous. The gradient of
        an expert's adapter without rows is zero.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range.
        RuntimeError: ``backend="triton"`` where the kernels cannot run; under torch.func.

    Under torch.compile the graph breaks.
    """
    check_indices(x, expert_indices)
    options = (scaling, bias, dropout_p, backend)
    found = decided(x, weight, lora_A, lora_B, expert_indices.shape, *options)
    x, bias, _, path, scaling, threshold, fan = found
    lora_A, lora_B = laid_out(lora_A), laid_out(lora_B)
    how = ExpertsCall(path, routing_of(expert_indices, len(weight)), scaling, fan)
    seed = draw_seeds(1, x.device, path) if threshold else None
    if not is_recorded():
        layer = how.layer(weight.to(x.dtype), lora_A, lora_B, seed, threshold)
        return _forward(x, layer, bias, how)[0]
    apply: Any = LoRALinearExpertsFunction.apply
    y: Tensor = apply(x, weight, lora_A, lora_B, bias, seed, threshold, how)
    return y


def laid_out(stack: Tensor | None) -> Tensor | None:
    """The adapters as the products read them, of PEFT's strided B a copy.

    On a CPU autograd keeps it for the backward, which else makes another one (5 % of a step of 128
    tokens). On a GPU a copy is faster than the memory is worth, and left to the launches.
    """
    return stack if stack is None or stack.is_cuda else contiguous(stack)


class Decided(NamedTuple):
    """A checked call."""

    x: Tensor  # this and the bias as autocast would have them
    bias: Tensor | None
    call: Call
    path: Path
    scaling: float
    threshold: int
    fan: int


def decided(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    indexed: torch.Size,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    backend: Backend,
) -> Decided:
    """The call as checked; ``indexed``: the indices' shape."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("lora_linear_experts: torch.func's transforms are not supported")
    check_options(weight, scaling, dropout_p, backend)
    if backend == "auto" and flops.are_counted():
        backend = "torch"
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and autocast_enabled(x):
        # It is cast where it is used, and kept as it is: this one is without values.
        weight = autocast(x, weight.new_empty(1), None)[1].expand(weight.shape)
    x, _, bias = autocast(x, None, bias)
    checks.check_experts(x, weight, lora_A, lora_B, bias, indexed)
    tensors = [t for t in (x, weight, lora_A, lora_B, bias) if t is not None]
    threshold = dropout_threshold(dropout_p) if lora_A is not None else 0
    call = Call(
        M=indexed.numel(),
        N=weight.shape[1],
        K=weight.shape[2],
        r=1 if lora_A is None else lora_A.shape[1],
        dtype=x.dtype,
        device=x.device,
        dropout=threshold > 0,
        plain_tensors=all(are_plain(t) for t in tensors),
    )
    kernels: Path = "triton" if takes_kernels(call, backend) else "torch"
    fan = 1 if x.shape[:-1] == indexed else indexed[-1]
    return Decided(x, bias, call, kernels, float(scaling), threshold, fan)


def explain_experts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    expert_indices: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Explanation:
    """Which backend `lora_linear_experts` takes for these arguments, and why not the other.

    Takes and raises what it does; computes nothing.
    """
    check_indices(x, expert_indices)
    options = (scaling, bias, dropout_p, backend)
    found = decided(x, weight, lora_A, lora_B, expert_indices.shape, *options)
    if found.path == "torch":
        reasons = {
            "triton": f"not taken: {why_torch(found.call, backend) or 'products are counted'}",
            "library": "taken: rows of some experts at a time, F.grouped_mm or a product for each",
        }
        return Explanation("torch", "library", "library", reasons)
    reasons = {
        "torch": "not taken: the kernels take this call",
        "split": "taken: h of all experts, then one launch for all, which gathers and scatters",
    }
    return Explanation("triton", "split", "split", reasons)


def check_indices(x: object, indices: object) -> None:
    """TypeError or ValueError unless they are integers beside x."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"expert_indices: got {type(indices).__name__}, wanted a torch.Tensor")
    if indices.dtype not in INTEGERS or indices.layout != torch.strided:
        got = f"dtype {indices.dtype}, layout {indices.layout}"
        raise TypeError(f"expert_indices: got {got}, wanted a dense tensor of integers")
    if isinstance(x, Tensor) and indices.device != x.device:
        raise ValueError(f"expert_indices: is on {indices.device}, wanted x's device, {x.device}")

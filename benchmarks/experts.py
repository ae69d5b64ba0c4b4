"""A mixture of experts with adapters, by ours and by others: `python -m benchmarks.experts`.

Experts as transformers has them, with LoRA on both projections, of tokens that a router sent to k
of them each:

    fused    ours, one autograd node
    nf4      the same over the weights' codes, which the others have the values of: QLoRA
    by_peft  PEFT's target_parameters over transformers' grouped_mm, where both are installed
    merged   what PEFT computes, by hand, for where they are not: W + sBA of all experts, then
             grouped products. It is faster: PEFT makes W + sBA twice, as PyTorch tries each
             parametrisation that is registered, and transformers gathers and sums in more passes
    split    without W + sBA, as Unsloth has it: A and B are grouped products of their own
    linear   the frozen experts alone

All in turns, medians in us, and the most memory that forward and backward hold at once, in bytes.
Before they are timed ours are compared with each of the others. The gradients are those of x, of
the router's weights and of the adapters.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lora import QuantizedWeight, quantize_nf4
from fused_lora.expert_middle import Middle
from fused_lora.expert_mlp import run_projections
from fused_lora.expert_stack import ExpertAdapter, Projection

from . import csv_rows, measure
from .shapes import EXPERTS

RANK, SCALING = 16, 2.0
TOLERANCE = 2e-2  # of the norm, in 16-bit products
PEFT = all(map(importlib.util.find_spec, ("peft", "transformers")))
OTHERS = ("by_peft", "merged", "split") if PEFT else ("merged", "split")
NAMES = ("fused", "nf4", *OTHERS, "linear")

Project = Callable[[Tensor, Tensor], Tensor]  # rows in the experts' order, and where each one's end


class Problem(NamedTuple):
    """A case."""

    experts: str
    M: int  # tokens
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.experts} M {self.M}"

    def mixture(self) -> Mixture:
        """On the device that there is."""
        return Mixture(self, csv_rows.like())


class Mixture:
    """Frozen weights [E, out, in], adapters as PEFT has them, x [M, hidden], a router's choice."""

    def __init__(self, problem: Problem, like: Tensor):
        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, device=like.device) * shape[-1] ** -0.5).to(like.dtype)

        _, M, hidden, intermediate, E, k = problem
        self.problem = problem
        self.x = torch.randn(M, hidden, device=like.device).to(like.dtype).requires_grad_()
        chosen, self.index = torch.randn(M, E, device=like.device).topk(k)
        self.p = chosen.softmax(-1).to(like.dtype).requires_grad_()
        shapes = ((E, 2 * intermediate, hidden), (E, hidden, intermediate))
        self.codes = [quantize_nf4(normal(*shape)) for shape in shapes]
        self.weights = [codes.dequantize() for codes in self.codes]
        # A [E r, in], expert after expert, and B [out, r E], rank after rank.
        self.As = [normal(E * RANK, W.shape[2]).requires_grad_() for W in self.weights]
        self.Bs = [
            normal(E, W.shape[1], RANK).permute(1, 2, 0).flatten(1).requires_grad_()
            for W in self.weights
        ]
        self.g = normal(M, hidden)

    def adapters(self) -> list[ExpertAdapter]:
        """Of both projections."""
        E = self.problem.num_experts
        pairs = zip(self.As, self.Bs, strict=True)
        return [ExpertAdapter.of(A, B, E, SCALING) for A, B in pairs]

    def projections(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """W, A [E, r, in] and B [E, out, r] of both."""
        both = zip(self.weights, self.adapters(), strict=True)
        return [(W, adapter.lora_A, adapter.lora_B) for W, adapter in both]

    def fused(self) -> Tensor:
        """In one node."""
        return self._fused(self.weights)

    def nf4(self) -> Tensor:
        """In one node, over codes."""
        return self._fused(self.codes)

    def _fused(self, weights: Sequence[Tensor | QuantizedWeight]) -> Tensor:
        both = zip(weights, self.adapters(), strict=True)
        first, last = (Projection(W, None, *adapter) for W, adapter in both)
        return run_projections(self.x, self.index, self.p, first, last, Middle("silu", act))

    def by_peft(self) -> Tensor:
        """By PEFT's wrappers of transformers' module."""
        y: Tensor = self._wrapped(self.x, self.index, self.p)
        return y

    @functools.cached_property
    def _wrapped(self) -> nn.Module:
        return wrapped(self)

    def merged(self) -> Tensor:
        """With a weight of its own for each expert, and its whole gradient."""

        def project(W: Tensor, A: Tensor, B: Tensor, x: Tensor, ends: Tensor) -> Tensor:
            return grouped(torch.baddbmm(W, B, A, alpha=SCALING), x, ends)

        return self._grouped(*(partial(project, *tensors) for tensors in self.projections()))

    def split(self) -> Tensor:
        """By three products each."""

        def project(W: Tensor, A: Tensor, B: Tensor, x: Tensor, ends: Tensor) -> Tensor:
            h = grouped(A, x, ends) * SCALING
            return grouped(W, x, ends).add_(grouped(B.contiguous(), h, ends))

        return self._grouped(*(partial(project, *tensors) for tensors in self.projections()))

    def linear(self) -> Tensor:
        """The frozen experts alone."""
        return self._grouped(*(partial(grouped, W) for W in self.weights))

    def _grouped(self, first: Project, last: Project) -> Tensor:
        """Rows to the experts' order, both projections, and back."""
        experts, order = self.index.flatten().sort()
        all_experts = torch.arange(self.problem.num_experts, device=order.device)
        ends = torch.searchsorted(experts, all_experts, right=True, out_int32=True)
        x = self.x.index_select(0, order // self.problem.top_k)
        out = last(act(first(x, ends)), ends)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        by_token = out.index_select(0, places).view(*self.index.shape, -1)
        return torch.bmm(self.p[:, None], by_token)[:, 0]

    def gradient(self, name: str) -> tuple[Tensor, ...]:
        """Forward and backward of one of the above."""
        trained = [self.x, self.p, *([] if name == "linear" else self.As + self.Bs)]
        return torch.autograd.grad(getattr(self, name)(), trained, self.g)

    def difference(self, name: str) -> float:
        """The largest between our results and another's, over their norms."""
        theirs = (getattr(self, name)(), *self.gradient(name))
        return csv_rows.difference((self.fused(), *self.gradient("fused")), theirs)


def act(z: Tensor) -> Tensor:
    """silu(gate) o up of z = (gate, up)."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped(weight: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """x W_e^T [M, out], of rows in the experts' order."""
    return F.grouped_mm(x, weight.mT, offs=ends)


def wrapped(mixture: Mixture) -> nn.Module:
    """transformers' module of the same tensors, with PEFT's adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    _, _, hidden, intermediate, E, _ = mixture.problem
    config = qwen3.Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=E
    )
    config._experts_implementation = "grouped_mm"
    names = ("gate_up_proj", "down_proj")
    with torch.device("meta"):
        experts = qwen3.Qwen3MoeExperts(config)
    for name, weight in zip(names, mixture.weights, strict=True):
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    adapters = LoraConfig(
        r=RANK,
        lora_alpha=SCALING * RANK,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in names],
    )
    model = get_peft_model(nn.ModuleDict({"experts": experts}), adapters)
    layer: Any = model.base_model.model["experts"]
    outer = layer
    while layer is not experts:
        of = names.index(layer.parameter_name)
        for side, weights in ((layer.lora_A, mixture.As), (layer.lora_B, mixture.Bs)):
            side["default"]._parameters["weight"] = weights[of]  # the mixture's leaves
        layer = layer.base_layer
    return outer


def problems(models: Sequence[str], Ms: Sequence[int]) -> list[Problem]:
    """All cases."""
    return [Problem(model, M, *EXPERTS[model]) for model, M in product(models, Ms)]


def _compile(problem: Problem) -> None:
    """Leaves a case's kernels in Triton's cache on disk."""
    with contextlib.suppress(Exception):  # the measurement will meet it again
        mixture = problem.mixture()
        mixture.gradient("fused")
        mixture.gradient("nf4")


def _measure(problem: Problem, seconds: float) -> Iterator[tuple[str, csv_rows.Medians]]:
    """By name of every mode the medians in us, or the bytes; AssertionError if ours are wrong."""
    mixture = problem.mixture()
    device = mixture.x.device
    for name in ("nf4", *OTHERS):
        error = mixture.difference(name)
        assert error < TOLERANCE, f"{error:.1e} of the norm from {name}"
    forward: dict[str, measure.Call] = {name: getattr(mixture, name) for name in NAMES}
    both: dict[str, measure.Call] = {name: partial(mixture.gradient, name) for name in NAMES}
    yield "forward", csv_rows.times(forward, device, seconds)
    yield "forward+backward", csv_rows.times(both, device, seconds)
    yield "memory", csv_rows.memory(both, device)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if our results are wrong, or something fails."""
    parser = csv_rows.parser(__doc__)
    parser.add_argument("--models", choices=EXPERTS, nargs="+", help="whose experts")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    *large, small, olmoe = EXPERTS
    models = args.models or (large if cuda else (small, olmoe))
    todo = problems(models, args.rows or ((8192, 2048) if cuda else (2048, 512, 128)))
    return csv_rows.main("experts", args, todo, _compile, _measure, versus=OTHERS[0])


if __name__ == "__main__":
    sys.exit(main())

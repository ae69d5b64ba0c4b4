"""Layers that are computed together, and one by one: `python -m benchmarks.groups`.

Whether it pays: q, k, v and gate, up by `lora_linear_group`, and a gated MLP with
`lora_linear_gated` for its last layer; the same layers by `lora_linear` each, by PEFT's formula,
and their frozen layers alone; in turns, medians in us. Both of ours are compared with each other
before they are timed. With few rows, where it counts, also CPU time without waiting for the device.
And the most memory that forward and backward hold at once, in bytes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora import lora_linear, lora_linear_gated, lora_linear_group
from fused_lora.arguments import Arguments
from fused_lora.dispatch import better_apart

from . import csv_rows, measure
from .providers import peft_expression
from .shapes import MODELS

RANK, SCALING = 16, 2.0
TOLERANCE = 2e-2  # of the norm, in 16-bit products
NAMES = ("group", "apart", "by_peft", "linear")
# CPU time is a mean of 100 calls, which CUDA's queue of about 1,000 launches must not hold up.
OVERHEAD_ROWS = 128


class Problem(NamedTuple):
    """A case."""

    layers: str
    M: int
    K: int
    sides: tuple[int, ...]  # N of each member
    dropout_p: float

    def __str__(self) -> str:
        return f"{self.layers} M {self.M} K {self.K} dropout {self.dropout_p:g}"

    def members(self) -> Members:
        """On the device that there is."""
        kind = MLP if self.layers == "mlp" else Members
        return kind(self.M, self.K, self.sides, self.dropout_p, csv_rows.like())


def problems(model: str, Ms: Sequence[int]) -> list[Problem]:
    """All cases, those without dropout first."""
    hidden, kv, intermediate = MODELS[model]
    sides = {"q,k,v": (hidden, kv, kv), "gate,up": (intermediate,) * 2}
    sides["mlp"] = sides["gate,up"]
    return [
        Problem(layers, M, hidden, sides[layers], dropout_p)
        for dropout_p, M, layers in product((0.0, 0.1), Ms, sides)
    ]


class Members:
    """Layers [N_i, K] with adapters, and their input x [M, K]."""

    def __init__(self, M: int, K: int, sides: Sequence[int], dropout_p: float, like: Tensor):
        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, device=like.device) * shape[-1] ** -0.5).to(like.dtype)

        self.normal = normal
        self.x = torch.randn(M, K, device=like.device).to(like.dtype).requires_grad_()
        self.weights = [normal(N, K) for N in sides]
        self.As = [normal(RANK, K).requires_grad_() for _ in sides]
        self.Bs = [normal(N, RANK).requires_grad_() for N in sides]
        self.gradients = [normal(M, N) for N in sides]
        self.dropout_p = dropout_p

    def first(self) -> Arguments:
        """What the first layer passes on."""
        W, A, B = self.weights[0], self.As[0], self.Bs[0]
        return Arguments(W, A, B, SCALING, None, self.dropout_p, "auto")

    def group(self) -> Sequence[Tensor]:
        """All in one call."""
        ps = [self.dropout_p] * len(self.weights)
        adapters = self.As, self.Bs
        return lora_linear_group(self.x, self.weights, *adapters, scalings=SCALING, dropout_ps=ps)

    def apart(self) -> Sequence[Tensor]:
        """A call each."""
        return [
            lora_linear(self.x, W, A, B, scaling=SCALING, dropout_p=self.dropout_p)
            for W, A, B in zip(self.weights, self.As, self.Bs, strict=True)
        ]

    def by_peft(self) -> Sequence[Tensor]:
        """As PEFT does it."""
        return [
            peft_expression(self.x, W, A, B, None, SCALING, self.dropout_p)
            for W, A, B in zip(self.weights, self.As, self.Bs, strict=True)
        ]

    def linear(self) -> Sequence[Tensor]:
        """The frozen layers alone."""
        return [F.linear(self.x, W) for W in self.weights]

    def adapters(self) -> Sequence[Tensor]:
        """All that is trained."""
        return [*self.As, *self.Bs]

    def gradient(self, name: str) -> tuple[Tensor, ...]:
        """Forward and backward of one of the above."""
        trained = [self.x] if name == "linear" else [self.x, *self.adapters()]
        ys = getattr(self, name)()
        return torch.autograd.grad(ys, trained, self.gradients)

    def difference(self) -> float:
        """The largest between a group's results and those of layers apart, over their norms."""
        group = (*self.group(), *self.gradient("group"))
        return csv_rows.difference(group, (*self.apart(), *self.gradient("apart")))


class MLP(Members):
    """A gated MLP: gate and up [N, K], which share x, and down [K, N] on silu(gate) o up."""

    def __init__(self, M: int, K: int, sides: Sequence[int], dropout_p: float, like: Tensor):
        super().__init__(M, K, sides, dropout_p, like)
        N = sides[0]
        A, B = self.normal(RANK, N).requires_grad_(), self.normal(K, RANK).requires_grad_()
        self.down, self.gradients = (self.normal(K, N), A, B), [self.normal(M, K)]

    def group(self) -> Sequence[Tensor]:
        """With the last layer's input in parts."""
        gate, up = super().group()
        p = self.dropout_p
        return [lora_linear_gated(gate, up, *self.down, scaling=SCALING, dropout_p=p)]

    def apart(self) -> Sequence[Tensor]:
        """A call each."""
        gate, up = super().apart()
        x = F.silu(gate) * up
        return [lora_linear(x, *self.down, scaling=SCALING, dropout_p=self.dropout_p)]

    def by_peft(self) -> Sequence[Tensor]:
        """As PEFT does it."""
        gate, up = super().by_peft()
        return [peft_expression(F.silu(gate) * up, *self.down, None, SCALING, self.dropout_p)]

    def linear(self) -> Sequence[Tensor]:
        """The frozen layers alone."""
        gate, up = super().linear()
        return [F.linear(F.silu(gate) * up, self.down[0])]

    def adapters(self) -> Sequence[Tensor]:
        """All that is trained."""
        return [*super().adapters(), *self.down[1:]]


def _compile(problem: Problem) -> None:
    """Leaves a case's kernels in Triton's cache on disk."""
    members = problem.members()
    for name in ("group", "apart"):
        with contextlib.suppress(Exception):  # the measurement will meet it again
            members.gradient(name)


def _measured(members: Members, seconds: float) -> Iterator[tuple[str, csv_rows.Medians]]:
    """By name of every mode the medians in us, or the bytes."""
    device = members.x.device
    forward: dict[str, measure.Call] = {name: getattr(members, name) for name in NAMES}
    both: dict[str, measure.Call] = {name: partial(members.gradient, name) for name in NAMES}
    yield "forward", csv_rows.times(forward, device, seconds)
    yield "forward+backward", csv_rows.times(both, device, seconds)
    if len(members.x) <= OVERHEAD_ROWS:
        yield "overhead", csv_rows.times(both, device, seconds, overhead=True)
    yield "memory", csv_rows.memory(both, device)


def _measure(problem: Problem, seconds: float) -> Iterator[tuple[str, csv_rows.Medians]]:
    """What `_measured` gives; AssertionError if the group's results are wrong."""
    members = problem.members()
    if problem.layers != "mlp" and better_apart(members.x, members.first()):
        print(f"{problem}: run apart anyway")
        return
    # Without dropout, whose masks differ: each member of a group has a seed of its own.
    error = problem._replace(dropout_p=0.0).members().difference()
    assert error < TOLERANCE, f"wrong by {error:.1e} of the norm"
    yield from _measured(members, seconds)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a group's results are wrong, or something fails."""
    parser = csv_rows.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, help="whose q, k, v and gate, up")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    Ms = args.rows or ((8192, 2048, 512, OVERHEAD_ROWS) if cuda else (512,))
    todo = problems(args.model or ("llama-3.1-8b" if cuda else "smollm2-135m"), Ms)
    return csv_rows.main("groups", args, todo, _compile, _measure, versus="apart")


if __name__ == "__main__":
    sys.exit(main())

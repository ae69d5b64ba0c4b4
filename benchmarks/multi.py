"""Many adapters in one batch: the problem, and who is measured.

fused        `lora_linear_multi`
split        its kernels with h B in the GEMM
expand       its kernels with h B after the library's product
loop         the base product, then for each adapter index_select, two products, index_add_
peft         PEFT's own forward with `adapter_names`, for adapters with equally many rows
bmm          rows padded to the longest adapter's: two torch.bmm
linear       the frozen layer alone, over the values where W0 is quantised

Over a quantised W0, loop and bmm dequantise it in every forward and backward, as PEFT does.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from oracle import Problem
from torch import Tensor

from fused_lora import QuantizedWeight, explain_multi, lora_linear_multi, reference
from fused_lora.multi import LoRALinearMultiFunction
from fused_lora.multi_backends import MultiPlan, Strategy
from fused_lora.multi_rows import row_groups

from .providers import Layer, Provider, by_name, frozen, linear, peft_layer, plain_linear
from .quantized import dequantised


@dataclass
class MultiProblem(Problem):
    """A problem with E adapters: lora_A [E, r, K], lora_B [E, N, r], ``rows`` of x for each."""

    rows: list[int]
    codes: QuantizedWeight | None = None  # what ``weight`` is the values of, if it is quantised

    @cached_property
    def adapters(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each."""
        return list(zip(self.lora_A.unbind(), self.lora_B.unbind(), strict=True))

    @property
    def segments(self) -> list[tuple[int, int]]:
        """As `lora_linear_multi` takes them."""
        return list(enumerate(self.rows))


def with_adapters(p: Problem, rows: list[int]) -> MultiProblem:
    """The problem with an adapter as its own, of random values, for each of ``rows``."""

    def normal(like: Tensor) -> Tensor:
        values = torch.randn(len(rows), *like.shape, device=like.device)
        return (values * like.shape[-1] ** -0.5).to(like.dtype)

    many = {"lora_A": normal(p.lora_A), "lora_B": normal(p.lora_B), "rows": rows}
    return MultiProblem(**{**vars(p), **many})


def expression(p: MultiProblem) -> Tensor:
    """The pure PyTorch expression: each adapter's rows by themselves."""
    parts = zip(p.x.split(p.rows), p.adapters, strict=True)
    return torch.cat(
        [
            reference.lora_linear(x, p.weight, A, B, scaling=p.scaling, bias=p.bias)
            for x, (A, B) in parts
        ]
    )


def _arguments(p: MultiProblem) -> tuple[Tensor | QuantizedWeight, list[Tensor], list[Tensor]]:
    As, Bs = map(list, zip(*p.adapters, strict=True))
    return frozen(p), As, Bs


def _base(p: MultiProblem, x: Tensor) -> Tensor:
    return F.linear(x, p.weight, p.bias) if p.codes is None else dequantised(x, p.codes)


def _fused(p: MultiProblem) -> Layer:
    weight, As, Bs = _arguments(p)
    options = {"scalings": p.scaling, "segments": p.segments, "bias": p.bias}
    return lambda x: lora_linear_multi(x, weight, As, Bs, **options)


def _chosen(p: MultiProblem) -> str:
    auto = explain_multi(p.x, *_arguments(p), scalings=p.scaling, segments=p.segments)
    return f"{auto.backend} {auto.strategy}/{auto.strategy_dx}"


def _with_plan(strategy: Strategy) -> Provider:
    plan = MultiPlan("triton", strategy, strategy)

    def build(p: MultiProblem) -> Layer:
        weight, As, Bs = _arguments(p)
        rows = row_groups(p.x.shape[:-1], p.x.device, len(As), None, p.segments)
        scalings = (p.scaling,) * len(As)

        def layer(x: Tensor) -> Tensor:
            y: Tensor = LoRALinearMultiFunction.apply(
                x, weight, p.bias, scalings, None, 0, rows, plan, None, *As, *Bs
            )
            return y

        return layer

    return Provider(strategy, build, backend="triton")


def _indices(p: MultiProblem) -> list[Tensor]:
    return list(torch.arange(len(p.x), device=p.x.device).split(p.rows))


def _loop(p: MultiProblem) -> Layer:
    indices, adapters = _indices(p), p.adapters

    def layer(x: Tensor) -> Tensor:
        y = _base(p, x)
        for index, (A, B) in zip(indices, adapters, strict=True):
            update = F.linear(F.linear(x[index].to(A.dtype), A), B)
            y = y.index_add(0, index, update.to(y.dtype), alpha=p.scaling)
        return y

    return layer


def _bmm(p: MultiProblem) -> Layer:
    longest, device = max(p.rows), p.x.device
    padded = torch.stack([F.pad(index, (0, longest - len(index))) for index in _indices(p)])
    real = torch.stack([torch.arange(longest, device=device) < n for n in p.rows])
    _, As, Bs = _arguments(p)

    def layer(x: Tensor) -> Tensor:
        A, B = torch.stack(As), torch.stack(Bs)
        update = torch.bmm(torch.bmm(x[padded].to(A.dtype), A.mT), B.mT)
        y = _base(p, x)
        return y.index_add(0, padded[real], update[real].to(y.dtype), alpha=p.scaling)

    return layer


def _peft(p: MultiProblem) -> Layer:
    names = [f"adapter{i}" for i in range(len(p.rows))]
    peft = peft_layer(p, plain_linear(p), dict(zip(names, p.adapters, strict=True))).eval()

    def layer(x: Tensor) -> Tensor:
        y: Tensor = peft(x.view(len(names), -1, x.shape[-1]), adapter_names=names)
        return y.flatten(0, 1)

    return layer


def _peft_cannot(p: MultiProblem) -> str | None:
    if not importlib.util.find_spec("peft"):
        return "peft is not installed"
    if p.codes is not None:
        return "it is measured over plain weights"
    return None if len({*p.rows}) == 1 else "its batches have samples of one length"


MULTI = by_name(
    Provider("fused", _fused, choice=_chosen),
    _with_plan("split"),
    _with_plan("expand"),
    Provider("loop", _loop),
    Provider("peft", _peft, obstacle=_peft_cannot),
    Provider("bmm", _bmm),
    Provider("linear", linear, adapter=False),
)
CPU_MULTI = ("fused", "loop", "peft", "bmm", "linear")

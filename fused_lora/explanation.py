"""Which backend and strategy a call takes, and why not the others, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from . import tables
from .calls import Backend, Call, Operands, as_products, rounds_input
from .cost_model import ceilings, predicted_seconds
from .dispatch import model_chooses, multiplied_in_fp32, plan, table_key, why_torch
from .kernels.device import device_info, has_fp8
from .strategies import NO_DESCRIPTORS, TAKES, Form, no_descriptors, obstacle, runs_as
from .tables import Strategy


@dataclass(frozen=True)
class Explanation:
    """What `fused_lora.explain` returns; ``print`` it to read it."""

    backend: Literal["triton", "torch"]
    strategy: str  # a `Strategy`, or one of many adapters' own
    strategy_dx: str
    reasons: Mapping[str, str]  # backend or strategy -> why it is taken or not

    def with_reasons(self, more: Mapping[str, str]) -> Explanation:
        """The same with more of them."""
        return replace(self, reasons={**self.reasons, **more})

    def __str__(self) -> str:
        head = f"backend {self.backend}, forward {self.strategy}, dx {self.strategy_dx}"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.reasons.items())])


def explain_call(
    call: Call, backend: Backend, operands: Operands, form: Form = "layer"
) -> Explanation:
    """The plan with the reason for and against every backend and strategy.

    ``operands``: their layouts decide whether tensor descriptors can be made of them.
    """
    chosen = plan(call, backend, form)
    reasons: dict[str, str] = {}
    if chosen.backend == "torch":
        reasons["triton"] = f"not taken: {why_torch(call, backend)}"
        reasons["library"] = "taken: F.linear, then addmm_ in place on its own output"
        if chosen.composed:
            reasons["library"] = "taken: F.linear, the adapter's part added in place"
            reasons["autograd"] = "PyTorch's own nodes: with so small an x they cost less"
        if multiplied_in_fp32(call):
            reasons["fp32"] = describe_fp32(call.dtype)
        if call.quantized is not None:
            reasons["quantised W0"] = describe_quantized(call, "torch", False)
        if rounds_input(call):
            reasons["x in fp8"] = "rounded to it, and multiplied in its own dtype"
        return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)
    device = device_info(call.device)
    seconds = predicted_seconds(call, device)
    found = tables.table(device.name).get(table_key(call, "forward"))
    reasons["torch"] = "not taken: the kernels take this call"
    of_y, of_dx = as_products(operands, call.dtype)
    taken, _ = runs_as(chosen.strategy, None, *of_y, form=form)
    taken_dx, _ = runs_as(chosen.strategy_dx, None, *of_dx)
    for strategy in get_args(Strategy):
        why_not = obstacle(call, strategy, device)
        if why_not is None or why_not.startswith(NO_DESCRIPTORS):  # which tensor has none
            why_not = no_descriptors(strategy, *of_y) or why_not
        if form == "dora" and strategy not in TAKES[form]:
            why_not = why_not or "its launch has no column scale, which DoRA needs"
        if why_not:
            reasons[strategy] = f"not taken: {why_not}"
            continue
        verdict = "taken" if strategy == taken else "not taken"
        why = f"predicted {seconds[strategy] * 1e6:.1f} us"
        if found is not None and strategy == found.strategy:
            why += f", measured {found.seconds * 1e6:.1f} us on this GPU"
        elif not model_chooses(strategy, call):
            why += "; taken only where a tuned table says so"
        reasons[strategy] = f"{verdict}: {why}"
    flops, bandwidth = ceilings(device)
    if call.quantized is not None:
        in_loop = chosen.strategy == "in_loop"
        reasons["quantised W0"] = describe_quantized(call, "triton", in_loop)
    reasons["model"] = f"ceilings of {flops / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.1f} TB/s"
    return Explanation(chosen.backend, taken, taken_dx, reasons)


def describe_fp32(dtype: torch.dtype) -> str:
    """Why PyTorch's path multiplies in fp32: see products.py."""
    name = str(dtype).removeprefix("torch.")
    return f"multiplied in it: this CPU has no instructions for {name}"


def describe_quantized(call: Call, backend: str, in_loop: bool) -> str:
    """A quantised W0's format, and how the forward turns its codes into values."""
    assert call.quantized is not None
    format = call.quantized.format
    if backend == "torch":
        tiles = "some rows or columns" if call.quantized.tiled else "a whole matrix"
        return f"{format}, made values {tiles} at a time"
    if rounds_input(call):
        how = "codes by codes" if has_fp8(call.device) else "as values: the GPU has no fp8 products"
        return f"{format}, and x is rounded to fp8 first; multiplied {how}"
    if in_loop:
        return f"{format}, tiles become values in the K loop"
    return f"{format}, turned into values once, in a scratch tensor"

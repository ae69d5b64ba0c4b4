"""What `FlopCounterMode` counts of our operators: what it counts of their PyTorch expression."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import problem
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import (
    dora_linear,
    inject,
    lora_linear,
    lora_linear_group,
    lora_linear_multi,
    quantize_int8,
)
from fused_lora.group_ops import lora_linear_group_op
from fused_lora.packing import pack

NAMES = ("x", "lora_A", "lora_B")
NEEDS = [needs for n in range(4) for needs in itertools.combinations(NAMES, n)]


def _composition(x, weight, lora_A, lora_B, *, scaling, bias, backend=None):
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_A), lora_B)


def _dora_composition(x, weight, lora_A, lora_B, magnitude, *, scaling, bias, backend=None):
    with torch.no_grad():
        norm = (weight + scaling * lora_B @ lora_A).norm(dim=1)
    return _composition(x, weight, lora_A, lora_B, scaling=scaling, bias=None) * magnitude / norm


def _counted(call, p, needs, **options):
    """Of the forward and of the backward."""
    tensors = {n: getattr(p, n).detach().clone().requires_grad_(n in needs) for n in NAMES}
    p = replace(p, **tensors)
    with FlopCounterMode(display=False) as forward:
        y = call(p, **options)
    with FlopCounterMode(display=False) as backward:
        if needs:
            y.backward(p.g)
    return forward.get_total_flops(), backward.get_total_flops()


def _call(function, *more):
    def call(p, weight=None, **options):
        weight = p.weight if weight is None else weight
        arguments = (p.x, weight, p.lora_A, p.lora_B, *more)
        return function(*arguments, scaling=p.scaling, bias=p.bias, **options)

    return call


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_of_lora(device, backend, needs):
    p = problem((3, 5), 12, 20, 4, device=device)
    expected = _counted(_call(_composition), p, needs)
    assert _counted(_call(lora_linear), p, needs, backend=backend) == expected
    assert expected[0] == 2 * 15 * (12 * 20 + 4 * (12 + 20))
    quantized = {"backend": backend, "weight": quantize_int8(p.weight)}
    assert _counted(_call(lora_linear), p, needs, **quantized) == expected


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_of_dora(device, backend, needs):
    p = problem((3, 5), 12, 20, 4, device=device)
    magnitude = torch.rand(12, device=device) + 0.5
    expected = _counted(_call(_dora_composition, magnitude), p, needs)
    assert _counted(_call(dora_linear, magnitude), p, needs, backend=backend) == expected


def _alone(members):
    return [_call(_composition)(p) for p in members]


def _as_members(members):
    lists = [[getattr(p, n) for p in members] for n in ("weight", "lora_A", "lora_B", "bias")]
    options = {"scalings": [p.scaling for p in members], "biases": lists.pop()}
    return lora_linear_group(members[0].x, *lists, **options)


def _as_operator(members):
    lists = [[getattr(p, n) for p in members] for n in ("lora_A", "lora_B", "bias")]
    packed = pack(*(p.weight for p in members))
    scalings = [p.scaling for p in members]
    arguments = (members[0].x, *lists, *packed, scalings, None, [0, 0], "torch", True)
    return lora_linear_group_op(*arguments)[:2]


@pytest.mark.parametrize("function", [_as_members, _as_operator])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_of_a_group(needs, function):
    other = problem((3, 5), 8, 20, 2)
    for name in NAMES[1:]:
        getattr(other, name).requires_grad_(name in needs)

    def total(call):
        def summed(p):
            y, z = call([p, replace(other, x=p.x)])
            return y * z.sum(-1, keepdim=True)

        return _counted(summed, problem((3, 5), 12, 20, 4), needs)

    assert total(function) == total(_alone)


def test_by_module():
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 20))
    inject(model, 4, 8, "all-linear")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(5, 20)).sum().backward()
    counts = {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}
    base, adapter = 2 * 5 * 12 * 20, 2 * 5 * 4 * (12 + 20)
    assert counts["Sequential.2"] == 2 * base + 3 * adapter
    # x of the first needs no gradient: neither g W0 nor dh A
    assert counts["Sequential.0"] == base + adapter + 2 * 5 * 4 * (12 + 12 + 20)
    assert counts["Global"] == counts["Sequential.0"] + counts["Sequential.2"]


@pytest.mark.parametrize("first", ["fused_lora", "torch.utils.flop_counter"])
def test_in_either_order_of_imports(first):
    program = f"""
import sys
import {first}
import torch, fused_lora
assert ("triton" in sys.modules) == {first != "fused_lora"}
from torch.utils.flop_counter import FlopCounterMode
layer = fused_lora.FusedLoRALinear(20, 12, 4)
with FlopCounterMode(display=False) as counter:
    layer(torch.ones(5, 20))
assert counter.get_total_flops() == 2 * 5 * (12 * 20 + 4 * (12 + 20)), counter.get_flop_counts()
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_of_many_adapters(needs):
    other = problem(5, 12, 20, 2)
    for name in NAMES[1:]:
        getattr(other, name).requires_grad_(name in needs)
    scalings = [1.0, 2.0]

    def multi(p, **rows):
        adapters = [p.lora_A, other.lora_A], [p.lora_B, other.lora_B]
        return lora_linear_multi(p.x, p.weight, *adapters, scalings=scalings, **rows)

    def alone(p):
        parts = p.x.split([4, 5, 6])
        middle = F.linear(F.linear(parts[1], other.lora_A), other.lora_B)
        last = F.linear(F.linear(parts[2], p.lora_A), p.lora_B)
        return F.linear(p.x, p.weight) + torch.cat((torch.zeros(4, 12), middle, last))

    p = problem(15, 12, 20, 4)
    rows = {"segments": [(-1, 4), (1, 5), (0, 6)]}
    assert _counted(multi, p, needs, **rows) == _counted(alone, p, needs)
    every = {"adapter_indices": torch.zeros(15, dtype=torch.int64)}
    assert _counted(multi, p, needs, **every) == _counted(_call(_composition), p, needs)


def test_what_else_happens_to_the_import():
    """Somebody asks where the module is; its import fails once; it and we are loaded again."""
    program = """
import importlib, importlib.util, sys
from importlib.machinery import SourceFileLoader
import torch, fused_lora

name = "torch.utils.flop_counter"
assert importlib.util.find_spec(name).name == name and name not in sys.modules
get_code = SourceFileLoader.get_code

def fail(self, fullname):
    if fullname == name:
        raise ImportError("once")
    return get_code(self, fullname)

SourceFileLoader.get_code = fail
try:
    import torch.utils.flop_counter
except ImportError:
    pass
SourceFileLoader.get_code = get_code
import torch.utils.flop_counter as counter
for module in (None, counter, fused_lora):
    if module is not None:
        importlib.reload(module)
    assert torch.ops.fused_lora.lora_linear in counter.flop_registry, module
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

"""Mixtures of experts over weights in codes: the stacks, and products with them."""

import copy
import functools
import re
from dataclasses import replace

import pytest
import torch
from oracle import Made, check, run
from test_experts import NEEDS, _call, _expression, _problem

from fused_lora import (
    FusedLoRALinear,
    QuantizedWeight,
    expert_backends,
    experts,
    explain_experts,
    lora_linear,
    lora_linear_experts,
    quantize_fp4,
    quantize_fp8,
    quantize_int8,
    quantize_mxfp4,
    quantize_nf4,
)
from fused_lora.cost_model import decodes_in_loop
from fused_lora.kernels.device import DeviceInfo
from fused_lora.kernels.quantized import dequantize
from fused_lora.quantize import quantize_like

QUANTIZERS = {
    "nf4": quantize_nf4,
    "nf4 single 32": functools.partial(quantize_nf4, double_quant=False, block_size=32),
    "fp4": quantize_fp4,
    "mxfp4": quantize_mxfp4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "fp8 whole": functools.partial(quantize_fp8, block_size=None),
}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])


# --- stacks in codes


@every_quantizer
@pytest.mark.parametrize("shape", [(3, 40, 64), (3, 5, 7), (2, 130, 128), (1, 3, 70)], ids=str)
def test_a_stack(name, shape):
    """4-bit codes are those of all rows, one after the other; in 8 bits each expert is alone."""
    make, W = QUANTIZERS[name], torch.randn(shape)
    stack = make(W)
    assert stack.shape == shape
    assert stack.numel() == W.numel()
    assert f"shape={list(shape)}" in repr(stack)
    values = stack.dequantize()
    alone = [make(of_expert) for of_expert in W]
    if "fp8" not in name:
        flat = make(W.flatten(0, 1))
        for part, own in flat._parameters.items():
            found = getattr(stack, part)
            assert own is found or torch.equal(own.view(-1), found.view(-1)), part
        assert torch.equal(values.flatten(0, 1), flat.dequantize())
    if name == "int8" or "fp8" in name:
        assert torch.equal(values, torch.stack([each.dequantize() for each in alone]))
        assert torch.equal(stack.scales.view(-1), torch.cat([e.scales.view(-1) for e in alone]))
    for chosen in (slice(1, 2), slice(0, 0), slice(None), slice(-1, None)):
        assert torch.equal(stack.dequantize(experts=chosen), values[chosen])
    assert stack.dequantize(torch.float64).dtype == torch.float64
    assert torch.equal(make(W.mT.contiguous().mT).dequantize(), values)
    assert torch.equal(quantize_like(stack, W).dequantize(), values)


@every_quantizer
def test_one_expert_is_quantised_at_a_time(name):
    W = torch.randn(6, 128, 128).bfloat16()
    with Made() as made:
        stack = QUANTIZERS[name](W)
    larger = [size for size in made.sizes if size > W[0].numel()]
    assert larger == [W.numel()] * ("fp8" in name)  # the codes are numbers too
    with Made() as made:
        (values,) = stack.dequantize(experts=slice(2, 3))
    assert max(made.sizes) <= values.numel()


@every_quantizer
def test_state_copies_and_dtypes(name):
    stack = QUANTIZERS[name](torch.randn(3, 40, 70))
    other = QUANTIZERS[name](torch.randn(3, 40, 70))
    other.load_state_dict(stack.state_dict())
    for same in (other, copy.deepcopy(stack)):
        assert torch.equal(same.dequantize(), stack.dequantize())
    half = copy.deepcopy(stack).half()
    assert half.dtype == torch.float16
    assert half.scales.dtype == stack.scales.dtype
    assert torch.equal(half.dequantize(), stack.dequantize().half())


def test_stacks_that_do_not_fit():
    codes, scales = torch.zeros(2, 3, 4, dtype=torch.int8), torch.ones(2, 3)
    options = {"dtype": torch.float32, "block": (1, 0)}
    QuantizedWeight("int8", codes, scales, shape=(2, 3, 4), **options)
    for shape, error, message in (
        ((2, 3, 5), ValueError, "codes: got 24 elements, wanted 30 for int8 of [2, 3, 5]"),
        ((3, 2, 4), ValueError, "codes: got [2, 3, 4], wanted [3, 2, 4]"),
        ((1, 2, 3, 4), TypeError, "shape: got (1, 2, 3, 4), wanted two integers, or three"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            QuantizedWeight("int8", codes, scales, shape=shape, **options)
    with pytest.raises(ValueError, match="scales: got 3 elements, wanted 6"):
        QuantizedWeight("int8", codes, scales[0], shape=(2, 3, 4), **options)
    bad = torch.randn(2, 3, 64)
    bad[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantize_nf4(bad)
    for shape in ((4,), (1, 2, 3, 4), (0, 3, 4)):
        with pytest.raises(ValueError, match=r"wanted \[N, K\], or \[E, N, K\] of experts"):
            quantize_int8(torch.ones(shape))
    with pytest.raises(ValueError, match="experts: got slice"):
        quantize_int8(torch.ones(3, 4)).dequantize(experts=slice(0, 1))
    with pytest.raises(TypeError, match="experts: got int, wanted a slice or None"):
        quantize_int8(torch.ones(2, 3, 4)).dequantize(experts=0)


def test_layers_of_one_weight_refuse_a_stack():
    stack, (A, B) = quantize_int8(torch.randn(3, 6, 8)), (torch.randn(2, 8), torch.randn(6, 2))
    with pytest.raises(ValueError, match=r"weight: got shape \[3, 6, 8\], wanted \[out_features"):
        lora_linear(torch.randn(5, 8), stack, A, B, scaling=1.0)
    with pytest.raises(ValueError, match=r"linear: got a weight \[3, 6, 8\]"):
        FusedLoRALinear.from_linear(stack)


# --- products


def _coded(name, *shape, **options):
    """The problem over what the codes stand for, and a call of it over them."""
    p = _problem(*shape, **options)
    codes = QUANTIZERS[name](p.weight)
    p = replace(p, weight=codes.dequantize())

    def call(p, function=lora_linear_experts, **options):
        return _call(replace(p, weight=codes), function, **options)

    return p, call


SHAPES = [((17, 3), 4, 40, 64, 4), ((20, 2), 3, 33, 128, 20)]


@both_backends
@every_quantizer
@pytest.mark.parametrize(
    ("shape", "dtype", "dropout_p"),
    [
        (SHAPES[0], torch.float32, 0.0),
        (SHAPES[0], torch.float32, 0.3),
        (SHAPES[1], torch.float16, 0.0),
    ],
    ids=str,
)
def test_rule(device, launches, monkeypatch, backend, name, shape, dtype, dropout_p):
    options = {"adapter_dtype": torch.float32, "dropout_p": dropout_p, "device": device}
    p, call = _coded(name, *shape, dtype=dtype, **options)
    monkeypatch.setattr(experts, "draw_seeds", lambda *_: p.seed)
    check(run(functools.partial(call, backend=backend), p, NEEDS), p, _expression)
    made = ["shrink", "gemm_experts"] * 2 + ["multi_grads"] * 2
    assert launches == made * (backend == "triton")


@both_backends
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8 whole"])
def test_blocks_that_end_with_an_expert(device, backend, name):
    """Odd sides, of which 128 x 128 blocks are cut off."""
    p, call = _coded(name, (12, 2), 2, 130, 149, 4, device=device)
    check(run(functools.partial(call, backend=backend), p, NEEDS), p, _expression)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(20, 18), (5, 7), (3, 96)], ids=str)
def test_blocks_over_the_ends_of_rows_go_to_pytorch(device, launches, name, shape):
    """And over those of experts."""
    p, call = _coded(name, (40, 2), 3, *shape, 4, device=device)
    check(run(call, p, NEEDS), p, _expression)
    assert not launches
    why = f"weight: got K = {shape[1]}, wanted a multiple of its block size"
    assert why in str(call(p, explain_experts))
    with pytest.raises(ValueError, match=why):
        call(p, backend="triton")


@both_backends
@pytest.mark.parametrize("which", [[2], [-1], [0, 3, -1]], ids=str)
def test_experts_without_rows(device, backend, which):
    p, call = _coded("nf4", (50, 2), 4, 17, 64, 4, device=device)
    chosen = torch.tensor(which, device=device)
    p = replace(p, indices=chosen[torch.randint(len(chosen), (50, 2), device=device)])
    got = run(functools.partial(call, backend=backend), p, NEEDS)
    check(got, p, _expression)
    assert not got["y"][p.indices < 0].any()
    idle = [e for e in range(4) if e not in which]
    assert not got["dlora_A"][idle].any()


@both_backends
@pytest.mark.parametrize("rows", [(0, 2), (1, 3)], ids=str)
def test_no_row_and_one(device, backend, rows):
    p, call = _coded("fp8", rows, 3, 17, 24, 4, device=device)
    check(run(functools.partial(call, backend=backend), p, NEEDS), p, _expression)


@both_backends
def test_parts_of_the_gradients_and_no_adapters(device, backend):
    p, call = _coded("int8", (40, 2), 3, 20, 18, 4, device=device)
    call = functools.partial(call, backend=backend)
    for needs in (("x",), ("lora_A",), ("lora_B",)):
        check(run(call, p, needs), p, _expression)
    frozen = replace(p, lora_A=None, lora_B=None)
    check(run(call, frozen, ("x",)), frozen, _expression)


def test_other_dtypes_and_autocast_on_pytorch():
    for dtype in (torch.bfloat16, torch.float64):
        p = _problem((40, 2), 3, 20, 64, 4, dtype=torch.float32)
        codes = quantize_nf4(p.weight)
        p = replace(p, **{n: t.to(dtype) for n, t in p.tensors().items() if t.is_floating_point()})
        p = replace(p, weight=codes.dequantize(dtype))
        check(run(lambda p: _call(replace(p, weight=codes)), p, NEEDS), p, _expression)  # noqa: B023
    p, call = _coded("nf4", (40, 2), 3, 20, 64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(p)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call(replace(p, x=p.x.bfloat16(), bias=p.bias.bfloat16())))


def test_values_are_there_one_expert_at_a_time_and_not_kept(monkeypatch):
    """Of experts with rows alone, in forward and backward."""
    monkeypatch.setattr(experts, "is_observed", lambda: False)  # else the mode sees one operator
    p, call = _coded("nf4", (12, 2), 16, 48, 128, 4)
    p = replace(p, indices=p.indices.clamp(min=3, max=5))
    leaves = [t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]
    saved = []
    with (
        Made() as made,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        torch.autograd.grad(call(p), leaves, p.g)
    assert max(made.sizes) <= max(48 * 128, p.lora_A.numel(), p.lora_B.numel())
    assert max(t.numel() for t in saved) <= max(t.numel() for t in leaves)


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_values_once_in_a_scratch_tensor(device, launches, monkeypatch, name):
    """What launches with many rows do."""
    monkeypatch.setattr(expert_backends, "decodes_in_loop", lambda *_: False)
    p, call = _coded(name, (17, 3), 4, 40, 64, 4, device=device)
    check(run(lambda p: call(p, backend="triton"), p, NEEDS), p, _expression)
    assert launches.count("gemm_experts") == 2
    assert "once, in a scratch tensor" in str(call(p, explain_experts, backend="triton"))


def test_rows_decide_between_the_loop_and_a_scratch_tensor():
    """On an H200, for Qwen3-30B-A3B's experts: by the model up to two tiles of rows each."""
    h200 = DeviceInfo(90, 132, 232448, "NVIDIA H200")
    layout = quantize_nf4(torch.zeros(1, 64)).layout

    def in_loop(tiles):
        return decodes_in_loop((128, 1536, 2048), layout, tiles, torch.bfloat16, h200)

    assert [in_loop(128 * each) for each in (1, 2, 3, 4, 16)] == [True, True, False, False, False]


@every_quantizer
def test_a_stack_becomes_values_in_one_launch(device, name):
    weight = QUANTIZERS[name](torch.randn(3, 40, 128, device=device))
    made = dequantize(weight.matrix(), torch.float32, 3)
    assert torch.equal(made, weight.dequantize(torch.float32))
    turned = dequantize(weight.matrix().t(), torch.float16, 3)
    assert torch.equal(turned, weight.dequantize(torch.float16).mT)


def test_codes_changed_before_the_backward():
    p = _problem((12, 2), 3, 16, 64, 4)
    codes = quantize_int8(p.weight)
    y = _call(replace(p, weight=codes, x=p.x.requires_grad_()))
    codes.scales.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_explain(device):
    p, call = _coded("nf4", (12, 2), 3, 16, 64, 4, device=device)
    found = call(p, explain_experts, backend="triton")
    assert found.backend == "triton"
    assert "nf4, tiles become values in the K loop" in str(found)
    found = call(p, explain_experts, backend="torch")
    assert "nf4, made values some rows or columns at a time" in str(found)


_P = _problem((6, 2), 3, 5, 7, 2)
BAD = {
    "weight: got shape [5, 7], wanted [experts, out_features, in_features]": quantize_int8(
        _P.weight[0]
    ),
    "weight: got activations='fp8', wanted None: experts": quantize_fp8(
        _P.weight, activations="fp8"
    ),
    "weight: is on meta, wanted x's device, cpu": quantize_int8(_P.weight).to("meta"),
    "lora_A: got shape [3, 2, 7], wanted [4, r, 7]": quantize_int8(torch.ones(4, 5, 7)),
    "x: got shape [6, 7], wanted": quantize_int8(torch.ones(3, 5, 8)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    for function in (lora_linear_experts, explain_experts):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            _call(replace(_P, weight=BAD[message]), function)

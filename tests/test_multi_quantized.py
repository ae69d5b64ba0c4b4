"""Many adapters over a quantised W0: both ways to its values, PyTorch's, the layer and PEFT's."""

import functools
from dataclasses import replace

import pytest
import torch
from oracle import Made
from test_multi import STRADDLING, batch, check, fused, run
from torch import nn

from fused_lora import (
    FusedMultiLoRALinear,
    explain_multi,
    lora_linear_multi,
    quantize_fp4,
    quantize_fp8,
    quantize_int8,
    quantize_nf4,
    quantized_weight,
)
from fused_lora.kernels import configs
from fused_lora.kernels.device import INTERPRETED
from fused_lora.kernels.gemm import gemm_scaled
from fused_lora.multi_backends import MultiPlan

QUANTIZERS = {
    "nf4": quantize_nf4,
    "nf4 single": lambda w: quantize_nf4(w, double_quant=False),
    "fp4": quantize_fp4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
PLANS = {
    "in loop": MultiPlan("triton", "expand", "expand", in_loop=True, in_loop_dx=True),
    "split": MultiPlan("triton", "split", "split"),
    "expand": MultiPlan("triton", "expand", "expand"),
    "split, in loop": MultiPlan("triton", "split", "expand", in_loop_dx=True),
    "torch": MultiPlan("torch", "library", "library"),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16"),
    ],
)


def quantized(b, name):
    """The batch over what the quantised weight stands for, and the weight."""
    weight = QUANTIZERS[name](b.weight)
    return replace(b, weight=weight.dequantize()), weight


def over(weight, call):
    return lambda b: call(replace(b, weight=weight))


@every_plan
@DTYPES
def test_multi_over_nf4(device, plan, dtype):
    adapters = torch.float32
    b = batch(STRADDLING, K=128, dtype=dtype, adapter_dtype=adapters, device=device)
    b, weight = quantized(b, "nf4")
    check(run(over(weight, fused(plan)), b), b)


@every_quantizer
@pytest.mark.parametrize("plan", [PLANS["in loop"], PLANS["torch"]], ids=["in loop", "torch"])
def test_multi_over_every_format_with_dropout(device, name, plan):
    b = batch([(1, 19), (-1, 3), (0, 8)], (3, 17), K=128, device=device, dropout_p=0.3)
    b, weight = quantized(b, name)
    check(run(over(weight, fused(plan)), b), b)


@every_quantizer
@pytest.mark.parametrize("transposed", [False, True])
def test_multi_base_product_in_every_quantized_configuration(device, name, transposed):
    w = QUANTIZERS[name](torch.randn(192, 128).to(device))
    matrix, full = w.matrix(), w.dequantize(torch.float64)
    if transposed:
        matrix, full = matrix.t(), full.t()
    x, bias = (torch.randn(s).to(device, torch.float16) for s in ((37, len(full)), full.shape[1:]))
    exact = x.double() @ full + bias.double()
    for config in configs.ship("quantized", 16, 2, False, INTERPRETED):
        y = gemm_scaled(config, x, matrix, scale=1.0, bias=bias)
        assert ((y.double() - exact).norm() / exact.norm()).item() < 2e-3


def call(b, weight, **kwargs):
    arguments = {"scalings": list(b.scalings), "bias": b.bias, "adapter_indices": b.indices}
    return lora_linear_multi(b.x, weight, b.As, b.Bs, **arguments | kwargs)


def test_multi_nf4_takes_few_rows_in_the_loop_and_many_from_a_scratch(device, monkeypatch):
    from fused_lora.kernels import quantized as kernels

    scratches = []
    real = kernels.dequantize
    monkeypatch.setattr(kernels, "dequantize", lambda *a: scratches.append(1) or real(*a))
    b = batch([(0, 3), (1, 2)], (3, 16), K=128, dtype=torch.float16, device=device)
    weight = quantize_nf4(b.weight)
    few = explain_multi(b.x, weight, b.As, b.Bs, adapter_indices=b.indices.cpu(), backend="triton")
    assert "K loop" in few.reasons["quantised W0"]
    call(b, weight, backend="triton")
    assert not scratches
    x = torch.empty(1, dtype=torch.float16, device=device).expand(8192, 4096)
    big = quantize_nf4(torch.zeros(1, 4096)).requires_grad_(False)
    many = explain_multi(
        x,
        big.to(device),
        [torch.empty(16, 4096, device=device)],
        [torch.empty(1, 16, device=device)],
        segments=[(0, 8192)],
        backend="triton",
    )
    assert "scratch" in many.reasons["quantised W0"]
    library = explain_multi(b.x, weight, b.As, b.Bs, adapter_indices=b.indices, backend="torch")
    assert "at a time" in library.reasons["quantised W0"]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_over_nf4_with_blocks_over_the_ends_of_rows(device, backend):
    b = batch([(0, 3), (1, 2)], (3, 16), K=70, device=device)
    b, weight = quantized(b, "nf4")
    if backend == "triton":
        with pytest.raises(ValueError, match="wanted a multiple of its block size, 64"):
            call(b, weight, backend="triton")
        return
    check(run(lambda b: call(b, weight), b), b)


def test_multi_over_nf4_makes_no_whole_weight_on_the_torch_path(monkeypatch):
    monkeypatch.setattr(quantized_weight, "_CPU_CHUNK", 16 << 10)
    b = batch([(1, 5), (0, 3)], (3, 4), N=768, K=512)
    b, weight = quantized(b, "nf4")
    with Made() as made:
        result = run(over(weight, fused(PLANS["torch"])), b)
    assert max(made.sizes) <= weight.numel() // 4
    monkeypatch.undo()
    check(result, b)


def test_multi_over_nf4_saves_no_weight():
    b = batch(STRADDLING, N=96, K=128)
    b, weight = quantized(b, "nf4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, id):
        over(weight, fused(PLANS["torch"]))(b.map(lambda t: t.requires_grad_()))
    assert torch.Size([96, 128]) not in saved


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_multi_layer_over_codes_trains_and_keeps_its_state(name):
    linear = nn.Linear(128, 24)
    layer = FusedMultiLoRALinear.from_linear(linear, quantize=name)
    assert layer.weight.layout.format == name
    assert layer.bias.data_ptr() == linear.bias.data_ptr()
    plain = nn.Linear(128, 24)
    plain.load_state_dict({"weight": layer.weight.dequantize(), "bias": linear.bias.detach()})
    reference = FusedMultiLoRALinear.from_linear(plain)
    for each in (layer, reference):
        each.add_adapter("german", 4)
        each.add_adapter("french", 2)
    adapters = {n: torch.randn(p.shape) for n, p in layer.named_parameters() if "lora_" in n}
    for each in (layer, reference):
        each.load_state_dict(adapters, strict=False)
    x, segments = torch.randn(7, 128), [("french", 3), ("__base__", 1), ("german", 3)]
    for each in (layer, reference):
        each(x, segments=segments).square().sum().backward()
    for (n, p), (_, q) in zip(
        layer.lora_A.named_parameters(), reference.lora_A.named_parameters(), strict=True
    ):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-3, msg=n)
    assert all(not p.requires_grad for p in layer.weight.parameters())
    other = FusedMultiLoRALinear.from_linear(nn.Linear(128, 24), quantize=name)
    other.add_adapter("german", 4)
    other.add_adapter("french", 2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, segments=segments), layer(x, segments=segments))
    with pytest.raises(ValueError, match=f"quantize: got 'nf4', but the weight is in {name} codes"):
        FusedMultiLoRALinear.from_linear(layer.weight, quantize="nf4")
    layer.delete_adapter("german")
    layer.delete_adapter("french")
    y = layer(x, adapter_names="__base__")
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_multi_mixed_batches_of_peft_over_nf4_and_int8(kind, compute_dtype, monkeypatch):
    from test_quantize import _peft_model

    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    import fused_lora.peft as fused_peft

    seen = []
    real = fused_peft.lora_linear_multi
    monkeypatch.setattr(
        fused_peft,
        "lora_linear_multi",
        lambda *a, **k: seen.append(a[1].layout.format) or real(*a, **k),
    )
    model = _peft_model(kind)
    model.add_adapter("other", peft.LoraConfig(r=6, lora_alpha=3, target_modules=["up"]))
    layer = model.base_model.model.up
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # PEFT trains the active adapter alone
        if "lora_B.other" in name:
            nn.init.normal_(parameter)
    model.eval()
    if compute_dtype is not None and kind == "nf4":
        layer.base_layer.compute_dtype = compute_dtype
        layer.base_layer.compute_type_is_set = True
    x = torch.randn(4, 3, 128, requires_grad=True)
    names = ["other", "__base__", "default", "other"]

    def outputs(forwards):
        model.zero_grad()
        x.grad = None
        y = []
        for forward in forwards:
            y.append(forward())
            y[-1].square().sum().backward()
        grads = [p.grad for _, p in sorted(layer.named_parameters()) if p.grad is not None]
        return [torch.cat(y), x.grad, *grads]

    def alone(i, name):
        if name == "__base__":
            with model.disable_adapter():
                return model(x[i : i + 1])
        model.set_adapter(name)
        return model(x[i : i + 1])

    # PEFT's own forward of a mixed batch cannot be trained through over 4 bits.
    expected = outputs([functools.partial(alone, i, name) for i, name in enumerate(names)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    fused_peft.fuse(model, strict=True)
    found = outputs([lambda: model(x, adapter_names=names)])
    assert seen == [kind]
    found, expected = [found[0], *found], [mixed, *expected]
    rounded = kind == "int8" or compute_dtype is not None  # bitsandbytes rounds x to int8
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).norm() <= (3e-2 if rounded else 1e-4) * wanted.norm()

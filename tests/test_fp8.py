"""fp8 weights whose layers round x to fp8 too: the rounding, the product, and who takes it."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from oracle import check, expression, fused, problem, run
from outside import run_outside
from torch import nn

from fused_lora import (
    FusedLoRALinear,
    FusedMultiLoRALinear,
    QuantizedWeight,
    explain,
    lora_linear,
    quantize_fp8,
    quantize_nf4,
    reference,
)
from fused_lora.dispatch import Plan
from fused_lora.kernels import configs, quantized
from fused_lora.kernels import device as device_module
from fused_lora.kernels.device import INTERPRETED
from fused_lora.kernels.gemm import gemm_add_lora
from fused_lora.kernels.quantized import dequantize, fp8_input
from fused_lora.quantize import quantize_like

E4M3 = torch.float8_e4m3fn
PLANS = {
    "in_loop": Plan("triton", "in_loop", "in_loop"),
    "dx by scratch": Plan("triton", "in_loop", "split"),
    "another name": Plan("triton", "split", "split"),  # rounds x all the same
    "torch": Plan("torch", "library", "library"),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
BLOCKS = pytest.mark.parametrize("block_size", [128, None])
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16"),
    ],
)


def _rows_scaled(weight):
    """With a scale for each row, as torchao has them."""
    scales = weight.float().abs().amax(1) / 448
    codes = (weight.float() / scales[:, None]).to(E4M3)
    return QuantizedWeight(
        "fp8",
        codes,
        scales,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        block=(1, 0),
        activations="fp8",
    )


def _rounding(p):
    return reference.lora_linear(
        p.x,
        p.weight,
        p.lora_A,
        p.lora_B,
        scaling=p.scaling,
        bias=p.bias,
        dropout_p=p.dropout_p,
        seed=p.seed,
        activations="fp8",
    )


def _check(p, weight, backend):
    """Against the fp64 product of what x and W0 are rounded to."""
    p = replace(p, weight=weight.dequantize())
    result = run(lambda q: fused(backend)(replace(q, weight=weight)), p)
    check(result, p, _rounding)
    return result


# --- the rounding


def _rounded(codes, scales):
    K = codes.shape[1]
    return codes.float() * scales.t().repeat_interleave(128, 1)[:, :K]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (33, 128), (5, 300), (70, 517)], ids=str)
def test_rounding_is_that_of_the_reference(device, dtype, shape):
    x = (torch.randn(shape) * torch.logspace(-9, 4, shape[0])[:, None]).to(device, dtype)
    x[0] = 0
    for view in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, : shape[1]]):
        assert torch.equal(_rounded(*fp8_input(view)).to(dtype), reference.fp8_activations(view))


def test_rounding_is_to_nearest_even_and_saturates(device):
    """Every value of e4m3, every middle between two of them, and their neighbours in fp32."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat((values, middles))
    points = torch.cat((points, points.nextafter(points + 1), points.nextafter(points - 1)))
    points = points.clamp(max=448.0)
    points = torch.cat((points, -points))
    x = torch.zeros(-(-len(points) // 127), 128)
    x[:, 1:] = torch.nn.functional.pad(points, (0, -len(points) % 127)).view(-1, 127)
    x[:, 0] = 448.0  # the scale is one
    codes, scales = fp8_input(x.to(device))
    assert torch.equal(scales.cpu(), torch.ones(1, len(x)))
    assert torch.equal(codes.float().cpu(), x.to(E4M3).float())
    assert torch.equal(reference.fp8_activations(x), x.to(E4M3).float())


def test_rounding_error_is_that_of_three_bits():
    x = torch.randn(64, 1000) * torch.rand(64, 1)
    rounded = reference.fp8_activations(x)
    assert (rounded - x).norm() / x.norm() < 0.03
    assert (
        (rounded - x).abs() <= torch.maximum(x.abs() / 16, x.abs().amax(1)[:, None] / 2**18)
    ).all()
    leaf = x.clone().requires_grad_()
    assert torch.equal(
        torch.autograd.grad(reference.fp8_activations(leaf), leaf, torch.ones_like(x))[0],
        torch.ones_like(x),
    )
    for odd in ((0, 5), (3, 0), (2, 3, 129)):
        assert reference.fp8_activations(torch.randn(odd)).shape == odd


@every_plan
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_in_x_shows(device, plan, value):
    p = problem(5, 17, 160, 3, device=device)
    p.x[2, 7] = value
    weight = quantize_fp8(p.weight, activations="fp8")
    y = fused(plan)(replace(p, weight=weight))
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


# --- the product


@BLOCKS
@every_plan
@DTYPES
def test_values_and_gradients(device, block_size, plan, dtype, launches):
    p = problem((3, 13), 130, 320, 8, dtype=dtype, adapter_dtype=torch.float32, device=device)
    _check(p, quantize_fp8(p.weight, block_size=block_size, activations="fp8"), plan)
    assert launches[:2] == (["gemm_scaled", "gemm_add_lora"] if plan.backend == "triton" else [])


@every_plan
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 5, 64), (17, 33, 77), (4, 260, 129)], ids=str)
def test_edge_shapes(device, plan, shape):
    p = problem(*shape, 3, device=device)
    _check(p, _rows_scaled(p.weight), plan)
    _check(p, quantize_fp8(p.weight, activations="fp8"), plan)


@pytest.mark.parametrize("plan", ["in_loop", "torch"])
def test_dropout_is_on_the_adapter_alone(device, plan):
    p = problem(37, 70, 130, 5, device=device, dropout_p=0.3)
    _check(p, quantize_fp8(p.weight, activations="fp8"), PLANS[plan])


def test_backends_agree_and_differ_from_an_exact_x(device):
    p = problem(9, 20, 256, 4, device=device)
    weight = quantize_fp8(p.weight, activations="fp8")
    ours = {
        name: run(lambda q, plan=plan: fused(plan)(replace(q, weight=weight)), p)
        for name, plan in PLANS.items()
    }
    for result in ours.values():
        torch.testing.assert_close(result, ours["torch"], rtol=1e-4, atol=1e-4)
    exact = run(expression, replace(p, weight=weight.dequantize()))
    error = (ours["torch"]["y"] - exact["y"]).norm() / exact["y"].norm()
    assert 0.005 < error < 0.05
    torch.testing.assert_close(ours["torch"]["dx"], exact["dx"])  # g is not rounded


def _products(weight, x, dtype):
    """h b + x w^T in every configuration, and what it is in fp64."""
    h, b = torch.randn(len(x), 5).to(x), torch.randn(5, weight.shape[0]).to(x)
    exact = reference.fp8_activations(x.double()) @ weight.dequantize(torch.float64).t()
    exact += h.double() @ b.double()
    for config in configs.ship("fp8", 5, dtype.itemsize, False, INTERPRETED):
        y = gemm_add_lora(config, x, weight.matrix().t(), h, b)
        yield (y.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("make", [_rows_scaled, lambda w: quantize_fp8(w, activations="fp8")])
def test_product_in_every_configuration(device, dtype, tolerance, make):
    x = torch.randn(37, 300).to(device, dtype)
    weight = make(torch.randn(150, 300).to(device))
    assert all(error < tolerance for error in _products(weight, x, dtype))


@pytest.mark.parametrize("make", [_rows_scaled, lambda w: quantize_fp8(w, activations="fp8")])
def test_product_of_codes(monkeypatch, make):
    """What GPUs with fp8 run. The interpreter rounds to e4m3 wrongly: x has nothing to round."""
    if torch.cuda.is_available():
        pytest.skip("the GPU does it in the other tests")
    monkeypatch.setattr(quantized, "has_fp8", lambda device: True)
    x = torch.randint(0x7E, (37, 300), dtype=torch.uint8)
    x |= torch.randint(2, x.shape, dtype=torch.uint8) << 7
    x[:, ::128] = 0x7E  # 448: the scale is a power of two
    x = x.view(E4M3).float() * 2.0 ** torch.randint(-9, 9, (37, 1))
    codes, _ = fp8_input(x)
    assert codes.dtype == E4M3
    assert torch.equal(reference.fp8_activations(x), x)
    assert all(error < 1e-6 for error in _products(make(torch.randn(150, 300)), x, torch.float32))


@pytest.mark.parametrize("activations", [None, "fp8"])
def test_codes_that_are_nan(device, activations):
    """0x7F and 0xFF, the one magnitude of e4m3 that is no number."""
    codes = torch.arange(256, dtype=torch.int32).to(device, torch.uint8).view(2, 128)
    codes[0, 127] = 0
    weight = QuantizedWeight(
        "fp8",
        codes.view(E4M3),
        torch.ones(1, device=device),
        shape=(2, 128),
        dtype=torch.float32,
        block=(0, 0),
        activations=activations,
    )
    values = weight.dequantize()
    assert values.isnan().sum() == values[1, 127].isnan() == 1
    assert torch.equal(
        dequantize(weight.matrix(), torch.float32).nan_to_num(7), values.nan_to_num(7)
    )
    p = problem(3, 2, 128, 2, device=device)
    for plan in PLANS.values():
        y = fused(plan)(replace(p, weight=weight))
        assert y[:, 0].isfinite().all()
        assert y[:, 1].isnan().all()


# --- who takes it


def test_dispatch_and_explain(device, launches):
    p = problem(4, 64, 256, 2, device=device)
    weight = quantize_fp8(p.weight, activations="fp8")
    said = str(explain(p.x, weight, p.lora_A, p.lora_B, backend="triton"))
    assert "in_loop: taken: predicted" in said
    assert "split: not taken: x is to be rounded to fp8, which only in_loop does" in said
    form = "multiplied codes by codes" if device_module.has_fp8(device) else "the GPU has no fp8"
    assert form in said
    said = str(explain(p.x, weight, p.lora_A, p.lora_B, backend="torch"))
    assert "x in fp8: rounded to it, and multiplied in its own dtype" in said
    lora_linear(p.x, weight, p.lora_A, p.lora_B, scaling=1.0, backend="triton")
    assert launches == ["gemm_scaled", "gemm_add_lora"]
    many = torch.empty(8192, 256, device=device)  # where weights alone in fp8 go to a scratch
    assert explain(many, weight, p.lora_A, p.lora_B, backend="triton").strategy == "in_loop"


@pytest.mark.parametrize(
    ("capability", "native"), [(80, False), (86, False), (89, True), (90, True)]
)
def test_which_gpus_multiply_codes(monkeypatch, capability, native):
    gpu = replace(INTERPRETED, capability=capability)
    monkeypatch.setattr(device_module, "device_info", lambda device: gpu)
    assert device_module.has_fp8(torch.device("cuda", 0)) is native
    assert not device_module.has_fp8(torch.device("cpu"))


def test_scales_of_few_columns_go_to_torch(device, launches):
    p = problem(5, 9, 256, 3, device=device)
    codes, scales = torch.randn(9, 256).to(device, E4M3), torch.rand(9, 4).to(device)
    kwargs = {"shape": (9, 256), "dtype": torch.float32, "block": (1, 64)}
    weight = QuantizedWeight("fp8", codes, scales, activations="fp8", **kwargs)
    _check(p, weight, "auto")
    assert launches == []
    message = "weight: got a scale for each 64 columns, wanted one for 128"
    with pytest.raises(ValueError, match=message):
        _check(p, weight, "triton")


# --- the container and its layers


def test_property_stays_with_the_weight():
    weight = quantize_fp8(torch.randn(20, 256), activations="fp8")
    assert weight.activations == "fp8"
    assert "activations='fp8'" in repr(weight)
    for same in (copy.deepcopy(weight), quantize_like(weight, torch.randn(20, 256)), weight.half()):
        assert same.activations == "fp8"
    assert quantize_fp8(torch.randn(20, 256)).activations is None
    assert quantize_nf4(torch.randn(20, 256)).activations is None
    assert set(weight.state_dict()) == {"codes", "scales"}


def test_layer_trains_and_merges():
    weight = quantize_fp8(torch.randn(24, 256) / 16, activations="fp8")
    layer = FusedLoRALinear.from_linear(weight, 4)
    nn.init.normal_(layer.lora_B, std=0.05)
    x = torch.randn(5, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None
    layer.eval()
    rounded = layer(x)
    layer.merge()  # a plain weight: x is what it is again
    assert 0.003 < (layer(x) - rounded).norm() / rounded.norm() < 0.06
    layer.unmerge()
    assert torch.equal(layer(x), rounded)
    layer.merge(requantize=True)
    assert layer.weight.activations == "fp8"
    check_base_alone(layer, x)


def check_base_alone(layer, x, **options):
    """A layer that is W0 alone rounds x, in the dtype that autocast gives it, and g does not."""
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            x = x.detach().requires_grad_()
            y = layer(x, **options)
        values = layer.weight.dequantize(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        assert torch.equal(
            y, nn.functional.linear(reference.fp8_activations(x.to(dtype)), values, bias)
        )
        y.sum().backward()
        assert torch.equal(x.grad, (torch.ones_like(y) @ values).float())


def test_layer_without_adapters_rounds_x_too():
    weight = quantize_fp8(torch.randn(24, 256) / 16, activations="fp8")
    layer, x = FusedMultiLoRALinear.from_linear(weight), torch.randn(5, 256)
    check_base_alone(layer, x, adapter_names="__base__")
    alone = layer(x, adapter_names="__base__")
    layer.add_adapter("german", 4)
    assert torch.allclose(layer(x, adapter_names="__base__"), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_torchao_layer_that_quantises_its_input_is_refused(granularity):
    ao = pytest.importorskip("torchao.quantization")
    float8 = pytest.importorskip("torchao.quantization.quantize_.workflows.float8.float8_tensor")
    rule = getattr(ao, granularity)()
    linear = nn.Linear(128, 24)
    tensor = float8.Float8Tensor.from_hp(
        linear.weight.detach(),
        granularity=rule,
        act_quant_kwargs=float8.QuantizeTensorToFloat8Kwargs(granularity=rule),
    )
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(ValueError, match="torchao quantises its input too, with scales that we do"):
        FusedLoRALinear.from_linear(linear)


def test_bad_activations():
    w = torch.randn(4, 128)
    with pytest.raises(ValueError, match="activations: got 'int8', wanted None or 'fp8'"):
        quantize_fp8(w, activations="int8")
    q = quantize_nf4(w)
    tensors = {name: p.data for name, p in q.named_parameters()}
    kwargs = {"shape": (4, 128), "dtype": q.dtype, "block": q.layout.block, **tensors}
    message = "activations: got 'fp8' for a weight in nf4, wanted one in fp8"
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantizedWeight("nf4", activations="fp8", **kwargs)


# --- what the compiler makes of it


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [("sm_80", "HMMA"), ("sm_89", "QMMA"), ("sm_90", "QGMMA"), ("sm_100", "UTCQMMA")],
)
def test_product_has_fp8_tensor_core_instructions(arch, instruction, tmp_path):
    rows_file = tmp_path / "rows.json"
    command = ["-m", "benchmarks.compile_report", "--arch", arch, "--kind", "fp8"]
    run_outside(*command, "--dtype", "bf16", "--sample", "4", "--json", str(rows_file))
    rows = json.loads(rows_file.read_text())
    assert len(rows) == 4
    assert all(row["stack"] == 0 for row in rows)
    large = [row for row in rows if row["config"]["BLOCK_M"] >= 64]
    assert large
    assert all(instruction in row["instructions"] for row in large)


def test_rounding_compiles_to_a_conversion_without_spills():
    program = """
import triton
from triton.backends.compiler import GPUTarget
from benchmarks.compile_report import resource_usage
from benchmarks.sources import specialised
from fused_lora.kernels.quantized import FP8_INPUT_TILE, fp8_input_kernel
constants = {"BLOCK_M": FP8_INPUT_TILE["BLOCK_M"], "stride_xk": 1}
for arch in (80, 89, 90, 100):
    codes = "*fp8e4nv" if arch >= 89 else "*fp16"
    pointers = {"x_ptr": "*bf16", "codes_ptr": codes, "scales_ptr": "*fp32"}
    source = specialised(fp8_input_kernel, pointers, constants)
    options = {k: v for k, v in FP8_INPUT_TILE.items() if not k.isupper()}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert ("cvt.rn.satfinite.e4m3x2" in ptx) == (arch >= 89), arch
    if arch >= 90:  # for sm_89 Triton 3.6 takes a way through fp16, towards zero
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx, arch
    assert str((127 - 6) << 23) in ptx, arch  # _round_to_e4m3, before it
    assert "fma." not in ptx, arch  # x * s is rounded before it
    usage = resource_usage(compiled)
    assert "STACK:0" in usage, usage
"""
    run_outside("-c", program)

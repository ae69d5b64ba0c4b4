"""`dora_linear`: the house rule on both backends, norms, what is saved, dropout, compile."""

import re
from dataclasses import dataclass, fields
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import Problem, check, problem, run
from outside import run_outside
from torch import Tensor, nn

from fused_lora import dispatch, dora_linear, explain, inject, reference, tables
from fused_lora import torch_backend as torch_path
from fused_lora.kernels import dora as kernels

BACKENDS = ["triton", "torch"]
NEEDS = ("x", "lora_A", "lora_B", "bias", "magnitude")


@dataclass
class DoRAProblem(Problem):
    magnitude: Tensor


def _problem(*shape, magnitude_dtype=None, **options):
    p = problem(*shape, **options)
    magnitude = torch.rand(p.weight.shape[0]) + 0.5
    magnitude = magnitude.to(p.x.device, magnitude_dtype or p.lora_A.dtype)
    return DoRAProblem(**{f.name: getattr(p, f.name) for f in fields(p)}, magnitude=magnitude)


def _call(p, function=dora_linear, **options):
    return function(
        p.x,
        p.weight,
        p.lora_A,
        p.lora_B,
        p.magnitude,
        scaling=p.scaling,
        bias=p.bias,
        **options,
    )


def expression(p):
    return _call(p, reference.dora_linear)


def _check(p, needs=NEEDS, **options):
    check(run(lambda p: _call(p, **options), p, needs), p, expression)


SHAPES = [(1, 5, 7, 1), (33, 70, 45, 4), ((2, 3, 19), 130, 65, 20), (130, 20, 140, 70)]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", [NEEDS, ("x", "lora_A", "lora_B")], ids=["all", "no m"])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((37, 72, 136, 8), "specialized_add_lora"),
        (((2, 70), 264, 64, 20), "specialized_add_lora"),
        ((9, 13, 11, 3), "gemm_one_pass"),  # no descriptors, and cuBLAS has no scale of columns
        ((9, 13, 11, 20), "gemm_add_lora"),
    ],
)
def test_in_the_hand_scheduled_kernel(launches, monkeypatch, shape, kernel, needs, bias):
    choices = {"dora": ("ws_split", None), "layer": ("split", None)}
    monkeypatch.setattr(dispatch, "_choose", lambda call, form: choices[form])
    p = _problem(*shape, dtype=torch.float16, adapter_dtype=torch.float32, bias=bias)
    _check(p, [n for n in needs if bias or n != "bias"], backend="triton")
    assert next(name for name in launches if name != "gemm_scaled") == kernel


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rule(device, launches, backend, shape, dtype, bias):
    _check(_problem(*shape, dtype=dtype, device=device, bias=bias), backend=backend)
    assert bool(launches) == (backend == "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_rule_in_dtypes_of_the_torch_path(dtype):
    _check(_problem(33, 70, 45, 4, dtype=dtype), backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_adapters_over_a_half_base(device, backend):
    p = _problem(33, 70, 45, 4, dtype=torch.float16, adapter_dtype=torch.float32, device=device)
    _check(p, backend=backend)
    p.magnitude = p.magnitude.half()
    _check(p, backend=backend)


@pytest.mark.parametrize("needs", [*[(n,) for n in NEEDS], ("lora_A", "lora_B")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_wanted_gradients(device, backend, needs):
    _check(_problem(33, 70, 45, 4, device=device), needs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(device, backend):
    p = _problem(34, 70, 46, 4, device=device)
    for name in ("x", "weight", "lora_A", "lora_B", "g"):
        tensor = getattr(p, name)
        setattr(p, name, tensor.t().contiguous().t())
    wide = torch.zeros(140, device=device)
    wide[::2] = p.magnitude
    p.magnitude = wide[::2]
    _check(p, backend=backend)
    p.g = torch.ones((), device=device).expand(34, 70)  # as of .sum()
    _check(p, backend=backend)


@pytest.mark.parametrize("M", [0, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_repeatable(device, backend, M):
    p = _problem(M, 70, 45, 4, device=device)
    first, second = (run(lambda p: _call(p, backend=backend), p, NEEDS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["dmagnitude"].shape == (70,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_magnitude_still_learns_and_a_zero_row_is_the_bias(device, backend):
    p = _problem(9, 20, 16, 4, device=device)
    p.magnitude[3] = 0.0
    _check(p, backend=backend)
    p.weight[5], p.lora_B[5] = 0.0, 0.0
    got = run(lambda p: _call(p, backend=backend), p, NEEDS)
    assert torch.equal(got["y"][:, 5], p.bias[5].expand(9))
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_where_the_adapter_cancels_the_weight(device, backend, dtype):
    """Row by row to a few roundings of the sum's terms, where the expanded square has no digits."""
    N, K, r = 37, 200, 70
    A, B = torch.randn(r, K, device=device), torch.randn(N, r, device=device)
    weight = (-0.5 * B.double() @ A.double()).to(dtype)
    exact = weight.double() + 0.5 * B.double() @ A.double()
    if backend == "triton":
        norm = kernels.weight_norm(weight, A, B, scale=0.5)
    else:
        norm = torch_path.weight_norm(weight, A, B, 0.5)
    error = (norm - exact.norm(dim=1)).abs()
    size = (weight.double().abs() + 0.5 * B.double().abs() @ A.double().abs()).norm(dim=1)
    assert norm.dtype == torch.float32
    assert (error <= 4 * torch.finfo(torch.float32).eps * size).all()


def test_norms_in_chunks(monkeypatch):
    weight, A, B = torch.randn(37, 20), torch.randn(3, 20), torch.randn(37, 3)
    whole = torch_path.weight_norm(weight, A, B, 0.5)
    g, z, c = torch.randn(37, 20), torch.randn(37, 20), torch.randn(20)
    gs, dot = torch_path.scale_columns_backward(g, c, z)
    monkeypatch.setattr(torch_path, "_CHUNK", 100)
    torch.testing.assert_close(torch_path.weight_norm(weight, A, B, 0.5), whole)
    torch.testing.assert_close(torch_path.scale_columns_backward(g, c, z), (gs, dot))


def test_what_is_saved(device):
    """x, h, the weights and, only where the magnitude trains, one [M, N]."""
    p = _problem(50, 70, 45, 4, device=device)
    for name in NEEDS:
        getattr(p, name).requires_grad_()

    def saved(p):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            _call(p)
        return shapes

    assert sorted(saved(p)) == sorted(
        [(50, 45), (70, 45), (4, 45), (70, 4), (70,), (70,), (50, 4), (50, 70)]
    )
    p.magnitude.requires_grad_(False)
    assert (50, 70) not in saved(p)


def test_the_output_may_be_changed_in_place():
    p = _problem(5, 6, 7, 2)
    p.magnitude.requires_grad_()
    y = _call(p)
    y.mul_(2.0)
    (got,) = torch.autograd.grad(y, p.magnitude, p.g)
    (expected,) = torch.autograd.grad(2 * expression(p), p.magnitude, p.g)
    torch.testing.assert_close(got, expected)


def test_dropout_is_on_the_base_product_too():
    p = _problem(50, 6, 7, 2)
    torch.manual_seed(3)
    y = _call(p, dropout_p=0.5)
    torch.manual_seed(3)
    dropped = F.dropout(p.x, 0.5)
    p.bias, bias, x = None, p.bias, p.x
    p.x = dropped
    torch.testing.assert_close(y, F.linear(x - dropped, p.weight, bias) + expression(p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    if device.type == "cpu" and dtype == torch.bfloat16:
        device = torch.device("cpu")
    p = _problem(5, 12, 20, 4, device=device)
    p.magnitude.requires_grad_()
    with torch.autocast(device.type, dtype):
        y = _call(p)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expression(p), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert p.magnitude.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(device, launches, compiler, dropout_p, backend):
    torch._dynamo.reset()
    p = _problem(6, 12, 20, 4, device=device)
    compiled = torch.compile(_call, backend=compiler, fullgraph=True)
    if dropout_p:
        y = compiled(p, backend=backend, dropout_p=dropout_p)
        assert y.isfinite().all()
    else:
        check(run(lambda p: compiled(p, backend=backend), p, NEEDS), p, expression)
        half = _problem(6, 12, 20, 4, dtype=torch.float16, device=device)
        assert compiled(half, backend=backend).dtype == torch.float16
    assert bool(launches) == (backend == "triton")


def test_a_dynamic_batch_and_another_alpha_do_not_recompile():
    torch._dynamo.reset()
    p = _problem(6, 12, 20, 4)
    A = p.lora_A.requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x, scaling):
        return dora_linear(x, p.weight, A, p.lora_B, p.magnitude, scaling=scaling)

    def expected(x, scaling):
        return reference.dora_linear(x, p.weight, A, p.lora_B, p.magnitude, scaling=scaling)

    graphs = torch._dynamo.utils.counters["stats"]
    for M, scaling in ((6, 1.0), (7, 0.5)):
        call(torch.randn(M, 20), scaling)
    before = graphs["unique_graphs"]
    for M, scaling in ((64, 0.25), (3, 7.5)):
        x = torch.randn(M, 20)
        torch.testing.assert_close(call(x, scaling), expected(x, scaling))
    assert graphs["unique_graphs"] == before


def test_export():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inject(model, 2, 4, "all-linear", use_dora=True)
    model.eval().requires_grad_(False)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(5, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(x), model(x))


def test_explain():
    p = _problem(5, 6, 7, 2)
    why = explain(p.x, p.weight, p.lora_A, p.lora_B, magnitude=p.magnitude, dropout_p=0.1)
    assert "dora: one more read of W0" in str(why)
    assert "dropout costs a second product with W0" in str(why)
    kernel = explain(p.x, p.weight, p.lora_A, p.lora_B, magnitude=p.magnitude, backend="triton")
    assert "the column scale is in the epilogue" in str(kernel)
    with pytest.raises(ValueError, match="magnitude: got shape"):
        explain(p.x, p.weight, p.lora_A, p.lora_B, magnitude=p.magnitude[1:])


@pytest.mark.parametrize("wanted", ["one_pass", "split", "skinny", "tma_one_pass", "library"])
def test_the_plan_is_what_runs(monkeypatch, launches, wanted):
    """Whatever is fastest without DoRA, explain names what is there with it."""
    table = mock.Mock(get=lambda key: tables.Choice(wanted, None, 1e-6))
    monkeypatch.setattr(tables, "table", lambda gpu: table)
    dispatch.forget_plans()
    p = _problem(5, 6, 7, 2, dtype=torch.float16)
    why = explain(p.x, p.weight, p.lora_A, p.lora_B, magnitude=p.magnitude, backend="triton")
    _call(p, backend="triton")
    dispatch.forget_plans()
    assert why.reasons[why.strategy].startswith("taken")
    assert sum(reason.startswith("taken") for reason in why.reasons.values()) == 1
    made = {"one_pass": ["gemm_one_pass"], "split": ["gemm_scaled", "gemm_add_lora"]}
    assert launches == made[why.strategy]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"magnitude": torch.ones(5)}, ValueError, "magnitude: got shape [5], wanted [6]"),
        ({"magnitude": torch.ones(6).int()}, TypeError, "magnitude's dtype: got torch.int32"),
        ({"magnitude": [1.0]}, TypeError, "magnitude: got list"),
        ({"magnitude": torch.ones(6, device="meta")}, ValueError, "magnitude: is on meta"),
        ({"lora_A": torch.ones(2, 8)}, ValueError, "lora_A: got shape"),
        ({"weight": torch.ones(6, 7).requires_grad_()}, ValueError, "weight: requires a gradient"),
        ({"scaling": float("nan")}, ValueError, "scaling: got nan"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
    ],
)
def test_refused(changes, error, message):
    arguments = {
        "x": torch.ones(5, 7),
        "weight": torch.ones(6, 7),
        "lora_A": torch.ones(2, 7),
        "lora_B": torch.ones(6, 2),
        "magnitude": torch.ones(6),
        "scaling": 1.0,
    } | changes
    with pytest.raises(error, match=re.escape(message)):
        dora_linear(**arguments)


def test_no_second_derivative():
    p = _problem(5, 6, 7, 2)
    p.x.requires_grad_()
    (dx,) = torch.autograd.grad(_call(p).sum(), p.x)
    assert dx.isfinite().all()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(_call(p).sum(), p.x, create_graph=True)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_the_kernels_compile_to(arch):
    """No spills, and offsets of 64 bits, in the launchers' own tiles."""
    program = f"""
import re
import triton
from triton.backends.compiler import GPUTarget
from benchmarks.compile_report import resource_usage
from benchmarks.sources import CODES, FP8_ARCH, specialised
from fused_lora.kernels import dora

def compile(kernel, tile, pointers, constants):
    meta = {{k: v for k, v in tile.items() if k.isupper()}}
    source = specialised(kernel, pointers, meta | constants)
    options = {{k: v for k, v in tile.items() if not k.isupper()}}
    compiled = triton.compile(source, target=GPUTarget("cuda", {arch}, 32), options=options)
    offsets = re.findall(r"tt.addptr [^:]*: [^,]*, (\\S+)", compiled.asm["ttir"])
    small = ("16xi32", "16x1xi32") if "w_tables" in pointers else ()  # places in the code books
    offsets = [offset for offset in offsets if not any(s in offset for s in small)]
    assert offsets and all("i64" in offset for offset in offsets), sorted(set(offsets))
    usage = resource_usage(compiled)
    assert "STACK:0 " in usage, usage

rows = {{"stride_wk": 1, "stride_ak": 1, "stride_br": 1, "w_tables": None, "W_LAYOUT": None}}
for r in (16, 32):
    constants = rows | {{"BLOCK_R": r}}
    pointers = {{"a_ptr": "*fp32", "b_ptr": "*fp32", "norm_ptr": "*fp32"}}
    for weight in ("*bf16", "*fp32"):
        compile(dora.weight_norm_kernel, dora._NORM, pointers | {{"w_ptr": weight}}, constants)
    for codes, tables, block in CODES.values():
        codes = "*u8" if codes == "*fp8e4nv" and {arch} < FP8_ARCH else codes
        quantised = pointers | {{"w_ptr": codes, "w_tables": tables}}
        layout = {{k: v for k, v in constants.items() if k != "w_tables"}}
        layout |= {{"W_LAYOUT": (*block, False), "stride_wn": 0, "stride_wk": 0}}
        compile(dora.weight_norm_kernel, dora._NORM, quantised, layout)
for dtype in ("*bf16", "*fp32"):
    pointers = {{"g_ptr": dtype, "col_scale_ptr": "*fp32", "gs_ptr": dtype}}
    compile(dora.scale_columns_kernel, dora._COLUMNS, pointers, {{"stride_gn": 1}})
    pointers |= {{"z_ptr": dtype, "dot_ptr": "*fp32"}}
    compile(dora.scale_columns_kernel, dora._COLUMNS, pointers, {{"stride_gn": 1}})
"""
    run_outside("-c", program)

"""Quantised base weights: their bytes, both backends against the fp64 oracle, layers, merging."""

import copy
import functools
import io
import json
import pickle
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import Made, check, fused, problem, run
from outside import run_outside
from pairs import pairs
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fused_lora
from fused_lora import (
    FusedLoRALinear,
    QuantizedWeight,
    explain,
    inject,
    lora_linear,
    merge_and_unload,
    quantize_fp4,
    quantize_fp8,
    quantize_int8,
    quantize_mxfp4,
    quantize_nf4,
    quantized_weight,
)
from fused_lora import quantize as quantize_module
from fused_lora.calls import Call
from fused_lora.codes import FORMATS
from fused_lora.dispatch import Plan, plan
from fused_lora.kernels import configs
from fused_lora.kernels.device import INTERPRETED
from fused_lora.kernels.gemm import gemm_add_lora
from fused_lora.kernels.quantized import dequantize
from fused_lora.ops import lora_linear_backward_op, lora_linear_op
from fused_lora.packing import pack

QUANTIZERS = {
    "nf4": quantize_nf4,
    "nf4 single": lambda w: quantize_nf4(w, double_quant=False),
    "nf4 32": lambda w: quantize_nf4(w, block_size=32),
    "fp4": quantize_fp4,
    "mxfp4": quantize_mxfp4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "fp8 whole": lambda w: quantize_fp8(w, block_size=None),
}
# ||Q(W) - W|| / ||W|| of normal weights: the formats' own, as their papers have it.
ERRORS = {"nf4": 0.1, "fp4": 0.13, "mxfp4": 0.12, "int8": 0.01, "fp8": 0.03}
PLANS = {
    "in_loop": Plan("triton", "in_loop", "in_loop"),
    "scratch": Plan("triton", "split", "one_pass"),
    "torch": Plan("torch", "library", "library"),
}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
every_format = pytest.mark.parametrize("format", FORMATS)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16"),
    ],
)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_in_16_bits_are_those_in_fp32_rounded_once(name):
    """Also of a weight that is made in parts, of tiles that are cut off and of its transpose's."""
    weight = QUANTIZERS[name](torch.randn(1090, 2048))
    expected = weight.dequantize(torch.float32).bfloat16()
    assert torch.equal(weight.dequantize(torch.bfloat16), expected)
    tiles = [list(tiles(torch.bfloat16)) for tiles in (weight.row_tiles, weight.column_tiles)]
    for dim, parts in enumerate(tiles):
        assert len(parts) > 1
        assert torch.equal(torch.cat([tile for _, tile in parts], dim), expected)


def _quantized(p, quantizer):
    """The problem over what the quantised weight stands for, and a call of it over the codes."""
    weight = QUANTIZERS[quantizer](p.weight)
    return replace(p, weight=weight.dequantize()), weight


def _over(weight, backend):
    return lambda p: fused(backend)(replace(p, weight=weight))


@every_quantizer
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@DTYPES
def test_values_and_gradients(device, name, plan, dtype, launches):
    p = problem((3, 13), 69, 192, 8, dtype=dtype, adapter_dtype=torch.float32, device=device)
    p, weight = _quantized(p, name)
    check(run(_over(weight, plan), p), p)
    expected = {"in_loop": "gemm_add_lora", "split": "gemm_add_lora"}.get(plan.strategy)
    assert launches[:2] == (["gemm_scaled", expected] if expected else [])


@every_format
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_values_and_gradients_with_dropout(device, format, plan):
    p = problem(37, 70, 128, 5, device=device, dropout_p=0.3)
    if plan.strategy_dx == "one_pass":
        plan = replace(plan, strategy_dx="split")
    p, weight = _quantized(p, format)
    check(run(_over(weight, plan), p), p)


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (0, 5, 64), (17, 130, 320)], ids=str)
def test_edge_shapes(device, name, shape):
    p = problem(*shape, 3, device=device)
    p, weight = _quantized(p, name)
    check(run(_over(weight, PLANS["in_loop"]), p), p)
    check(run(_over(weight, PLANS["torch"]), p), p)


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8 whole"])
def test_any_width_but_for_nf4(device, name, launches):
    p, weight = _quantized(problem(10, 33, 77, 3, device=device), name)
    check(run(_over(weight, "triton"), p), p)
    assert "gemm_add_lora" in launches


@every_quantizer
def test_kernels_make_the_same_values(device, name):
    weight = QUANTIZERS[name](torch.randn(67, 320).to(device))
    torch.testing.assert_close(
        dequantize(weight.matrix(), torch.float32),
        weight.cpu().dequantize().to(device),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_product_in_every_configuration(device, dtype, tolerance):
    """And over every format, as the forward reads W0 and as dx does: not all in every one."""
    tiles = configs.ship("quantized", 5, dtype.itemsize, False, INTERPRETED)
    for name, config, turned in pairs(name=[*QUANTIZERS], config=tiles, turned=[False, True]):
        w = QUANTIZERS[name](torch.randn(192, 128).to(device))
        matrix, full = w.matrix(), w.dequantize(torch.float64)
        if turned:
            matrix, full = matrix.t(), full.t()
        x = torch.randn(37, full.shape[0]).to(device, dtype)
        h = torch.randn(37, 5).to(device, dtype)
        b = torch.randn(5, full.shape[1]).to(device, dtype)
        exact = x.double() @ full + h.double() @ b.double()
        y = gemm_add_lora(config, x, matrix, h, b)
        assert ((y.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize(
    ("arch", "sample"), [("sm_80", 2), ("sm_89", 2), ("sm_90", 9), ("sm_100", 2)]
)
def test_nf4_int8_and_fp8_kernels_compile_without_spills(arch, sample, tmp_path):
    rows_file = tmp_path / "rows.json"
    # New cases in each run, on Hopper of each format and form; `make kernels` compiles all.
    options = ["--arch", arch, "--kind", "quantized", "--dtype", "bf16", "--sample", str(sample)]
    run_outside("-m", "benchmarks.compile_report", *options, "--json", str(rows_file))
    rows = json.loads(rows_file.read_text())
    assert len(rows) == sample
    assert not any(row["problem"] for row in rows)


# --- bytes


def test_nf4_bytes_by_hand():
    w = torch.zeros(1, 64)
    w[0, :4] = torch.tensor([1.0, -1.0, 0.5, -0.25]) * 3
    q = quantize_nf4(w, double_quant=False)
    assert q.scales.tolist() == [3.0]
    assert q.codes[:3].tolist() == [0xF0, 0xC4, 0x77]  # 1.0, -1.0; 0.44, -0.28; 0, 0
    assert q.codebook[[0, 7, 15]].tolist() == [-1, 0, 1]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(70, 320), (7, 33), (3, 64)], ids=str)
def test_nf4_bytes_are_those_of_bitsandbytes(name, dtype, double_quant, block_size, shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    codes, state = functional.quantize_4bit(
        w, blocksize=block_size, quant_type=name, compress_statistics=double_quant
    )
    make = {"nf4": quantize_nf4, "fp4": quantize_fp4}[name]
    ours = make(w, double_quant=double_quant, block_size=block_size)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.codebook, state.code)
    assert torch.equal(ours.scales, state.absmax)
    if double_quant:
        assert torch.equal(ours.nested_scales, state.state2.absmax)
        assert torch.equal(ours.nested_codebook, state.state2.code)
        assert ours.nested_offset.item() == state.offset.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_bytes_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(33, 70).to(dtype)
    codes, absmax, _ = functional.int8_vectorwise_quant(w.half())
    ours = quantize_int8(w)
    assert torch.equal(ours.codes, codes)
    torch.testing.assert_close(ours.scales * 127, absmax)


@every_format
@pytest.mark.parametrize("shape", [(130, 320), (33, 77), (1, 1)], ids=str)
def test_error_of_a_format(format, shape):
    w = torch.randn(shape)
    q = quantize_module.quantize(w, format)
    assert q.shape == shape
    assert q.numel() == w.numel()
    error = (q.dequantize() - w).norm() / w.norm()
    # A number alone may be one that MXFP4 is worst at: just below 8, which becomes 6.
    alone = format == "mxfp4" and w.numel() == 1
    assert error < (0.25 if alone else 1.5 * ERRORS[format])
    assert torch.equal(
        quantize_module.quantize_like(q, q.dequantize()).codes, q.codes
    ) or format in ("fp4", "nf4")
    assert q.dequantize(torch.float16).dtype == torch.float16


@every_format
def test_zeros_of_a_format(format):
    w = torch.zeros(4, 256)
    w[1] = torch.randn(256)
    q = quantize_module.quantize(w, format)
    values = q.dequantize()
    assert torch.isfinite(values).all()
    assert values[0].abs().max() <= 0.02 * w.abs().max()  # nested scales: near zero, not zero


def test_every_code_of_nf4_fp4_int8_and_fp8():
    """Against the tables, code by code."""
    byte = torch.arange(256).to(torch.uint8)
    for format in ("nf4", "fp4"):
        weight = QuantizedWeight(
            format,
            byte,
            torch.tensor([1.0, 2.0]),
            shape=(2, 256),
            dtype=torch.float32,
            block=(1, 256),
            codebook=(table := torch.randn(16)),
        )
        nibbles = torch.stack((byte >> 4, byte & 15), dim=1).view(2, 256).int()
        expected = table[nibbles] * torch.tensor([[1.0], [2.0]])
        assert torch.equal(weight.dequantize(), expected)
    for format, codes in (("int8", byte.view(torch.int8)), ("fp8", byte.view(torch.float8_e4m3fn))):
        weight = QuantizedWeight(
            format,
            codes.view(1, 256),
            torch.tensor([[0.5]]),
            shape=(1, 256),
            dtype=torch.float32,
            block=(0, 0),
        )
        expected = codes.to(torch.float32).view(1, 256) * 0.5
        assert torch.equal(weight.dequantize().nan_to_num(7), expected.nan_to_num(7))


def test_nf4_takes_half_a_byte():
    q = quantize_nf4(torch.randn(512, 1024))
    assert q.nbytes / q.numel() == pytest.approx(0.5 + 1 / 64, abs=0.003)


# --- the container


@every_format
def test_state_dict_pickle_and_copies(format, tmp_path):
    q = quantize_module.quantize(torch.randn(20, 128), format)
    other = quantize_module.quantize(torch.randn(20, 128), format)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    copies = [other, copy.deepcopy(q), torch.load(file, weights_only=False)]
    if format != "fp8":  # torch's own __reduce__ does not know float8 tensors
        copies.append(pickle.loads(pickle.dumps(q)))
    for same in copies:
        assert torch.equal(same.dequantize(), q.dequantize())
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(q.state_dict(), tmp_path / "q.safetensors")
    assert safetensors.load_file(tmp_path / "q.safetensors").keys() == q.state_dict().keys()


@every_format
def test_to_moves_and_never_casts(format):
    q = quantize_module.quantize(torch.randn(20, 128), format)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    half = nn.Sequential(q).to(torch.float16)[0]
    assert half is q
    assert q.dtype == q.dequantize().dtype == torch.float16
    assert all(v.dtype == before[k].dtype for k, v in q.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())
    assert q.to("meta").device.type == "meta"
    assert not any(p.requires_grad for p in q.parameters())


def test_state_dict_of_another_format_is_refused():
    with pytest.raises(RuntimeError, match="codes: got torch.int8, wanted torch.float8_e4m3fn"):
        quantize_fp8(torch.randn(4, 64)).load_state_dict(
            quantize_int8(torch.randn(4, 64)).state_dict()
        )


# --- memory


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_no_whole_weight_on_the_torch_path(name, monkeypatch):
    """The largest tensor made in forward and backward is a tile, not W0."""
    monkeypatch.setattr(quantized_weight, "_CPU_CHUNK", 16 << 10)
    p, weight = _quantized(problem(8, 768, 512, 4), name)
    with Made() as made:
        result = run(_over(weight, "torch"), p)
    assert max(made.sizes) <= weight.numel() // 4
    monkeypatch.undo()
    check(result, p)


def test_nf4_saves_no_weight_for_the_backward():
    p, weight = _quantized(problem(8, 96, 128, 4), "nf4")
    saved = []

    def pack(t):
        saved.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(_over(weight, "torch"), p)
    assert torch.Size([96, 128]) not in saved


# --- the choice


def _call(M, N=11008, **changes):
    layout = quantize_nf4(torch.randn(1, 64)).layout
    call = Call(M, N, 4096, 16, torch.bfloat16, torch.device("cpu"), False, True, layout)
    return replace(call, **changes)


def test_nf4_crossover():
    def in_loop(M, N):
        found = plan(_call(M, N, dtype=torch.float16), "triton").strategy
        assert found in ("in_loop", "one_pass", "split", "library")
        return found == "in_loop"

    assert [in_loop(M, 11008) for M in (1, 16, 1024, 8192)] == [True, True, False, False]
    assert [in_loop(M, 4096) for M in (1, 16, 1024, 8192)] == [True, True, False, False]


def test_int8_dispatcher_takes_both(device, launches):
    q = quantize_int8(torch.randn(64, 64).to(device))
    few, many = (_call(M, dtype=torch.float16, device=device) for M in (4, 8192))
    assert plan(few, "triton").strategy == "in_loop"
    assert plan(many, "triton").strategy == "library"
    x, A, B = (torch.randn(s).to(device) for s in ((4, 64), (2, 64), (64, 2)))
    said = str(explain(x, q, A, B, backend="triton"))
    assert "in_loop: taken: predicted" in said
    assert "split: not taken: predicted" in said
    assert "int8, tiles become values in the K loop" in said
    lora_linear(x, q, A, B, scaling=1.0, backend="triton")
    assert launches == ["gemm_scaled", "gemm_add_lora"]


def test_nf4_of_odd_width_goes_to_torch(device, launches):
    p, weight = _quantized(problem(5, 9, 33, 3, device=device), "nf4")
    check(run(_over(weight, "auto"), p), p)
    assert launches == []
    message = "weight: got K = 33, wanted a multiple of its block size, 64"
    with pytest.raises(ValueError, match=message):
        run(_over(weight, "triton"), p)
    assert "a whole matrix" in str(explain(p.x, weight, p.lora_A, p.lora_B))


@every_format
def test_autocast(format):
    q = quantize_module.quantize(torch.randn(32, 64), format)
    A, B = torch.randn(4, 64), torch.randn(32, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(torch.randn(3, 64), q, A, B, scaling=1.0)
    assert y.dtype == torch.bfloat16


# --- torch.compile, torch.export, torch.func, dispatch modes


class Projection(nn.Module):
    """A frozen quantised weight and a call of `lora_linear` in the middle of a graph."""

    def __init__(self, p, weight, backend="auto"):
        super().__init__()
        self.weight, self.p, self.backend = weight, p, backend
        self.lora_A, self.lora_B = nn.Parameter(p.lora_A), nn.Parameter(p.lora_B)
        self.bias = None if p.bias is None else nn.Parameter(p.bias)

    def forward(self, x):
        y = lora_linear(
            x * 2,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self.p.scaling,
            bias=self.bias,
            dropout_p=self.p.dropout_p,
            backend=self.backend,
        )
        return y * 2


class Watch(TorchDispatchMode):
    """Looks on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _projection(device, name="nf4", backend="auto", **options):
    p = problem((3, 5), 32, 64, 4, device=device, **options)
    return Projection(p, QUANTIZERS[name](p.weight), backend), p


def _outcome(call, module, p):
    """The output and every gradient."""
    torch.manual_seed(3)
    x = p.x.detach().requires_grad_()
    y = call(x)
    trained = dict(module.named_parameters())
    trained = {"x": x} | {n: t for n, t in trained.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(trained.values()), p.g)
    return {"y": y.detach()} | dict(zip(trained, grads, strict=True))


def _equal(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value), key


def _close(got, expected):
    """To the rounding of a few fp32 sums in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_as_eager(device, launches):
    options = {"backend": ["triton", "torch"], "dynamic": [False, True]}
    for name, backend, dynamic in pairs(name=[*QUANTIZERS], **options):
        torch._dynamo.reset()
        launches.clear()
        module, p = _projection(device, name, backend)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        same = _close if dynamic else _equal  # alpha is on lora_B in a dynamic graph
        same(_outcome(compiled, module, p), _outcome(module, module, p))
        assert bool(launches) == (backend == "triton")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapters", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_int8_compiled_as_eager_in_all_dtypes(dtype, adapters, bias, dropout_p):
    options = {"dtype": dtype, "adapter_dtype": adapters, "bias": bias, "dropout_p": dropout_p}
    module, p = _projection("cpu", "int8", **options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    # A CPU's plain call draws another mask; one that is watched is the operator.
    with Watch() if dropout_p else nullcontext():
        expected = _outcome(module, module, p)
    _equal(_outcome(compiled, module, p), expected)


@pytest.mark.slow
@every_quantizer
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor(device, name):
    module, p = _projection(device, name)
    got = _outcome(torch.compile(module, fullgraph=True, dynamic=True), module, p)
    _close(got, _outcome(module, module, p))


@pytest.mark.usefixtures("fresh_compiler")
def test_nf4_graphs_serve_every_M_and_alpha():
    layer = FusedLoRALinear.from_linear(quantize_nf4(torch.randn(8, 64)), 2)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for M, layer.scaling in ((3, 1.0), (4, 0.5)):
        compiled(torch.randn(M, 64))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for M, layer.scaling in ((64, 0.25), (5, 7.5)):
        x = torch.randn(M, 64)
        torch.testing.assert_close(compiled(x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("fresh_compiler")
def test_int8_is_refused_while_tracing():
    module, _ = _projection("cpu", "int8")
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(ValueError, match=re.escape("x: got shape [3, 63], wanted [..., 64]")):
        compiled(torch.randn(3, 63))
    with pytest.raises(TypeError, match="bias: got dtype torch.float32, wanted x's dtype"):
        compiled(torch.randn(3, 64).half())


class Branches(nn.ModuleList):
    """Models of one x."""

    def forward(self, x):
        return [branch(x) for branch in self]


def _exported(device, *names):
    """Two layers over each format."""
    parts = [(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in names]
    model = Branches(nn.Sequential(*layers) for layers in parts).to(device)
    inject(model, 2, 4, "all-linear")
    for branch, name in zip(model, names, strict=True):
        for layer in (branch[0], branch[2]):
            nn.init.normal_(layer.lora_B)
            layer.weight = QUANTIZERS[name](layer._parameters.pop("weight").data)
    model.eval().requires_grad_(False)
    example = torch.randn(5, 64, device=device)
    batch = torch.export.Dim("batch")
    return model, torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


@every_quantizer
def test_export(device, name, tmp_path):
    model, program = _exported(device, name)
    x = torch.randn(9, 64, device=device)
    torch.testing.assert_close(program.module()(x), model(x))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("fused_lora.lora_linear.default") == 2


@pytest.mark.slow
def test_aot_inductor_package(device, tmp_path):
    """One of all formats: a compiler of C++ takes seven seconds for each."""
    model, program = _exported(device, "nf4", "int8", "fp8")
    file = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    x = torch.randn(9, 64, device=device)
    torch.testing.assert_close(torch._inductor.aoti_load_package(file)(x), model(x))


@every_format
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_function_transforms(device, format):
    module, p = _projection(device, format)
    trained = {n: t.detach() for n, t in module.named_parameters() if t.requires_grad}

    def loss(trained, x):
        return torch.func.functional_call(module, trained, (x,)).square().sum()

    module.p.g = 2 * module(p.x).detach()
    expected = _outcome(module, module, p)
    got = torch.func.grad(loss)(trained, p.x)
    expected = {n: expected[n] for n in trained}
    _close(got, expected)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, p.x)
    _close({n: t.sum(0) for n, t in rows.items()}, got)


@every_format
def test_selective_checkpointing(device, format, launches):
    """The layer's operator is saved: its kernels run once forward and once backward."""
    module, p = _projection(device, format, "triton", dropout_p=0.3)
    saved = [torch.ops.fused_lora.lora_linear.default, torch.ops.aten.randint.default]
    context = functools.partial(create_selective_checkpoint_contexts, saved)

    def call(x):
        return checkpoint(module, x, use_reentrant=False, context_fn=context)

    got = _outcome(call, module, p)
    ran = list(launches)
    assert ran.count("gemm_add_lora") == 2
    launches.clear()
    _equal(got, _outcome(module, module, p))
    assert ran == launches


@every_format
def test_fake_tensors(format):
    module, p = _projection("cpu", format)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = module(mode.from_tensor(p.x))
        y.sum().backward()
    assert (y.shape, module.lora_A.grad.shape) == ((3, 5, 32), (4, 64))


@every_quantizer
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(device, name, dropout_p):
    p = problem(5, 6, 64, 2, device=device)
    packed = pack(QUANTIZERS[name](p.weight))
    x, A, B = (t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
    seed = torch.tensor([3], device=device) if dropout_p else None
    rest = (*packed, 0.5, seed, round(dropout_p * 65536), "torch", True)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not name.startswith("fp8"):  # its comparison of inputs does not take this dtype
        checks.append("test_schema")
    torch.library.opcheck(lora_linear_op, (x, A, B, p.bias, *rest), test_utils=checks)
    x, A, B = (t.detach() for t in (x, A, B))
    h = torch.randn(5, 2, device=device)
    torch.library.opcheck(lora_linear_backward_op, (p.g, x, A, B, h, *rest), test_utils=checks)


# --- layers


@every_format
def test_layer_trains_and_merges(format):
    linear = nn.Linear(128, 24)
    layer = FusedLoRALinear.from_linear(linear, 4, 8, quantize=format)
    assert isinstance(layer.weight, QuantizedWeight)
    nn.init.normal_(layer.lora_B, std=0.05)
    x = torch.randn(5, 128)
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None
    layer.eval()
    expected = layer(x)
    codes = layer.weight.codes.clone()

    assert layer.merge() == 0.0
    assert type(layer.weight) is nn.Parameter
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.unmerge()
    assert torch.equal(layer.weight.codes, codes)

    error = layer.merge(requantize=True)
    assert isinstance(layer.weight, QuantizedWeight)
    assert 0 < error < 1.5 * ERRORS[format]
    assert (layer(x) - expected).norm() / expected.norm() < 0.5
    layer.unmerge()
    assert torch.equal(layer.weight.codes, codes)
    assert torch.equal(layer(x), expected)

    layer.merge()
    layer.bfloat16().unmerge()
    assert layer.weight.dtype == torch.bfloat16


def test_nf4_layer_state_dict_goes_back_into_its_like():
    layers = [FusedLoRALinear.from_linear(nn.Linear(64, 8), 2, quantize="nf4") for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(layers[0](x), layers[1](x))
    assert "weight.codes" in layers[0].state_dict()
    assert "weight" not in layers[0].state_dict()


def test_int8_layer_from_a_quantized_weight():
    q = quantize_int8(torch.randn(8, 64).half())
    layer = FusedLoRALinear.from_linear(q, 2)
    assert layer.weight is q
    assert layer.bias is None
    assert layer.lora_A.dtype == torch.float32
    assert (layer.in_features, layer.out_features) == (64, 8)


@every_format
def test_inject_quantizes(format):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    weights = [p.detach().clone() for p in model.parameters()]
    report = inject(model, 2, 4, ["0"], quantize=format)
    assert report.layers == ("0",)
    assert report.total == sum(w.numel() for w in weights) + report.trainable
    assert isinstance(model[0].weight, QuantizedWeight)
    assert type(model[2]) is nn.Linear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B"]
    values = model[0].weight.dequantize()
    merge_and_unload(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight.data, values)


def test_nf4_adapter_is_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Sequential(nn.Linear(64, 32))
    inject(model, 2, 4, ["0"], quantize="nf4")
    nn.init.normal_(model[0].lora_B)
    fused_lora.save_adapter(model, tmp_path)
    plain = nn.Sequential(nn.Linear(64, 32))
    fused_lora.load_adapter(plain, tmp_path)
    assert torch.equal(plain[0].lora_B, model[0].lora_B)


# --- other libraries' layers


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_nf4_layer_of_bitsandbytes(name, storage):
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(128, 24, quant_type=name, quant_storage=storage)
    with pytest.raises(ValueError, match="not quantised yet"):
        FusedLoRALinear.from_linear(linear)
    linear = linear.to("cpu")
    layer = FusedLoRALinear.from_linear(linear, 4)
    assert layer.weight.layout.format == name
    assert layer.weight.codes.data_ptr() == linear.weight.data_ptr()
    x = torch.randn(5, 128, requires_grad=True)
    torch.testing.assert_close(layer(x), linear(x))
    with pytest.raises(ValueError, match=f"quantize: got 'nf4', but the weight is in {name} codes"):
        FusedLoRALinear.from_linear(linear, 4, quantize="nf4")


def test_int8_layer_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear8bitLt(128, 24, has_fp16_weights=False)
    with pytest.raises(ValueError, match="not quantised yet"):
        FusedLoRALinear.from_linear(linear)
    dense = linear.weight.detach().clone()
    linear = linear.to("cpu")
    layer = FusedLoRALinear.from_linear(linear, 4)
    x = torch.randn(5, 128)
    torch.testing.assert_close(layer.weight.dequantize(torch.float32), dense, rtol=0, atol=2e-3)
    # bitsandbytes rounds x to int8 as well
    assert (layer(x) - linear(x)).norm() / linear(x).norm() < 0.05
    with pytest.raises(ValueError, match="keeps its weight in fp16"):
        FusedLoRALinear.from_linear(bnb.nn.Linear8bitLt(128, 24))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_int8_layer_of_torchao(name):
    ao = pytest.importorskip("torchao.quantization")
    config = ao.Int8WeightOnlyConfig(version=2) if name == "int8" else ao.Float8WeightOnlyConfig()
    model = nn.Sequential(nn.Linear(128, 24).to(torch.bfloat16))
    ao.quantize_(model, config)
    values = model[0].weight.dequantize()
    inject(model, 4, 8, ["0"])
    assert model[0].weight.layout.format == name
    torch.testing.assert_close(model[0].weight.dequantize(), values)


@pytest.fixture
def fused_calls(monkeypatch):
    """How many of PEFT's layers took the fused path."""
    pytest.importorskip("peft")
    import fused_lora.peft as fused_peft

    seen = []
    real = fused_peft.call_layer
    monkeypatch.setattr(
        fused_peft,
        "call_layer",
        lambda x, c, **_: seen.append(c.weight.layout.format) or real(x, c),
    )
    return seen


def _peft_model(kind, **config):
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "int8":
                self.up = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
            else:
                self.up = bnb.nn.Linear4bit(128, 64, quant_type=kind)

        def forward(self, x):
            return self.up(x)

    net = Net().to("cpu")
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind != "int8", kind == "int8"
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["up"], **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_nf4_and_int8_layers_of_peft(kind, config, fused_calls):
    from fused_lora.peft import fuse, unfuse

    model = _peft_model(kind, **config)
    x = torch.randn(3, 5, 128, requires_grad=True)
    expected = model(x)
    expected_dx = torch.autograd.grad(expected.sum(), x)[0]
    before = type(model.base_model.model.up)
    report = fuse(model, strict=True)
    assert len(report.fused) == 1
    y = model(x)
    dx = torch.autograd.grad(y.sum(), x)[0]
    assert fused_calls == [kind]
    tolerance = 2e-2 if kind == "int8" else 1e-5  # bitsandbytes rounds x to int8
    assert (y - expected).norm() <= tolerance * expected.norm()
    assert (dx - expected_dx).norm() <= tolerance * expected_dx.norm()
    with model.disable_adapter():
        model(x)
    assert fused_calls == [kind]
    unfuse(model)
    assert type(model.base_model.model.up) is before


def test_nf4_layer_of_peft_in_its_compute_dtype(fused_calls):
    from fused_lora.peft import fuse

    model = _peft_model("nf4")
    model.base_model.model.up.base_layer.compute_dtype = torch.bfloat16
    model.base_model.model.up.base_layer.compute_type_is_set = True
    x = torch.randn(4, 128)
    expected = model(x)
    fuse(model)
    y = model(x)
    assert y.dtype == x.dtype
    assert (y - expected).norm() < 2e-2 * expected.norm()
    assert fused_calls == ["nf4"]


# --- bad input


def _parts(format="nf4"):
    q = quantize_module.quantize(torch.randn(4, 128), format)
    tensors = {name: p.data for name, p in q.named_parameters()}
    return {"shape": (4, 128), "dtype": q.dtype, "block": q.layout.block, **tensors}


BAD_PARTS = {
    "truncated codes": (
        {"codes": torch.zeros(255).byte()},
        ValueError,
        "codes: got 255",
    ),
    "int8 codes": (
        {"codes": torch.zeros(256).char()},
        TypeError,
        "codes: got torch.int8",
    ),
    "block of 48": ({"block": (1, 48)}, ValueError, "block: got (1, 48)"),
    "block of 128": ({"block": (1, 128)}, ValueError, "scales: got 8 elements, wanted 4"),
    "other K": ({"shape": (4, 192)}, ValueError, "codes: got 256 elements, wanted 384"),
    "fp32 scales": ({"scales": torch.ones(8)}, TypeError, "scales: got torch.float32"),
    "no codebook": ({"codebook": None}, TypeError, "codebook: is missing"),
    "short codebook": ({"codebook": torch.ones(15)}, ValueError, "codebook: got 15"),
    "no offset": ({"nested_offset": None}, TypeError, "nested_offset: is missing"),
    "integer dtype": ({"dtype": torch.int8}, TypeError, "dtype: got torch.int8"),
    "two devices": (
        {"scales": torch.ones(8, dtype=torch.uint8, device="meta")},
        ValueError,
        "scales: is on meta",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_nf4_parts_that_do_not_fit(name):
    changes, error, message = BAD_PARTS[name]
    with pytest.raises(error, match=re.escape(message)):
        QuantizedWeight("nf4", **_parts() | changes)
    QuantizedWeight("nf4", **_parts())


def test_int8_parts_of_any_strides(device):
    """The kernels read codes and scales one after another."""
    q = quantize_int8(torch.randn(20, 64).to(device))
    codes, scales = q.codes.t().contiguous().t(), q.scales.repeat_interleave(2)[::2]
    kwargs = {"shape": q.shape, "dtype": q.dtype, "block": q.layout.block}
    same = QuantizedWeight("int8", codes, scales, **kwargs)
    values = dequantize(same.matrix(), torch.float32)
    assert torch.equal(values, dequantize(q.matrix(), torch.float32))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codebook": torch.ones(16)}, TypeError, "codebook: is given"),
        ({"block": (1, 48)}, ValueError, "block: got (1, 48), wanted powers of two or 0"),
        ({"scales": torch.ones(3)}, ValueError, "scales: got 3 elements, wanted 4"),
        ({"codes": torch.zeros(4, 128)}, TypeError, "codes: got torch.float32"),
    ],
)
def test_int8_parts_that_do_not_fit(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        QuantizedWeight("int8", **_parts("int8") | changes)


@every_format
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0], TypeError, "weight: got list"),
        (torch.ones(4), ValueError, "weight: got shape [4]"),
        (torch.ones(0, 64), ValueError, "weight: got shape [0, 64]"),
        (torch.ones(4, 64).double(), TypeError, "weight: got torch.float64"),
        (torch.ones(4, 64) / 0, ValueError, "weight: has values that are not finite"),
        (torch.ones(4, 64, device="meta"), ValueError, "weight: is on the meta device"),
    ],
)
def test_weights_that_cannot_be_quantized(format, weight, error, message):
    with pytest.raises(error, match=re.escape(message)):
        quantize_module.quantize(weight, format)


def test_other_arguments_of_nf4_int8_and_fp8():
    w = torch.randn(4, 64)
    with pytest.raises(ValueError, match="block_size: got 63"):
        quantize_nf4(w, block_size=63)
    with pytest.raises(ValueError, match="block_size: got 64, wanted 128 or None"):
        quantize_fp8(w, block_size=64)
    with pytest.raises(ValueError, match="beyond 65504"):
        quantize_int8(w * 1e6)
    with pytest.raises(
        ValueError, match="quantize: got 'nf3', wanted one of nf4, fp4, mxfp4, int8, fp8"
    ):
        inject(nn.Sequential(nn.Linear(64, 4)), 2, 4, ["0"], quantize="nf3")
    with pytest.raises(ValueError, match="requantize: the layer's weight is not quantised"):
        FusedLoRALinear(4, 4).merge(requantize=True)
    merged = FusedLoRALinear.from_linear(nn.Linear(64, 4), r=2, quantize="nf4")
    merged.merge()
    assert merged.merge(requantize=True) == 0.0  # nothing happens to a merged one
    q = quantize_nf4(w)
    with pytest.raises(ValueError, match="x: got shape"):
        lora_linear(torch.randn(3, 63), q, torch.randn(2, 64), torch.randn(4, 2), scaling=1.0)
    x, A, B = (torch.randn(*s, device="meta") for s in ((3, 64), (2, 64), (4, 2)))
    with pytest.raises(ValueError, match="weight: is on cpu, wanted x's device, meta"):
        lora_linear(x, q, A, B, scaling=1.0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_rows_of_codes(device, backend):
    """As a shard may have them; what makes codes refuses empty weights."""
    tables = {"scales": torch.empty(0), "codebook": torch.zeros(16)}
    codes = torch.empty(0, dtype=torch.uint8)
    weight = QuantizedWeight(
        "nf4", codes, shape=(0, 128), dtype=torch.float32, block=(1, 64), **tables
    ).to(device)
    x = torch.randn(3, 128, device=device, requires_grad=True)
    A, B = torch.randn(2, 128, device=device), torch.empty(0, 2, device=device)
    y = lora_linear(x, weight, A, B, scaling=1.0, backend=backend)
    assert y.shape == (3, 0)
    y.sum().backward()
    assert not x.grad.any()


def test_a_function_quantizes_with_options_of_its_own():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(256, 128))

    quantizer = functools.partial(quantize_fp8, block_size=128, activations="fp8")
    for start in (True, "pissa"):
        made = model()
        report = inject(made, 2, 4, ["0"], quantize=quantizer, init_lora_weights=start)
        assert (made[0].weight.layout.format, made[0].weight.activations) == ("fp8", "fp8")
        assert made[0].bias is not None
        assert 0 < report.quantization_error < 0.04  # e4m3 has 3 bits of mantissa
    unchanged = model()
    with pytest.raises(TypeError, match="the function gave a Parameter, wanted a QuantizedWeight"):
        inject(unchanged, 2, 4, ["0"], quantize=lambda weight: weight)
    with pytest.raises(ValueError, match=r"gave \[256, 128\] for a weight \[128, 256\]"):
        inject(unchanged, 2, 4, ["0"], quantize=lambda weight: quantize_nf4(weight.t()))
    assert type(unchanged[0]) is nn.Linear


def test_dequantize_takes_floating_dtypes():
    with pytest.raises(TypeError, match="dtype: got torch.int8, wanted a floating dtype"):
        quantize_nf4(torch.randn(4, 64)).dequantize(torch.int8)


@pytest.mark.parametrize(
    ("format", "block", "dtype"),
    [
        ("fp8", (1, 0), torch.float8_e4m3fn),
        ("fp8", (1, 64), torch.float8_e4m3fn),
        ("int8", (1, 32), torch.int8),
        ("int8", (0, 0), torch.int8),
    ],
)
def test_blocks_of_other_libraries_stay(format, block, dtype):
    """As torchao's: merged into codes and out of them, rows of very different size stay apart."""
    N, K = 6, 128
    blocks = (1 if block[0] == 0 else N) * (1 if block[1] == 0 else K // block[1])
    scales = torch.rand(blocks, 1) + 0.5
    codes = torch.randn(N, K).mul(20).to(dtype)
    like = QuantizedWeight(format, codes, scales, shape=(N, K), dtype=torch.float32, block=block)
    weight = torch.randn(N, K) * torch.logspace(-2, 2, N)[:, None]
    new = quantize_module.quantize_like(like, weight)
    assert new.layout == like.layout
    assert new.scales.shape == like.scales.shape
    error = (new.dequantize() - weight).norm(dim=1) / weight.norm(dim=1)
    assert error.max() < (0.05 if block[0] else 2.0)
    again = quantize_module.quantize_like(like, like.dequantize())
    torch.testing.assert_close(again.dequantize(), like.dequantize(), rtol=0.1, atol=0.3)


def test_nothing_is_on_the_default_device():
    """Which may be another: what helps is where the tensors are."""
    weight, x = torch.randn(5, 129), torch.randn(4, 129)
    quantizers = (quantize_module.quantize_fp8, quantize_module.quantize_int8, quantize_nf4)
    for quantizer in quantizers:
        expected = quantizer(weight)
        y = F.linear(x, expected.dequantize())
        quantize_module.nested_codebook.cache_clear()
        with torch.device("meta"):
            quantized = quantizer(weight)
            assert torch.equal(quantized.codes, expected.codes)
            assert torch.equal(F.linear(x, quantized.dequantize()), y)
        with torch.device("cpu"):
            assert torch.equal(quantizer(weight).dequantize(), expected.dequantize())


def test_dequantising_on_a_gpu_without_kernels(monkeypatch):
    """An old GPU, or no Triton: by PyTorch, as the layers."""
    from fused_lora import strategies

    asked = []
    monkeypatch.setattr(
        strategies, "device_obstacle", lambda device: asked.append(device) or RuntimeError("old")
    )
    monkeypatch.setattr(QuantizedWeight, "device", torch.device("cuda"))
    quantized = quantize_nf4(torch.randn(4, 64))
    assert quantized.dequantize().shape == (4, 64)
    assert asked == [torch.device("cuda")]

"""What stands on quantised base weights: DoRA, groups, and starts that change the base weight."""

import copy
import math
import re
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from oracle import Made, Problem, check, compare, expression, in_fp64, magnitudes, problem, run
from torch import Tensor, nn

from fused_lora import (
    FusedLoRAGroup,
    FusedLoRALinear,
    QuantizedWeight,
    dora_linear,
    explain,
    explain_group,
    inject,
    lora_linear,
    lora_linear_group,
    lora_linear_multi,
    merge_and_unload,
    quantize_fp4,
    quantize_fp8,
    quantize_int8,
    quantize_mxfp4,
    quantize_nf4,
    quantized_weight,
    reference,
)
from fused_lora import quantize as quantize_module
from fused_lora import torch_backend as torch_path
from fused_lora.backends import dora_norm
from fused_lora.codes import FORMATS
from fused_lora.dispatch import Plan
from fused_lora.dora import DoRALinearFunction
from fused_lora.group import LoRALinearGroupFunction
from fused_lora.group_ops import lora_linear_group_backward_op, lora_linear_group_op
from fused_lora.kernels import dora as kernels
from fused_lora.kernels.dropout import dropout_threshold
from fused_lora.packing import pack

QUANTIZERS = {
    "nf4": quantize_nf4,
    "nf4 single 32": lambda w: quantize_nf4(w, double_quant=False, block_size=32),
    "fp4": quantize_fp4,
    "mxfp4": quantize_mxfp4,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "fp8 whole": lambda w: quantize_fp8(w, block_size=None),
}
PLANS = {
    "in_loop": Plan("triton", "in_loop", "in_loop"),
    "scratch": Plan("triton", "split", "one_pass"),
    "scratch one_pass": Plan("triton", "one_pass", "split"),
    "torch": Plan("torch", "library", "library"),
}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
every_format = pytest.mark.parametrize("format", FORMATS)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16"),
    ],
)


# --- DoRA

DORA_NEEDS = ("x", "lora_A", "lora_B", "bias", "magnitude")


@dataclass
class DoRAProblem(Problem):
    magnitude: Tensor


def _dora_problem(*shape, quantizer, **options):
    """The problem over what the codes stand for, and the codes."""
    p = problem(*shape, **options)
    weight = QUANTIZERS[quantizer](p.weight)
    p = replace(p, weight=weight.dequantize())
    magnitude = (torch.rand(weight.shape[0]) + 0.5).to(p.x.device, p.lora_A.dtype)
    given = {f.name: getattr(p, f.name) for f in fields(p)}
    return DoRAProblem(**given, magnitude=magnitude), weight


def _dora_expression(p, **options):
    return reference.dora_linear(
        p.x, p.weight, p.lora_A, p.lora_B, p.magnitude, scaling=p.scaling, bias=p.bias, **options
    )


def _dora(weight, backend, **options):
    def call(p):
        arguments = (p.x, weight, p.lora_A, p.lora_B, p.magnitude)
        if not isinstance(backend, Plan):
            return dora_linear(
                *arguments, scaling=p.scaling, bias=p.bias, backend=backend, **options
            )
        norm = dora_norm(weight, p.lora_A, p.lora_B, p.scaling, backend)
        return DoRALinearFunction.apply(*arguments, norm, p.bias, p.scaling, backend, None)

    return call


@every_quantizer
@every_plan
@DTYPES
def test_dora_over_nf4_and_others(device, name, plan, dtype, launches):
    p, weight = _dora_problem(
        (3, 13), 69, 192, 8, quantizer=name, dtype=dtype, adapter_dtype=torch.float32, device=device
    )
    check(run(_dora(weight, plan), p, DORA_NEEDS), p, _dora_expression)
    expected = {
        "in_loop": ["gemm_scaled", "gemm_add_lora"],
        "split": ["gemm_scaled", "gemm_add_lora"],
        "one_pass": ["gemm_one_pass"],
        "library": [],
    }[plan.strategy]
    assert launches[: len(expected)] == expected
    assert bool(launches) == (plan.backend == "triton")


@pytest.mark.parametrize("needs", [("magnitude",), ("x",), ("lora_A", "lora_B")], ids=str)
@both_backends
def test_dora_over_nf4_gives_only_the_wanted_gradients(device, backend, needs):
    p, weight = _dora_problem(33, 70, 64, 4, quantizer="nf4", device=device)
    check(run(_dora(weight, backend), p, needs), p, _dora_expression)


@every_quantizer
@pytest.mark.parametrize("shape", [(37, 192, 20), (130, 320, 70), (5, 128, 1)], ids=str)
def test_norms_of_codes(device, name, shape):
    """To a few roundings, where the adapter cancels a part of the weight, too."""
    N, K, r = shape
    A, B = torch.randn(r, K, device=device), torch.randn(N, r, device=device)
    weight = QUANTIZERS[name](-0.5 * B @ A)
    values = weight.dequantize(torch.float64)
    exact = (values + 0.5 * B.double() @ A.double()).norm(dim=1)
    size = (values.abs() + 0.5 * B.double().abs() @ A.double().abs()).norm(dim=1)
    for norm in (
        kernels.weight_norm(weight.matrix(), A, B, scale=0.5),
        torch_path.weight_norm(weight, A, B, 0.5),
    ):
        assert norm.dtype == torch.float32
        assert ((norm - exact).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


def test_norms_of_nf4_without_the_whole_weight(monkeypatch):
    weight = quantize_nf4(torch.randn(768, 512))
    A, B = torch.randn(4, 512), torch.randn(768, 4)
    whole = torch_path.weight_norm(weight, A, B, 0.5)
    monkeypatch.setattr(quantized_weight, "_CPU_CHUNK", 16 << 10)
    with Made() as made:
        norm = torch_path.weight_norm(weight, A, B, 0.5)
    assert max(made.sizes) <= weight.numel() // 4
    torch.testing.assert_close(norm, whole)


def test_dora_over_nf4_of_odd_width_goes_to_torch(device, launches):
    p, weight = _dora_problem(5, 9, 33, 3, quantizer="nf4", device=device)
    check(run(_dora(weight, "auto"), p, DORA_NEEDS), p, _dora_expression)
    assert launches == []
    with pytest.raises(ValueError, match="wanted a multiple of its block size"):
        _dora(weight, "triton")(p)


@both_backends
def test_dora_over_nf4_with_dropout(device, backend):
    """Dropout is on the base product too, and x's gradient goes through both."""
    p, weight = _dora_problem(50, 6, 64, 2, quantizer="nf4", device=device)

    def expected(p):
        dropped = F.dropout(p.x, 0.5)
        base = F.linear(p.x - dropped, p.weight, p.bias)
        return base + _dora_expression(replace(p, x=dropped, bias=None))

    results = []
    for call in (_dora(weight, backend, dropout_p=0.5), expected):
        torch.manual_seed(3)
        results.append(run(call, p, DORA_NEEDS))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-4)


def test_dora_over_nf4_saves_no_weight():
    p, weight = _dora_problem(8, 96, 128, 4, quantizer="nf4")
    for name in DORA_NEEDS:
        getattr(p, name).requires_grad_()
    for options in ({}, {"dropout_p": 0.5}):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: shapes.append(t.shape) or t, lambda t: t
        ):
            _dora(weight, "torch", **options)(p)
        assert torch.Size([96, 128]) not in shapes


def test_dora_over_nf4_is_not_differentiated_twice():
    p, weight = _dora_problem(5, 6, 64, 2, quantizer="nf4")
    p.x.requires_grad_()
    for options in ({}, {"dropout_p": 0.5}):
        y = _dora(weight, "torch", **options)(p)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(y.sum(), p.x, create_graph=True)


def test_dora_over_nf4_under_autocast():
    p, weight = _dora_problem(5, 6, 64, 2, quantizer="nf4")
    expected = _dora_expression(p)
    with torch.autocast("cpu", torch.bfloat16):
        y = _dora(weight, "auto")(p)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@both_backends
@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_dora_over_nf4_compiles(device, name, backend, launches):
    torch._dynamo.reset()
    p, weight = _dora_problem(5, 6, 64, 2, quantizer=name, device=device)
    call = _dora(weight, backend)
    compiled = torch.compile(lambda p: call(p) * 2, backend="aot_eager", fullgraph=True)
    check(run(compiled, p, DORA_NEEDS), p, lambda p: _dora_expression(p) * 2)
    assert bool(launches) == (backend == "triton")
    dropped = torch.compile(
        _dora(weight, backend, dropout_p=0.5), backend="aot_eager", fullgraph=True
    )
    assert all(t.isfinite().all() for t in run(dropped, p, DORA_NEEDS).values())


def test_dora_over_nf4_under_torch_func():
    p, weight = _dora_problem((3, 5), 6, 64, 2, quantizer="nf4")

    def loss(x, call):
        return call(replace(p, x=x)).square().sum()

    results = [
        torch.func.vmap(torch.func.grad(lambda x, call=call: loss(x, call)))(p.x)
        for call in (_dora(weight, "auto"), _dora_expression)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_dora_over_nf4_is_explained():
    p, weight = _dora_problem(5, 512, 1024, 2, quantizer="nf4")
    said = str(explain(p.x, weight, p.lora_A, p.lora_B, magnitude=p.magnitude, backend="triton"))
    assert "dora: one more read of W0 for the norm; the column scale is in the epilogue" in said
    assert "nf4, tiles become values in the K loop" in said


@every_format
def test_dora_layer_trains_and_merges(format):
    linear = nn.Linear(128, 24)
    layer = FusedLoRALinear.from_linear(linear, 4, 8, quantize=format, use_dora=True)
    x = torch.randn(5, 128)
    values = layer.weight.dequantize()
    torch.testing.assert_close(layer.lora_magnitude_vector.data, values.norm(dim=1))
    torch.testing.assert_close(layer(x), F.linear(x, values, linear.bias))
    with torch.no_grad():
        layer.lora_B.normal_(std=0.05)
        layer.lora_magnitude_vector *= 1.5
        layer.lora_magnitude_vector[3] = 0.0  # which a quantised weight can be merged with
    layer(x).sum().backward()
    assert layer.lora_magnitude_vector.grad.abs().min() > 0
    layer.eval()
    expected, codes = layer(x), layer.weight.codes.clone()
    assert layer.merge() == 0.0
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert 0 < layer.merge(requantize=True) < 0.2
    layer.unmerge()
    assert torch.equal(layer.weight.codes, codes)
    assert torch.equal(layer(x), expected)


def test_dora_over_nf4_is_saved_and_merged(tmp_path):
    pytest.importorskip("safetensors")
    from fused_lora import load_adapter, save_adapter

    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(5, 64)
    inject(model, 2, 4, ["0"], quantize="nf4", use_dora=True)
    nn.init.normal_(model[0].lora_B)
    save_adapter(model, tmp_path)
    other = copy.deepcopy(model)
    other[0].reset_lora_parameters()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(merge_and_unload(other.eval())(x), model(x), rtol=1e-4, atol=1e-5)


# --- groups

MIXED = {
    "nf4, nf4, nf4": ("nf4", "nf4", "nf4"),
    "nf4, plain, int8": ("nf4", None, "int8"),
    "fp8, fp4": ("fp8", "fp4"),
}
SIZES = [(77, 16), (33, 5), (40, 33)]
GROUP_PLANS = {
    "in_loop": Plan("triton", "in_loop", "split"),
    "scratch": Plan("triton", "split", "split"),
    "torch": Plan("torch", "library", "library"),
}


def _group(M, K, formats, dropout_ps=(0.0, 0.0, 0.0), **kwargs):
    """Problems over what the weights stand for, with one x; and the weights."""
    problems, weights = [], []
    for (N, r), format, dropout_p in zip(SIZES, formats, dropout_ps, strict=False):
        p = problem(M, N, K, r, dropout_p=dropout_p, **kwargs)
        weight = p.weight if format is None else QUANTIZERS[format](p.weight)
        if format is not None:
            p.weight = weight.dequantize()
        problems.append(replace(p, x=problems[0].x if problems else p.x))
        weights.append(weight)
    return problems, weights


def _run_group(call, problems):
    x = problems[0].x.detach().requires_grad_()
    leaves, group = {"dx": x}, []
    for i, p in enumerate(problems):
        own = {n: getattr(p, n).detach().requires_grad_() for n in ("lora_A", "lora_B", "bias")}
        group.append(replace(p, x=x, **own))
        leaves |= {f"d{n}{i}": t for n, t in own.items()}
    ys = call(group)
    grads = torch.autograd.grad(ys, list(leaves.values()), [p.g for p in problems])
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(leaves, grads, strict=True))


def _check_group(problems, weights, plan):
    def call(group):
        thresholds = [dropout_threshold(p.dropout_p) for p in group]
        seeds = torch.cat([p.seed for p in group]) if any(thresholds) else None
        adapters = [getattr(p, kind) for kind in ("lora_A", "lora_B", "bias") for p in group]
        return LoRALinearGroupFunction.apply(
            group[0].x,
            [p.scaling for p in group],
            seeds,
            thresholds,
            [plan] * len(group),
            None,
            *weights,
            *adapters,
        )

    def one_by_one(group):
        return [expression(p) for p in group]

    exact = [in_fp64(p) for p in problems]
    magnitude = _run_group(one_by_one, [magnitudes(p) for p in exact])
    same_dtype = _run_group(one_by_one, problems)
    compare(_run_group(call, problems), _run_group(one_by_one, exact), magnitude, same_dtype)


@pytest.mark.parametrize("formats", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("plan", GROUP_PLANS.values(), ids=GROUP_PLANS)
@DTYPES
def test_groups_over_nf4_and_others(device, formats, plan, dtype, launches):
    _check_group(*_group((3, 13), 128, formats, dtype=dtype, device=device), plan)
    if plan.backend == "triton":
        n = len(formats)
        assert launches[: n + 1] == ["gemm_scaled"] + ["gemm_add_lora"] * n
        assert launches.count("gemm_group") == 1
        assert launches.count("grad_lora_a") == 1


@pytest.mark.parametrize("plan", GROUP_PLANS.values(), ids=GROUP_PLANS)
def test_groups_over_nf4_with_dropout(device, plan):
    formats = MIXED["nf4, plain, int8"]
    _check_group(*_group(37, 128, formats, (0.5, 0.0, 0.2), device=device), plan)


@both_backends
def test_group_of_mixed_formats_by_its_checked_way_in(device, backend, launches):
    problems, weights = _group(9, 64, MIXED["nf4, plain, int8"], device=device)

    def call(group):
        return lora_linear_group(
            group[0].x,
            weights,
            [p.lora_A for p in group],
            [p.lora_B for p in group],
            scalings=problems[0].scaling,
            biases=[p.bias for p in group],
            backend=backend,
        )

    expected = _run_group(lambda group: [expression(p) for p in group], problems)
    for name, tensor in _run_group(call, problems).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
    assert launches.count("gemm_group") == (backend == "triton")


def test_a_group_over_nf4_saves_no_weight():
    problems, weights = _group(9, 64, MIXED["nf4, nf4, nf4"])
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        lora_linear_group(
            problems[0].x.requires_grad_(),
            weights,
            [p.lora_A.requires_grad_() for p in problems],
            [p.lora_B.requires_grad_() for p in problems],
            scalings=1.0,
        )
    assert (9, 64) in shapes
    assert (77, 64) not in shapes


@both_backends
def test_a_group_over_nf4_compiles(device, backend, launches):
    torch._dynamo.reset()
    problems, weights = _group(9, 64, MIXED["nf4, plain, int8"], device=device)

    def call(group):
        return lora_linear_group(
            group[0].x * 2,
            weights,
            [p.lora_A for p in group],
            [p.lora_B for p in group],
            scalings=1.5,
            biases=[p.bias for p in group],
            backend=backend,
        )

    expected = _run_group(call, problems)
    del launches[:]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for name, tensor in _run_group(compiled, problems).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)
    assert launches.count("gemm_group") == (backend == "triton")


def test_group_operators_over_nf4_and_others():
    problems, weights = _group(9, 64, MIXED["nf4, plain, int8"])
    x = problems[0].x
    As = [p.lora_A.requires_grad_() for p in problems]
    Bs = [p.lora_B.requires_grad_() for p in problems]
    rest = (*pack(*weights), [0.5, 1.0, 2.0], None, [0, 0, 0], "torch", True)
    biases = [p.bias for p in problems]
    torch.library.opcheck(lora_linear_group_op, (x.requires_grad_(), As, Bs, biases, *rest))
    detached = [[t.detach() for t in ts] for ts in (As, Bs)]
    h = torch.randn(9, sum(len(A) for A in As))
    call = ([p.g for p in problems], x.detach(), *detached, h, *rest)
    torch.library.opcheck(lora_linear_group_backward_op, call)


def test_a_group_over_nf4_is_explained():
    problems, weights = _group(9, 64, MIXED["nf4, plain, int8"], dtype=torch.float16)
    tensors = (problems[0].x, weights, [p.lora_A for p in problems], [p.lora_B for p in problems])
    said = str(explain_group(*tensors, backend="triton"))
    assert said.startswith("backend triton, forward in_loop, split, dx split")
    assert "h: one product for all members: x is read once" in said
    assert "dx: one launch for 3 members, with the values of all that are quantised" in said
    assert "quantised W0 of member 0: nf4, tiles become values in the K loop" in said
    assert "quantised W0 of member 2: int8, tiles become values in the K loop" in said
    assert "member 1" not in said
    said = str(explain_group(*tensors, dropout_ps=[0.1, 0.1, 0.1]))
    assert "triton: not taken: the tensors are on the CPU" in said
    assert "group: not taken: few rows, and on a CPU dropout, are faster each on its own" in said
    assert "nf4, made values some rows or columns at a time" in said
    said = str(explain_group(*tensors, scalings=[1.0, 2.0, 3.0], backend="triton"))
    assert "their scalings differ" in said


def test_group_layers_over_nf4_run_together(monkeypatch):
    from fused_lora import together

    calls = []
    real = together.call_group
    monkeypatch.setattr(together, "call_group", lambda x, m: calls.append(len(m)) or real(x, m))
    layers = {
        name: FusedLoRALinear.from_linear(nn.Linear(64, N), 4, quantize=format)
        for name, N, format in (("q", 32, "nf4"), ("k", 16, "int8"), ("v", 16, None))
    }
    x = torch.randn(5, 64)
    expected = [layer(x) for layer in layers.values()]
    for y, own in zip(FusedLoRAGroup(layers)(x), expected, strict=True):
        torch.testing.assert_close(y, own)
    assert calls == [3]


# --- starts that change the base weight

RESIDUAL = ["pissa", "pissa_niter_4", "olora", "loftq", "loftq_niter_3"]
every_residual = pytest.mark.parametrize("init", RESIDUAL)


def _decaying(N, K):
    """A weight with large principal components, as trained ones have."""
    rank = min(N, K)
    sizes = torch.diag(torch.arange(1, rank + 1).float() ** -0.7)
    return torch.randn(N, rank) @ sizes @ torch.randn(rank, K) / math.sqrt(K)


def _linear(N=64, K=128):
    linear = nn.Linear(K, N)
    linear.weight.data = _decaying(N, K)
    return linear


def _together(layer):
    """W0 + scaling * B A."""
    product = layer.scaling * layer.lora_B.data @ layer.lora_A.data
    return layer.weight.dequantize() + product


@every_residual
@every_format
def test_residual_starts_are_nearer_than_codes_alone(init, format):
    linear = _linear()
    weight = linear.weight.detach().clone()
    alone = quantize_module.quantize(weight, format).dequantize()
    layer = FusedLoRALinear.from_linear(linear, 8, 16, quantize=format, init_lora_weights=init)
    assert layer.weight.layout == quantize_module.quantize(weight, format).layout
    assert torch.equal(linear.weight, weight)
    worse = 1.1 if init == "olora" else 0.95  # the rows of R and columns of Q are no large part
    assert (_together(layer) - weight).norm() < worse * (alone - weight).norm()
    x = torch.randn(5, 128)
    torch.testing.assert_close(layer(x), F.linear(x, _together(layer), linear.bias))
    assert torch.equal(layer.lora_A_init, layer.lora_A)


def test_pissa_over_nf4_takes_the_same_part_as_over_the_weight():
    linear = _linear()
    plain = FusedLoRALinear.from_linear(linear, 8, init_lora_weights="pissa")
    layer = FusedLoRALinear.from_linear(linear, 8, init_lora_weights="pissa", quantize="nf4")
    assert torch.equal(layer.lora_A, plain.lora_A)
    assert torch.equal(layer.lora_B, plain.lora_B)
    assert torch.equal(layer.weight.codes, quantize_nf4(plain.weight).codes)


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("lora_alpha", [8, 20])
def test_loftq_alternates_codes_and_components(turns, lora_alpha):
    linear = _linear()
    weight, product = linear.weight.detach(), 0.0
    for _ in range(turns):
        codes = quantize_nf4(weight - product)
        U, S, Vh = torch.linalg.svd(weight - codes.dequantize(), full_matrices=False)
        product = U[:, :8] @ torch.diag(S[:8]) @ Vh[:8]
    init = "loftq" if turns == 1 else f"loftq_niter_{turns}"
    layer = FusedLoRALinear.from_linear(
        linear, 8, lora_alpha, quantize="nf4", init_lora_weights=init
    )
    assert torch.equal(layer.weight.codes, codes.codes)
    torch.testing.assert_close(_together(layer), codes.dequantize() + product)


def test_loftq_of_peft_has_the_same_numbers(monkeypatch):
    """PEFT wants a GPU for it and leaves the scaling out."""
    bnb = pytest.importorskip("bitsandbytes")
    loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
    from fused_lora.initial import initial_values

    def on_the_cpu(move):
        def to(tensor, *args, **kwargs):
            kwargs |= {"device": "cpu"} if "device" in kwargs else {}
            return move(tensor, *("cpu" if a == "cuda" else a for a in args), **kwargs)

        return to

    weight = _decaying(64, 128)
    for kind in (Tensor, bnb.nn.Params4bit, bnb.nn.Int8Params):
        monkeypatch.setattr(kind, "to", on_the_cpu(kind.to))
    for num_bits, like, turns in (
        (4, quantize_nf4(weight, double_quant=False), 1),
        (4, quantize_nf4(weight, double_quant=False), 3),
        (8, quantize_int8(weight), 2),
    ):
        values, lora_A, lora_B = loftq_utils.loftq_init(weight, num_bits, 8, turns)
        start = initial_values(f"loftq_niter_{turns}", like, 8, 1.0, weight)
        torch.testing.assert_close(start.weight.dequantize(), values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            start.lora_B @ start.lora_A, lora_B @ lora_A, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_starts_from_codes(init):
    """Over a weight that is in codes already: W0 is what they stand for."""
    weight = quantize_nf4(_decaying(64, 128))
    before = weight.codes.clone()
    layer = FusedLoRALinear.from_linear(weight, 8, init_lora_weights=init)
    assert torch.equal(weight.codes, before)
    assert layer.weight.layout == weight.layout
    error = (_together(layer) - weight.dequantize()).norm() / weight.dequantize().norm()
    assert 0 < error < 0.15


@every_residual
def test_reset_starts_again_from_about_the_original_weight(init):
    linear = _linear()
    layer = FusedLoRALinear.from_linear(linear, 8, quantize="nf4", init_lora_weights=init)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    layer.reset_lora_parameters()
    error = (_together(layer) - linear.weight).norm() / linear.weight.norm()
    assert error < 0.2


@every_residual
@pytest.mark.parametrize("use_dora", [False, True])
def test_residual_adapters_over_nf4_go_with_the_original_model(tmp_path, init, use_dora):
    """W + what was learnt: apart from the codes' error, what the trained model is."""
    pytest.importorskip("safetensors")
    from fused_lora import load_adapter, save_adapter

    net, x = nn.Sequential(_linear()), torch.randn(50, 128)
    model = copy.deepcopy(net)
    inject(model, 8, 16, ["0"], quantize="int8", init_lora_weights=init, use_dora=use_dora)
    with torch.no_grad():
        model[0].lora_A += 0.3 * torch.randn_like(model[0].lora_A)
        model[0].lora_B += 0.3 * torch.randn_like(model[0].lora_B)
    save_adapter(model, tmp_path)
    loaded = copy.deepcopy(net)
    load_adapter(loaded, tmp_path)
    assert loaded[0].r == 16
    assert (loaded(x) - model(x)).norm() < 0.02 * model(x).norm()
    assert (loaded(x) - net(x)).norm() > 0.1 * net(x).norm()
    with pytest.raises(ValueError, match="0 has a residual weight"):
        load_adapter(model, tmp_path)


def test_state_dicts_of_residual_layers_over_nf4():
    x, linear = torch.randn(5, 128), _linear()
    layer = FusedLoRALinear.from_linear(linear, 8, quantize="nf4", init_lora_weights="pissa")
    other = FusedLoRALinear.from_linear(linear, 8, quantize="nf4")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.lora_A_init, layer.lora_A_init)
    fresh = FusedLoRALinear.from_linear(linear, 8, quantize="nf4")
    codes = {k: v for k, v in fresh.state_dict().items() if k.startswith("weight")}
    with pytest.raises(RuntimeError, match="weight is a residual"):
        layer.load_state_dict(codes, strict=False)
    layer.load_state_dict(fresh.state_dict())
    assert layer.lora_A_init is None


def test_inject_says_the_error_of_what_it_quantised():
    def error(init, **options):
        torch.manual_seed(5)
        model = nn.Sequential(_linear(), nn.ReLU(), _linear(32, 64))
        weights = [model[i].weight.detach() for i in (0, 2)]
        report = inject(model, 8, 16, ["0", "2"], init_lora_weights=init, **options)
        if isinstance(model[0].weight, QuantizedWeight) and init != "orthogonal":
            changes = [(_together(model[i]) - w) for i, w in zip((0, 2), weights, strict=True)]
            total = math.sqrt(sum(c.square().sum() for c in changes))
            total /= math.sqrt(sum(w.square().sum() for w in weights))
            assert report.quantization_error == pytest.approx(total, rel=1e-4)
            assert f"differ from the original ones by {total:.2%} of their norm" in str(report)
        return report.quantization_error

    assert error("pissa") is None
    assert error("pissa", quantize="nf4") < error(True, quantize="nf4")
    assert error("loftq", quantize="int8") < error(True, quantize="int8") < 0.02
    assert error("orthogonal", quantize="nf4") == pytest.approx(error(True, quantize="nf4"))


def test_refused_loftq_starts():
    message = 'init_lora_weights: "loftq" starts from the error of codes; wanted a plain nn.Linear'
    for linear in (nn.Linear(64, 8), quantize_nf4(torch.randn(8, 64))):
        with pytest.raises(ValueError, match=re.escape(message)):
            FusedLoRALinear.from_linear(linear, 2, init_lora_weights="loftq")
    with pytest.raises(ValueError, match="got a weight in torch.float32"):
        FusedLoRALinear(64, 8, 2, init_lora_weights="loftq_niter_2")
    with pytest.raises(ValueError, match="init_lora_weights: got 'loftq_niter_0'"):
        FusedLoRALinear.from_linear(
            nn.Linear(64, 8), 2, quantize="nf4", init_lora_weights="loftq_niter_0"
        )
    with pytest.raises(ValueError, match="r: got 9, wanted at most 8"):
        FusedLoRALinear.from_linear(nn.Linear(64, 8), 9, quantize="nf4", init_lora_weights="loftq")


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["layer", "dora", "multi", "group"])
def test_codes_changed_in_place_are_noticed(format, kind):
    """By all forms, as autograd notices it of the tensors that it saves."""
    W = quantize_module.quantize(torch.randn(32, 64), format)
    x = torch.randn(100, 64, requires_grad=True)
    A, B, m = torch.randn(4, 64), torch.randn(32, 4), torch.rand(32)
    y = {
        "layer": lambda: lora_linear(x, W, A, B, scaling=1.0),
        "dora": lambda: dora_linear(x, W, A, B, m, scaling=1.0),
        "multi": lambda: lora_linear_multi(x, W, [A], [B], scalings=1.0, segments=[(0, 100)]),
        "group": lambda: lora_linear_group(x, [W, W], [A, A], [B, B], scalings=1.0)[1],
    }[kind]()
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.no_grad():
        W.codes.copy_(W.codes.flip(0))
    with pytest.raises(RuntimeError, match="quantised W0 .* was changed in place"):
        torch.autograd.grad(y.sum(), x)

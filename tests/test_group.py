"""`lora_linear_group` and `FusedLoRAGroup` against the fp64 oracle, member by member and in dx."""

import copy
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from oracle import compare, expression, in_fp64, magnitudes, problem
from pairs import pairs
from torch import nn

from fused_lora import (
    FusedLoRAGroup,
    FusedLoRALinear,
    dispatch,
    explain_group,
    lora_linear,
    lora_linear_group,
    merge_and_unload,
    reference,
)
from fused_lora import group as group_module
from fused_lora.dispatch import FEW_ROWS, Plan, better_apart
from fused_lora.group import LoRALinearGroupFunction
from fused_lora.group_ops import lora_linear_group_backward_op, lora_linear_group_op
from fused_lora.kernels import configs
from fused_lora.kernels.device import INTERPRETED
from fused_lora.kernels.dropout import Dropout, dropout_threshold
from fused_lora.kernels.group import gemm_group
from fused_lora.packing import pack

pytestmark = pytest.mark.usefixtures("together")
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16"),
]
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])
PLANS = {
    "triton": Plan("triton", "split", "split"),
    "torch": Plan("torch", "library", "library"),
}


def _group(M, K, sizes, dropout_ps=None, scalings=None, **kwargs):
    """One problem a member, of sizes (N, r), with the first one's x."""
    problems = [problem(M, N, K, r, **kwargs) for N, r in sizes]
    for i, p in enumerate(problems):
        p.x = problems[0].x
        p.dropout_p = dropout_ps[i] if dropout_ps else 0.0
        p.scaling = scalings[i] if scalings else p.scaling
    return problems


def _fused(problems, backend):
    thresholds = [dropout_threshold(p.dropout_p) for p in problems]
    seeds = torch.cat([p.seed for p in problems]) if any(thresholds) else None
    kinds = ("weight", "lora_A", "lora_B", "bias")
    tensors = [getattr(p, kind) for kind in kinds for p in problems]
    plans = [PLANS[backend]] * len(problems) if isinstance(backend, str) else backend
    return LoRALinearGroupFunction.apply(
        problems[0].x, [p.scaling for p in problems], seeds, thresholds, plans, None, *tensors
    )


def _one_by_one(problems):
    return [expression(p) for p in problems]


def _run(call, problems, skip=(), needs=("lora_A", "lora_B", "bias"), need_x=True):
    """Outputs and gradients by name; members in ``skip`` get no gradient from above."""
    x = problems[0].x.detach().requires_grad_(need_x)
    leaves = {"dx": x} if need_x else {}
    group = []
    for i, p in enumerate(problems):
        own = {n: getattr(p, n) for n in needs if getattr(p, n) is not None}
        own = {n: t.detach().requires_grad_() for n, t in own.items()}
        group.append(replace(p, x=x, **own))
        if i not in skip:
            leaves |= {f"d{n}{i}": t for n, t in own.items()}
    ys = call(group)
    used = [i for i in range(len(problems)) if i not in skip]
    grads = torch.autograd.grad(
        [ys[i] for i in used], list(leaves.values()), [problems[i].g for i in used]
    )
    outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return outputs | dict(zip(leaves, grads, strict=True))


def _check(problems, backend, call=None, **kwargs):
    got = _run(call or (lambda ps: _fused(ps, backend)), problems, **kwargs)
    exact_problems = [in_fp64(p) for p in problems]
    exact = _run(_one_by_one, exact_problems, **kwargs)
    magnitude = _run(_one_by_one, [magnitudes(p) for p in exact_problems], **kwargs)
    compare(got, exact, magnitude, _run(_one_by_one, problems, **kwargs))


SIZES = [(77, 16), (33, 5), (40, 33)]


@both_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_values_and_gradients(device, launches, backend, dtype, members):
    _check(_group((3, 23), 101, SIZES[:members], dtype=dtype, device=device), backend)
    assert bool(launches) == (backend == "triton")


@pytest.mark.parametrize("dropout_ps", [None, (0.1, 0.1, 0.1)])
@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32])
def test_each_member_by_its_own_strategy(device, launches, adapter_dtype, dropout_ps):
    """dx by cuBLAS if all of them would have it so; where h B is dropped, one launch for all."""
    kwargs = {"dtype": torch.float16, "adapter_dtype": adapter_dtype, "device": device}
    sizes = [(80, 16), (32, 5), (48, 32)]
    plans = [Plan("triton", s, "library") for s in ("library", "split", "tma_split")]
    _check(_group(37, 72, sizes, dropout_ps, **kwargs), plans)
    ours = [name for name in launches if name not in ("gemm_scaled", "grad_lora_a", "grad_lora_b")]
    masks = ["add_group"] if dropout_ps else []
    assert ours == ["gemm_add_lora", "persistent_add_lora", *masks]
    launches.clear()
    _check(
        _group(37, 72, sizes, dropout_ps, **kwargs), [*plans[:2], Plan("triton", "split", "split")]
    )
    assert "gemm_group" in launches


@pytest.mark.parametrize("strategy", ["library", "split"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_members_whose_outputs_have_the_same_gradient(device, launches, strategy, dropout_p):
    """q + k: autograd gives both one and the same tensor."""
    problems = _group(37, 72, [(32, 8), (32, 5)], [dropout_p] * 2, dtype=torch.float16)
    tensors = [[getattr(p, kind) for p in problems] for kind in ("weight", "lora_A", "lora_B")]
    x = problems[0].x.clone().requires_grad_()
    plans = [Plan("triton", "split", strategy)] * 2
    thresholds = [dropout_threshold(dropout_p)] * 2
    seeds = torch.tensor([[1, 0], [2, 0]])[:, 0] if dropout_p else None

    def dx(gradients):
        flat = [t for kind in tensors for t in kind]
        ys = LoRALinearGroupFunction.apply(
            x, [2.0, 2.0], seeds, thresholds, plans, None, *flat, None, None
        )
        return torch.autograd.grad(ys, x, gradients)[0]

    g = torch.randn(37, 32, dtype=torch.float16)
    assert torch.equal(dx([g, g]), dx([g, g.clone()]))
    assert launches.count("gemm_group") == (2 if strategy == "split" else 0)
    assert launches.count("add_group") == (2 if strategy == "library" and dropout_p else 0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dropout_ps", [None, (0.1, 0.0, 0.3)])
@pytest.mark.parametrize("sizes", [[(80, 16), (32, 5), (48, 32)], [(80, 5), (104, 5)]])
def test_one_dx_of_members_whose_own_would_be_scheduled_by_hand(launches, sizes, dropout_ps):
    """By one launch of that kernel, with all h B where nothing is dropped."""
    plans = [Plan("triton", "split", s) for s in ("ws_split", "tma_split", "library")]
    problems = _group(37, 72, sizes, dropout_ps and dropout_ps[: len(sizes)], dtype=torch.float16)
    _check(problems, plans[: len(sizes)])
    assert launches.count("specialized_group") == 1
    assert launches.count("add_group") == bool(dropout_ps)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("sizes", [[(80, 8), (33, 8)], [(80, 8), (40, 8)]])
def test_one_dx_where_that_kernel_has_no_descriptors(launches, sizes):
    """By cuBLAS, where a gradient cannot be read by TMA, or a weight not as the others are."""
    problems = _group(37, 72, sizes, dtype=torch.float16)
    if sizes[1][0] == 40:
        problems[1].weight = problems[1].weight.t().contiguous().t()
    _check(problems, [Plan("triton", "split", "ws_split")] * 2)
    assert not {"specialized_group", "gemm_group"} & {*launches}


def test_a_member_without_a_descriptor(device, launches):
    plans = [Plan("triton", "tma_split", "split")] * 2
    _check(_group(37, 72, [(33, 4), (64, 4)], dtype=torch.float16, device=device), plans)
    assert launches.count("persistent_add_lora") == 1


@both_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_ps", [(0.5, 0.5, 0.5), (0.0, 0.1, 0.9)])
def test_values_and_gradients_with_dropout(device, backend, dtype, dropout_ps):
    _check(_group(70, 101, SIZES, dropout_ps, dtype=dtype, device=device), backend)


@both_backends
def test_scalings_of_their_own(device, backend):
    _check(_group(20, 40, SIZES, scalings=(0.5, 2.0, -3.0), device=device), backend)


@both_backends
def test_fp32_adapters_over_a_half_base(device, backend):
    group = _group(50, 72, SIZES, dtype=torch.float16, adapter_dtype=torch.float32, device=device)
    _check(group, backend)


@both_backends
def test_adapters_of_different_dtypes(device, backend):
    group = _group(20, 40, SIZES[:2], dtype=torch.float16, device=device)
    group[1].lora_A = group[1].lora_A.float()
    _check(group, backend)


def test_bf16_on_the_cpu():
    _check(_group(50, 72, SIZES, (0.1,) * 3, dtype=torch.bfloat16), "torch")


@both_backends
@pytest.mark.parametrize("ranks", [(1, 1), (64, 65), (512, 3)])
def test_ranks(device, backend, ranks):
    _check(_group(20, 40, [(33, r) for r in ranks], device=device), backend)


@both_backends
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0, 3), ()])
def test_sizes_of_zero_and_one(device, backend, shape):
    _check(_group(shape, 8, [(5, 2), (4, 2)], (0.5, 0.0), device=device), backend)


@both_backends
def test_strides(device, backend):
    """Transposed weights, every second column of x, expanded gradients."""
    group = _group(12, 20, [(9, 3), (14, 4)], device=device)
    x = torch.randn(12, 40, device=device)[:, ::2]
    for p in group:
        p.x, p.weight = x, p.weight.t().contiguous().t()
        p.lora_A, p.lora_B = p.lora_A.t().contiguous().t(), p.lora_B.t().contiguous().t()
        p.g = p.g[:, :1].expand(p.g.shape)
    _check(group, backend)


@both_backends
@pytest.mark.parametrize("skip", [(0,), (1, 2)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_outputs_that_nobody_uses(device, backend, skip, dropout_p):
    _check(_group(9, 20, SIZES, (dropout_p,) * 3, device=device), backend, skip=skip)


@both_backends
@pytest.mark.parametrize("needs", [("lora_A",), ("lora_B",), ("bias",), ()])
@pytest.mark.parametrize("need_x", [True, False])
def test_only_the_wanted_gradients(device, backend, needs, need_x):
    if needs or need_x:
        group = _group(9, 20, SIZES, device=device)
        _check(group, backend, needs=needs, need_x=need_x)


def _arguments(problems):
    kinds = [[getattr(p, n) for p in problems] for n in ("weight", "lora_A", "lora_B")]
    return (problems[0].x, *kinds), {
        "scalings": [p.scaling for p in problems],
        "biases": [p.bias for p in problems],
    }


def _launches_of(problems, **options):
    arguments, named = _arguments(problems)
    leaves = [t.requires_grad_() for t in (arguments[0], *arguments[2], *arguments[3])]
    ys = lora_linear_group(*arguments, **named, backend="triton", **options)
    torch.autograd.grad(ys, leaves, [p.g for p in problems])


def test_launches(device, launches):
    """One h, one dx, one dA for all members; the base products, dh and dB a launch each."""
    _launches_of(_group(9, 20, SIZES, device=device))
    assert launches[:4] == ["gemm_scaled"] + ["gemm_add_lora"] * 3
    assert Counter(launches[4:]) == {
        "grad_lora_b": 3,
        "gemm_scaled": 3,
        "gemm_group": 1,
        "grad_lora_a": 1,
    }


def test_launches_with_dropout(device, launches):
    """A mask of its own for each member: three products of three matrices, but one dx."""
    _launches_of(_group(9, 20, SIZES, device=device), dropout_ps=[0.1] * 3)
    counts = Counter(launches)
    assert counts["gemm_scaled"] == 6
    assert counts["grad_lora_a"] == 3
    assert counts["gemm_group"] == 1


def test_more_members_than_a_launch_takes(device, launches):
    group = _group(9, 20, [(5 + i, 2) for i in range(5)], device=device)
    arguments, named = _arguments(group)
    ys = lora_linear_group(*arguments, **named, backend="triton")
    for y, p in zip(ys, group, strict=True):
        torch.testing.assert_close(y, expression(p), rtol=1e-4, atol=1e-4)
    assert launches.count("gemm_scaled") == 2


def test_masks_are_independent_and_drawn_anew(device):
    K = 64
    eye, zero = torch.eye(K, device=device), torch.zeros(K, K, device=device)
    x = torch.ones(32, K, device=device, requires_grad=True)

    def call():
        return lora_linear_group(
            x, [zero] * 2, [eye] * 2, [eye] * 2, scalings=[1.0] * 2, dropout_ps=[0.5] * 2
        )

    first, second = call(), call()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    (dx,) = torch.autograd.grad(first, x, [torch.ones_like(y) for y in first])
    assert torch.equal(dx, first[0] + first[1])  # x is ones: both are the scaled masks


@both_backends
def test_bit_for_bit_the_same_twice_and_nothing_overwritten(device, backend):
    group = _group(40, 20, SIZES, (0.5,) * 3, device=device)
    before = copy.deepcopy(group)
    first, second = (_run(lambda ps: _fused(ps, backend), group) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for p, q in zip(group, before, strict=True):
        assert all(torch.equal(t, q.tensors()[name]) for name, t in p.tensors().items())


def test_retain_graph_and_no_second_derivative(device):
    group = _group(5, 8, SIZES[:2], device=device)
    arguments, named = _arguments(group)
    A = arguments[2][0].requires_grad_()
    ys = lora_linear_group(*arguments, **named)
    loss = sum(y.square().sum() for y in ys)
    (first,) = torch.autograd.grad(loss, A, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, A, retain_graph=True)[0], first)
    with pytest.raises(RuntimeError, match="lora_linear_group: its gradients cannot"):
        torch.autograd.grad(loss, A, create_graph=True)


@both_backends
def test_outputs_may_be_changed_in_place(device, backend):
    def changed(ys):
        ys[0].mul_(2)
        ys[1].add_(1)
        return ys

    group = _group((3, 4), 8, SIZES[:2], device=device)
    got = _run(lambda ps: changed(_fused(ps, backend)), group)
    expected = _run(lambda ps: changed(_one_by_one(ps)), group)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


def test_what_is_saved():
    group = _group(6, 8, [(20, 2), (30, 3)], (0.5, 0.5))
    for p in group:
        p.lora_A.requires_grad_(), p.lora_B.requires_grad_(), p.x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _fused(group, "torch")
    weights = {t.data_ptr() for p in group for t in p.tensors().values()}
    others = [tuple(t.shape) for t in saved if t.data_ptr() not in weights]
    assert sorted(others) == [(2,), (6, 5)]  # the seeds and the h's; x and the weights besides


def test_autocast(device):
    group = _group(6, 20, SIZES[:2], device=device)
    arguments, named = _arguments(group)
    A = arguments[2][1].requires_grad_()
    with torch.autocast(device.type, torch.float16):
        ys = lora_linear_group(*arguments, **named)
    assert {y.dtype for y in ys} == {torch.float16}
    ys[1].sum().backward()
    assert A.grad.dtype == torch.float32


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile(device, launches, fresh_compiler, compiler):
    options = {"backend": ["triton", "torch"], "dynamic": [False, True], "skip": [(), (1,)]}
    for backend, dynamic, skip in pairs(**options):
        torch._dynamo.reset()
        launches.clear()

        def call(problems, backend=backend):
            arguments, named = _arguments(problems)
            return lora_linear_group(*arguments, **named, backend=backend)

        group = _group((3, 7), 20, SIZES, device=device)
        group[2].bias = None
        compiled = torch.compile(call, backend=compiler, fullgraph=True, dynamic=dynamic)
        _check(group, backend, call=compiled, skip=skip)
        assert launches.count("gemm_group") == (backend == "triton")
        assert launches.count("gemm_scaled") == (4 if backend == "triton" else 0)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_dropout_is_the_same_in_backward(fresh_compiler, compiler):
    K = 64
    eye, zero = torch.eye(K), torch.zeros(K, K)
    x = torch.ones(32, K, requires_grad=True)

    @torch.compile(backend=compiler, fullgraph=True)
    def call(x):
        return lora_linear_group(
            x, [zero] * 2, [eye] * 2, [eye] * 2, scalings=[1.0] * 2, dropout_ps=[0.5] * 2
        )

    first, second = call(x), call(x)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    (dx,) = torch.autograd.grad(first, x, [torch.ones_like(y) for y in first])
    assert torch.equal(dx, first[0] + first[1])


def test_compile_does_not_recompile_for_each_M_or_alpha(fresh_compiler):
    group = _group(6, 12, SIZES[:2])
    arguments, named = _arguments(group)
    for B in arguments[3]:
        B.requires_grad_()  # so that h comes out too

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def call(x, s):
        return lora_linear_group(x, *arguments[1:], **named | {"scalings": [s, 2.0]})

    call(torch.randn(6, 12), 1.0)
    call(torch.randn(7, 12), 0.5)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for M, s in ((9, 0.25), (30, 3.0)):
        x = torch.randn(M, 12)
        ys = call(x, s)
        expected = lora_linear_group(x, *arguments[1:], **named | {"scalings": [s, 2.0]})
        torch.testing.assert_close(ys, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("M", [0, 5])
def test_opcheck(device, dropout_p, M):
    group = _group(M, 8, [(6, 2), (9, 3)], device=device)
    (x, weights, As, Bs), _ = _arguments(group)
    biases = [group[0].bias, x.new_empty(0)]
    for t in (x, *As, *Bs):
        t.requires_grad_()
    seeds = torch.tensor([3, 4], device=device) if dropout_p else None
    dropout = (seeds, [round(dropout_p * 65536)] * 2)
    packed = pack(*weights)
    call = (x, As, Bs, biases, *packed, [0.5, 2.0], *dropout, "torch", True)
    torch.library.opcheck(lora_linear_group_op, call)
    detached = [[t.detach() for t in ts] for ts in (As, Bs)]
    gs, h = [p.g for p in group], torch.randn(M, 5, device=device)
    call = (gs, x.detach(), *detached, h, *packed, [0.5, 2.0], *dropout, "torch", True)
    torch.library.opcheck(lora_linear_group_backward_op, call)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_under_torch_func_each_member_is_on_its_own(launches):
    group = _group((3, 4), 8, SIZES[:2])
    arguments, named = _arguments(group)

    def loss(x, call):
        return sum(y.square().sum() for y in call(x))

    def fused(x):
        return lora_linear_group(x, *arguments[1:], **named)

    def plain(x):
        return _one_by_one([replace(p, x=x) for p in group])

    got = torch.func.vmap(torch.func.grad(lambda x: loss(x, fused)))(arguments[0])
    expected = torch.func.vmap(torch.func.grad(lambda x: loss(x, plain)))(arguments[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_group_product_in_every_configuration(device, dtype, tolerance, p):
    # More than one of the largest tile, and a rest: of 128 x 256, and in fp32 of 32 x 32.
    M, N = (133, 261) if dtype == torch.float16 else (45, 77)
    Ks, Rs = (70, 64, 9), (20, 3, 40)

    def normal(*shape):
        return torch.randn(*shape).to(device, dtype)

    xs, ws = [normal(M, K) for K in Ks], [normal(K, N) for K in Ks]
    hs, bs = normal(M, sum(Rs)).split(Rs, dim=1), [normal(R, N) for R in Rs]
    dropouts = [Dropout(torch.tensor([i], device=device), round(p * 65536)) for i in range(3)]
    dropouts = dropouts if p else [None] * 3
    exact = torch.zeros(M, N, dtype=torch.float64, device=device)
    for x, w, h, b, dropout in zip(xs, ws, hs, bs, dropouts, strict=True):
        keep = reference.keep_mask(*dropout, M, N) * dropout.keep_scale if dropout else 1.0
        exact += x.double() @ w.double() + keep * (h.double() @ b.double())
    tiles = configs.ship("group", max(Rs), dtype.itemsize, p > 0, INTERPRETED)
    assert tiles
    for config in tiles:
        y = gemm_group(config, xs, ws, hs, bs, dropouts)
        assert ((y.double() - exact).norm() / exact.norm()).item() < tolerance


GOOD = {
    "x": torch.randn(4, 6),
    "weights": [torch.randn(5, 6), torch.randn(3, 6)],
    "lora_As": [torch.randn(2, 6), torch.randn(4, 6)],
    "lora_Bs": [torch.randn(5, 2), torch.randn(3, 4)],
    "scalings": [1.0, 2.0],
}
BAD = {
    "no members": (
        {"weights": [], "lora_As": [], "lora_Bs": [], "scalings": []},
        ValueError,
        "weights: got none",
    ),
    "an A too few": ({"lora_As": GOOD["lora_As"][:1]}, ValueError, "lora_As: got 1, wanted 2"),
    "a bias too few": ({"biases": [None]}, ValueError, "biases: got 1, wanted 2"),
    "a member's B": (
        {"lora_Bs": [torch.randn(5, 2), torch.randn(3, 2)]},
        ValueError,
        "member 1: lora_B: got shape [3, 2]",
    ),
    "weights no list": ({"weights": 1.0}, TypeError, "weights: got float, wanted a list"),
    "dropout no list": ({"dropout_ps": 0.5}, TypeError, "dropout_ps: got float, wanted a list"),
    "a scaling too few": ({"scalings": [1.0]}, ValueError, "scalings: got 1, wanted 2"),
    "no number": ({"scalings": None}, TypeError, "member 0: scaling: got NoneType"),
    "x": ({"x": torch.randn(4, 7)}, ValueError, "member 0: x: got shape [4, 7]"),
    "scaling": ({"scalings": [1.0, float("nan")]}, ValueError, "member 1: scaling: got nan"),
    "dropout": ({"dropout_ps": [1.0, 0.0]}, ValueError, "member 0: dropout_p: got 1.0"),
    "weight's dtype": (
        {"weights": [torch.randn(5, 6), torch.randn(3, 6).half()]},
        TypeError,
        "member 1: weight: got dtype torch.float16",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
    "weight trains": (
        {"weights": [torch.randn(5, 6, requires_grad=True), torch.randn(3, 6)]},
        ValueError,
        "member 0: weight: requires a gradient",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name, launches):
    changes, error, message = BAD[name]
    arguments = GOOD | changes
    state = torch.get_rng_state()
    tensors = [arguments.pop(key) for key in ("x", "weights", "lora_As", "lora_Bs")]
    with pytest.raises(error, match=re.escape(message)):
        lora_linear_group(*tensors, **arguments)
    assert launches == []
    assert torch.equal(state, torch.get_rng_state())


def test_one_scaling_for_all():
    tensors = [GOOD[key] for key in ("x", "weights", "lora_As", "lora_Bs")]
    one, each = (lora_linear_group(*tensors, scalings=s) for s in (2.0, [2.0, 2.0]))
    for y, other in zip(one, each, strict=True):
        assert torch.equal(y, other)


def test_explain(launches):
    tensors = [GOOD[key] for key in ("x", "weights", "lora_As", "lora_Bs")]
    said = str(explain_group(*tensors))
    assert said.startswith("backend torch, forward library, dx library\n  triton: not taken: the")
    assert "h: one product for all members: x is read once" in said
    said = str(explain_group(*tensors, backend="triton"))
    assert said.startswith("backend triton, forward split, dx split\n  torch: not taken")
    assert "dx: one launch for 2 members" in said
    too_large = {"lora_As": [torch.randn(2, 6), torch.randn(513, 6)]}
    too_large["lora_Bs"] = [torch.randn(5, 2), torch.randn(3, 513)]
    tensors = [(GOOD | too_large)[key] for key in ("x", "weights", "lora_As", "lora_Bs")]
    with pytest.raises(ValueError, match="member 1: .*got r = 513, wanted at most"):
        explain_group(*tensors, backend="triton")
    assert launches == []


def test_explain_says_which_member_goes_to_pytorch(monkeypatch):
    monkeypatch.setattr(dispatch, "_auto_avoids_kernels", lambda call: None)
    dispatch.plan.cache_clear()
    As, Bs = (
        [torch.randn(r, 6) for r in (2, 513)],
        [torch.randn(n, r) for n, r in ((5, 2), (3, 513))],
    )
    said = str(explain_group(GOOD["x"], GOOD["weights"], As, Bs))
    dispatch.plan.cache_clear()
    assert "triton: not taken: lora_A: got r = 513, wanted at most 512 (member 1)" in said


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_explain_says_how_dx_is_made(monkeypatch, dropout_p):
    monkeypatch.setattr(dispatch, "_choose", lambda call, form: ("ws_split", None))
    problems = _group(70, 72, [(80, 8), (40, 8)], dtype=torch.float16)
    kinds = ("weight", "lora_A", "lora_B")
    tensors = [[getattr(p, kind) for p in problems] for kind in kinds]
    ps = [dropout_p, dropout_p]
    found = explain_group(problems[0].x, *tensors, dropout_ps=ps, backend="triton")
    assert found.strategy_dx == "ws_split"
    assert ("and one for every member's h B" in found.reasons["dx"]) == bool(dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("M", [1, FEW_ROWS, FEW_ROWS + 1, 16385])
def test_members_run_apart_where_that_is_faster(monkeypatch, M, dropout_p):
    """The same as calls of their own, random numbers too, and `explain_group` says so."""
    monkeypatch.setattr(group_module, "better_apart", better_apart)
    apart = M * 8 <= 4 * dispatch._FEW_OF_GROUP or dropout_p > 0
    problems = _group(M, 8, SIZES[:2], device="cpu")
    lists = [[getattr(p, n) for p in problems] for n in ("weight", "lora_A", "lora_B")]
    options = {"scalings": 1.25, "biases": [p.bias for p in problems]}
    options["dropout_ps"] = [dropout_p] * len(problems)
    lists[1][0].requires_grad_()
    torch.manual_seed(5)
    ys = lora_linear_group(problems[0].x, *lists, **options)
    assert ("LoRALinearGroup" in type(ys[0].grad_fn).__name__) != apart
    torch.manual_seed(5)
    for y, p in zip(ys, problems, strict=True):
        tensors = (p.x, p.weight, p.lora_A, p.lora_B)
        alone = lora_linear(*tensors, scaling=1.25, bias=p.bias, dropout_p=dropout_p)
        # Of a million sums of a group, some are rounded in another order.
        torch.testing.assert_close(y, alone, **({} if apart else {"rtol": 1e-4, "atol": 1e-4}))
    said = explain_group(problems[0].x, *lists, **options)
    assert ("group" in said.reasons) == apart


def test_module_explains_itself():
    layers, x = _layers(backend="triton"), torch.randn(4, 6)
    group = FusedLoRAGroup(layers)
    assert str(group.explain(x)).startswith("backend triton, forward split, dx split\n")
    assert "dx: one launch for 3 members" in str(group.explain(x))
    layers["k"].backend = "torch"
    said = str(group.explain(x))
    assert said.startswith("backend torch, forward one by one, dx one by one\n")
    assert "group: not taken: the layers differ in their backend" in said
    assert "q: backend triton, forward" in said
    assert "k: backend torch, forward library, dx library" in said
    alone = FusedLoRAGroup({"q": layers["q"]}).explain(x)
    assert str(alone) == str(layers["q"].explain(x))
    group["k"] = nn.Linear(6, 4)
    assert "k: has no adapter" in str(group.explain(x))


def _layers(**kwargs):
    layers = {
        "q": FusedLoRALinear(6, 8, 2, **kwargs),
        "k": FusedLoRALinear(6, 4, 3, 12, **kwargs),
        "v": FusedLoRALinear(6, 4, 2, bias=False, **kwargs),
    }
    for layer in layers.values():
        nn.init.normal_(layer.lora_B)
    return layers


def test_module_is_its_layers(device, launches):
    layers = _layers(backend="triton", device=device)
    expected_keys = [
        f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()
    ]
    group, x = FusedLoRAGroup(layers), torch.randn(2, 5, 6, device=device)
    assert list(group.state_dict()) == expected_keys
    assert group["k"] is layers["k"]
    ys = group(x)
    assert launches == ["gemm_scaled"] + ["gemm_add_lora"] * 3
    for y, layer in zip(ys, layers.values(), strict=True):
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_module_looks_at_its_layers_on_each_call(launches, device):
    group = FusedLoRAGroup(_layers(backend="triton", device=device)).eval()
    x = torch.randn(5, 6, device=device)
    expected, seen = group(x), []
    group["q"].merge()
    for y, before in zip(group(x), expected, strict=True):
        torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-4)
    group["q"].unmerge()
    handle = group["k"].register_forward_hook(lambda *_: seen.append("k"))
    group(x)
    assert seen == ["k"]
    handle.remove()
    launches.clear()
    group(x)
    assert "gemm_add_lora" in launches


def test_module_after_merge_and_unload():
    group, x = FusedLoRAGroup(_layers()).eval(), torch.randn(5, 6)
    expected = group(x)
    merge_and_unload(group)
    assert type(group["q"]) is nn.Linear
    for y, before in zip(group(x), expected, strict=True):
        torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-4)


def test_module_draws_dropout_in_training_only():
    group, x = FusedLoRAGroup(_layers(lora_dropout=0.5)), torch.randn(50, 6)
    assert not torch.equal(group(x)[0], group(x)[0])
    group.eval()
    assert torch.equal(group(x)[0], group(x)[0])


def test_module_refuses_other_layers():
    with pytest.raises(TypeError, match="k: got Linear, wanted a FusedLoRALinear"):
        FusedLoRAGroup({"k": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"got in_features {'a': 2, 'b': 3}"):
        FusedLoRAGroup({"a": FusedLoRALinear(2, 2, 1), "b": FusedLoRALinear(3, 2, 1)})
    with pytest.raises(ValueError, match="wanted one number"):
        FusedLoRAGroup({})

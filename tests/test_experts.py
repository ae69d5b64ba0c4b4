"""`lora_linear_experts`: the house rule on both backends, routing of every kind, bad input."""

import itertools
import re
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import Problem, check, run
from outside import check_offsets
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_lora
from fused_lora import experts, explain_experts, lora_linear, lora_linear_experts, reference

BACKENDS = ["triton", "torch"]
NEEDS = ("x", "lora_A", "lora_B")


@dataclass
class ExpertsProblem(Problem):
    """weight, lora_A, lora_B and bias have one more dimension, the experts, in front."""

    indices: torch.Tensor


def _problem(
    rows,
    E,
    N,
    K,
    r,
    *,
    fan=True,
    dtype=torch.float32,
    adapter_dtype=None,
    bias=True,
    dropout_p=0.0,
    device="cpu",
    highest=1,
):
    """``rows``: the indices' shape; of -1 to E - 1 + ``highest``, some of which are no expert's."""

    def normal(*shape, std=1.0, dtype=dtype):
        return (torch.randn(*shape) * std).to(device, dtype)

    adapter_dtype = adapter_dtype or dtype
    return ExpertsProblem(
        x=normal(*(rows[:-1] if fan else rows), K),
        weight=normal(E, N, K, std=max(K, 1) ** -0.5),
        lora_A=normal(E, r, K, std=max(K, 1) ** -0.5, dtype=adapter_dtype),
        lora_B=normal(E, N, r, std=r**-0.5, dtype=adapter_dtype),
        bias=normal(E, N) if bias else None,
        g=normal(*rows, N),
        scaling=1.25,
        dropout_p=dropout_p,
        seed=torch.empty(1, dtype=torch.int64).random_().to(device),
        indices=torch.randint(-1, E + highest, rows, device=device),
    )


def _call(p, function=lora_linear_experts, **options):
    return function(
        p.x,
        p.weight,
        p.lora_A,
        p.lora_B,
        expert_indices=p.indices,
        scaling=p.scaling,
        bias=p.bias,
        dropout_p=p.dropout_p,
        **options,
    )


def _expression(p):
    return _call(p, reference.lora_linear_experts, seed=p.seed)


@pytest.fixture
def seeded(monkeypatch):
    """The dropout mask is the problem's own."""
    return lambda p: monkeypatch.setattr(experts, "draw_seeds", lambda *_: p.seed)


SHAPES = [
    ((37, 3), 5, 40, 24, 4),
    ((2, 9, 2), 3, 33, 70, 20),
    ((70,), 4, 17, 16, 1),
    ((130, 2), 2, 64, 32, 33),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("fan", [True, False])
def test_rule(device, launches, seeded, backend, dtype, shape, dropout_p, fan):
    if fan and len(shape[0]) == 1:
        pytest.skip("a row has one expert")
    options = {"adapter_dtype": torch.float32, "dropout_p": dropout_p, "device": device}
    p = _problem(*shape, fan=fan, dtype=dtype, **options)
    seeded(p)
    check(run(lambda p: _call(p, backend=backend), p, NEEDS), p, _expression)
    made = ["shrink", "gemm_experts"] * 2 + ["multi_grads"] * 2
    assert launches == made * (backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids=str)
def test_each_gradient_alone(device, backend, needs):
    p = _problem((40, 2), 3, 20, 18, 4, device=device)
    check(run(lambda p: _call(p, backend=backend), p, needs), p, _expression)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_adapters_it_is_the_frozen_layer(device, backend):
    p = replace(_problem((40, 3), 4, 20, 18, 4, device=device), lora_A=None, lora_B=None)
    check(run(lambda p: _call(p, backend=backend), p, ("x",)), p, _expression)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weights_adapters_and_x(device, backend):
    """transformers' ``is_transposed`` weights, PEFT's B, a slice of x, an odd stride of experts."""
    p = _problem((40, 2), 3, 20, 18, 4, device=device)
    flat = torch.randn(3 * 18 * 20 + 3, device=device)
    odd = flat.as_strided((3, 20, 18), (18 * 20 + 1, 18, 1)).copy_(p.weight)
    for weight in (p.weight.mT.contiguous().mT, odd):
        strided = replace(
            p,
            weight=weight,
            lora_B=p.lora_B.permute(1, 2, 0).contiguous().permute(2, 0, 1),
            lora_A=p.lora_A.mT.contiguous().mT,
            x=torch.cat((p.x, p.x), dim=1)[:, :18],
            g=p.g.transpose(0, 1).contiguous().transpose(0, 1),
        )
        check(run(lambda p: _call(p, backend=backend), strided, NEEDS), p, _expression)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [(0, 2), (1, 1), (1, 4)], ids=str)
def test_no_row_and_one(device, backend, rows):
    p = _problem(rows, 3, 17, 24, 4, device=device)
    check(run(lambda p: _call(p, backend=backend), p, NEEDS), p, _expression)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [[0], [2], [-1], [3], [0, -1], [-(2**40), 2**40]], ids=str)
def test_all_rows_to_a_few_experts_or_to_none(device, backend, which):
    p = _problem((50, 2), 3, 17, 24, 4, device=device)
    chosen = torch.tensor(which, device=device)
    p = replace(p, indices=chosen[torch.randint(len(chosen), (50, 2), device=device)])
    got = run(lambda p: _call(p, backend=backend), p, NEEDS)
    check(got, p, _expression)
    none = (p.indices < 0) | (p.indices >= 3)
    assert not got["y"][none].any()
    idle = [e for e in range(3) if e not in which]
    assert not got["dlora_A"][idle].any()
    assert not got["dlora_B"][idle].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_lora_linear_of_each_expert(device, backend):
    p = _problem((30,), 3, 17, 24, 4, fan=False, device=device, highest=0)
    y = _call(p, backend=backend)
    for e in range(3):
        rows = p.indices == e
        tensors = (p.x[rows], p.weight[e], p.lora_A[e], p.lora_B[e])
        alone = lora_linear(*tensors, scaling=p.scaling, bias=p.bias[e], backend=backend)
        torch.testing.assert_close(y[rows], alone, rtol=1e-4, atol=1e-4)


def test_narrow_indices_of_many_experts():
    p = _problem((20, 2), 200, 8, 16, 4, bias=False)
    indices = torch.randint(0, 128, (20, 2))
    expected = _call(replace(p, indices=indices))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        assert torch.equal(_call(replace(p, indices=indices.to(dtype))), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_multiply(device, backend):
    p = _problem((20, 2), 3, 8, 0, 4, dtype=torch.float16, device=device)
    result = run(lambda p: _call(p, backend=backend), p, NEEDS)
    assert result["dx"].shape == (20, 0)
    assert torch.equal(result["y"], _expression(p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_one_of_x(device, backend):
    """Where x's rows go to several experts, all of them see the same elements dropped."""
    p = _problem((20, 2), 1, 8, 64, 4, bias=False, dropout_p=0.5, device=device)
    p = replace(p, indices=torch.zeros_like(p.indices))
    y = _call(p, backend=backend)
    assert torch.equal(y[:, 0], y[:, 1])
    assert not torch.equal(y, _call(p, backend=backend)), "a new mask in every call"


def test_saved_for_backward(device):
    """x as it was given, not in the experts' order, and h."""
    p = _problem((40, 4), 3, 20, 18, 4, device=device)
    inputs = [t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = _call(p)
    assert y.requires_grad
    known = {t.data_ptr() for t in (*inputs, p.weight)}
    new = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in new] == [(160, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(device, backend):
    p = _problem((200, 3), 4, 33, 40, 8, device=device)
    first, second = (run(lambda p: _call(p, backend=backend), p, NEEDS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_overwritten(device, backend):
    p = _problem((30, 2), 3, 17, 24, 4, dropout_p=0.2, device=device)
    before = {name: t.clone() for name, t in p.tensors().items()}
    run(lambda p: _call(p, backend=backend), p, NEEDS)
    assert all(torch.equal(t, before[name]) for name, t in p.tensors().items())


def test_bf16_fp64_and_autocast_on_pytorch():
    for dtype in (torch.bfloat16, torch.float64):
        p = _problem((40, 2), 3, 20, 18, 4, dtype=dtype)
        check(run(_call, p, NEEDS), p, _expression)
    p = _problem((40, 2), 3, 20, 18, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = _call(p)
    assert y.dtype == torch.bfloat16
    half = replace(p, x=p.x.bfloat16(), weight=p.weight.bfloat16(), bias=p.bias.bfloat16())
    assert torch.equal(y, _call(half))


def test_a_cpu_without_half_instructions(cpu_without):
    cpu_without(torch.bfloat16, torch.float16)
    for dtype in (torch.bfloat16, torch.float16):
        p = _problem((90, 2), 3, 200, 120, 4, dtype=dtype)
        check(run(_call, p, NEEDS), p, _expression)


def test_checkpointing_and_second_derivatives():
    p = _problem((40, 2), 3, 20, 18, 4, dropout_p=0.3)
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        x = p.x.clone().requires_grad_()
        A = p.lora_A.clone().requires_grad_()

        def layer(x, A):
            return _call(replace(p, x=x, lora_A=A))

        y = checkpoint(layer, x, A, use_reentrant=False) if again else layer(x, A)
        found.append(torch.autograd.grad(y, (x, A), p.g))
    assert all(map(torch.equal, *found))
    y = _call(replace(p, x=p.x.requires_grad_()))
    with pytest.raises(RuntimeError, match=r"reference\.lora_linear_experts's can"):
        torch.autograd.grad(y, p.x, p.g, create_graph=True)


def test_transforms():
    p = _problem((40, 2), 3, 20, 18, 4)
    xs, indices = torch.randn(3, 40, 18), torch.randint(-1, 4, (3, 40, 2))

    def loss(x, A, B, indices, function):
        y = _call(replace(p, x=x, lora_A=A, lora_B=B, indices=indices), function)
        return (y * p.g).sum()

    for_each = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None, 0, None))
    arguments = (xs, p.lora_A, p.lora_B, indices)
    with pytest.warns(UserWarning, match="once for each example"):
        found = for_each(*arguments, lora_linear_experts)
    for i in range(3):
        given = (xs[i], p.lora_A, p.lora_B, indices[i])
        expected = grad(loss, argnums=(0, 1, 2))(*given, reference.lora_linear_experts)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="weight: .* base weight is frozen"):
        grad(lambda weight: _call(replace(p, weight=weight)).sum())(p.weight)


def test_other_modes_leave_the_kernels_be(device, launches):
    """Selective checkpointing is one."""
    p = _problem((40, 2), 3, 20, 18, 4, device=device)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    expected = _call(p, backend="triton")
    launches.clear()
    with Watching():
        y = _call(p, backend="triton")
    assert launches
    assert torch.equal(y, expected)


def test_flops_are_counted():
    """As if each row had an expert, which only the indices know."""
    p = _problem((40, 2), 3, 20, 18, 4, highest=0)
    p = replace(p, indices=p.indices.clamp(min=0))
    x, A, B = (t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(_call(p), (x, A, B), p.g)
    rows, N, K, r = 80, 20, 18, 4
    assert counter.get_total_flops() == 2 * rows * (2 * N * K + 3 * r * (N + K))


def test_explain(device):
    p = _problem((40, 2), 3, 20, 18, 4, device=device)
    assert _call(p, explain_experts, backend="triton").backend == "triton"
    found = _call(p, explain_experts, backend="torch")
    assert found.backend == "torch"
    assert 'backend="torch" was asked for' in str(found)
    assert "some experts at a time" in str(found)


def test_explain_says_what_is_multiplied_in_fp32(cpu_without):
    cpu_without(torch.bfloat16)
    x, weight = torch.randn(200, 64).bfloat16(), torch.randn(3, 80, 64).bfloat16()
    A, B = torch.randn(3, 4, 64), torch.randn(3, 80, 4)
    for T, said in ((200, True), (3, False)):  # few rows are not worth the casts
        index = torch.zeros(T, dtype=torch.int64)
        found = explain_experts(x[:T], weight, A, B, expert_indices=index, backend="torch")
        assert ("fp32" in found.reasons) == said


_P = _problem((6, 2), 3, 5, 7, 2)
BAD = {
    "x: got list": {"x": [1.0]},
    "x: got shape [5, 7], wanted [6, 2, 7] or [6, 7]": {"x": _P.x[:5]},
    "weight: got shape [5, 7], wanted [experts, out_features, in_features]": {
        "weight": _P.weight[0]
    },
    "weight: got shape [0, 5, 7], wanted at least one expert": {"weight": _P.weight[:0]},
    "weight: got dtype torch.float64, wanted x's dtype": {"weight": _P.weight.double()},
    "weight: requires a gradient": {"weight": _P.weight.clone().requires_grad_()},
    "lora_A: got shape [3, 2, 6], wanted [3, r, 7]": {"lora_A": _P.lora_A[..., :6]},
    "lora_A: got shape [2, 2, 7], wanted [3, r, 7]": {"lora_A": _P.lora_A[:2]},
    "lora_A: got shape [3, 0, 7] (r = 0)": {"lora_A": _P.lora_A[:, :0]},
    "lora_B: got shape [3, 5, 1], wanted [3, 5, 2]": {"lora_B": _P.lora_B[..., :1]},
    "lora_A, lora_B: got lora_A alone": {"lora_B": None},
    "bias: got shape [5], wanted [3, 5]": {"bias": _P.bias[0]},
    "bias: got dtype torch.float16": {"bias": _P.bias.half()},
    "bias: requires a gradient": {"bias": _P.bias.clone().requires_grad_()},
    "expert_indices: got list": {"indices": [0, 1]},
    "expert_indices: got dtype torch.float32": {"indices": _P.indices.float()},
    "expert_indices: got dtype torch.bool": {"indices": _P.indices > 0},
    "expert_indices: got shape [6, 0], wanted an expert": {"indices": _P.indices[:, :0]},
    "scaling: got nan": {"scaling": float("nan")},
    "dropout_p: got 1.0": {"dropout_p": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    for function in (lora_linear_experts, explain_experts):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            _call(replace(_P, **BAD[message]), function)
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        _call(_P, backend="cuda")


def test_offsets_are_of_64_bits():
    check_offsets("experts", "second", "plain", "multi_grad")


def test_pieces_are_every_row_once():
    """Of groups of any size, in pieces of any, whether the host knows the indices or not."""
    from fused_lora.kernels.rows import groups_of_indices, groups_of_runs

    for E, M, block in itertools.product((1, 3, 200), (0, 1, 50), (1, 16, 64)):
        indices = torch.randint(-1, E, (M,))
        groups = groups_of_indices(indices, E)
        pieces = groups.pieces(block)
        values, counts = torch.unique_consecutive(indices, return_counts=True)
        runs = tuple(zip(values.tolist(), counts.tolist(), strict=True))
        known = groups_of_runs(runs, torch.device("cpu")) if M else groups
        for found, at in ((groups, pieces), (known, known.pieces(block))):
            rows = torch.full((M,), -1, dtype=torch.int32)
            for adapter, first, last in at.table.tolist():
                assert last - first <= block
                if first < last and adapter >= 0:
                    order = torch.arange(M) if found.order is None else found.order
                    assert (rows[order[first:last].long()] == -1).all()
                    rows[order[first:last].long()] = adapter
            assert torch.equal(rows, indices.int())
            for group, adapter in enumerate(found.adapters.tolist()):
                own = at.table[at.first[group] : at.first[group + 1]]
                own = own[own[:, 1] < own[:, 2]]
                assert (own[:, 0] == adapter).all()
                expected = 0 if adapter < 0 and found is known else int((indices == adapter).sum())
                assert int((own[:, 2] - own[:, 1]).sum()) == expected


def test_public():
    assert fused_lora.lora_linear_experts is lora_linear_experts
    assert "lora_linear_experts" in fused_lora.__all__
    assert "explain_experts" in fused_lora.__all__

"""`lora_linear` on both backends against the fp64 oracle: values, gradients, shapes, strides."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from oracle import TRAINED, check, expression, fused, problem, run

from fused_lora import LoRALinearFunction, lora_linear, reference
from fused_lora.dispatch import FEW_ROWS, Plan

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    BF16,
]
PLANS = [
    pytest.param(Plan("triton", "one_pass", "one_pass"), id="one_pass"),
    pytest.param(Plan("triton", "split", "split"), id="split"),
    pytest.param(Plan("torch", "library", "library"), id="torch"),
]
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 16, 33])
def test_values_and_gradients(device, plan, dtype, r):
    p = problem((3, 29), 77, 131, r, dtype=dtype, device=device)
    check(run(fused(plan), p), p)


@pytest.mark.parametrize("plan", PLANS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_values_and_gradients_with_dropout(device, plan, dtype, dropout_p):
    p = problem(70, 45, 101, 8, dtype=dtype, device=device, dropout_p=dropout_p)
    check(run(fused(plan), p), p)


@both_backends
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), BF16])
def test_fp32_adapters_over_a_half_base(device, backend, dtype):
    p = problem(50, 40, 72, 8, dtype=dtype, adapter_dtype=torch.float32, device=device)
    result = run(fused(backend), p)
    assert result["dlora_A"].dtype == result["dlora_B"].dtype == torch.float32
    check(result, p)


def test_bf16_on_the_cpu():
    p = problem(50, 40, 72, 8, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.1)
    check(run(fused("auto"), p), p)


@both_backends
@pytest.mark.parametrize("r", [1, 2, 3, 15, 17, 64, 65, 100, 128, 257, 512])
def test_every_rank(device, backend, r):
    p = problem(20, 33, 40, r, device=device, dropout_p=0.25)
    check(run(fused(backend), p), p)


def test_torch_backend_takes_ranks_beyond_the_kernels():
    p = problem(20, 33, 40, 700)
    check(run(fused("auto"), p), p)


@both_backends
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((0, 8, 8), id="M0"),
        pytest.param((1, 64, 48), id="M1"),
        pytest.param((5, 1, 7), id="N1"),
        pytest.param((5, 7, 1), id="K1"),
        pytest.param((5, 0, 7), id="N0"),
        pytest.param((5, 7, 0), id="K0"),
        pytest.param(((), 7, 9), id="vector"),
        pytest.param(((2, 0, 3), 7, 9), id="empty batch"),
        pytest.param(((2, 3, 4), 65, 129), id="4-D"),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_edge_shapes(device, backend, shape, dropout_p):
    p = problem(*shape, 4, device=device, dropout_p=dropout_p)
    check(run(fused(backend), p), p)


def _transposed(t):
    return t.mT.contiguous().mT


def _sliced(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    view = wide.to(t.device)[..., 1 : 1 + 2 * t.shape[-1] : 2]
    return view.copy_(t)


def _expanded(t):
    return t[:1].expand(t.shape)


@both_backends
@pytest.mark.parametrize("layout", [_transposed, _sliced, _expanded])
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B", "g"])
def test_strides(device, backend, layout, name):
    p = problem(37, 50, 45, 5, device=device, dropout_p=0.3)
    p = replace(p, **{name: layout(getattr(p, name))})
    assert not getattr(p, name).is_contiguous()
    check(run(fused(backend), p), p)


@both_backends
def test_strided_bias(device, backend):
    p = problem(10, 12, 14, 5, device=device)
    p = replace(p, bias=_sliced(p.bias))
    check(run(fused(backend), p), p)


def test_kernels_read_a_transposed_weight_in_place(device, monkeypatch):
    from fused_lora.kernels import gemm

    seen = []
    launch = gemm._launch
    monkeypatch.setattr(
        gemm, "_launch", lambda c, x, w, **kw: seen.append(w.data_ptr()) or launch(c, x, w, **kw)
    )
    p = problem(10, 12, 14, 5, device=device)
    p = replace(p, weight=_transposed(p.weight))
    run(fused("triton"), p)
    assert p.weight.data_ptr() in seen


@both_backends
@pytest.mark.parametrize(
    "needs",
    [needs for n in range(16) if (needs := tuple(t for i, t in enumerate(TRAINED) if n >> i & 1))],
    ids=lambda needs: "+".join(needs),
)
def test_only_the_wanted_gradients(device, backend, needs, launches):
    p = problem(20, 24, 28, 4, device=device)
    check(run(fused(backend), p, needs), p)
    wanted = {("lora_A", "lora_B"): "lora_grads", ("lora_A",): "grad_lora_a"}
    adapters = tuple(name for name in needs if name.startswith("lora"))
    grads = [name for name in launches if "grad" in name]
    expected = [wanted.get(adapters, "grad_lora_b")] if adapters and backend == "triton" else []
    assert grads == expected


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    p = problem(5, 6, 7, 3, dtype=torch.float64, dropout_p=dropout_p)

    def call(x, lora_A, lora_B, bias):
        return fused("auto")(replace(p, x=x, lora_A=lora_A, lora_B=lora_B, bias=bias))

    inputs = [getattr(p, name).requires_grad_() for name in TRAINED]
    assert torch.autograd.gradcheck(call, inputs)


@both_backends
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_backends_share_saved_tensors_and_save_nothing_large(device, backend, dropout_p):
    M, N, K, r = 20, 300, 30, 4
    p = problem(M, N, K, r, device=device, dropout_p=dropout_p)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(fused(backend), p)
    inputs = {t.data_ptr() for t in p.tensors().values()}
    new = [tuple(t.shape) for t in saved if t.data_ptr() not in inputs]
    assert new == [(M, r)]


@both_backends
def test_nothing_given_or_saved_is_written_to(device, backend):
    p = problem(20, 24, 28, 4, device=device, dropout_p=0.2)
    before = {name: t.clone() for name, t in p.tensors().items()}
    leaves = [getattr(p, name).requires_grad_() for name in TRAINED]
    y = fused(backend)(p)
    first = torch.autograd.grad(y, leaves, p.g, retain_graph=True)
    second = torch.autograd.grad(y, leaves, p.g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, before[name]) for name, t in p.tensors().items())


@both_backends
def test_the_same_bits_in_every_run(device, backend):
    p = problem(300, 40, 50, 8, device=device, dropout_p=0.1)
    first, second = run(fused(backend), p), run(fused(backend), p)
    assert all(torch.equal(first[name], second[name]) for name in first)


@both_backends
def test_double_backward_is_refused(device, backend):
    p = problem(4, 5, 6, 2, device=device)
    x = p.x.requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(fused(backend)(p).sum(), x, create_graph=True)


def _plain(p, **kwargs):
    kwargs = {"scaling": p.scaling, "bias": p.bias, "dropout_p": p.dropout_p} | kwargs
    return lora_linear(p.x, p.weight, p.lora_A, p.lora_B, **kwargs)


@both_backends
def test_manual_seed_reproduces_dropout(device, backend):
    p = problem(20, 24, 28, 4, device=device, dropout_p=0.5)
    torch.manual_seed(1)
    first, second = _plain(p, backend=backend), _plain(p, backend=backend)
    torch.manual_seed(1)
    again = _plain(p, backend=backend)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("backend", "seed"), [("triton", 2**62 - 12345), ("torch", 2**62 - 12345), ("torch", -5)]
)
def test_the_mask_is_the_documented_function_of_the_seed(device, backend, seed):
    M, K, threshold = 40, 37, round(0.3 * 65536)
    eye = torch.eye(K, device=device)
    seed = torch.tensor([seed], device=device)
    x = torch.ones(M, K, device=device)
    strategy = "library" if backend == "torch" else "split"
    plan = Plan(backend, strategy, strategy)
    zero = torch.zeros_like(eye)
    y = LoRALinearFunction.apply(x, zero, eye, eye, None, 1.0, seed, threshold, plan)
    assert torch.equal(y != 0, reference.keep_mask(seed, threshold, M, K))


def _drawn(p):
    """The problem with the mask that `lora_linear` will draw on a CPU."""
    state = torch.get_rng_state()
    M, K = p.x.shape[:-1].numel(), p.x.shape[-1]
    mask = reference.drawn_mask(reference.dropout_threshold(p.dropout_p), M, K)
    torch.set_rng_state(state)
    return replace(p, seed=mask)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lead", [0, 1, 3, FEW_ROWS, FEW_ROWS + 1, 1800, (2, 5), ()])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_on_a_cpu(launches, dtype, adapter_dtype, lead, dropout_p):
    """Small x without a node of ours, and large with it: the same values and gradients."""
    p = problem(lead, 45, 101, 8, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    p = _drawn(p)

    def call(p):
        return lora_linear(
            p.x,
            p.weight,
            p.lora_A,
            p.lora_B,
            scaling=p.scaling,
            bias=p.bias,
            dropout_p=p.dropout_p,
        )

    check(run(call, p), p)
    assert not launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [2.0, 1.3, 1e-9, 7e4])
def test_the_scaling_of_few_rows_is_not_rounded(dtype, scaling):
    """As `add_` rounds its alpha: with identities for A and B only the product itself rounds."""
    eye = torch.eye(8, dtype=dtype)
    x = (torch.randn(3, 8) / 100).to(dtype)
    y = lora_linear(x, torch.zeros_like(eye), eye, eye, scaling=scaling)
    assert torch.equal(y, x * scaling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 7, FEW_ROWS])
def test_few_rows_in_the_dtype_of_wider_adapters(dtype, M):
    """To the bit what PEFT computes for fp32 adapters over a half base."""
    x, W = torch.randn(M, 33, dtype=dtype, requires_grad=True), torch.randn(21, 33, dtype=dtype)
    A, B = torch.randn(4, 33, requires_grad=True), torch.randn(21, 4, requires_grad=True)
    y = lora_linear(x, W, A, B, scaling=2.0)
    update = F.linear(F.linear(x.float(), A), B)
    expected = (F.linear(x, W) + update * 2.0).to(dtype)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, A, B), g),
        torch.autograd.grad(expected, (x, A, B), g),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("K", [33, 1031])
def test_a_large_mask_of_few_rows_is_saved_in_the_dtype_of_x(launches, cpu_without, K):
    """And changes nothing but that: to the bit what a mask in the adapters' dtype gives."""
    cpu_without()
    p = problem(
        FEW_ROWS, 21, K, 4, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.5
    )  # of which the scale, 2, is exact
    x, A, B = (t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B))
    mask, saved = _drawn(p).seed, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, p.weight, A, B, scaling=2.0, dropout_p=p.dropout_p)
    masks = [t.dtype for t in saved if t.shape == x.shape and t.unique().tolist() == [0, 1]]
    assert masks == [torch.bfloat16 if K == 1031 else torch.float32]
    assert not launches

    update = F.linear(F.linear(x.float() * mask, A), B)
    expected = (F.linear(x, p.weight) + update * 4.0).to(x.dtype)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, A, B), g),
        torch.autograd.grad(expected, (x, A, B), g),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_second_derivatives_of_few_rows_on_a_cpu():
    """PyTorch's own there, and right."""
    p = problem(3, 5, 4, 2, dtype=torch.float64)

    def call(x, lora_A, lora_B):
        return lora_linear(x, p.weight, lora_A, lora_B, scaling=p.scaling, bias=p.bias)

    leaves = [t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]
    assert torch.autograd.gradgradcheck(call, leaves)


def test_no_dropout_draws_no_random_number():
    p = problem(4, 5, 6, 2)
    state = torch.get_rng_state()
    _plain(p, dropout_p=0.0)
    assert torch.equal(state, torch.get_rng_state())


@both_backends
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), BF16])
def test_autocast(device, backend, dtype):
    p = problem(20, 24, 28, 4, device=device)
    leaves = [getattr(p, name).requires_grad_() for name in TRAINED]
    with torch.autocast(device.type, dtype):
        y = _plain(p, backend=backend)
        assert y.dtype == torch.nn.functional.linear(p.x, p.weight).dtype == dtype
    grads = torch.autograd.grad(y, leaves, p.g.to(dtype))
    assert all(grad.dtype == torch.float32 for grad in grads)
    half = replace(p, **{n: getattr(p, n).detach().to(dtype) for n in ("x", "weight", "bias", "g")})
    check({"y": y.detach(), "dlora_A": grads[1], "dlora_B": grads[2]}, half)


def test_reference_agrees_with_the_formula():
    p = problem(6, 5, 4, 3, dtype=torch.float64)
    delta = p.scaling * p.lora_B @ p.lora_A
    torch.testing.assert_close(expression(p), p.x @ (p.weight + delta).t() + p.bias)


def test_backend_really_ran(device, launches):
    p = problem(8, 8, 8, 2, device=device)
    _plain(p, backend="torch")
    assert launches == []
    _plain(p, backend="triton")
    assert launches


@pytest.mark.parametrize(
    ("strategy", "kernels"),
    [
        ("one_pass", ["gemm_one_pass"]),
        ("split", ["gemm_scaled", "gemm_add_lora"]),
        ("library", ["gemm_scaled"]),
        ("tma_one_pass", ["persistent_one_pass"]),
        ("tma_split", ["gemm_scaled", "persistent_add_lora"]),
        ("one_launch", ["persistent_produced"]),
        ("skinny", ["skinny"]),
    ],
)
def test_launches_of_a_strategy(device, launches, strategy, kernels):
    p = problem(37, 72, 136, 8, dtype=torch.float16, device=device)
    check(run(fused(Plan("triton", strategy, strategy)), p), p)
    assert launches == [*kernels, *kernels, "lora_grads"]


@pytest.mark.parametrize(
    ("strategy", "forward", "dx"),
    [
        ("split", "gemm_add_lora", "gemm_add_lora"),
        ("library", "gemm_scaled", "add_lora"),
        ("tma_split", "persistent_add_lora", "persistent_add_lora"),
        ("one_launch", "persistent_produced", "persistent_produced"),
        ("skinny", "skinny", "skinny"),
    ],
)
@pytest.mark.parametrize("r", [8, 32, 144])
def test_dropout_in_a_strategy(device, launches, strategy, forward, dx, r):
    p = problem(37, 72, 136, r, dtype=torch.float16, device=device, dropout_p=0.3)
    check(run(fused(Plan("triton", strategy, strategy)), p), p)
    makers_of_y = [name for name in launches if name != "gemm_scaled" or strategy == "library"]
    assert (makers_of_y[0], *launches[-2:]) == (forward, dx, "lora_grads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 7), (37, 45, 131), (0, 8, 8), (5, 7, 0), (5, 0, 7)])
def test_a_product_by_the_library_and_dropout_in_the_input_gradient(device, launches, dtype, shape):
    """h b is dropped by a launch that adds it, of any shape and dtype."""
    p = problem(*shape, 9, dtype=dtype, adapter_dtype=torch.float32, device=device, dropout_p=0.3)
    check(run(fused(Plan("triton", "library", "library")), p), p)
    assert launches == ["gemm_scaled", "gemm_scaled", "add_lora", "lora_grads"]


@pytest.mark.parametrize(
    ("strategy", "kernels"),
    [
        ("tma_one_pass", ["gemm_one_pass"]),
        ("tma_split", ["gemm_scaled"]),
        ("one_launch", ["gemm_scaled"]),
    ],
)
def test_tensors_without_a_descriptor_go_to_the_kernels_that_need_none(
    device, launches, strategy, kernels
):
    p = problem(9, 13, 11, 3, dtype=torch.float16, device=device)
    check(run(fused(Plan("triton", strategy, strategy)), p), p)
    assert launches == [*kernels, *kernels, "lora_grads"]


def test_ranks_that_would_spill_have_no_descriptors(device, launches):
    p = problem(37, 72, 136, 24, dtype=torch.float16, device=device, dropout_p=0.3)
    check(run(fused(Plan("triton", "tma_split", "one_launch")), p), p)
    assert launches == ["gemm_scaled", "gemm_scaled", "add_lora", "lora_grads"]


@pytest.mark.gpu
def test_more_than_2_to_31_elements(device):
    M, K, N = 2**19 + 3, 4104, 64  # x has 2.15e9 elements
    x = torch.zeros(M, K, dtype=torch.bfloat16, device=device)
    x[-3:] = torch.randn(3, K, device=device, dtype=torch.bfloat16)
    p = problem(3, N, K, 16, dtype=torch.bfloat16, device=device)
    big = replace(p, x=x, g=torch.empty(0, device=device))
    y = run(fused("triton"), big, ())["y"][-3:]
    check({"y": y}, replace(p, x=x[-3:].clone()))


def test_all_pairs_of_backends_and_grad_modes(device):
    p = problem(8, 9, 10, 2, device=device)
    for backend, mode in product(("triton", "torch"), (torch.no_grad, torch.inference_mode)):
        with mode():
            y = _plain(p, backend=backend)
        assert not y.requires_grad
        check({"y": y}, p)


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_output_may_be_changed_in_place(device, backend, lead):
    """As `nn.Linear`'s: nn.ReLU(inplace=True) and `y += residual` are common."""
    p = problem(lead, 6, 7, 2, device=device)
    p.lora_B.requires_grad_()

    def grad(function, **options):
        y = function(p.x, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, **options)
        y.relu_()
        return torch.autograd.grad(y, p.lora_B, p.g)[0]

    torch.testing.assert_close(
        grad(lora_linear, backend=backend), grad(reference.lora_linear), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("M", [6, 70])
def test_lazily_negated_views_are_masked(own_nodes, M):
    p = _drawn(problem(M, 5, 8, 2, dropout_p=0.5))
    p.x = torch.complex(p.x, -p.x).conj().imag
    check(run(fused("auto"), p), p)


@both_backends
def test_lazily_negated_views(device, backend):
    """The kernels would read the numbers without their sign: those calls are PyTorch's."""
    p = problem(6, 5, 8, 2, device=device)
    p.x = torch.complex(p.x, -p.x).conj().imag
    assert p.x.is_neg()
    if backend == "triton":
        with pytest.raises(TypeError, match="negated when it is read"):
            run(fused(backend), p)
    check(run(fused("auto"), p), p)
    p.x = p.x.resolve_neg()
    p.g = torch.complex(p.g, -p.g).conj().imag
    assert p.g.is_neg()
    check(run(fused(backend), p), p)

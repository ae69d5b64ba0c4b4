"""torch.compile, torch.export and the registered operators behind them."""

import functools
from dataclasses import replace

import pytest
import torch
from oracle import TRAINED, check, fused, problem
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fused_lora import FusedLoRALinear, dora_linear, inject, lora_linear, reference
from fused_lora.dora_ops import dora_linear_backward_op, dora_linear_op
from fused_lora.ops import lora_linear_backward_op, lora_linear_op

COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def recompiled(monkeypatch):
    """The number of graphs that dynamo has made."""
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _call(p, scaling=None, **kwargs):
    return lora_linear(
        p.x,
        p.weight,
        p.lora_A,
        p.lora_B,
        scaling=p.scaling if scaling is None else scaling,
        bias=p.bias,
        **kwargs,
    )


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_values_and_gradients(device, launches, compiler, dynamic, backend):
    compiled = torch.compile(_call, backend=compiler, fullgraph=True, dynamic=dynamic)
    p = problem((3, 7), 12, 20, 4, device=device)
    leaves = {name: getattr(p, name).requires_grad_() for name in TRAINED}
    y = compiled(p, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), p.g)
    check({"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}, p)
    assert bool(launches) == (backend == "triton")


def test_only_the_wanted_gradients(device, launches):
    p = problem(6, 12, 20, 4, device=device)
    p.lora_B.requires_grad_()
    compiled = torch.compile(_call, backend="aot_eager", fullgraph=True)
    compiled(p, backend="triton").sum().backward()
    assert p.lora_B.grad is not None
    assert launches == ["gemm_one_pass", "grad_lora_b"]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_no_recompilation_when_M_changes(compiler, dropout_p, recompiled):
    p = problem(6, 12, 20, 4)
    A, B = p.lora_A.requires_grad_(), p.lora_B.requires_grad_()  # so that h comes out too

    @torch.compile(backend=compiler, fullgraph=True, dynamic=True)
    def call(x):
        return lora_linear(x, p.weight, A, B, scaling=2.0, dropout_p=dropout_p)

    call(torch.randn(2, 6, 20)).sum().backward()
    before = recompiled()
    for M in (7, 64, 3, 1000):
        call(torch.randn(3, M, 20)).sum().backward()
    assert recompiled() == before


@pytest.mark.parametrize(
    ("dtype", "options", "is_operator"),
    [
        (torch.float32, {}, False),
        (torch.float64, {"backend": "torch"}, False),
        (torch.float32, {"backend": "triton"}, True),
        (torch.float32, {"dropout_p": 0.1}, True),
        (torch.bfloat16, {}, False),
        (torch.float16, {}, True),
    ],
)
def test_on_a_cpu_the_compiler_gets_the_formula(cpu_without, dtype, options, is_operator):
    cpu_without(torch.float16)
    targets = []

    def compiler(module, _):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    p = problem((3, 70), 12, 20, 4, dtype=dtype)
    p.lora_A.requires_grad_()
    torch.compile(_call, backend=compiler, fullgraph=True)(p, **options)
    # PyTorch 2.11's Dynamo tells every call that it is exported, and an export has operators.
    exported = torch.compile(lambda: torch.compiler.is_exporting(), backend="eager")()
    assert any("fused_lora" in target for target in targets) == (is_operator or exported)


def test_at_most_one_recompilation_when_alpha_changes(recompiled):
    """Dynamo takes the first value of a float for a constant and the second for a variable."""
    p = problem(6, 12, 20, 4)
    compiled = torch.compile(_call, backend="aot_eager", fullgraph=True)
    compiled(p, 1.0)
    compiled(p, 0.5)
    before = recompiled()
    for scaling in (0.25, 3.0, 7.5):
        torch.testing.assert_close(compiled(p, scaling), _call(p, scaling))
    assert recompiled() == before


def test_no_recompilation_with_dynamic_shapes_when_alpha_changes(recompiled):
    p = problem(6, 12, 20, 4)
    compiled = torch.compile(_call, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(p, 1.0)
    before = recompiled()
    for scaling in (0.25, 3.0, 7.5):
        torch.testing.assert_close(compiled(p, scaling), _call(p, scaling))
    assert recompiled() == before


def test_a_layers_alpha_and_seed_can_change(recompiled):
    layer = FusedLoRALinear(8, 6, 2, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8)
    before = recompiled()
    outputs = []
    for seed in range(3):
        torch.manual_seed(seed)
        outputs.append(compiled(x))
        outputs[-1].sum().backward()
    assert recompiled() == before + 1
    assert not torch.equal(outputs[0], outputs[1])
    layer.eval()
    for layer.scaling in (1.0, 0.5, 3.0, 7.5):
        torch.testing.assert_close(compiled(x), layer(x))
    assert recompiled() <= before + 3  # training, the first alpha, all others


@pytest.mark.parametrize("compiler", COMPILERS)
def test_dropout_draws_a_new_mask_each_call_and_the_same_in_backward(compiler):
    K = 64
    eye, x = torch.eye(K), torch.ones(32, K, requires_grad=True)

    @torch.compile(backend=compiler, fullgraph=True)
    def call(x):
        return lora_linear(x, torch.zeros(K, K), eye, eye, scaling=1.0, dropout_p=0.5)

    first, second = call(x), call(x)
    assert not torch.equal(first, second)
    (dx,) = torch.autograd.grad(first, x, torch.ones_like(first))
    assert torch.equal(dx, first)  # x is ones: both are the scaled mask


def test_a_model_with_adapters(recompiled):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inject(model, 2, 4, "all-linear")
    for module in (model[0], model[2]):
        nn.init.normal_(module.lora_B)
    x = torch.randn(5, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].lora_A.grad is not None
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_bad_input_is_refused_while_tracing():
    compiled = torch.compile(lora_linear, backend="aot_eager")
    t = torch.ones(4, 4)
    with pytest.raises(ValueError, match="lora_B: got shape"):
        compiled(t, t, t, torch.ones(3, 4), scaling=1.0)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="scaling: got inf"):
        compiled(t, t, t, t, scaling=float("inf"))


def test_autocast_under_compile(device):
    p = problem(6, 12, 20, 4, device=device)
    A = p.lora_A.requires_grad_()
    with torch.autocast(device.type, torch.float16):
        y = torch.compile(_call, backend="aot_eager", fullgraph=True)(p)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert A.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_function_transforms_break_the_graph(device):
    layer = FusedLoRALinear(8, 6, 2, device=device)
    nn.init.normal_(layer.lora_B)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 8, device=device)

    def gradients(x):
        def loss(parameters):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        return torch.func.grad(loss)({n: parameters[n] for n in ("lora_A", "lora_B")})["lora_A"]

    compiled = torch.compile(gradients, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gradients(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="inside of a torch.func transform"):
        torch.compile(gradients, backend="aot_eager", fullgraph=True)(x)


def _layouts(t):
    """Contiguous, transposed and sliced."""
    wide = torch.zeros(t.shape[0] * 2, t.shape[1] * 2, dtype=t.dtype, device=t.device)
    sliced = wide[::2, ::2]
    sliced.copy_(t)
    return {"contiguous": t, "transposed": t.t().contiguous().t(), "sliced": sliced}


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "empty"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(device, layout, dropout_p):
    p = problem(0 if layout == "empty" else 5, 6, 8, 2, device=device)
    names = ("x", "weight", "lora_A", "lora_B")
    tensors = [getattr(p, name) for name in names]
    if layout != "empty":
        tensors = [_layouts(t)[layout] for t in tensors]
    x, weight, A, B = (
        t.detach().requires_grad_(n != "weight") for t, n in zip(tensors, names, strict=True)
    )
    rest = ([weight], "", 0.5, None if not dropout_p else torch.tensor([3], device=device))
    rest += (round(dropout_p * 65536), "torch", True)
    torch.library.opcheck(lora_linear_op, (x, A, B, p.bias, *rest))
    h = torch.randn(x.shape[0], 2, device=device)
    g, x, A, B = (t.detach() for t in (p.g, x, A, B))
    torch.library.opcheck(lora_linear_backward_op, (g, x, A, B, h, *rest))


def _exported(device):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)).to(device)
    inject(model, 2, 4, "all-linear")
    nn.init.normal_(model[2].lora_B)
    model.eval().requires_grad_(False)
    example = torch.randn(5, 8, device=device)
    batch = torch.export.Dim("batch")
    return model, torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def test_export(device, tmp_path):
    model, program = _exported(device)
    x = torch.randn(9, 8, device=device)
    torch.testing.assert_close(program.module()(x), model(x))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "fused_lora.lora_linear.default" in targets


@pytest.mark.slow
def test_aot_inductor_package(device, tmp_path):
    """Loaded where fused_lora is imported: the package calls the operator, it does not hold it."""
    model, program = _exported(device)
    file = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    x = torch.randn(9, 8, device=device)
    torch.testing.assert_close(torch._inductor.aoti_load_package(file)(x), model(x))


def test_eager_calls_make_no_operator_call(monkeypatch):
    from fused_lora import ops

    monkeypatch.setattr(ops, "lora_linear_op", None)
    p = problem(5, 6, 8, 2)
    check({"y": fused("auto")(p)}, p)
    torch.testing.assert_close(_call(p), fused("auto")(p))


# --- DoRA


def _dora(p, m, weight=None, **options):
    weight = p.weight if weight is None else weight
    options = {"scaling": p.scaling, "bias": p.bias} | options
    return dora_linear(p.x, weight, p.lora_A, p.lora_B, m, **options)


def _dora_problem(*shape, **options):
    p = problem(*shape, **options)
    return p, (torch.rand(p.weight.shape[0]) + 0.5).to(p.x.device)


def _dora_outcome(call, p, m, **options):
    leaves = [t.detach().requires_grad_() for t in (p.x, p.lora_A, p.lora_B, p.bias, m)]
    x, A, B, bias, magnitude = leaves
    y = call(replace(p, x=x, lora_A=A, lora_B=B, bias=bias), magnitude, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, p.g.to(y.dtype))


@pytest.fixture
def dora_kernels(monkeypatch):
    """What DoRA's own kernels were called, in order."""
    from fused_lora import triton_backend
    from fused_lora.kernels import dora

    called = []

    def record(module, name, wanted=lambda **_: True):
        launcher = getattr(module, name)

        def recorded(*args, **kwargs):
            if wanted(**kwargs):
                called.append(name)
            return launcher(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    record(dora, "weight_norm")
    record(dora, "scale_columns_backward")
    record(triton_backend, "gemm_one_pass", lambda dora=None, **_: dora is not None)
    return called


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_dora_runs_its_kernels(device, dora_kernels, compiler, dynamic):
    p, m = _dora_problem((3, 7), 12, 20, 4, device=device)
    compiled = torch.compile(_dora, backend=compiler, fullgraph=True, dynamic=dynamic)
    got = _dora_outcome(compiled, p, m, backend="triton")
    assert dora_kernels == ["weight_norm", "gemm_one_pass", "scale_columns_backward"]
    expected = _dora_outcome(_dora, p, m, backend="triton")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert dora_kernels == 2 * ["weight_norm", "gemm_one_pass", "scale_columns_backward"]


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "bias", "magnitude"])
def test_dora_gives_only_the_wanted_gradient(wanted):
    p, m = _dora_problem(6, 12, 20, 4)
    leaf = (m if wanted == "magnitude" else getattr(p, wanted)).requires_grad_()
    compiled = torch.compile(_dora, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(p, m), leaf, p.g)
    (expected,) = torch.autograd.grad(_dora(p, m), leaf, p.g)
    torch.testing.assert_close(got, expected)


def test_a_dora_layer_does_not_recompile(recompiled):
    layer = FusedLoRALinear.from_linear(nn.Linear(20, 12), 4, use_dora=True)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for M, layer.scaling in ((6, 1.0), (7, 0.5)):
        compiled(torch.randn(2, M, 20)).sum().backward()
    before = recompiled()
    for M, layer.scaling in ((64, 0.25), (3, 7.5)):
        x = torch.randn(2, M, 20)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
    assert recompiled() == before


def test_dora_under_autocast_has_the_norm_of_the_weight_before_it_is_cast():
    p, m = _dora_problem(6, 12, 20, 4)
    p.weight *= 1e-6  # a few steps of fp16
    p.lora_B, m = p.lora_B * 1e-6, m * 1e-6
    compiled = torch.compile(_dora, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.float16):
        got, expected = (_dora_outcome(call, p, m) for call in (compiled, _dora))
    assert got[0].dtype == torch.float16
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dora_under_function_transforms(device, backend):
    p, m = _dora_problem((3, 5), 12, 20, 4, device=device)

    def loss(x, A, m):
        return _dora(replace(p, x=x, lora_A=A), m, backend=backend).square().sum()

    def plain(x, A, m):
        y = reference.dora_linear(x, p.weight, A, p.lora_B, m, scaling=p.scaling, bias=p.bias)
        return y.square().sum()

    arguments = (p.x, p.lora_A, m)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(*arguments)
    expected = torch.func.grad(plain, argnums=(0, 1, 2))(*arguments)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    rows = torch.func.vmap(torch.func.grad(loss, argnums=(1, 2)), (0, None, None))(*arguments)
    for row, whole in zip(rows, expected[1:], strict=True):
        torch.testing.assert_close(row.sum(0), whole, rtol=1e-4, atol=1e-3)
    with pytest.raises(RuntimeError, match="dora_linear: its gradients cannot be differentiated"):
        torch.func.grad(lambda A: torch.func.grad(loss, 1)(p.x, A, m).sum())(p.lora_A)


def test_dora_with_fake_tensors_and_selective_checkpointing(device, dora_kernels):
    p, m = _dora_problem(6, 12, 20, 4, device=device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = replace(p, x=mode.from_tensor(p.x))
        shapes = [t.shape for t in _dora_outcome(_dora, fake, m)]
    assert shapes == [(6, 12), (6, 20), (4, 20), (12, 4), (12,), (12,)]
    saved = [torch.ops.fused_lora.dora_linear.default]
    context = functools.partial(create_selective_checkpoint_contexts, saved)

    def call(p, m):
        return checkpoint(
            lambda x: _dora(replace(p, x=x), m, backend="triton"),
            p.x,
            use_reentrant=False,
            context_fn=context,
        )

    got = _dora_outcome(call, p, m)
    assert dora_kernels == ["weight_norm", "gemm_one_pass", "scale_columns_backward"]
    torch.testing.assert_close(got, _dora_outcome(_dora, p, m, backend="triton"))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("casts", [False, True])
def test_opcheck_of_dora(device, layout, casts):
    p, m = _dora_problem(5, 6, 8, 2, device=device)
    names = ("x", "weight", "lora_A", "lora_B", "g")
    x, weight, A, B, g = (_layouts(getattr(p, name))[layout] for name in names)
    weights = [weight, weight.double()] if casts else [weight]
    trained = [t.detach().requires_grad_() for t in (x, A, B, m, p.bias)]
    rest = (";" * casts, 0.5, "torch", True)
    torch.library.opcheck(dora_linear_op, (*trained, weights, *rest, True))
    norm, h, z = (torch.rand(*s, device=device) for s in ((6,), (5, 2), (5, 6)))
    arguments = (g, x, A, B, m, norm, h, z, [weight], "", 0.5, "torch", True)
    torch.library.opcheck(dora_linear_backward_op, arguments)


def _exported_dora(device):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    inject(model, 2, 4, "all-linear", use_dora=True)
    nn.init.normal_(model[2].lora_B)
    model.eval().requires_grad_(False)
    batch = torch.export.Dim("batch")
    example = torch.randn(5, 8, device=device)
    return model, torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def test_export_of_dora(device):
    model, program = _exported_dora(device)
    x = torch.randn(9, 8, device=device)
    torch.testing.assert_close(program.module()(x), model(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("fused_lora.dora_linear.default") == 2


@pytest.mark.slow
def test_aot_inductor_package_of_dora(device, tmp_path):
    model, program = _exported_dora(device)
    file = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    x = torch.randn(9, 8, device=device)
    torch.testing.assert_close(torch._inductor.aoti_load_package(file)(x), model(x))

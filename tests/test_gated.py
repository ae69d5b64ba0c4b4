"""`lora_linear_gated`: the house rule on both backends, what is saved, where PyTorch makes x."""

import functools
import itertools
import re
from dataclasses import dataclass, fields

import pytest
import torch
from oracle import Made, Problem, check, problem, run
from outside import run_outside
from torch import nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import lora_linear, lora_linear_gated, quantize_nf4, reference, torch_backend
from fused_lora.gated import LoRALinearGatedFunction

ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh"]
BACKENDS = ["triton", "torch"]
NEEDS = ("gate", "up", "lora_A", "lora_B", "bias")
# Of sums in fp32 that are rounded in another order.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
ROWS = 70  # more than what is few everywhere
pytestmark = pytest.mark.usefixtures("own_nodes")


@dataclass
class GatedProblem(Problem):
    """x is not used."""

    gate: torch.Tensor
    up: torch.Tensor


def _problem(*shape, **options):
    p = problem(*shape, **options)
    return GatedProblem(
        **{f.name: getattr(p, f.name) for f in fields(p)},
        gate=2 * torch.randn_like(p.x),
        up=torch.randn_like(p.x),
    )


def _call(p, function=lora_linear_gated, **options):
    operands = (p.gate, p.up, p.weight, p.lora_A, p.lora_B)
    return function(*operands, scaling=p.scaling, bias=p.bias, **options)


def _expression(activation="silu"):
    return lambda p: _call(p, reference.lora_linear_gated, activation=activation)


def _of_gated(launches):
    return [name for name in launches if name.startswith("gated")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(9, 33, 70, 4), ((2, 35), 33, 1030, 20)], ids=str)
def test_rule(device, launches, activation, backend, dtype, shape):
    p = _problem(*shape, dtype=dtype, adapter_dtype=torch.float32, device=device)
    options = {"activation": activation, "backend": backend}
    check(run(lambda p: _call(p, **options), p, NEEDS), p, _expression(activation))
    assert _of_gated(launches) == ["gated", "gated", "gated_backward"] * (backend == "triton")
    assert bool(launches) == (backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_row(device, backend, dtype):
    """Of so few elements PyTorch's error is luck: against `lora_linear` of the product."""
    p = _problem(1, 5, 7, 1, dtype=dtype, device=device)
    inputs = [t.requires_grad_() for t in (p.gate, p.up, p.lora_A, p.lora_B)]
    x = nn.functional.silu(p.gate) * p.up
    adapter = {"scaling": p.scaling, "bias": p.bias, "backend": backend}
    expected = lora_linear(x, p.weight, p.lora_A, p.lora_B, **adapter)
    y = _call(p, backend=backend)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {}
    assert_close(y, expected, **tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, p.g), torch.autograd.grad(expected, inputs, p.g), strict=True
    ):
        assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_and_fp64_on_pytorch_are_the_expression(activation):
    for dtype in (torch.bfloat16, torch.float64):
        p = _problem(ROWS, 24, 40, 4, dtype=dtype)
        check(run(lambda p: _call(p, activation=activation), p, NEEDS), p, _expression(activation))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # NumPy's
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_at_their_ends(device, backend):
    """Where exponentials overflow or vanish."""
    values = torch.tensor([-1e30, -1e4, -200.0, -90.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 90.0, 1e4])
    gate = values.repeat(ROWS, 1).to(device).requires_grad_()
    K = len(values)
    options = {"scaling": 1.0, "backend": backend}
    eye, zeros = torch.eye(K, device=device), torch.zeros(1, K, device=device)
    for activation in ACTIVATIONS:
        acted = reference.lora_linear_gated(
            gate, torch.ones_like(gate), eye, zeros, zeros.t(), scaling=1.0, activation=activation
        )
        y = lora_linear_gated(
            gate, torch.ones_like(gate), eye, zeros, zeros.t(), activation=activation, **options
        )
        assert_close(y, acted)
        inner = slice(1, None)  # PyTorch's own GeLU has NaN for the derivative at -1e30
        for got, want in zip(
            torch.autograd.grad(y.sum(), gate), torch.autograd.grad(acted.sum(), gate), strict=True
        ):
            assert_close(got[:, inner], want[:, inner])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [("gate",), ("up",), ("lora_A",), ("gate", "up"), NEEDS[2:]])
def test_gradients_that_nobody_needs(device, backend, frozen):
    p = _problem(ROWS, 24, 40, 4, device=device)
    needs = tuple(name for name in NEEDS if name not in frozen)
    check(run(lambda p: _call(p, backend=backend), p, needs), p, _expression())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(device, backend):
    """Halves of one tensor, as of a gate_up projection, and a transposed one."""
    p = _problem(ROWS, 24, 40, 4, device=device)
    both = torch.randn(ROWS, 80, device=device)
    for gate, up in (both.chunk(2, dim=1), (both[:, ::2], both.t()[:40].t().contiguous())):
        p.gate, p.up = gate, up
        check(run(lambda p: _call(p, backend=backend), p, NEEDS), p, _expression())
    p.gate = p.up = torch.randn(40, ROWS, device=device).t()
    check(run(lambda p: _call(p, backend=backend), p, ("lora_A", "lora_B")), p, _expression())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("permuted", [("gate",), ("up",), ("gate", "up")])
def test_permuted_inputs(device, backend, permuted):
    """Dense, but no matrix is a view of them."""
    p = _problem((5, 14), 24, 40, 4, device=device)
    for name in permuted:
        setattr(p, name, torch.randn(40, 14, 5, device=device).permute(2, 1, 0))
    check(run(lambda p: _call(p, backend=backend), p, NEEDS), p, _expression())


def test_inputs_that_need_no_gradient_are_not_kept():
    p = _problem(ROWS, 24, 40, 4)
    p.lora_A.requires_grad_()
    p.lora_B.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = _call(p)
    assert sum(t.numel() == p.gate.numel() for t in saved) == 1
    expected = torch.autograd.grad(_call(p, reference.lora_linear_gated), p.lora_A, p.g)
    p.gate.mul_(2)  # as it may be
    assert_close(torch.autograd.grad(y, p.lora_A, p.g), expected)


def test_inference_tensors_and_batches_without_gradients():
    p = _problem(ROWS, 24, 40, 4)
    expected = _call(p, reference.lora_linear_gated)
    with torch.inference_mode():
        gate = p.gate.clone()
    operands = (p.weight, p.lora_A.requires_grad_(), p.lora_B)
    options = {"scaling": p.scaling, "bias": p.bias}
    y = lora_linear_gated(gate, p.up.clone().requires_grad_(), *operands, **options)
    assert_close(y, expected)
    torch.autograd.grad(y.sum(), p.lora_A)
    with torch.no_grad():
        batched = vmap(lambda up: lora_linear_gated(p.gate, up, *operands, **options))
        assert_close(batched(p.up[None])[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(device, backend):
    p = _problem((2, 0), 24, 40, 4, device=device)
    check(run(lambda p: _call(p, backend=backend), p, NEEDS), p, _expression())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_are_those_of_the_layer(device, backend):
    p = _problem(ROWS, 24, 40, 4, device=device)
    options = {"scaling": 1.0, "dropout_p": 0.4, "backend": backend}
    operands = (p.weight, p.lora_A, p.lora_B)
    inputs = [t.requires_grad_() for t in (p.gate, p.up, p.lora_A, p.lora_B)]
    results = []
    for fused in (True, False):
        torch.manual_seed(3)
        if fused:
            y = lora_linear_gated(p.gate, p.up, *operands, **options)
        else:
            y = lora_linear(nn.functional.silu(p.gate) * p.up, *operands, **options)
        results.append((y, *torch.autograd.grad(y, inputs, p.g)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_kept_and_nothing_else_of_their_size(device, backend):
    """On the CPU's path act(gate) too."""
    p = _problem(ROWS, 24, 40, 4, device=device)
    inputs = [p.gate.requires_grad_(), p.up.requires_grad_(), p.lora_A.requires_grad_()]
    copies = [p.gate.clone(), p.up.clone()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = _call(p, backend=backend)
    large = [t for t in saved if t.numel() == p.gate.numel()]
    assert len(large) == (2 if backend == "triton" else 3)
    assert {t.data_ptr() for t in large[:2]} == {p.gate.data_ptr(), p.up.data_ptr()}
    torch.autograd.grad(y, inputs, p.g, retain_graph=True)
    torch.autograd.grad(y, inputs, p.g)
    assert torch.equal(p.gate, copies[0])
    assert torch.equal(p.up, copies[1])


class Storages(TorchDispatchMode):
    """The memory of every tensor of a size that operators give, kept so that none has another's."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen = numel, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.numel:
            self.seen[result.untyped_storage().data_ptr()] = result
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_needs_little_memory(device, backend):
    """x and its gradient, which become the inputs' gradients; by PyTorch one more, of act(gate)."""
    p = _problem(ROWS, 24, 40, 4, device=device)
    inputs = [p.gate.requires_grad_(), p.up.requires_grad_(), p.lora_A.requires_grad_()]
    y = _call(p, backend=backend)
    with Storages(p.gate.numel()) as storages:
        gradients = torch.autograd.grad(y, inputs, p.g)
    saved = {p.gate.data_ptr(), p.up.data_ptr()}
    made = {at: t for at, t in storages.seen.items() if at not in saved}
    assert len(made) <= (2 if backend == "triton" else 4)  # that and the saved one are act(gate)'s
    assert {t.data_ptr() for t in gradients[:2]} <= set(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(device, launches, backend):
    p = _problem(ROWS, 24, 40, 4, device=device)
    expected = _call(p, reference.lora_linear_gated)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(_call(p, backend=backend), expected)
    assert _of_gated(launches) == ["gated"] * 2 * (backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_codes(device, backend):
    p = _problem(ROWS, 24, 128, 4, device=device)
    codes = quantize_nf4(p.weight)
    inputs = [t.requires_grad_() for t in (p.gate, p.up, p.lora_A, p.lora_B)]
    adapter = {"scaling": 1.0, "backend": backend}
    y = lora_linear_gated(p.gate, p.up, codes, p.lora_A, p.lora_B, **adapter)
    x = nn.functional.silu(p.gate) * p.up
    expected = reference.lora_linear(
        x, codes.dequantize(torch.float32), p.lora_A, p.lora_B, scaling=1.0
    )
    assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, p.g), torch.autograd.grad(expected, inputs, p.g), strict=True
    ):
        assert_close(ours, theirs)


@pytest.fixture
def recorded(monkeypatch):
    """How often the Function was called."""
    calls = []
    real = LoRALinearGatedFunction.apply
    monkeypatch.setattr(
        LoRALinearGatedFunction, "apply", lambda *args: calls.append(args) or real(*args)
    )
    return calls


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(recorded, enabled):
    """gate and up come in its dtype from the layers before; others are cast by the last layer."""
    p = _problem(ROWS, 24, 40, 4)
    inputs = [p.gate.bfloat16(), p.up.bfloat16()] if enabled else [p.gate, p.up]
    with torch.autocast("cpu", torch.bfloat16):
        p.gate, p.up = [t.requires_grad_() for t in inputs]
        got, expected = _call(p), _call(p, reference.lora_linear_gated)
    assert got.dtype == torch.bfloat16
    assert_close(got, expected, rtol=0.1, atol=0.1)
    (dgate,) = torch.autograd.grad(got, p.gate, p.g.bfloat16())
    (wanted,) = torch.autograd.grad(expected, p.gate, p.g.bfloat16())
    assert_close(dgate, wanted, rtol=0.1, atol=0.1)
    assert len(recorded) == enabled


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(recorded, reentrant):
    p = _problem(ROWS, 24, 40, 4)
    p.gate.requires_grad_()
    torch.manual_seed(1)
    y = checkpoint(lambda: _call(p, dropout_p=0.3), use_reentrant=False)
    torch.manual_seed(1)
    expected = _call(p, dropout_p=0.3)
    if reentrant:
        torch.manual_seed(1)
        y = checkpoint(
            lambda gate: lora_linear_gated(
                gate, p.up, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, bias=p.bias,
                dropout_p=0.3,
            ),
            p.gate,
            use_reentrant=True,
        )  # fmt: skip
    y.backward(p.g)
    (dgate,) = torch.autograd.grad(expected, p.gate, p.g)
    assert_close(p.gate.grad, dgate)


def test_what_watches_operators_gets_the_formula(recorded):
    p = _problem(ROWS, 24, 40, 4)
    p.gate.requires_grad_()
    expected = _call(p, reference.lora_linear_gated)
    (wanted,) = torch.autograd.grad(expected, p.gate, p.g)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(gate):
        return lora_linear_gated(
            gate, p.up, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, bias=p.bias
        )

    y = compiled(p.gate)
    assert_close(y, expected)
    assert_close(torch.autograd.grad(y, p.gate, p.g)[0], wanted)
    with Made():
        assert_close(_call(p), expected)
    examples = vmap(lambda gate, up: lora_linear_gated(
        gate, up, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, bias=p.bias
    ))(p.gate[None], p.up[None])  # fmt: skip
    assert_close(examples[0], expected)
    assert recorded == []


def test_no_second_derivative():
    p = _problem(ROWS, 24, 40, 4)
    p.gate.requires_grad_()
    with pytest.raises(RuntimeError, match=r"lora_linear_gated.*cannot be differentiated again"):
        torch.autograd.grad(_call(p).sum(), p.gate, create_graph=True)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gate": [1.0]}, TypeError, "gate: got list, wanted a torch.Tensor"),
        ({"up": None}, TypeError, "up: got NoneType, wanted a torch.Tensor"),
        ({"gate": torch.ones(70, 40, dtype=torch.int32)}, TypeError, "gate's dtype: got"),
        ({"up": torch.ones(70, 40).half()}, TypeError, "up: got dtype torch.float16, wanted gate"),
        ({"up": torch.ones(71, 40)}, ValueError, "up: got shape [71, 40], wanted gate's, [70, 40]"),
        ({"up": torch.ones(70, 40, device="meta")}, ValueError, "up: is on meta, wanted gate's"),
        (
            {"gate": torch.ones(70, 41), "up": torch.ones(70, 41)},
            ValueError,
            "gate: got shape [70, 41], wanted [..., 40] to fit weight [24, 40]",
        ),
        ({"gate": torch.tensor(1.0), "up": torch.tensor(1.0)}, ValueError, "gate: got shape []"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu', wanted one of silu, gelu"),
        ({"activation": ["silu"]}, ValueError, "activation: got ['silu'], wanted one of"),
        ({"weight": torch.ones(24)}, ValueError, "weight: got shape [24], wanted"),
        ({"scaling": "2"}, TypeError, "scaling: got str"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_what_is_wrong_is_said(changed, error, message, mode):
    p = _problem(ROWS, 24, 40, 4)
    given = {"gate": p.gate, "up": p.up, "weight": p.weight, "scaling": 1.0}
    given |= {"lora_A": p.lora_A, "lora_B": p.lora_B}
    with mode(), pytest.raises(error, match=re.escape(message)):
        lora_linear_gated(**given | changed)


def test_is_public():
    assert "lora_linear_gated" in fused_lora.__all__


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_with_factors_and_dots(device, activation, dtype):
    """What a mixture of experts takes: of a row's factor, <dx, x>, and x in dx's place."""
    from fused_lora.kernels.gated import gated_backward

    M, K = 7, 2100  # three programs a row
    z = torch.randn(M, 2 * K, device=device, dtype=dtype)
    dx, scale = torch.randn(M, K, device=device, dtype=dtype), torch.rand(M, device=device)
    gate, up = z.double().requires_grad_().chunk(2, dim=1)
    x = torch_backend.gated(gate, up, activation)
    expected = torch.autograd.grad(x, (gate, up), scale[:, None] * dx)
    for keep_x, dots in itertools.product((True, False), repeat=2):
        given, dz = dx.clone(), torch.empty_like(z)
        options = {"scale": scale, "keep_x": keep_x, "dots": dots}
        parts = (*z.chunk(2, dim=1), activation, *dz.chunk(2, dim=1))
        found = gated_backward(given, *parts, **options)
        close = functools.partial(torch.testing.assert_close, rtol=2e-3, atol=2e-3)
        close(dz.double(), torch.cat(expected, dim=1))
        close(given.double(), x.detach() if keep_x else dx.double())
        assert (found is None) is not dots
        if found is not None:
            close(found.double(), (dx * x).sum(1).detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_the_kernels_compile_to(arch):
    """No stack, offsets of 64 bits, and 16 bytes at a time."""
    # On Hopper with all activations, elsewhere with one by chance: half a second for each kernel.
    by_chance = ACTIVATIONS[int(torch.randint(len(ACTIVATIONS), ()))]
    program = f"""
import re
import triton
from triton.backends.compiler import GPUTarget
from benchmarks.compile_report import disassembled
from benchmarks.sources import specialised
from fused_lora.kernels import gated

tile = gated._TILE
options = {{k: v for k, v in tile.items() if not k.isupper()}}
backward = ("dx_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")
none = {{"scale_ptr": None, "dots_ptr": None, "KEEP_X": False}}
kernels = [
    (gated.gated_kernel, ("gate_ptr", "up_ptr", "x_ptr"), {{}}),
    (gated.gated_backward_kernel, backward, none),
    (gated.gated_backward_kernel, (*backward, "scale_ptr", "dots_ptr"), {{"KEEP_X": True}}),
]
for kernel, names, more in kernels:
    for activation in {ACTIVATIONS if arch == 90 else [by_chance]}:
        for dtype in ("*bf16", "*fp32"):
            constants = {{"ACTIVATION": activation, "BLOCK_K": tile["BLOCK_K"]}}
            constants |= {{"stride_ek": 1, "stride_uk": 1}} | more
            types = dict.fromkeys(names, dtype)
            if "dots_ptr" in types:
                types["dots_ptr"] = "*fp32"
            source = specialised(kernel, types, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", {arch}, 32), options=options)
            offsets = re.findall(r"tt.addptr [^:]*: [^,]*, (\\S+)", compiled.asm["ttir"])
            assert offsets and all("i64" in offset for offset in offsets), sorted(set(offsets))
            usage, sass = disassembled(compiled)
            assert "STACK:0 " in usage, usage
            wide = re.findall(r"\\b(LDG|STG)\\.E[.\\w]*", sass)
            narrow = [w for w in re.findall(r"\\b(?:LDG|STG)\\.E[.\\w]*", sass) if "128" not in w]
            assert wide and len(narrow) <= ("dots_ptr" in types) * 2, narrow  # p and <dx, x>
"""
    run_outside("-c", program)

"""What PyTorch's autograd and `torch.func` do with an `nn.Linear`, on both backends."""

import re
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracle import check, problem, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import graph
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import FusedLoRALinear, explain, lora_linear, reference
from fused_lora.dispatch import FEW_ROWS

N, K, R = 5, 8, 2
MANY = FEW_ROWS + 2  # rows: on a CPU PyTorch's path takes fewer without a node of ours
pytestmark = [
    pytest.mark.usefixtures("own_nodes"),
    pytest.mark.parametrize(("backend", "M"), [("triton", 6), ("torch", 6), ("torch", MANY)]),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # vmap's own
]


@pytest.fixture
def layer(device, backend):
    layer = FusedLoRALinear(K, N, R, device=device, backend=backend)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture
def x(device, M):
    return torch.randn(M, K, device=device)


@pytest.fixture
def node(layer, x):
    """Skips where no node of ours records the call."""
    tensors = (x, layer.weight, layer.lora_A, layer.lora_B)
    if "autograd" in explain(*tensors, backend=layer.backend).reasons:
        pytest.skip("PyTorch records this call operator by operator")


def _adapter(layer):
    return [layer.lora_A, layer.lora_B]


def _frozen(layer):
    return {name: p.detach() for name, p in layer.named_parameters()}


def _close(got, expected):
    """To the rounding of a few fp32 sums in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_backward_twice(layer, x):
    y = layer(x)
    first = torch.autograd.grad(y.sum(), _adapter(layer), retain_graph=True)
    second = torch.autograd.grad(y.sum(), _adapter(layer))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), _adapter(layer))


def test_gradients_accumulate(layer, x):
    whole = torch.autograd.grad(layer(x).sum(), _adapter(layer))
    for part in x.chunk(3):
        layer(part).sum().backward()
    for p, expected in zip(_adapter(layer), whole, strict=True):
        _close(p.grad, expected)


def test_one_layer_used_twice(device, backend, M):
    layer = FusedLoRALinear(K, K, R, device=device, backend=backend)
    nn.init.normal_(layer.lora_B, std=0.1)  # a saturated tanh would enlarge roundings
    x = torch.randn(M, K, device=device)

    def twice(linear):
        return linear(linear(x).tanh()).square().sum()

    def plain(x):
        return reference.lora_linear(
            x, layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, bias=layer.bias
        )

    got = torch.autograd.grad(twice(layer), _adapter(layer))
    expected = torch.autograd.grad(twice(plain), _adapter(layer))
    for a, b in zip(got, expected, strict=True):
        _close(a, b)


def test_hooks(layer, x):
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("forward pre"))
    layer.register_forward_hook(lambda m, args, y: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda m, g: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda m, dx, g: seen.append("backward"))
    layer.lora_A.register_hook(lambda g: g * 0)
    layer.lora_B.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x.requires_grad_()
    layer(x).sum().backward()
    assert sorted(seen) == ["accumulated", "backward", "backward pre", "forward", "forward pre"]
    assert not layer.lora_A.grad.any()
    assert layer.lora_B.grad.any()


def test_nothing_is_kept_after_backward(node, layer, x):
    y = layer(x * 1)
    kept = weakref.ref(y.grad_fn.saved_tensors[0])
    y.sum().backward()
    assert kept() is None
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        _ = y.grad_fn.saved_tensors


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(layer, x, mode):
    expected = layer(x)
    with mode():
        y = layer(x)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)


def test_inference_tensors_in_training(layer, x):
    """As nn.Linear: refused where autograd would save one, taken where it would not."""
    with torch.inference_mode():
        frozen = x.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(frozen)
    layer.lora_A.requires_grad_(False)
    layer(frozen).sum().backward()
    assert layer.lora_B.grad is not None


def test_requires_grad_toggled(layer, x, launches, backend):
    layer.lora_A.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.lora_A.grad is None
    assert layer.lora_B.grad is not None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer.lora_A.requires_grad_()
    layer.lora_B.grad = None
    layer(x).sum().backward()
    assert layer.lora_B.grad is None
    assert layer.lora_A.grad is not None
    assert launches.count("grad_lora_a") == launches.count("grad_lora_b") == (backend == "triton")


def test_trainable_base_weight_is_refused(layer, x):
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: requires a gradient"):
        layer(x)


def test_anomaly_mode(node, layer, x):
    with torch.autograd.set_detect_anomaly(True):
        layer(x).sum().backward()
        y = layer(x)
        with (
            pytest.warns(UserWarning, match="Error detected in LoRALinearFunctionBackward"),
            pytest.raises(RuntimeError, match="LoRALinearFunctionBackward.*nan values"),
        ):
            y.backward(torch.full_like(y, float("nan")))


def test_saved_tensors_can_be_moved_elsewhere(layer, x, M):
    expected = torch.autograd.grad(layer(x).sum(), _adapter(layer))
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.to("cpu", torch.float64)

    def unpack(t):
        return t.to(x.device, torch.float32)

    with graph.saved_tensors_hooks(pack, unpack):
        y = layer(x)
    got = torch.autograd.grad(y.sum(), _adapter(layer))
    assert torch.Size((M, K)) in packed
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with graph.save_on_cpu(pin_memory=x.is_cuda):
        y = layer(x)
    got = torch.autograd.grad(y.sum(), _adapter(layer))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "weight"])
def test_changes_in_place_of_what_is_saved_are_noticed(layer, x, name):
    leaf = x.clone().requires_grad_()
    x = leaf * 1
    y = layer(x)
    changed = x if name == "x" else getattr(layer, name)
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_output_can_be_changed_in_place(layer, x, M):
    expected = torch.autograd.grad(layer(x).relu().sum(), _adapter(layer))
    got = torch.autograd.grad(layer(x).relu_().sum(), _adapter(layer))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert nn.Sequential(layer, nn.ReLU(inplace=True))(x.expand(2, M, K)).shape == (2, M, N)


def test_expanded_gradient_of_a_sum(layer, x):
    """sum()'s gradient has strides of 0."""
    got = torch.autograd.grad(layer(x).sum(), _adapter(layer))
    y = layer(x)
    expected = torch.autograd.grad(y, _adapter(layer), torch.ones_like(y))
    for a, b in zip(got, expected, strict=True):
        _close(a, b)


def test_functional_call(layer, x):
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    got = functional_call(layer, other, (x,))
    expected = lora_linear(x, **other, scaling=layer.scaling, backend=layer.backend)
    assert torch.equal(got, expected)


def _losses(layer):
    """A loss of (trained parameters, x): the layer's own, and the reference's."""
    base = _frozen(layer)

    def ours(trained, x):
        return functional_call(layer, base | trained, (x,)).square().sum()

    def theirs(trained, x):
        values = base | trained
        return reference.lora_linear(x, **values, scaling=layer.scaling).square().sum()

    trained = {name: base[name] for name in ("lora_A", "lora_B", "bias")}
    return ours, theirs, trained


VMAP_WARNING = "ignore:There is a performance drop:UserWarning"


@pytest.mark.filterwarnings(VMAP_WARNING)
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda f, t, x: grad(f)(t, x), id="grad"),
        pytest.param(lambda f, t, x: grad(f, argnums=1)(t, x), id="grad of x"),
        pytest.param(lambda f, t, x: vmap(grad(f), in_dims=(None, 0))(t, x), id="per sample"),
        pytest.param(
            lambda f, t, x: grad(lambda t: vmap(lambda row: f(t, row))(x).sum())(t),
            id="grad of vmap",
        ),
        pytest.param(lambda f, t, x: jacrev(lambda x: f(t, x))(x), id="jacrev"),
        pytest.param(lambda f, t, x: vjp(f, t, x)[1](torch.ones((), device=x.device)), id="vjp"),
    ],
)
def test_function_transforms(layer, x, launches, backend, transform):
    ours, theirs, trained = _losses(layer)
    got, expected = transform(ours, trained, x), transform(theirs, trained, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert bool(launches) == (backend == "triton")


@pytest.mark.filterwarnings(VMAP_WARNING)
def test_vmap_over_adapters(layer, x):
    stacked = {n: torch.randn(3, *p.shape, device=x.device) for n, p in _losses(layer)[2].items()}

    def call(trained):
        return functional_call(layer, _frozen(layer) | trained, (x,))

    expected = [call({n: t[i] for n, t in stacked.items()}) for i in range(3)]
    _close(vmap(call)(stacked), torch.stack(expected))


def test_vmap_says_that_it_loops(layer, x):
    with pytest.warns(UserWarning, match="performance drop.*fused_lora::lora_linear"):
        vmap(layer)(x)


@pytest.mark.filterwarnings(VMAP_WARNING)
def test_vmap_of_nothing_is_refused(layer, x):
    with pytest.raises(RuntimeError, match="fused_lora::lora_linear: got 0 examples under vmap"):
        vmap(layer)(x[:0])


@pytest.mark.filterwarnings(VMAP_WARNING)
def test_vmap_with_dropout(device, backend, M):
    eye = torch.eye(64, device=device)

    def call(x):
        return lora_linear(x, 0 * eye, eye, eye, scaling=1.0, dropout_p=0.5, backend=backend)

    x = torch.ones(4, M, 64, device=device)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(x)
    same = vmap(call, randomness="same")(x)
    assert all(torch.equal(row, same[0]) for row in same)
    different = vmap(call, randomness="different")(x)
    assert not torch.equal(different[0], different[1])


def test_forward_mode_is_refused(node, layer, x):
    message = "must implement the jvp function"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match=message):
        jvp(layer, (x,), (x,))


def test_second_derivatives_are_refused(node, layer, x):
    message = re.escape("gradients cannot be differentiated again (create_graph=True)")
    ours, _, trained = _losses(layer)

    def penalty(trained):
        return sum(g.square().sum() for g in grad(ours)(trained, x).values())

    with pytest.raises(RuntimeError, match=message):
        grad(penalty)(trained)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(layer(x).sum(), layer.lora_A, create_graph=True)


def test_fake_tensors(layer, x, M):
    """What torchtitan, AOTAutograd and memory planners run a model with: shapes, no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
        y.sum().backward()
    assert y.shape == (M, N)
    assert layer.lora_A.grad.shape == (R, K)


def test_meta_tensors(backend, M):
    if backend == "triton":
        pytest.skip("the kernels have no meta device")
    layer = FusedLoRALinear(K, N, R, device="meta")
    y = layer(torch.empty(M, K, device="meta"))
    y.sum().backward()
    assert y.shape == (M, N)
    assert layer.lora_B.grad.shape == (N, R)


def test_values_under_a_dispatch_mode(device, backend, M):
    operators = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators.append(str(function))
            return function(*args, **(kwargs or {}))

    p = problem(M, N, K, R, device=device)

    def call(p):
        return lora_linear(
            p.x, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, bias=p.bias, backend=backend
        )

    with Watch():
        result = run(call, p)
    check(result, p)
    assert "fused_lora.lora_linear.default" in operators
    assert "fused_lora.lora_linear_backward.default" in operators

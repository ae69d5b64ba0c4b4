"""What is kept of a set of adapters is never stale, and keeps none of them alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fused_lora import FusedMultiLoRALinear, adapter_set, lora_linear_multi
from fused_lora.adapter_set import adapter_set as look

BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
SEGMENTS = [("german", 3), ("__base__", 1), ("french", 4)]


@pytest.fixture
def made(monkeypatch):
    """How many sets were looked at closely."""
    sets = []
    real = adapter_set._make
    monkeypatch.setattr(adapter_set, "_make", lambda *a: sets.append(1) or real(*a))
    return sets


def _layer(device, backend, dtype=None):
    layer = FusedMultiLoRALinear(12, 10, device=device, backend=backend, dtype=dtype)
    layer.add_adapter("german", 4, 8)
    layer.add_adapter("french", 6, 8)
    for B in layer.lora_B.values():
        nn.init.normal_(B)
    return layer


def _expected(layer, x):
    y = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for name, rows in (("german", slice(3)), ("french", slice(4, 8))):
        A, B = layer.lora_A[name].double(), layer.lora_B[name].double()
        y[rows] += layer.scaling[name] * x[rows].double() @ A.t() @ B.t()
    return y


def _agrees(layer, x):
    y = layer(x, segments=SEGMENTS)
    tolerance = 2e-3 if x.dtype == torch.float16 else 1e-5
    exact = _expected(layer, x)
    assert (y.double() - exact).norm() <= tolerance * exact.norm()
    return y


def _new_parameter(layer):
    layer.lora_A["german"] = nn.Parameter(torch.randn_like(layer.lora_A["german"]))


def _new_rank(layer):
    layer.delete_adapter("german")
    layer.add_adapter("german", 9)
    nn.init.normal_(layer.lora_B["german"])


def _data(layer):
    layer.lora_B["french"].data = torch.randn_like(layer.lora_B["french"])


def _data_of_another_rank(layer):
    layer.lora_A["french"].data = torch.randn(3, 12, device=layer.weight.device)
    layer.lora_B["french"].data = torch.randn(10, 3, device=layer.weight.device)


def _data_at_the_same_address(layer):
    A, B = layer.lora_A["german"], layer.lora_B["german"]
    A.data = A.data[:2]
    B.data = B.data.view(-1)[:20].view(10, 2)


def _data_transposed(layer):
    A = layer.lora_A["german"]
    A.data = A.data.view(12, 4).t()


def _scaling(layer):
    layer.scaling["german"] = 0.25


def _in_place(layer):
    with torch.no_grad():
        for p in (*layer.lora_A.values(), *layer.lora_B.values()):
            p.mul_(1.5)


def _optimizer(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(8, 12, device=layer.weight.device), segments=SEGMENTS).sum().backward()
    optimizer.step()


def _loaded(layer):
    state = {n: torch.randn_like(p) for n, p in layer.state_dict().items()}
    layer.load_state_dict(state)


def _assigned(layer):
    state = {n: torch.randn_like(p) for n, p in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _half(layer):
    layer.half()


def _half_adapters_at_the_same_address(layer):
    for p in (*layer.lora_A.values(), *layer.lora_B.values()):
        half = p.data.view(torch.float16).view(-1)[: p.numel()].view(p.shape)
        half.copy_(torch.randn(p.shape))
        p.data = half


CHANGES = [
    _new_parameter,
    _new_rank,
    _data,
    _data_of_another_rank,
    _data_at_the_same_address,
    _data_transposed,
    _scaling,
    _in_place,
    _optimizer,
    _loaded,
    _assigned,
    _half,
    _half_adapters_at_the_same_address,
]


@BACKENDS
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
@pytest.mark.parametrize("grad", [False, True])
def test_multi_adapters_that_change(device, backend, change, grad):
    layer, x = _layer(device, backend), torch.randn(8, 12, device=device)
    with torch.set_grad_enabled(grad):
        first = _agrees(layer, x).detach()  # its graph would keep the gradients' shapes
        assert torch.equal(_agrees(layer, x), first)
        with torch.enable_grad():
            change(layer)
        x = x.to(layer.weight.dtype)
        second = _agrees(layer, x)
        assert not torch.equal(first, second.to(first.dtype))
        if grad:
            second.sum().backward()
            for name, p in (*layer.lora_A.items(), *layer.lora_B.items()):
                assert p.grad.shape == p.shape, name
                assert p.grad.dtype == p.dtype, name


def test_multi_adapters_that_move(made):
    layer, x = _layer("cpu", "torch"), torch.randn(8, 12)
    _agrees(layer, x)
    with pytest.raises(ValueError, match="weight: is on meta"):
        layer.to("meta")(x, segments=SEGMENTS)
    layer.lora_A = nn.ParameterDict({n: nn.Parameter(torch.ones(2, 12)) for n in layer.adapters})
    layer.lora_B = nn.ParameterDict({n: nn.Parameter(torch.ones(10, 2)) for n in layer.adapters})
    layer.lora_B["french"] = nn.Parameter(torch.ones(10, 2, device="meta"))
    layer.weight, layer.bias = (
        nn.Parameter(t, False) for t in (torch.ones(10, 12), torch.ones(10))
    )
    with pytest.raises(ValueError, match="is on meta, wanted x's device, cpu"):
        layer(x, segments=SEGMENTS)


def test_multi_layer_with_dicts_in_another_order():
    layer, x = _layer("cpu", "torch"), torch.randn(8, 12)
    layer.scaling["german"] = 3.0
    layer.lora_B = nn.ParameterDict(dict(layer.lora_B.items()))  # which sorts them
    assert list(layer.lora_B.keys()) != layer.adapters
    _agrees(layer, x)


def test_multi_unchanged_adapters_are_looked_at_once(made):
    layer, x = _layer("cpu", "torch"), torch.randn(8, 12)
    for _ in range(3):
        layer(x, segments=SEGMENTS)
        with torch.no_grad():
            layer(x, segments=SEGMENTS)
        layer(torch.randn(5, 12), adapter_names="french")
        _in_place(layer)
    assert len(made) == 1
    layer.lora_A["german"].requires_grad_(False)
    layer(x, adapter_names="german").sum().backward()
    assert layer.lora_A["german"].grad is None
    assert len(made) == 2


def test_multi_gradients_are_asked_for_again(made):
    x, weight, A, B = torch.randn(4, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    rows = {"scalings": 1.0, "segments": [(0, 4)]}
    assert not lora_linear_multi(x, weight, [A], [B], **rows).requires_grad
    A.requires_grad_()
    assert lora_linear_multi(x, weight, [A], [B], **rows).requires_grad
    with torch.inference_mode():
        assert not lora_linear_multi(x, weight, [A], [B], **rows).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear_multi(x, weight, [A], [B], **rows).dtype == torch.bfloat16
    assert lora_linear_multi(x, weight, [A], [B], **rows).requires_grad


def test_multi_negated_adapters_are_never_read_as_they_lie():
    x, weight, B = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5, 2)
    A = nn.Parameter(torch.randn(2, 6))
    rows = {"scalings": 1.0, "segments": [(0, 4)]}
    base = nn.functional.linear(x, weight)
    before = lora_linear_multi(x, weight, [A], [B], backend="triton", **rows) - base
    A.data = torch._neg_view(A.data)
    after = lora_linear_multi(x, weight, [A], [B], **rows) - base
    torch.testing.assert_close(after, -before, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="negated when it is read"):
        lora_linear_multi(x, weight, [A], [B], backend="triton", **rows)


def test_multi_checks_are_not_skipped_for_known_adapters():
    A, B, x = torch.randn(2, 6), torch.randn(5, 2), torch.randn(4, 6)
    rows = {"scalings": 1.0, "segments": [(0, 4)]}
    lora_linear_multi(x, torch.randn(5, 6), [A], [B], **rows)
    with pytest.raises(ValueError, match=r"lora_Bs\[0\]: got shape \[5, 2\], wanted \[7, 2\]"):
        lora_linear_multi(x, torch.randn(7, 6), [A], [B], **rows)
    with pytest.raises(TypeError, match="weight: got dtype torch.float16"):
        lora_linear_multi(x, torch.randn(5, 6).half(), [A], [B], **rows)
    with pytest.raises(TypeError, match="scaling: got bool"):  # which is equal to 1
        lora_linear_multi(x, torch.randn(5, 6), [A], [B], **rows | {"scalings": [True]})
    with pytest.raises(TypeError, match=r"segments\[0\]: got \(0, 4.0\)"):
        lora_linear_multi(x, torch.randn(5, 6), [A], [B], **rows | {"segments": [(0, 4.0)]})


def test_multi_sets_keep_no_adapter_alive():
    A, B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))
    y = lora_linear_multi(
        torch.randn(4, 6), torch.randn(5, 6), [A], [B], scalings=1.0, segments=[(0, 4)],
        backend="triton",
    )  # fmt: skip
    alive = [weakref.ref(A), weakref.ref(B)]
    del A, B, y
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_multi_sets_are_bounded(monkeypatch):
    monkeypatch.setattr(adapter_set, "_MAX_SETS", 3)
    monkeypatch.setattr(adapter_set, "_sets", type(adapter_set._sets)())
    kept = [(torch.randn(2, 6), torch.randn(5, 2)) for _ in range(7)]
    for A, B in kept:
        look([A], [B], 1.0)
    assert len(adapter_set._sets) == 3


@BACKENDS
def test_multi_saved_adapters_that_hooks_move(device, backend):
    """Offloading gives the backward pass other tensors than the forward's."""
    layer, x = _layer(device, backend), torch.randn(8, 12, device=device)
    layer(x, segments=SEGMENTS).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = layer(x, segments=SEGMENTS)
        y.square().sum().backward()
    for name, p in layer.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], msg=name)


class _Other:
    """Guards with another signature."""

    def __init__(self, *tensors):
        pass


@pytest.mark.parametrize("guards", [None, _Other], ids=["none", "others"])
def test_multi_nothing_is_kept_without_guards(monkeypatch, made, guards):
    monkeypatch.setattr(adapter_set, "_sets", type(adapter_set._sets)())
    if guards is None:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    else:
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", guards)
    layer, x = _layer("cpu", "torch"), torch.randn(8, 12)
    for change in (_in_place, _new_parameter, _new_rank):
        _agrees(layer, x)
        change(layer)
    _agrees(layer, x).sum().backward()
    assert len(made) == 4
    assert not adapter_set._sets

"""A call like an earlier one is neither checked nor decided again; a call that differs is."""

import pytest
import torch
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import (
    FusedLoRALinear,
    dispatch,
    functional,
    lora_linear,
    quantize_nf4,
    recall,
    reference,
)


@pytest.fixture
def looks(monkeypatch):
    """Grows by one with each call that is looked at anew."""
    made = []
    real = functional.checked_call
    monkeypatch.setattr(functional, "checked_call", lambda *a: made.append(1) or real(*a))
    dispatch.forget_plans()
    return made


def _tensors(M=5, K=32, N=24, r=4, dtype=torch.float32):
    shapes = ((M, K), (N, K), (r, K), (N, r))
    x, W, A, B = (torch.randn(s, dtype=dtype) for s in shapes)
    return x, W, A.requires_grad_(), B.requires_grad_()


def _assert_right(y, x, W, A, B, **options):
    expected = reference.lora_linear(x, W, A, B, scaling=2.0, **options)
    torch.testing.assert_close(y, expected)


def test_the_second_call_is_not_looked_at(looks):
    x, W, A, B = _tensors()
    for _ in range(3):
        _assert_right(lora_linear(x, W, A, B, scaling=2.0), x, W, A, B)
        with torch.no_grad():
            lora_linear(x, W, A, B, scaling=2.0)
    assert len(looks) == 1
    lora_linear(torch.randn(5, 64)[:, ::2], W, A, B, scaling=2.0)  # other strides
    assert len(looks) == 1
    lora_linear(torch.randn(9, 32), W, A, B, scaling=2.0)
    assert len(looks) == 2
    for M in (5, 9):
        x = torch.randn(M, 32)
        _assert_right(lora_linear(x, W, A, B, scaling=2.0), x, W, A, B)
    assert len(looks) == 2


def test_what_differs_is_looked_at(looks):
    x, W, A, B = _tensors()
    bias = torch.randn(24)
    lora_linear(x, W, A, B, scaling=2.0)
    changed = [
        lambda: lora_linear(x, W, A, B, scaling=3.0),
        lambda: lora_linear(x, W, A, B, scaling=2.0, dropout_p=0.5),
        lambda: lora_linear(x, W, A, B, scaling=2.0, backend="torch"),
        lambda: lora_linear(x, W, A, B, scaling=2.0, bias=bias),
        lambda: lora_linear(x, W.clone(), A, B, scaling=2.0),
        lambda: lora_linear(x, W, A.bfloat16(), B, scaling=2.0),
        lambda: lora_linear(x[None], W, A, B, scaling=2.0),
    ]
    for i, call in enumerate(changed, 2):
        call()
        assert len(looks) == i
        lora_linear(x, W, A, B, scaling=2)
        assert len(looks) == i
    _assert_right(lora_linear(x, W, A, B, scaling=2.0, bias=bias), x, W, A, B, bias=bias)


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("x", lambda: torch.randn(5, 31), ValueError, "x: got shape"),
        ("x", lambda: torch.randn(5, 32).double(), TypeError, "weight: got dtype torch.float32"),
        ("x", lambda: None, TypeError, "x: got NoneType"),
        ("x", lambda: [1.0], TypeError, "x: got list"),
        ("lora_A", lambda: torch.randn(4, 33), ValueError, "lora_A: got shape"),
        ("lora_A", lambda: torch.randn(4, 32).to_sparse(), TypeError, "lora_A: got layout"),
        ("lora_B", lambda: torch.randn(24, 5), ValueError, "lora_B: got shape"),
        ("lora_B", lambda: None, TypeError, "lora_B: got NoneType"),
        ("bias", lambda: torch.randn(25), ValueError, "bias: got shape"),
        ("bias", lambda: 1.0, TypeError, "bias: got float"),
        ("scaling", lambda: True, TypeError, "scaling: got bool"),
        ("scaling", lambda: [2.0], TypeError, "scaling: got list"),
        ("dropout_p", lambda: False, TypeError, "dropout_p: got bool"),
        ("backend", lambda: "cuda", ValueError, "backend: got 'cuda'"),
        ("backend", lambda: [], ValueError, "backend: got"),
    ],
)
def test_a_known_call_gone_wrong(name, wrong, error, message):
    x, W, A, B = _tensors()
    good = {"x": x, "weight": W, "lora_A": A, "lora_B": B, "scaling": 1.0, "dropout_p": 0.0}
    for bias in (None, torch.randn(24)):
        good["bias"] = bias
        lora_linear(**good)
        lora_linear(**good)
        with pytest.raises(error, match=message):
            lora_linear(**good | {name: wrong()})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_do_not_end_the_process(name, layout):
    """Of their strides Dynamo's guards ask outside of any handler."""
    x, W, A, B = _tensors()
    good = {"x": x, "weight": W, "lora_A": A, "lora_B": B, "scaling": 1.0, "bias": torch.randn(24)}
    lora_linear(**good)
    nested = torch.nested.nested_tensor([torch.randn(2, 32), torch.randn(3, 32)], layout=layout)
    with pytest.raises(TypeError, match=f"{name}: got "):
        lora_linear(**good | {name: nested})


def test_a_weight_that_wants_a_gradient_later():
    x, W, A, B = _tensors()
    W.requires_grad_()
    with torch.no_grad():
        lora_linear(x, W, A, B, scaling=1.0)
    with pytest.raises(ValueError, match="weight: requires a gradient"):
        lora_linear(x, W, A, B, scaling=1.0)
    W.requires_grad_(False)
    lora_linear(x, W, A, B, scaling=1.0)
    W.requires_grad_()
    with pytest.raises(ValueError, match="weight: requires a gradient"):
        lora_linear(x, W, A, B, scaling=1.0)


def test_tensors_changed_through_data(looks):
    x, W, A, B = _tensors()
    lora_linear(x, W, A, B, scaling=2.0)
    for tensor in (W, A, B):
        tensor.data = tensor.data.double()
    x = x.double()
    _assert_right(lora_linear(x, W, A, B, scaling=2.0), x, W, A, B)
    assert len(looks) == 2
    A.data = torch.randn(8, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="lora_B: got shape"):
        lora_linear(x, W, A, B, scaling=2.0)


@pytest.mark.parametrize("M", [5, 100])  # by PyTorch's nodes, by a node of ours
def test_autocast_comes_goes_and_changes(looks, M):
    x, W, A, B = _tensors(M, dtype=torch.bfloat16)
    wide = x.float()
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                for t in (x, wide):
                    assert lora_linear(t, W, A, B, scaling=2.0).dtype == dtype
        assert lora_linear(x, W, A, B, scaling=2.0).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="weight: got dtype torch.bfloat16"):
            lora_linear(wide, W, A, B, scaling=2.0)
    looks.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            lora_linear(x, W, A, B, scaling=2.0)
    assert len(looks) == 1  # it had followed a call without autocast


def test_what_autocast_changes_is_not_kept():
    x, W, A, B = _tensors()
    dispatch.forget_plans()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lora_linear(x, W, A, B, scaling=2.0)
    assert not recall._known


def test_calls_that_take_turns(looks):
    x, W, A, B = _tensors()
    others = torch.randn(6, 32), torch.randn(24, 6)
    leaf = x.clone().requires_grad_()
    for _ in range(3):
        for t in (x, x[None], leaf):
            lora_linear(t, W, A, B, scaling=2.0)
        lora_linear(x, W, *others, scaling=2.0)
    assert len(looks) == 4


class _Odd(float):
    def __hash__(self):
        raise RuntimeError("hash")

    def __eq__(self, other):
        return True


def test_numbers_of_other_types_are_not_compared():
    x, W, A, B = _tensors()
    for scaling in (1.0, 2.0):
        got = lora_linear(x, W, A, B, scaling=_Odd(scaling))
        expected = reference.lora_linear(x, W, A, B, scaling=scaling)
        torch.testing.assert_close(got, expected)


def test_codes_that_are_no_parameters():
    """As in the replicas of nn.DataParallel."""
    x, W, A, B = _tensors(K=64)
    codes = quantize_nf4(W)
    values = codes._parameters.pop("codes").data
    codes.register_buffer("codes", values)
    for _ in range(2):
        _assert_right(lora_linear(x, codes, A, B, scaling=2.0), x, codes.dequantize(), A, B)


@pytest.mark.parametrize("M", [5, 100])
def test_transforms_and_modes_over_a_known_call(M):
    x, W, A, B = _tensors(M, dtype=torch.float64)
    call = lambda x: lora_linear(x, W, A, B, scaling=2.0)  # noqa: E731
    expected = call(x)
    torch.testing.assert_close(torch.func.vmap(call)(x[None])[0], expected)
    got = torch.func.grad(lambda x: call(x).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(call(leaf).sum(), leaf)[0])
    with FlopCounterMode(display=False) as flops:
        torch.testing.assert_close(call(x), expected)
    assert flops.get_total_flops() == 2 * M * (24 * 32 + 4 * (24 + 32))
    with torch.inference_mode():
        assert call(x).is_inference()
        torch.testing.assert_close(call(x.clone()), expected)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_quantised_weights(looks):
    x, W, A, B = _tensors(K=64)
    codes = quantize_nf4(W)
    for _ in range(3):
        y = lora_linear(x, codes, A, B, scaling=2.0)
        _assert_right(y, x, codes.dequantize(), A, B)
    assert len(looks) == 1
    codes.to(torch.bfloat16)  # the same object and the same codes
    lora_linear(x, codes, A, B, scaling=2.0)
    assert len(looks) == 2
    y = lora_linear(x, quantize_nf4(torch.zeros(24, 64)), A, B, scaling=2.0)
    _assert_right(y, x, torch.zeros(24, 64), A, B)


@pytest.mark.parametrize("change", ["prune", "parametrize"])
def test_layers_whose_weights_are_no_parameters_any_more(change):
    layer = FusedLoRALinear(16, 12, r=4, bias=False)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    layer(x)
    if change == "prune":
        prune.l1_unstructured(layer, "lora_A", amount=0.5)
    else:

        class Double(torch.nn.Module):
            def forward(self, t):
                return 2 * t

        torch.nn.utils.parametrize.register_parametrization(layer, "lora_A", Double())
    assert "lora_A" not in layer._parameters
    expected = reference.lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling
    )
    torch.testing.assert_close(layer(x), expected)


def test_no_tensor_is_kept_alive():
    import gc
    import weakref

    x, W, A, B = _tensors()
    lora_linear(x, W, A, B, scaling=2.0)
    refs = [weakref.ref(t) for t in (x, W, A, B)]
    del x, W, A, B
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(recall, "_MAX_CALLS", 3)
    monkeypatch.setattr(recall, "_MAX_SHAPES", 3)
    dispatch.forget_plans()
    x, W, A, B = _tensors()
    weights = [W.clone() for _ in range(10)]
    for weight in weights:
        lora_linear(x, weight, A, B, scaling=2.0)
    assert len(recall._known) <= 3
    for M in range(1, 10):
        lora_linear(torch.randn(M, 32), W, A, B, scaling=2.0)
    assert max(len(known.decisions) for known in recall._known.values()) <= 3


def test_without_pytorchs_guards_every_call_is_looked_at(looks, monkeypatch):
    monkeypatch.setattr(recall, "guards_of", lambda *_: None)
    x, W, A, B = _tensors()
    for _ in range(2):
        _assert_right(lora_linear(x, W, A, B, scaling=2.0), x, W, A, B)
    assert len(looks) == 2

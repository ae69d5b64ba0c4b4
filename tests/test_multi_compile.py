"""Many adapters under torch.compile and torch.export, and the operators behind them."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from pairs import pairs
from test_multi import STRADDLING, batch, check, multi_launches, run
from torch import nn

from fused_lora import FusedMultiLoRALinear, lora_linear_multi, quantize_nf4, route
from fused_lora.multi_ops import lora_linear_multi_backward_op, lora_linear_multi_op
from fused_lora.packing import pack

assert multi_launches  # a fixture
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def recompiled():
    """The number of graphs that dynamo has made."""
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def call(x, weight, As, Bs, bias, scalings, **kwargs):
    return lora_linear_multi(x, weight, As, Bs, scalings=scalings, bias=bias, **kwargs)


def compiled_call(b, compiler="aot_eager", dynamic=None, weight=None, **kwargs):
    compiled = torch.compile(call, backend=compiler, fullgraph=True, dynamic=dynamic)
    weight = b.weight if weight is None else weight
    return compiled(b.x, weight, b.As, b.Bs, b.bias, list(b.scalings), **kwargs)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_multi_compiled(device, multi_launches, compiler):
    b = batch(STRADDLING, device=device)
    named = [
        {"segments": STRADDLING},
        {"adapter_indices": b.indices},
        {"adapter_indices": b.indices.tolist()},
    ]
    options = {"dynamic": [False, True], "backend": ["triton", "torch"], "rows": named}
    for dynamic, backend, rows in pairs(**options):
        torch._dynamo.reset()
        multi_launches.clear()
        call = partial(compiled_call, compiler=compiler, dynamic=dynamic, backend=backend, **rows)
        check(run(call, b), b)
        assert ("multi_grads" in multi_launches) == (backend == "triton")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_compiled_over_nf4(device, multi_launches, backend):
    b = batch(STRADDLING, K=128, device=device)
    weight = quantize_nf4(b.weight)
    b.weight = weight.dequantize()
    check(
        run(lambda b: compiled_call(b, weight=weight, segments=STRADDLING, backend=backend), b), b
    )
    assert ("shrink" in multi_launches) == (backend == "triton")


def test_multi_compiled_makes_only_the_wanted_gradients(device, multi_launches):
    b = batch(STRADDLING, device=device)
    b.Bs[2].requires_grad_()
    compiled_call(b, segments=STRADDLING, backend="triton").sum().backward()
    assert b.Bs[2].grad.any()
    assert all(t.grad is None for t in (b.x, *b.As, *b.Bs[:2]))
    assert multi_launches == ["shrink", "expand", "multi_grads"]


def test_multi_compiled_for_every_M_and_every_batch(recompiled):
    b = batch(STRADDLING)
    A = b.As[0].requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(x, indices):
        return lora_linear_multi(
            x, b.weight, b.As, b.Bs, scalings=2.0, adapter_indices=indices, dropout_p=0.1
        )

    def once(M):
        step(torch.randn(M, 70), torch.randint(-1, 4, (M,))).sum().backward()

    once(6)
    before = recompiled()
    for M in (7, 64, 3, 300):
        once(M)
    assert recompiled() == before
    assert A.grad is not None


def test_multi_compiled_segments_of_every_length(recompiled):
    b = batch(STRADDLING)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(x, first):
        segments = [(0, first), (2, x.shape[0] - first)]
        return lora_linear_multi(x, b.weight, b.As, b.Bs, scalings=2.0, segments=segments)

    for i, (M, first) in enumerate([(9, 4), (30, 7), (64, 60)]):
        x = torch.randn(M, 70)
        rows = {"segments": [(0, first), (2, M - first)]}
        expected = lora_linear_multi(x, b.weight, b.As, b.Bs, scalings=2.0, **rows)
        assert torch.equal(step(x, first), expected)
        if i == 0:
            before = recompiled()
    assert recompiled() == before


def test_multi_compiled_alphas_change_at_most_once_more(recompiled):
    b = batch(STRADDLING, dtype=torch.float64)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)

    def scaled(function, scaling):
        scalings = [scaling, 1.0, 2.0, 0.5]
        return function(b.x, b.weight, b.As, b.Bs, b.bias, scalings, segments=STRADDLING)

    scaled(compiled, 1.0)
    scaled(compiled, 0.5)
    before = recompiled()
    for scaling in (0.25, 3.0, 7.5):
        torch.testing.assert_close(scaled(compiled, scaling), scaled(call, scaling))
    assert recompiled() == before


def _layers():
    model = nn.Sequential(
        FusedMultiLoRALinear(12, 10), nn.ReLU(), FusedMultiLoRALinear.from_linear(nn.Linear(10, 3))
    )
    for layer in (model[0], model[2]):
        layer.add_adapter("german", 4)
        layer.add_adapter("french", 6)
        for B in layer.lora_B.values():
            nn.init.normal_(B)
    return model


def test_multi_compiled_layers_under_route():
    model, x = _layers(), torch.randn(6, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for segments in ([("german", 2), ("french", 4)], [("__base__", 6)], [("french", 6)]):
        with route(model, segments=segments):
            torch.testing.assert_close(compiled(x), model(x))
    names = ["french", "german"] * 3
    with route(model, adapter_names=names):
        y = compiled(x)
        y.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_multi_exported_with_any_M():
    layer = _layers()[0].eval()

    class Serve(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, indices):
            return self.layer(x, adapter_indices=indices)

    rows = torch.export.Dim("rows", min=2, max=4096)
    example = (torch.randn(6, 12), torch.tensor([0, 1, -1, 0, 1, 1]))
    exported = torch.export.export(
        Serve(), example, dynamic_shapes={"x": {0: rows}, "indices": {0: rows}}
    )
    x, indices = torch.randn(31, 12), torch.randint(-1, 2, (31,))
    assert torch.equal(exported.module()(x, indices), layer(x, adapter_indices=indices))


def test_multi_compiled_rows_that_are_wrong_are_refused_when_it_runs(multi_launches):
    b = batch([(0, 4)])
    with pytest.raises(ValueError, match="got index 9, wanted 0 to 3"):
        compiled_call(b, adapter_indices=torch.tensor([0, 9, 0, 0]), backend="triton")
    with pytest.raises(ValueError, match="segments: have 3 rows in all, wanted x's 4"):
        compiled_call(b, segments=[(0, 3)], backend="triton")
    with pytest.raises(Exception, match="adapter_indices, segments: got neither"):
        compiled_call(b, backend="triton")
    with pytest.raises(Exception, match="scalings: got 1, wanted one for each of 4 adapters"):
        compiled_call(replace(b, scalings=(1.0,)), segments=[(0, 4)], backend="triton")
    with pytest.raises(Exception, match="got 4 and 3 adapters"):
        compiled_call(replace(b, Bs=b.Bs[1:]), segments=[(0, 4)], backend="triton")
    b.As[1] = torch.randn(2, 9)
    # Dynamo 2.11 shows a message by its parts.
    parts = "'lora_A'), ConstantVariable(str: ': got shape '"
    with pytest.raises(Exception, match=f"lora_A: got shape|{re.escape(parts)}"):
        compiled_call(b, segments=[(0, 4)], backend="triton")
    assert multi_launches == []


def test_multi_under_torch_func_is_refused():
    b = batch([(0, 4)])

    def loss(x):
        return lora_linear_multi(x, b.weight, b.As, b.Bs, scalings=1.0, segments=[(0, 4)]).sum()

    with pytest.raises(RuntimeError, match="torch.func's transforms are not supported"):
        torch.func.grad(loss)(b.x)


def test_multi_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(5, 6), torch.empty(7, 6)
        As, Bs = [torch.empty(2, 6)], [torch.empty(7, 2, requires_grad=True)]
        y = lora_linear_multi(x, weight, As, Bs, scalings=1.0, segments=[(0, 5)])
        y.sum().backward()
    assert y.shape == (5, 7)
    assert Bs[0].grad.shape == (7, 2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_operators(backend):
    b = batch([(1, 6), (0, 3)], (3, 3))  # without undefined elements of h
    weights, spec = pack(b.weight)
    segments = [1, 6, 0, 3]
    scalings = list(b.scalings)
    for t in (b.x, *b.As, *b.Bs, b.bias):
        t.requires_grad_()
    rows = [None, segments]
    tensors = (b.x, weights, spec, b.As, b.Bs, b.bias, scalings)
    torch.library.opcheck(lora_linear_multi_op, (*tensors, *rows, None, 0, backend, True))
    rows = [b.indices, []]
    torch.library.opcheck(lora_linear_multi_op, (*tensors, *rows, None, 0, backend, True))
    detached = b.map(torch.Tensor.detach)
    h = torch.randn(9, 3)
    gradients = (b.g, detached.x, weights, spec, detached.As, detached.Bs, h, scalings)
    arguments = (*gradients, *rows, None, 0, backend, True)
    torch.library.opcheck(lora_linear_multi_backward_op, arguments, test_utils="test_schema")
    torch.library.opcheck(lora_linear_multi_backward_op, arguments, test_utils="test_faketensor")

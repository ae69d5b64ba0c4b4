"""16-bit products on a CPU without instructions for them: in fp32, by parts, the same results."""

import pytest
import torch
import torch.nn.functional as F
from oracle import FORWARD_FACTOR, GRADIENT_FACTOR

import fused_lora
from fused_lora import products
from fused_lora.quantize import quantize

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SIZES = pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (7, 5, 3), (33, 17, 40), (3, 70, 129), (0, 4, 4), (4, 0, 4)]
)


@pytest.fixture
def by_parts(cpu_without, monkeypatch):
    """A CPU without instructions, operands in many parts; the sizes of products made so."""
    for name, value in {"_CAST": 0, "_OVERHEAD": 0, "_LEFT": 640, "_RIGHT": 320}.items():
        monkeypatch.setattr(products, name, value)
    cpu_without(torch.bfloat16, torch.float16)
    made, in_parts = [], products._in_parts

    def counted(out, a, b, *args, **kwargs):
        made.append((a.shape[0], b.shape[1], a.shape[1]))
        return in_parts(out, a, b, *args, **kwargs)

    monkeypatch.setattr(products, "_in_parts", counted)
    return made


def _rounded_once(got, exact):
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=eps, atol=eps**2)


@HALVES
@SIZES
def test_products(by_parts, dtype, M, N, K):
    a, b, bias = torch.rand(M, K).to(dtype), torch.rand(K, N).to(dtype), torch.rand(N).to(dtype)
    exact = a.double() @ b.double()
    kept = [t.clone() for t in (a, b, bias)]
    _rounded_once(products.mm(a, b), exact)
    _rounded_once(products.mm(a, b.t().contiguous().t()), exact)
    _rounded_once(products.linear(a, b.t()), exact)
    _rounded_once(products.linear(a, b.t(), bias), exact + bias.double())
    wide = torch.zeros(M, N + 2, dtype=dtype)
    products.mm(a, b, out=wide[:, 1:-1])
    _rounded_once(wide[:, 1:-1], exact)
    assert not wide[:, [0, -1]].any()
    y = torch.rand(M, N).to(dtype)
    exact += y.double()
    assert products.addmm_(y, a, b) is y
    _rounded_once(y, exact)
    for batch in (1, 3):
        as_, bs = torch.rand(batch, M, K).to(dtype), torch.rand(batch, K, N).to(dtype)
        _rounded_once(products.bmm(as_, bs), as_.double() @ bs.double())
    assert all(map(torch.equal, kept, (a, b, bias)))
    assert bool(by_parts) == (M * N * K > 0)


CALLS = {
    "plain": lambda x, W, A, B, bias: fused_lora.lora_linear(x, W, A, B, scaling=1.25, bias=bias),
    "dropout": lambda x, W, A, B, bias: fused_lora.lora_linear(
        x, W, A, B, scaling=1.25, bias=bias, dropout_p=0.3
    ),
    "dora": lambda x, W, A, B, bias: fused_lora.dora_linear(
        x, W, A, B, W.detach().float().norm(dim=1), scaling=1.25, bias=bias
    ),
    "group": lambda x, W, A, B, bias: torch.cat(
        fused_lora.lora_linear_group(
            x, [W, W[:9]], [A, A], [B, B[:9]], scalings=[1.25, 2.0], biases=[bias, None]
        ),
        dim=-1,
    ),
    "multi": lambda x, W, A, B, bias: fused_lora.lora_linear_multi(
        x,
        W,
        [A, 2 * A],
        [B, B],
        scalings=[1.25, 2.0],
        bias=bias,
        adapter_indices=torch.arange(len(x)) // (len(x) // 3) - 1,
    ),
}


def _results(call, tensors, g, dtype=None):
    x, W, A, B, bias = (t.detach().to(dtype or t.dtype) for t in tensors)
    trained = [t.requires_grad_() for t in (x, A, B, bias)]
    torch.manual_seed(0)  # the mask
    y = CALLS[call](x, W, A, B, bias)
    return [y.detach(), *torch.autograd.grad(y, trained, g[:, : y.shape[1]].to(y.dtype))]


@HALVES
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("M", [30, 90])
def test_values_and_gradients_by_parts(by_parts, cpu_without, dtype, adapter_dtype, call, M):
    """The rule, with PyTorch's own products of the same call for its expression."""
    N, K, r = 45, 101, 8
    x, W, bias = torch.randn(M, K), torch.randn(N, K) / 10, torch.randn(N)
    adapters = [(torch.randn(r, K) / 10), torch.randn(N, r) / 3]
    A, B = (t.to(adapter_dtype or dtype) for t in adapters)
    tensors = (x.to(dtype), W.to(dtype), A, B, bias.to(dtype))
    g = torch.randn(M, 2 * N).to(dtype)
    got = _results(call, tensors, g)
    assert {(M, N, K), (M, K, N)} <= set(by_parts)  # y and dx
    by_parts.clear()
    cpu_without()
    theirs = _results(call, tensors, g)
    assert not by_parts
    exact = _results(call, tensors, g, torch.float64)
    for i, (ours, same_dtype, true) in enumerate(zip(got, theirs, exact, strict=True)):
        assert ours.dtype == same_dtype.dtype
        error, allowed = (ours - true).norm(), (same_dtype - true).norm()
        assert error <= (GRADIENT_FACTOR if i else FORWARD_FACTOR) * allowed, i


@HALVES
def test_over_codes_by_parts(by_parts, dtype):
    """Quantised weights are values first, in x's dtype."""
    codes = quantize(torch.randn(64, 128), "nf4")
    x, A, B = torch.randn(70, 128).to(dtype), torch.randn(4, 128) / 10, torch.randn(64, 4)
    x.requires_grad_()
    g, results = torch.randn(70, 64).to(dtype), []
    for weight in (codes, codes.dequantize(dtype)):
        y = fused_lora.lora_linear(x, weight, A, B, scaling=0.5)
        results.append((y, torch.autograd.grad(y, x, g)[0]))
    assert (70, 64, 128) in by_parts
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= torch.finfo(dtype).eps * want.norm()


def test_few_rows_stay_pytorchs_and_explain_says_what_is_not(cpu_without):
    cpu_without(torch.bfloat16)
    layer = fused_lora.FusedLoRALinear(256, 256, r=8, dtype=torch.bfloat16)
    few, many = (torch.randn(M, 256, dtype=torch.bfloat16) for M in (1, 32))
    assert "autograd" in layer.explain(few).reasons
    assert torch.equal(layer(few), F.linear(few, layer.weight, layer.bias))  # B is 0
    reasons = layer.explain(many).reasons
    assert reasons["fp32"] == "multiplied in it: this CPU has no instructions for bfloat16"
    assert "autograd" not in reasons
    cpu_without()
    assert "autograd" in layer.explain(many).reasons

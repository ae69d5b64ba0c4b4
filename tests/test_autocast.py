"""Autocast gives `F.linear`'s dtypes, the adapters keep theirs, and x is copied at most once."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from oracle import TRAINED, check, problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import FusedLoRALinear, backends, lora_linear

BF16 = pytest.param(torch.bfloat16, id="bf16")
FP16 = pytest.param(torch.float16, id="fp16")
# Triton's interpreter has no bf16 products.
CASES = [
    pytest.param("torch", torch.bfloat16, id="torch-bf16"),
    pytest.param("torch", torch.float16, id="torch-fp16"),
    pytest.param("triton", torch.bfloat16, id="triton-bf16", marks=pytest.mark.gpu),
    pytest.param("triton", torch.float16, id="triton-fp16"),
]
both_backends = pytest.mark.parametrize(("backend", "dtype"), CASES)
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _call(p, **options):
    return lora_linear(p.x, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, bias=p.bias, **options)


@both_backends
@pytest.mark.parametrize(
    ("x_dtype", "base_dtype", "adapter_dtype"),
    [c for c in product(STORED, repeat=3) if c in {(c[0],) * 3, (c[0], c[1], "fp32")}],
)
def test_dtypes_are_those_of_linear(
    device, launches, backend, dtype, x_dtype, base_dtype, adapter_dtype
):
    p = problem(20, 24, 28, 4, dtype=STORED[base_dtype], adapter_dtype=STORED[adapter_dtype])
    p = replace(p, **{n: t.to(device) for n, t in p.tensors().items()})
    p.x = p.x.to(STORED[x_dtype])
    leaves = {name: getattr(p, name).requires_grad_() for name in TRAINED}
    with torch.autocast(device.type, dtype):
        y = _call(p, backend=backend)
        expected = F.linear(p.x, p.weight, p.bias)
    assert y.dtype == expected.dtype == dtype
    grads = torch.autograd.grad(y, list(leaves.values()), p.g.to(dtype))
    theirs = torch.autograd.grad(expected, [p.x, p.bias], p.g.to(dtype))
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves.values()]
    assert [grads[0].dtype, grads[3].dtype] == [grad.dtype for grad in theirs]
    assert bool(launches) == (backend == "triton")
    cast = replace(p, **{n: getattr(p, n).detach().to(dtype) for n in ("x", "weight", "bias", "g")})
    result = {"y": y.detach(), "dlora_A": grads[1], "dlora_B": grads[2]}
    check(result, replace(cast, lora_A=p.lora_A.detach(), lora_B=p.lora_B.detach()))


def test_disabled_regions_and_fp64(device):
    """As F.linear: nothing is cast where autocast is off, and fp64 never is."""
    p = problem(4, 5, 6, 2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.autocast(device.type, enabled=False):
            assert _call(p).dtype == torch.float32
        double = replace(p, **{n: t.double() for n, t in p.tensors().items() if n != "seed"})
        assert _call(double).dtype == F.linear(double.x, double.weight).dtype == torch.float64


def test_mixed_dtypes_without_autocast_are_refused(device):
    p = problem(4, 5, 6, 2, device=device)
    with pytest.raises(TypeError, match="weight: got dtype torch.float32, wanted x's dtype"):
        _call(replace(p, x=p.x.half()))


def saved_into(saved):
    return torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)


class Allocations(TorchDispatchMode):
    """The number of elements and the dtype of every new floating-point tensor."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple) else (made,):
            fresh = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given
            if fresh and t.is_floating_point():
                self.made.append((t.numel(), t.dtype))
        return made


@both_backends
def test_fp32_adapters_make_no_fp32_copy_of_x(
    device, monkeypatch, own_nodes, cpu_without, backend, dtype
):
    """PEFT casts x to the adapters' dtype. Here nothing of x's or y's size is ever fp32."""
    cpu_without()
    M, N, K, r = 80, 48, 40, 4  # too many for what is composed
    layer = FusedLoRALinear(K, N, r, dtype=dtype, device=device, backend=backend)
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    made, saved = [], []

    def watched(function):
        def watch(*args, **kwargs):
            with Allocations() as allocations:
                result = function(*args, **kwargs)
            made.extend(allocations.made)
            return result

        return watch

    monkeypatch.setattr(backends, "forward", watched(backends.forward))
    monkeypatch.setattr(backends, "backward", watched(backends.backward))
    with saved_into(saved), torch.autocast(device.type, dtype):
        y = layer(x)
    y.backward(torch.ones_like(y))
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    large = [kind for numel, kind in made if numel >= M * min(K, N)]
    assert set(large) == {dtype}
    if backend == "torch" or device.type == "cuda":  # the interpreter copies what a kernel reads
        assert len(large) == 2  # y and dx, and no other tensor of their size
    wide = [t for t in saved if t.numel() >= M * K and t.dtype == torch.float32]
    assert not wide
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@both_backends
def test_x_is_cast_once_and_saved_as_cast(device, backend, dtype):
    """fp32 x over fp32 weights: the copy in the autocast dtype is what is saved, as F.linear's."""
    layer = FusedLoRALinear(40, 48, 4, device=device, backend=backend)
    x = torch.randn(64, 40, device=device, requires_grad=True)
    saved = []
    with saved_into(saved), torch.autocast(device.type, dtype):
        layer(x)
    assert [t.dtype for t in saved if t.shape == x.shape] == [dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_peak_memory_is_below_pefts(device, dtype):
    peft = pytest.importorskip("peft")
    M, K, N, r = 8192, 4096, 4096, 16

    def peak(model):
        x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(x).sum().backward()
        return torch.cuda.max_memory_allocated(device) - before

    base = nn.Linear(K, N, device=device, dtype=dtype).requires_grad_(False)
    ours = peak(FusedLoRALinear.from_linear(base, r, r))
    config = peft.LoraConfig(r=r, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(base))
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()  # as get_peft_model does
    assert ours < peak(theirs)


@both_backends
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_grad_scaler(device, backend, dtype):
    """Training with a scaler makes the steps that unscaled training makes, and skips overflows."""
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layer = FusedLoRALinear(12, 10, 2, 2, device=device, backend=backend)
        nn.init.normal_(layer.lora_B)
        layers.append(layer)
    scaled, plain = layers
    x, target = torch.randn(8, 12, device=device), torch.randn(8, 10, device=device)
    optimizers = [
        torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.01) for layer in (scaled, plain)
    ]
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)

    def loss_of(layer):
        with torch.autocast(device.type, dtype):
            y = layer(x)
        return (y.float() - target).square().mean()

    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss_of(scaled)).backward()
        scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        loss_of(plain).backward()
        optimizers[1].step()
    # A power of two changes no rounding but that of subnormal numbers.
    torch.testing.assert_close(scaled.lora_A, plain.lora_A, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled.lora_B, plain.lora_B, rtol=1e-3, atol=1e-5)

    before, scale = scaled.lora_B.clone(), scaler.get_scale()
    optimizers[0].zero_grad()
    scaler.scale(loss_of(scaled) * float("inf")).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert torch.equal(scaled.lora_B, before)
    assert scaler.get_scale() == scale / 2


@both_backends
def test_backward_outside_of_the_region(device, backend, dtype):
    """torch's recommendation; and inside of it, the same gradients."""
    layer = FusedLoRALinear(12, 10, 2, device=device, backend=backend)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 12, device=device)
    with torch.autocast(device.type, dtype):
        inside = torch.autograd.grad(layer(x).sum(), [layer.lora_A, layer.lora_B])
        y = layer(x)
    outside = torch.autograd.grad(y.sum(), [layer.lora_A, layer.lora_B])
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@both_backends
def test_half_precision_module(device, backend, dtype):
    """.half() and .bfloat16() take the adapters along, as they do for any module."""
    layer = FusedLoRALinear(12, 10, 2, device=device, backend=backend).to(dtype)
    nn.init.normal_(layer.lora_B)
    layer(torch.randn(8, 12, device=device, dtype=dtype)).sum().backward()
    assert layer.lora_A.grad.dtype == dtype

"""W0 between forward and backward, and what asks for a derivative with respect to it."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import (
    FusedLoRALinear,
    dora_linear,
    lora_linear,
    lora_linear_gated,
    lora_linear_group,
    lora_linear_multi,
)


def _weight_derivatives(call):
    W = torch.randn(12, 16, dtype=torch.float64)
    return {
        "jvp": lambda: jvp(call, (W,), (W,)),
        "grad of vmap": lambda: grad(lambda w: vmap(call)(torch.stack([w, w])).sum())(W),
        "vmap of jvp": lambda: vmap(lambda w: jvp(call, (w,), (w,))[1])(torch.stack([W, W])),
    }


@pytest.mark.parametrize("form", ["lora_linear", "dora_linear", "lora_linear_group"])
@pytest.mark.parametrize("derivative", ["jvp", "grad of vmap", "vmap of jvp"])
def test_the_base_weight_has_no_derivative_in_silence(form, derivative):
    x, A, B, m = (torch.randn(s, dtype=torch.float64) for s in ((20, 16), (4, 16), (12, 4), 12))
    call = {
        "lora_linear": lambda W: lora_linear(x, W, A, B, scaling=1.0),
        "dora_linear": lambda W: dora_linear(x, W, A, B, m, scaling=1.0),
        "lora_linear_group": lambda W: lora_linear_group(x, [W], [A], [B], scalings=1.0)[0],
    }[form]
    with pytest.raises(ValueError, match="weight: .*differentiates with respect to it"):
        _weight_derivatives(call)[derivative]()
    detached = _weight_derivatives(lambda W: call(W.detach()) + W.sum())[derivative]
    detached()


def test_forward_ad_under_a_dispatch_mode():
    x, W, A, B = (
        torch.randn(s, dtype=torch.float64) for s in ((20, 16), (12, 16), (4, 16), (12, 4))
    )
    with forward_ad.dual_level(), FlopCounterMode(display=False):
        dual = forward_ad.make_dual(A, torch.ones_like(A))
        with pytest.raises(RuntimeError, match="lora_linear_multi: has no forward-mode"):
            lora_linear_multi(x, W, [dual], [B], scalings=1.0, segments=[(0, 20)])
        dual = forward_ad.make_dual(W, torch.ones_like(W))
        for call in (
            lambda: lora_linear(x, dual, A, B, scaling=1.0),
            lambda: lora_linear_multi(x, dual, [A], [B], scalings=1.0, segments=[(0, 20)]),
        ):
            with pytest.raises(ValueError, match="differentiates with respect to it"):
                call()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("M", [5, 100])
def test_merging_between_forward_and_backward(M, use_dora):
    """`merge` gives the parameter other memory: the gradient is that of what the forward read."""
    layer = FusedLoRALinear(16, 12, 4, 8, use_dora=use_dora, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(M, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x).square().sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    layer.merge()
    (dx,) = torch.autograd.grad(y, x)
    assert torch.equal(dx, expected)


SAVING = {
    "lora": lambda x, W, A, B, m: lora_linear(x, W, A, B, scaling=2.0),
    "dora": lambda x, W, A, B, m: dora_linear(x, W, A, B, m, scaling=2.0),
    "group": lambda x, W, A, B, m: lora_linear_group(x, [W], [A], [B], scalings=2.0)[0],
    "multi": lambda x, W, A, B, m: lora_linear_multi(
        x, W, [A], [B], scalings=2.0, segments=[(0, 100)]
    ),
    "gated": lambda x, W, A, B, m: lora_linear_gated(x, x, W, A, B, scaling=2.0),
}


@pytest.mark.parametrize("form", SAVING)
def test_a_parameters_memory_is_read_when_the_gradient_is_made(form, own_nodes):
    """As by PyTorch's own layers: ZeRO-3 takes a parameter's memory away after the forward."""
    x = torch.randn(100, 16, dtype=torch.float64, requires_grad=True)
    parameters = [
        nn.Parameter(torch.randn(shape, dtype=torch.float64), requires_grad=i > 0)
        for i, shape in enumerate([(12, 16), (4, 16), (12, 4), 12])
    ]
    wanted = [x, *parameters[1 : 4 if form == "dora" else 3]]
    y = SAVING[form](x, *parameters)
    expected = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
    values = [p.data for p in parameters]
    for p in parameters:
        p.data = p.new_empty(0)
    for p, value in zip(parameters, values, strict=True):
        p.data = value.clone()
        value.fill_(torch.nan)
    found = torch.autograd.grad(y.square().sum(), wanted)
    for gradient, wants in zip(found, expected, strict=True):
        assert torch.equal(gradient, wants)


@pytest.mark.parametrize("form", SAVING)
def test_hooks_on_saved_tensors_know_parameters(form, own_nodes):
    """Offloading leaves them where they are."""
    parameters = [nn.Parameter(torch.randn(s)) for s in ((12, 16), (4, 16), (12, 4), 12)]
    parameters[0].requires_grad_(False)
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    seen = []

    def pack(t):
        if t.numel() and t.untyped_storage().data_ptr() in storages:
            seen.append(t)
        return t

    x = torch.randn(100, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        SAVING[form](x, *parameters)
    assert len(seen) >= 3
    assert all(type(t) is nn.Parameter for t in seen)

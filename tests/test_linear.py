"""`FusedLoRALinear`: an `nn.Linear` in every respect that users rely on."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora import FusedLoRAGroup, FusedLoRALinear, explain, reference


def _layer(K=6, N=5, r=2, **kwargs):
    """A layer whose adapter does something."""
    layer = FusedLoRALinear(K, N, r, 4, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def test_starts_as_the_base_layer():
    base = nn.Linear(6, 5)
    layer = FusedLoRALinear.from_linear(base, r=3)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), F.linear(x, base.weight, base.bias))
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.bias.data_ptr() == base.bias.data_ptr()
    assert base.weight.requires_grad
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_is_the_reference_on_its_own_parameters():
    layer, x = _layer(), torch.randn(2, 3, 6)
    expected = reference.lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, scaling=2.0, bias=layer.bias
    )
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_trains_on_either_backend(device, launches, backend):
    layer = _layer(device=device, backend=backend)
    layer(torch.randn(4, 6, device=device)).square().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.weight.grad is None
    assert bool(launches) == (backend == "triton")


def test_scaling():
    assert FusedLoRALinear(4, 4, 8, 16).scaling == 2.0
    assert FusedLoRALinear(4, 4, 9, 6, use_rslora=True).scaling == 2.0


def test_initialisation_is_the_papers():
    layer = FusedLoRALinear(400, 30, 16)
    bound = 1 / math.sqrt(400)  # of Kaiming-uniform with a = sqrt(5)
    assert layer.lora_A.abs().max() <= bound
    assert abs(layer.lora_A.std() - bound / math.sqrt(3)) < 0.1 * bound
    assert not layer.lora_B.any()
    nn.init.ones_(layer.lora_B)
    layer.reset_lora_parameters()
    assert not layer.lora_B.any()


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(dtype, adapter_dtype, expected):
    layer = FusedLoRALinear(6, 5, 2, dtype=dtype, adapter_dtype=adapter_dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == expected
    assert layer(torch.randn(3, 6, dtype=dtype)).dtype == dtype


def test_dropout_only_in_training():
    layer, x = _layer(lora_dropout=0.5), torch.randn(4, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_merge_and_unmerge():
    layer, x = _layer().eval(), torch.randn(4, 6)
    before, weight = layer(x), layer.weight.clone()
    layer.merge()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), before)
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer(x), before)


def test_merge_leaves_layers_that_share_the_weight_alone():
    base = nn.Linear(6, 5)
    before = base.weight.clone()
    layer = FusedLoRALinear.from_linear(base, r=2)
    nn.init.normal_(layer.lora_B)
    layer.merge()
    assert torch.equal(base.weight, before)


def test_merge_that_is_not_finite_is_refused_and_changes_nothing():
    layer = _layer(dtype=torch.float16)
    with torch.no_grad():
        layer.lora_B.fill_(1e6)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_merged_layer_in_training_is_refused():
    layer = _layer()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\)"):
        layer(torch.randn(4, 6))


def test_loads_a_plain_linears_state_dict():
    base, layer = nn.Linear(6, 5), _layer()
    adapter = layer.lora_A.clone()
    layer.load_state_dict(base.state_dict())
    assert torch.equal(layer.weight, base.weight)
    assert torch.equal(layer.lora_A, adapter)


def test_state_dict_round_trip():
    layer, other = _layer(), _layer()
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), other(x))


def test_half_an_adapter_is_not_loaded_silently():
    layer = _layer()
    state = layer.state_dict()
    del state["lora_B"]
    with pytest.raises(RuntimeError, match="lora_B"):
        layer.load_state_dict(state)


def test_merged_state_dict_is_a_plain_linears():
    layer, base = _layer().eval(), nn.Linear(6, 5)
    layer.merge()
    base.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(base(x), layer(x))
    with pytest.raises(RuntimeError, match="merged: call unmerge"):
        layer.load_state_dict(layer.state_dict())


def test_from_linear_refuses_subclasses():
    class Quantised(nn.Linear):
        pass

    with pytest.raises(TypeError, match="linear: got Quantised, wanted torch.nn.Linear"):
        FusedLoRALinear.from_linear(Quantised(4, 4))


def test_copies():
    layer, x = _layer().eval(), torch.randn(4, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.lora_A.data_ptr() != layer.lora_A.data_ptr()


def test_meta_device_and_to_empty():
    layer = FusedLoRALinear(6, 5, 2, device="meta").to_empty(device="cpu")
    layer.load_state_dict(_layer().state_dict())
    assert layer(torch.randn(4, 6)).shape == (4, 5)


def test_explain(launches):
    layer, x = FusedLoRALinear(8, 6, 2, lora_dropout=0.5, backend="triton"), torch.randn(3, 8)
    assert str(layer.explain(x)) == str(
        explain(
            x,
            layer.weight,
            layer.lora_A,
            layer.lora_B,
            scaling=layer.scaling,
            bias=layer.bias,
            dropout_p=0.5,
            backend="triton",
        )
    )
    assert layer.explain(x).reasons != layer.eval().explain(x).reasons
    assert "dora: one more read of W0" in str(FusedLoRALinear(8, 6, 2, use_dora=True).explain(x))
    with pytest.raises(ValueError, match="x: got shape"):
        layer.explain(x[:, 1:])
    layer.merge()
    assert "library: taken: F.linear, as the adapter is merged" in str(layer.explain(x))
    assert launches == []


def test_repr():
    layer = _layer(lora_dropout=0.1, use_rslora=True, backend="torch")
    layer.merge()
    assert repr(layer) == (
        "FusedLoRALinear(in_features=6, out_features=5, bias=True, r=2, lora_alpha=4, "
        "lora_dropout=0.1, use_rslora=True, backend='torch', merged=True)"
    )


def _dora(**options):
    layer = _layer(use_dora=True, **options)
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
    return layer


def test_dora_starts_as_the_base_layer():
    for dtype in (torch.float32, torch.bfloat16):
        base, x = nn.Linear(6, 5, dtype=dtype), torch.randn(4, 6, dtype=dtype)
        layer = FusedLoRALinear.from_linear(base, r=2, use_dora=True)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(layer(x), base(x), rtol=2 * eps, atol=2 * eps)
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
            "lora_A",
            "lora_B",
            "lora_magnitude_vector",
        ]


@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_dora_is_pefts(lora_dropout):
    """Outputs and gradients, in training with the same masks too."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, use_dora=True, target_modules=["0"], lora_dropout=lora_dropout
    )
    base, x = nn.Linear(6, 5), torch.randn(30, 6)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    ours = FusedLoRALinear.from_linear(base, 2, 4, use_dora=True, lora_dropout=lora_dropout)
    module = theirs.base_model.model[0]
    torch.testing.assert_close(
        ours.lora_magnitude_vector, module.lora_magnitude_vector["default"].weight
    )
    pairs = [
        (ours.lora_A, module.lora_A["default"].weight),
        (ours.lora_B, module.lora_B["default"].weight),
        (ours.lora_magnitude_vector, module.lora_magnitude_vector["default"].weight),
    ]
    for mine, other in pairs:
        nn.init.uniform_(mine, 0.5, 1.5)
        other.data.copy_(mine)

    def outputs(model):
        torch.manual_seed(3)
        y = model(x)
        y.square().sum().backward()
        return y

    torch.testing.assert_close(outputs(ours), outputs(theirs))
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dora_trains_on_either_backend(device, launches, backend):
    layer = _dora(device=device, backend=backend)
    layer(torch.randn(4, 6, device=device)).square().sum().backward()
    assert layer.lora_magnitude_vector.grad is not None
    assert bool(launches) == (backend == "triton")


def test_dora_merges_and_comes_back():
    layer, x = _dora().eval(), torch.randn(4, 6)
    expected, before = layer(x), layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert list(layer.state_dict()) == ["weight", "bias"]
    copied = copy.deepcopy(layer)
    copied.unmerge()
    for other in (layer, copied):
        other.unmerge()
        torch.testing.assert_close(other.weight, before)
        torch.testing.assert_close(other(x), expected)
    with torch.no_grad():
        layer.lora_magnitude_vector[0] = 0.0
    with pytest.raises(ValueError, match="lora_magnitude_vector: has zeros"):
        layer.merge()
    assert not layer.merged


def test_dora_state_dicts_and_copies():
    layer, other, x = _dora().eval(), _dora().eval(), torch.randn(4, 6)
    assert "lora_magnitude_vector" in layer.state_dict()
    other.load_state_dict(layer.state_dict())
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))
    assert torch.equal(again(x), layer(x))
    with pytest.raises(RuntimeError, match="lora_magnitude_vector"):
        layer.load_state_dict(_layer().state_dict())
    layer.load_state_dict(nn.Linear(6, 5).state_dict())
    assert "use_dora=True" in repr(layer)
    meta = FusedLoRALinear(6, 5, 2, use_dora=True, device="meta").to_empty(device="cpu")
    base = nn.Linear(6, 5)
    meta.load_state_dict(base.state_dict())
    meta.reset_lora_parameters()
    torch.testing.assert_close(meta(x), base(x))


@pytest.mark.parametrize("alpha", [np.float64(8), np.int64(8), Fraction(8)], ids=repr)
def test_alphas_of_other_number_types(alpha):
    layer = FusedLoRALinear(6, 5, r=2, lora_alpha=alpha)
    nn.init.normal_(layer.lora_B)
    assert type(layer.scaling) is float
    x = torch.randn(4, 6)
    y = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), y)
    layer.eval().merge()
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("alpha", [0, -8])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
def test_a_start_that_divides_by_the_scaling(init, alpha):
    with pytest.raises(ValueError, match="lora_alpha: got a scaling of .*, wanted one above 0"):
        FusedLoRALinear(8, 8, r=2, lora_alpha=alpha, init_lora_weights=init)
    FusedLoRALinear(8, 8, r=2, lora_alpha=alpha, init_lora_weights="olora")


def test_a_state_dict_that_fails_leaves_no_start():
    state = FusedLoRALinear(8, 8, r=2, lora_alpha=4, init_lora_weights="pissa").state_dict()
    layer = FusedLoRALinear(8, 8, r=4, lora_alpha=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state)
    assert layer.lora_A_init is None
    assert layer.lora_B_init is None


def test_global_hooks_hear_of_every_layer_of_a_group():
    group = FusedLoRAGroup({name: FusedLoRALinear(6, 5) for name in "qkv"})
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: heard.append(type(m)))
    group(torch.randn(100, 6))
    handle.remove()
    assert heard == [FusedLoRALinear] * 3 + [FusedLoRAGroup]

"""`init_lora_weights`: PEFT's numbers from the same seed, and residual weights that stay honest."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, inject

INITS = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora"]
RESIDUAL = ["pissa", "pissa_niter_3", "olora"]
TARGETS = ["0", "2"]


def _net(dtype=torch.float32):
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6, bias=False)).to(dtype)


def _peft(net, init, **config):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            net,
            peft.LoraConfig(
                r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init, **config
            ),
        )


def _adapted(init, net=None, **options):
    net = _net() if net is None else net
    inject(net, 4, 6, TARGETS, init_lora_weights=init, **options)
    return net


def _learn(model):
    """Moves A and B a little, as training would."""
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            with torch.no_grad():
                module.lora_A += 0.1 * torch.randn_like(module.lora_A)
                module.lora_B += 0.1 * torch.randn_like(module.lora_B)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_same_numbers_as_peft_from_the_same_seed(init, use_rslora, dtype):
    net = _net(dtype)
    base = copy.deepcopy(net)
    torch.manual_seed(5)
    theirs = _peft(copy.deepcopy(net), init, use_rslora=use_rslora).base_model.model
    torch.manual_seed(5)
    _adapted(init, net, use_rslora=use_rslora)
    for path in TARGETS:
        ours, layer = net.get_submodule(path), theirs.get_submodule(path)
        for name in ("lora_A", "lora_B"):
            expected = getattr(layer, name)["default"].weight
            assert getattr(ours, name).dtype == expected.dtype
            assert torch.equal(getattr(ours, name), expected), name
        assert ours.weight.dtype == dtype
        torch.testing.assert_close(ours.weight, layer.base_layer.weight)
        assert (ours.lora_A_init is not None) == (init in RESIDUAL)
        assert torch.equal(ours.weight, base.get_submodule(path).weight) == (init not in RESIDUAL)


@pytest.mark.parametrize("init", [i for i in INITS if i is not False])
def test_starts_at_the_base_model_and_trains_as_peft(init):
    net, x = _net(), torch.randn(30, 12)
    expected = net(x)
    theirs = _peft(copy.deepcopy(net), init)
    ours = _adapted(init, net)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    if init in ("pissa_niter_3", True, "gaussian", "orthogonal"):
        for path in TARGETS:  # drawn anew: start from the same place
            layer = theirs.base_model.model.get_submodule(path)
            for name in ("lora_A", "lora_B"):
                getattr(ours.get_submodule(path), name).data.copy_(
                    getattr(layer, name)["default"].weight
                )
            ours.get_submodule(path).weight.data.copy_(layer.base_layer.weight)

    def losses(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        history = []
        for _ in range(5):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)


@pytest.mark.parametrize("init", RESIDUAL)
def test_the_original_linear_keeps_its_weight(init):
    base = nn.Linear(12, 20)
    before = base.weight.clone()
    layer = FusedLoRALinear.from_linear(base, 4, init_lora_weights=init)
    assert torch.equal(base.weight, before)
    assert layer.weight.data_ptr() != base.weight.data_ptr()
    assert layer.bias.data_ptr() == base.bias.data_ptr()


@pytest.mark.parametrize("init", RESIDUAL)
def test_reset_starts_again_from_the_original_weight(init):
    base, x = nn.Linear(12, 20), torch.randn(5, 12)
    layer = _learn(FusedLoRALinear.from_linear(base, 4, init_lora_weights=init))
    layer.reset_lora_parameters()
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-5)
    layer.eval().merge()
    with pytest.raises(RuntimeError, match="merged"):
        layer.reset_lora_parameters()


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_reset_of_a_parametrised_weight_is_refused(options):
    layer = FusedLoRALinear.from_linear(nn.Linear(12, 20), 4, **options)
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(RuntimeError, match=r"weight: .* parametrization, .*got a Tensor"):
        layer.reset_lora_parameters()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_saved_adapters_go_with_the_original_model(tmp_path, init, use_rslora, use_dora):
    """Ours and PEFT's loaders make of the original model and the files what was trained."""
    pytest.importorskip("safetensors")
    peft = pytest.importorskip("peft")
    from fused_lora import load_adapter, save_adapter

    net, x = _net(), torch.randn(5, 12)
    options = {"alpha_pattern": {"2": 5}, "rank_pattern": {"2": 6}, "use_rslora": use_rslora}
    options |= {"use_dora": use_dora}
    model = _learn(_adapted(init, copy.deepcopy(net), **options)).eval()
    save_adapter(model, tmp_path)
    ours = copy.deepcopy(net)
    load_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    for loaded in (ours, theirs):
        torch.testing.assert_close(loaded.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    assert ours[0].r == (8 if init in RESIDUAL else 4)


def test_adapters_are_not_loaded_over_residual_weights(tmp_path):
    pytest.importorskip("safetensors")
    from fused_lora import load_adapter, save_adapter

    save_adapter(_adapted(True), tmp_path)
    with pytest.raises(ValueError, match="0 has a residual weight"):
        load_adapter(_adapted("olora"), tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_residual_layer_of_another_rank_is_saved(tmp_path, init, use_rslora):
    pytest.importorskip("safetensors")
    from fused_lora import load_adapter, save_adapter

    model = nn.Sequential(nn.Linear(16, 16))
    base, x = copy.deepcopy(model), torch.randn(5, 16)
    inject(model, 4, 8, ["0"], init_lora_weights=init, use_rslora=use_rslora)
    A, B = model[0].lora_A.detach(), model[0].lora_B.detach() + 0.1
    model[0].lora_A = nn.Parameter(torch.cat([A, torch.zeros(2, 16)]))
    model[0].lora_B = nn.Parameter(torch.cat([B, torch.zeros(16, 2)], dim=1))
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), model(x))


@pytest.mark.parametrize("init", RESIDUAL)
def test_state_dicts_of_residual_layers(init):
    x = torch.randn(5, 12)
    layer = _learn(FusedLoRALinear(12, 20, 4, init_lora_weights=init)).eval()
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "lora_A", "lora_B", "lora_A_init", "lora_B_init"]
    for other in (
        FusedLoRALinear(12, 20, 4, init_lora_weights=init),
        FusedLoRALinear(12, 20, 4),  # becomes a residual one
        FusedLoRALinear(12, 20, 4, init_lora_weights=init, device="meta").to_empty(device="cpu"),
    ):
        other.load_state_dict(state)
        assert torch.equal(other.eval()(x), layer(x))
        assert torch.equal(other.lora_A_init, layer.lora_A_init)
    with pytest.raises(RuntimeError, match="weight is a residual"):
        layer.load_state_dict(nn.Linear(12, 20).state_dict(), strict=False)
    layer.merge()
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.unmerge()
    layer.load_state_dict(FusedLoRALinear(12, 20, 4).state_dict())
    assert layer.lora_A_init is None


@pytest.mark.parametrize("init", INITS)
def test_meta_device(init):
    layer = FusedLoRALinear(12, 20, 4, init_lora_weights=init, device="meta")
    assert layer.lora_A.is_meta
    layer.to_empty(device="cpu")
    layer.load_state_dict(nn.Linear(12, 20).state_dict())
    layer.reset_lora_parameters()
    assert layer(torch.randn(3, 12)).isfinite().all()


@pytest.mark.parametrize(
    ("init", "r", "error", "message"),
    [
        ("eva", 4, ValueError, "needs activations of training data"),
        ("loftq", 4, ValueError, 'init_lora_weights: "loftq" starts from the error of codes'),
        ("lofty", 4, ValueError, "init_lora_weights: got 'lofty', wanted True, False"),
        ("pissa_niter_", 4, ValueError, "init_lora_weights: got 'pissa_niter_'"),
        (None, 4, TypeError, "init_lora_weights: got None"),
        (1, 4, TypeError, "init_lora_weights: got 1"),
        ("orthogonal", 3, ValueError, "r: got 3, wanted an even one"),
        ("pissa", 7, ValueError, "r: got 7, wanted at most 6"),
        ("olora", 7, ValueError, "r: got 7, wanted at most 6"),
    ],
)
def test_refused_and_unchanged(init, r, error, message):
    net = _net()
    before, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    with pytest.raises(error, match=re.escape(message)):
        inject(net, r, 4, TARGETS, init_lora_weights=init)
    assert list(net.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

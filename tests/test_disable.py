"""`disable_adapter`: the frozen model for a while."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_lora import (
    FusedLoRAAttention,
    FusedLoRAGroup,
    FusedLoRALinear,
    add_adapter,
    disable_adapter,
    inject,
    route,
)


def _model():
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8, bias=False))


def _learn(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"quantize": "nf4"}],
    ids=["plain", "dora", "dropout", "nf4"],
)
def test_inside_it_is_the_base_model(options):
    model, x = _model(), torch.randn(5, 64)
    inject(model, 4, 8, ["0", "2"], **options)
    base = model(x).detach() if "quantize" in options else None  # of the codes: B is zero
    if base is None:
        base = nn.functional.linear(
            torch.tanh(nn.functional.linear(x, model[0].weight, model[0].bias)), model[2].weight
        )
    _learn(model)
    with disable_adapter(model):
        torch.testing.assert_close(model(x), base)
        with disable_adapter(model):  # nested
            pass
        torch.testing.assert_close(model(x), base)
        assert not model(x).requires_grad
        assert "the adapter is disabled" in str(model[0].explain(x))
    assert (model(x) - base).abs().max() > 0.1
    assert "disabled" not in str(model[0].explain(x))


def test_an_exception_inside_switches_them_on_again():
    model = _learn(_model())
    inject(model, 4, 8, ["0"])
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert not model[0].disabled


def test_uses_that_overlap():
    """Two threads' blocks, of which the first to begin is the first to end."""
    model, x = _model(), torch.randn(5, 64)
    inject(model, 4, 8, ["0"])
    expected = _learn(model)(x)
    first, second = disable_adapter(model), disable_adapter(model)
    first.__enter__()
    base = model(x)
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(model(x), base)
    with pytest.raises(RuntimeError, match="merge outside of disable_adapter"):
        model[0].merge()
    second.__exit__(None, None, None)
    torch.testing.assert_close(model(x), expected)


def test_a_copy_made_inside_is_outside():
    model, x = _model(), torch.randn(5, 64)
    inject(model, 4, 8, ["0"])
    _learn(model)
    with disable_adapter(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        torch.testing.assert_close(other(x), model(x))


def test_layers_that_are_computed_together():
    x = torch.randn(70, 64)
    layers = {name: _learn(FusedLoRALinear(64, 32, r=4)) for name in ("q", "k")}
    group = FusedLoRAGroup(layers)
    with disable_adapter(group):
        for y, layer in zip(group(x), layers.values(), strict=True):
            torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))
        assert "adapter is disabled" in str(group.explain(x))
    mha = nn.MultiheadAttention(64, 4, batch_first=True)
    attention = _learn(FusedLoRAAttention.from_multihead_attention(mha, r=4))
    x = torch.randn(2, 40, 64)
    with disable_adapter(attention):
        torch.testing.assert_close(attention(x), mha(x, x, x, need_weights=False)[0])


def test_llamas_projections_that_share_their_input():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=4, **sizes)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(50, (1, 80))
    with torch.no_grad():
        base = model(tokens).logits
        assert inject(model, 4, 8, "all-linear").groups
        _learn(model)
        with disable_adapter(model):
            torch.testing.assert_close(model(tokens).logits, base)
        assert (model(tokens).logits - base).abs().max() > 0.1


def test_a_layer_of_many_adapters():
    model, x = _model(), torch.randn(5, 64)
    base = model(x)
    for name in ("a", "b"):
        add_adapter(model, name, 2, 4, ["0"])
    _learn(model)
    with disable_adapter(model):
        torch.testing.assert_close(model(x), base)
        assert "its adapters are disabled" in str(model[0].explain(x))
        with route(model, adapter_names="a"):
            torch.testing.assert_close(model(x), base)
    with route(model, adapter_names="a"):
        assert (model(x) - base).abs().max() > 0.1


def test_a_compiled_model_sees_it():
    model, x = _model(), torch.randn(5, 64)
    inject(model, 4, 8, ["0"])
    _learn(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        with disable_adapter(model):
            torch.testing.assert_close(compiled(x), model(x))


def test_what_cannot_be_disabled_says_so():
    with pytest.raises(TypeError, match="model: got list, wanted"), disable_adapter([]):
        pass
    with pytest.raises(ValueError, match="model: has no adapters"), disable_adapter(_model()):
        pass
    model = _model()
    inject(model, 4, 8, ["0", "2"])
    model[2].merge()
    with pytest.raises(ValueError, match="model: 2 is merged"), disable_adapter(model):
        pass
    assert not model[0].disabled

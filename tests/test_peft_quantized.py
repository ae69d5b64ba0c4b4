"""`fuse` over quantised layers of PEFT's: DoRA and groups, against PEFT's own forward.

With bitsandbytes where it is installed; with stand-ins for its layers everywhere: a PEFT model over
the dequantised weights, whose base layers become Linear4bit look-alikes with the codes.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora import layer as peft_lora  # noqa: E402

import fused_lora.peft as fused_peft  # noqa: E402
from fused_lora import QuantizedWeight, inject, peft_state, quantize_nf4, sharing  # noqa: E402
from fused_lora.arguments import Arguments  # noqa: E402
from fused_lora.peft import fuse, unfuse  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def _llama():
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))


def _peft_model(net, **config):
    config = peft.LoraConfig(r=3, lora_alpha=6, **{"target_modules": ALL} | config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            parameter.data *= 1.0 + 0.2 * torch.rand_like(parameter)
    return model


class OverCodes(peft_lora.Linear):
    """Where bitsandbytes is, PEFT has a class of its own over each of its layers."""


class FusedOverCodes(fused_peft._FusedForward, OverCodes):
    pass


class Linear4bit(nn.Linear):
    """What `foreign.read` reads of bitsandbytes' layer."""

    compute_dtype = None


Linear4bit.__module__ = "bitsandbytes.nn.modules"


def _codes(linear):
    """A layer of codes, and ``linear`` with what they stand for."""
    weight = quantize_nf4(linear.weight)
    with torch.no_grad():
        linear.weight.copy_(weight.dequantize())
    layer = Linear4bit(linear.in_features, linear.out_features, device="meta")
    layer.weight = nn.Parameter(weight.codes.data, requires_grad=False)
    layer.weight.quant_state = SimpleNamespace(
        quant_type="nf4",
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=64,
        code=weight.codebook,
        absmax=weight.scales.data,
        offset=weight.nested_offset,
        state2=SimpleNamespace(
            absmax=weight.nested_scales, code=weight.nested_codebook, blocksize=256
        ),
    )
    layer.bias = linear.bias
    return layer


@pytest.fixture
def stand_in(monkeypatch):
    """Makes the codes of a PEFT model's base layers; gives the model over them."""
    monkeypatch.setattr(peft_state, "_OVER_CODES", (OverCodes,))
    monkeypatch.setattr(fused_peft, "_FUSED", fused_peft._FUSED | {OverCodes: FusedOverCodes})

    def over_codes(net, **config):
        codes = {name: _codes(m) for name, m in net.named_modules() if name.endswith(tuple(ALL))}
        expected = _peft_model(net, **config)
        model = copy.deepcopy(expected)
        for name, layer in codes.items():
            wrapped = model.base_model.model.get_submodule(name)
            wrapped.base_layer, wrapped.__class__ = layer, OverCodes
        return model, expected

    return over_codes


@pytest.fixture
def calls(monkeypatch):
    """Which of our functions were called for quantised weights, and with how many."""
    seen = []

    def watch(module, name, number):
        real = getattr(module, name)

        def watched(*args, **kwargs):
            members = args[1] if isinstance(args[1], list) else [args[1]]
            weights = [m.weight if isinstance(m, Arguments) else m for m in members]
            if any(isinstance(weight, QuantizedWeight) for weight in weights):
                seen.append(number(weights))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(fused_peft, "call_layer", lambda _: "lora_linear")
    watch(fused_peft, "dora_linear", lambda _: "dora_linear")
    watch(sharing, "call_group", len)
    return seen


def _results(model, x):
    model.zero_grad()
    x = x.detach().requires_grad_(x.is_floating_point())
    out = model(x)
    out = out.logits if hasattr(out, "logits") else out
    out.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad if x.is_floating_point() else None} | found


def _assert_same(got, expected, rtol=1e-4, atol=1e-5):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=name)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(128, 64)

    def forward(self, x):
        return self.up_proj(x)


DORA = [{}, {"lora_dropout": 0.3}, {"use_rslora": True}]


@pytest.mark.parametrize("config", DORA, ids=str)
def test_dora_of_peft_over_nf4_codes(stand_in, calls, config):
    model, expected = stand_in(Net(), use_dora=True, **config)
    report = fuse(model, strict=True)
    assert len(report.fused) == 1
    results = []
    for each in (model, expected):
        torch.manual_seed(3)
        results.append(_results(each, torch.randn(3, 5, 128)))
    _assert_same(*results)
    assert calls == ["dora_linear"]


@pytest.mark.usefixtures("together")
def test_groups_of_peft_over_nf4_codes(stand_in, calls):
    model, expected = stand_in(_llama())
    report = fuse(model, strict=True)
    assert "self_attn: q_proj, k_proj, v_proj share their input, 2 x" in str(report)
    assert "mlp: gate_proj, up_proj share their input, 2 x" in str(report)
    ids = torch.randint(1, 40, (2, 7))
    _assert_same(_results(model, ids), _results(expected, ids))
    assert calls == [3, "lora_linear", 2, "lora_linear"] * 2
    del calls[:]
    unfuse(model)
    fuse(model, groups=False)
    _assert_same(_results(model, ids), _results(expected, ids))
    assert calls == ["lora_linear"] * 14


@pytest.mark.usefixtures("together")
def test_a_group_over_codes_sees_what_changes(stand_in, calls):
    """Another compute dtype, and codes put in between: nothing prepared is handed out."""
    model, _ = stand_in(_llama())
    fuse(model)
    ids = torch.randint(1, 40, (2, 7))
    attention = model.base_model.model.model.layers[0].self_attn
    attention.k_proj.base_layer.compute_dtype = torch.bfloat16
    model(ids)
    assert calls == ["lora_linear"] * 4 + [2, "lora_linear", 3, "lora_linear", 2, "lora_linear"]
    attention.k_proj.base_layer.compute_dtype = None
    q, k = attention.q_proj, attention.k_proj
    x = torch.randn(2, 64)
    q(x)
    with torch.no_grad():
        k.base_layer.weight.zero_()
    got = k(x)
    sharing.forget()
    torch.testing.assert_close(got, k(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert q(x).dtype == k(x).dtype == torch.float32  # as bitsandbytes': x's


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_groups_of_inject_over_quantised_weights(format, monkeypatch):
    model = _llama()
    report = inject(model, 3, 6, ALL, quantize=format)
    assert len(report.groups) == 4
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(1, 40, (2, 7))
    sizes = []
    real = sharing.call_group
    monkeypatch.setattr(
        sharing, "call_group", lambda *a, **k: sizes.append(len(a[1])) or real(*a, **k)
    )
    together = _results(model, ids)
    assert sizes == [3, 2, 3, 2]
    said = str(model.model.layers[0].self_attn.q_proj.explain(torch.randn(2, 64)))
    assert "group: one of 3 layers" in said
    for module in model.modules():
        module.__dict__.pop("shared_input", None)
    _assert_same(together, _results(model, ids))


# --- bitsandbytes itself


def _over_bitsandbytes(net, kind, **config):
    bnb = pytest.importorskip("bitsandbytes")
    for path, linear in list(net.named_modules()):
        if not path.endswith(tuple(ALL)):
            continue
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*shape, quant_type=kind)
        new.load_state_dict(linear.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, new)
    net = net.to("cpu")
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind != "int8", kind == "int8"
    return _peft_model(net, **config)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("config", DORA, ids=str)
def test_dora_of_peft_over_bitsandbytes_nf4_and_int8(kind, config, calls):
    model = _over_bitsandbytes(Net(), kind, use_dora=True, **config)
    x = torch.randn(3, 5, 128)
    torch.manual_seed(3)
    expected = _results(model, x)
    assert len(fuse(model, strict=True).fused) == 1
    torch.manual_seed(3)
    got = _results(model, x)
    assert calls == ["dora_linear"]
    tolerance = 3e-2 if kind == "int8" else 1e-4  # bitsandbytes rounds x to int8
    for name in expected:
        assert (got[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_groups_of_peft_over_bitsandbytes_nf4_and_int8(kind, calls):
    model = _over_bitsandbytes(_llama(), kind)
    ids = torch.randint(1, 40, (2, 7))
    expected = _results(model, ids)
    assert len(fuse(model, strict=True).groups) == 4
    got = _results(model, ids)
    assert calls == [3, "lora_linear", 2, "lora_linear"] * 2
    tolerance = 0.1 if kind == "int8" else 1e-4
    assert (got["out"] - expected["out"]).norm() <= tolerance * expected["out"].norm()
    if kind == "nf4":
        del got["dx"], expected["dx"]
        _assert_same(got, expected)

"""Codes of some layers only, or of several formats, and what adapters' files say of them."""

import copy
import functools
import json
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

from safetensors.torch import load_file, save_file
from small_models import base

from fused_lora import (
    QuantizedWeight,
    add_adapter,
    inject,
    load_adapter,
    quantize_nf4,
    save_adapter,
)
from fused_lora.settings import Settings

NUMBERS = {"r": 2, "lora_alpha": 4}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "o_proj"]
MIXED = {"mlp.experts": "mxfp4", r"layers\.0\..*q_proj": None, ".*_proj": "nf4"}


def _formats(model):
    """By the end of its path, what each weight is in."""
    return {
        path.removeprefix("model.layers."): module.layout.format
        for path, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
    }


def _logits(model):
    return model(input_ids=torch.arange(6)[None]).logits.detach()


def _train(model):
    """Adapters that do something."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)


def test_several_formats(tmp_path):
    plain = base("gpt_oss").eval()
    model = copy.deepcopy(plain)
    report = inject(
        model, **NUMBERS, target_modules=ATTENTION, target_parameters=EXPERTS, quantize=MIXED
    )
    of_experts = {
        f"{layer}.mlp.experts.base_layer.{name}": "mxfp4"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    }
    of_attention = dict.fromkeys(
        ("0.self_attn.o_proj.weight", "1.self_attn.q_proj.weight", "1.self_attn.o_proj.weight"),
        "nf4",
    )
    assert _formats(model) == of_experts | of_attention
    assert report.quantization_error > 0
    assert not report.skipped
    _train(model)
    save_adapter(model, tmp_path)
    again = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(again, tmp_path, quantize=MIXED)
    assert torch.equal(_logits(again), _logits(model))


def test_of_several_adapters():
    model = base().eval()
    add_adapter(model, "a", **NUMBERS, target_modules=ATTENTION, quantize={"q_proj": quantize_nf4})
    assert _formats(model) == {f"{i}.self_attn.q_proj.weight": "nf4" for i in range(2)}
    add_adapter(model, "b", **NUMBERS, target_modules=ATTENTION, quantize={"q_proj": "nf4"})
    with pytest.raises(ValueError, match=r"weight of model\.layers\.0\.self_attn\.o_proj is in"):
        add_adapter(model, "c", **NUMBERS, target_modules=ATTENTION, quantize={"o_proj": "nf4"})


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"q_proj": "nf5"}, "quantize['q_proj']: got 'nf5', wanted one of nf4"),
        ({1: "nf4"}, "quantize: got {1: 'nf4'}, wanted a mapping from layers' names to formats"),
        ({"(": "nf4"}, "quantize: '(' is no regular expression"),
        (["nf4"], "quantize: got ['nf4'], wanted"),
    ],
)
@pytest.mark.parametrize("give", [inject, functools.partial(add_adapter, adapter_name="a")])
def test_no_format(give, quantize, message):
    model = base()
    before = list(map(str, model.modules()))
    with pytest.raises((TypeError, ValueError)) as error:
        give(model, **NUMBERS, target_modules=ATTENTION, quantize=quantize)
    first, _, rest = message.partition(".*")
    assert first in str(error.value)
    assert rest in str(error.value)
    assert list(map(str, model.modules())) == before


def test_patterns_that_match_nothing_are_reported():
    report = inject(base(), **NUMBERS, target_modules=ATTENTION, quantize={"experts": "nf4"})
    assert report.skipped == {"experts of quantize": "matches no layer that gets an adapter"}
    assert report.unused_quantize == ("experts of quantize matches no layer that gets an adapter",)
    assert report.quantization_error is None
    behind = {".*_proj": "nf4", "o_proj": "int8", "self_attn.*": None}
    report = inject(base(), **NUMBERS, target_modules=ATTENTION, quantize=behind)
    why = "matches only layers that keys before it match"
    assert report.skipped == {f"{key} of quantize": why for key in ("o_proj", "self_attn.*")}


def test_of_the_command_line():
    assert Settings().codes() is None
    assert Settings(quantize="nf4").codes() == "nf4"
    mixed = Settings(quantize=r"mlp.experts=mxfp4, q_proj=none, a(?=b)=nf4")
    assert mixed.codes() == {"mlp.experts": "mxfp4", "q_proj": None, "a(?=b)": "nf4"}
    others = Settings(quantize="nf4,q_proj=int8").codes()
    assert list(others.items()) == [("q_proj", "int8"), (".*", "nf4")]
    assert Settings(quantize=".*=nf4,int8").codes() == "nf4"  # the first match counts
    for wrong in ("q_proj=nf5", "q_proj=", "nf4,", "nf4,int8", "nf5,q_proj=int8"):
        with pytest.raises(ValueError, match="wanted none or one of nf4, .* or PATTERN=FORMAT"):
            Settings(quantize=wrong)
    with pytest.raises(TypeError, match="quantize: got 3, wanted a string"):
        Settings(quantize=3)


# What it was trained over, what it is over, and what the warning says of both.
PAIRS = [
    (None, None, ()),
    (None, "nf4", ()),  # which was asked for
    ("nf4", "nf4", ()),
    ("nf4", None, ("in nf4, a scale for 1 x 64", "over unquantised weights here", "over nf4")),
    ("int8", "fp8", ("int8, a scale for 1 x all", "over fp8, a scale for 128 x 128 values here")),
    (
        "nf4",
        functools.partial(quantize_nf4, double_quant=False),
        ("1 x 64 values, double_quant, and", "over nf4, a scale for 1 x 64 values here"),
    ),
]


def _said(load):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(w.message) for w in caught if "was trained over" in str(w.message)]


@pytest.mark.parametrize(("before", "now", "parts"), PAIRS, ids=map(str, range(len(PAIRS))))
@pytest.mark.parametrize("kind", ["layers", "experts", "named"])
def test_other_codes_than_it_was_trained_over(kind, before, now, parts, tmp_path):
    plain, name = base("qwen3_moe"), "a" if kind == "named" else None
    model = copy.deepcopy(plain)
    if kind == "named":
        add_adapter(model, "a", **NUMBERS, target_modules=ATTENTION, quantize=before)
    elif kind == "experts":
        inject(model, **NUMBERS, target_parameters=EXPERTS, quantize=before)
    else:
        inject(model, **NUMBERS, target_modules=ATTENTION, quantize=before)
    save_adapter(model, tmp_path, adapter_name=name)
    said = _said(lambda: load_adapter(plain, tmp_path, adapter_name=name, quantize=now))
    assert len(said) == bool(parts)
    for part in parts:
        assert part in said[0]
        assert "(4 layers differ)" in said[0]


@pytest.mark.parametrize("adapter_name", [None, "a"])
def test_patterns_that_match_nothing_warn_where_nobody_sees_a_report(adapter_name, tmp_path):
    model = base()
    inject(model, **NUMBERS, target_modules=ATTENTION)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="qproj of quantize matches no layer that gets an adapter"):
        load_adapter(base(), tmp_path, adapter_name=adapter_name, quantize={"qproj": "nf4"})


_HOSTILE = json.dumps({"model.layers.0.self_attn.q_proj": "\x1b[31m" + "A" * 1_000_000})


@pytest.mark.parametrize(
    "said", ["{", "[]", '{"a": 1}', "[" * 100_000, _HOSTILE, None], ids=map(str, range(6))
)
def test_files_that_say_nothing_of_it(said, tmp_path):
    model = base()
    inject(model, **NUMBERS, target_modules=ATTENTION, quantize="nf4")
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    metadata = {"format": "pt"} | ({"fused_lora.trained_over": said} if said else {})
    save_file(load_file(file), file, metadata=metadata)
    assert not _said(lambda: load_adapter(base(), tmp_path))


def test_a_residuals_codes_are_no_others(tmp_path):
    plain = base()
    model = copy.deepcopy(plain)
    inject(model, **NUMBERS, target_modules=ATTENTION, quantize="nf4", init_lora_weights="pissa")
    with pytest.warns(UserWarning, match="over the codes of a residual"):
        save_adapter(model, tmp_path)
    (said,) = _said(lambda: load_adapter(plain, tmp_path, quantize="nf4"))
    assert "double_quant of a residual, and is over nf4" in said


def test_peft_reads_the_file(tmp_path):
    import peft

    plain = base()
    model = copy.deepcopy(plain)
    inject(model, **NUMBERS, target_modules=ATTENTION, quantize="nf4")
    _train(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).state_dict()
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(theirs[name.replace(".weight", ".default.weight")], tensor)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2

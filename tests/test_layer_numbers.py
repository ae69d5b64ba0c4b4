"""layers_to_transform and layers_pattern: adapters of some blocks of a model, as PEFT chooses."""

import contextlib
import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
from small_models import adapted, base

from fused_lora import add_adapter, inject, load_adapter, route

NUMBERS = {"r": 2, "lora_alpha": 4}


def _nested():
    """Numbers after numbers, as of experts in blocks, and blocks of two names."""
    blocks = [
        nn.ModuleDict(
            {"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "q": nn.Linear(4, 4)}
        )
        for _ in range(3)
    ]
    others = nn.ModuleList(copy.deepcopy(blocks[:1]))
    body = nn.ModuleDict({"layers": nn.ModuleList(blocks), "h": others})
    return nn.ModuleDict({"body": body, "q": nn.Linear(4, 4)})


CHOICES = [
    {"target_modules": ["q"], "layers_to_transform": 1},
    {"target_modules": ["q"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q", "0"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q", "1"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "body.layers"},
    {"target_modules": ["q", "body.layers.2.q"], "layers_to_transform": [0]},
    {"target_modules": ["1"], "layers_to_transform": [1]},
    {"target_modules": ["q"], "layers_to_transform": []},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "body|layers"},
    {"target_modules": ["q"], "layers_to_transform": [0, 1], "exclude_modules": ["1.q"]},
]


@pytest.mark.parametrize("choice", CHOICES, ids=map(str, range(len(CHOICES))))
@pytest.mark.parametrize("add", [False, True])
def test_they_are_pefts(choice, add):
    config = peft.LoraConfig(r=2, **choice)
    theirs = peft.tuners.lora.LoraModel(_nested(), config, "default").targeted_module_names
    args = ("a",) if add else ()
    report = (add_adapter if add else inject)(_nested(), *args, **NUMBERS, **choice)
    assert sorted(report.layers) == sorted(theirs)
    assert theirs


def test_all_linear_in_some_layers():
    report = inject(base(), **NUMBERS, target_modules="all-linear", layers_to_transform=range(1, 2))
    assert len(report.layers) == 7
    assert {path.split(".")[2] for path in report.layers} == {"1"}


def test_numbers_that_no_layer_has_are_reported():
    report = inject(base(), **NUMBERS, target_modules=["q_proj"], layers_to_transform=[0, 99, -1])
    why = "matches no layer that gets an adapter"
    assert report.skipped == {f"{n} of layers_to_transform": why for n in (-1, 99)}


@pytest.mark.parametrize("name", [None, "a"])
def test_we_load_what_peft_saves(name, tmp_path):
    plain, ids = base().double().eval(), torch.arange(8)[None]
    options = {"layers_to_transform": [1], "layers_pattern": "layers"}
    theirs = adapted(copy.deepcopy(plain), ["q_proj", "up_proj"], **options).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(plain, tmp_path, adapter_name=name)
    expected = theirs(input_ids=ids).logits
    with contextlib.nullcontext() if name is None else route(plain, adapter_names=name):
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers_to_transform": "1"},
            "layers_to_transform: got '1', wanted the number of a layer",
        ),
        ({"layers_to_transform": [True]}, r"layers_to_transform: got \[True\], wanted the number"),
        ({"layers_to_transform": [1.0]}, r"layers_to_transform: got \[1.0\], wanted the number"),
        (
            {"layers_to_transform": [7], "target_modules": ["0"]},
            r"in layers \[7\] of layers_to_transform",
        ),
        ({"layers_pattern": "h"}, "layers_pattern: wanted layers_to_transform too"),
        ({"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern: got 3, wanted a string"),
        ({"layers_to_transform": 1, "layers_pattern": ["("]}, "'[(]' is no regular expression"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, "wanted a list of names"),
        ({"layers_to_transform": ""}, "layers_to_transform: got '', wanted the number"),
        ({"layers_to_transform": 1, "layers_pattern": "(?i)q"}, "'[(][?]i[)]q' is no regular exp"),
        (
            {"layers_to_transform": 1, "target_modules": None, "target_parameters": ["x"]},
            "wanted target_modules too: of experts all layers are meant",
        ),
    ],
)
def test_refused_and_unchanged(options, message):
    model = _nested()
    before = str(model)
    with pytest.raises((TypeError, ValueError), match=message):
        inject(model, **NUMBERS | {"target_modules": ["q"]} | options)
    assert str(model) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": "1"}, "layers_to_transform: got '1', wanted the number"),
        ({"layers_to_transform": [1], "layers_pattern": "(a*)*"}, "got the pattern"),
        ({"layers_to_transform": [1], "layers_pattern": ".*.*.*.*"}, "got the pattern"),
        ({"layers_to_transform": [1], "layers_pattern": {"a": 1}}, "layers_pattern: got"),
        ({"layers_to_transform": {"a": 1}}, "layers_to_transform: got"),
        ({"layers_to_transform": [1], "layers_pattern": "(?i)q"}, "is no regular expression"),
        ({"layers_to_transform": [1], "layers_pattern": ["a"] * 17}, "has 17, wanted at most 16"),
    ],
)
def test_configs_are_checked(fields, message, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]} | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_adapter(_nested(), tmp_path)

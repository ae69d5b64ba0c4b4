"""`lora_plus_param_groups`: PEFT's `create_loraplus_optimizer` groups, for its models and ours."""

import re
import warnings

import pytest
import torch
from torch import nn

from fused_lora import inject, lora_plus_param_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.norm = nn.Embedding(7, 12), nn.LayerNorm(12)
        self.up, self.head = nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, ids):
        return self.head(torch.relu(self.up(self.norm(self.emb(ids)))))


CONFIGS = {
    "plain": {},
    "embedding": {"target_modules": ["emb", "up"]},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm", "head"]},
    "trainable tokens": {"trainable_token_indices": {"emb": [1, 3]}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_groups_are_pefts(config):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            Net(), peft.LoraConfig(**{"r": 2, "target_modules": ["up"]} | config)
        )
    options = {
        "lr": 1e-3,
        "loraplus_lr_ratio": 16,
        "loraplus_weight_decay": 0.1,
        "loraplus_lr_embedding": 1e-5,
    }
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    ours = torch.optim.AdamW(lora_plus_param_groups(model, **options), lr=options["lr"])
    assert len(ours.param_groups) == len(theirs.param_groups) == 4
    for group, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in group.pop("params")] == [id(p) for p in expected.pop("params")]
        assert group == expected


def test_injected_models():
    model = Net()
    inject(model, 2, 4, ["up", "head"])
    for parameter in (model.norm.weight, model.norm.bias, model.up.bias, model.emb.weight):
        parameter.requires_grad_()
    groups = lora_plus_param_groups(model, lr=0.1, loraplus_lr_ratio=4, loraplus_weight_decay=0.2)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [[names[id(p)] for p in g["params"]] for g in groups] == [
        ["emb.weight", "up.lora_A", "head.lora_A"],
        [],
        ["up.lora_B", "head.lora_B"],
        ["norm.weight", "norm.bias", "up.bias"],
    ]
    assert [g["lr"] for g in groups] == [0.1, 1e-6, 0.4, 0.4]
    assert [g["weight_decay"] for g in groups] == [0.2, 0.2, 0.2, 0.0]
    optimizer = torch.optim.SGD(groups)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": [1]}, TypeError, "model: got list"),
        (
            {"model": Net().requires_grad_(False)},
            ValueError,
            "has no lora_B that requires a gradient",
        ),
        ({"lr": 0}, ValueError, "lr: got 0, wanted > 0"),
        ({"lr": "1"}, TypeError, "lr: got str"),
        ({"loraplus_lr_ratio": float("nan")}, ValueError, "loraplus_lr_ratio: got nan"),
        ({"loraplus_weight_decay": -1}, ValueError, "loraplus_weight_decay: got -1, wanted at l"),
    ],
)
def test_refused(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lora_plus_param_groups(**{"model": Net(), "lr": 0.1, "loraplus_lr_ratio": 2} | changes)

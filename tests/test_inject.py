"""`inject`: which modules it takes, what it freezes, what it reports and what it refuses."""

import contextlib
import copy
import importlib
import inspect
import re

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, add_adapter, inject, route


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.v_proj(self.norm(self.q_proj(x)))


def _model():
    return nn.Sequential(Block(), nn.Linear(4, 8), Block())


def test_the_seed_documents_layer():
    """200 x 200 with rank 20: 40,000 parameters become 8,000, 80 % saved."""
    report = inject(nn.Sequential(nn.Linear(200, 200, bias=False)), 20, 20, ["0"])
    assert (report.adapted, report.trainable) == (40_000, 8_000)
    assert report.saved == pytest.approx(0.8)
    assert "8,000 trainable parameters of 48,000" in str(report)
    assert "80.0% saved" in str(report)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj"], ["0.q_proj", "2.q_proj"]),
        (["q_proj", "0.v_proj"], ["0.q_proj", "0.v_proj", "2.q_proj"]),
        ({"1"}, ["1"]),
        (r"2\..*_proj", ["2.q_proj", "2.v_proj"]),
        ("all-linear", ["0.q_proj", "0.v_proj", "1", "2.q_proj", "2.v_proj"]),
    ],
)
def test_target_modules_follow_pefts_rules(target_modules, expected):
    report = inject(_model(), 2, 4, target_modules)
    assert list(report.layers) == expected


def test_all_linear_leaves_the_output_head():
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = Block(), nn.Linear(4, 10)

        def get_output_embeddings(self):
            return self.lm_head

    assert inject(WithHead(), 2, 4, "all-linear").layers == ("body.q_proj", "body.v_proj")


def test_exclude_modules():
    report = inject(_model(), 2, 4, ["q_proj", "v_proj"], exclude_modules=r"0\..*")
    assert report.layers == ("2.q_proj", "2.v_proj")


def test_freezes_everything_else_and_keeps_the_output():
    model, x = _model(), torch.randn(3, 8)
    before = model(x)
    report = inject(model, 2, 4, ["q_proj"], lora_dropout=0.1, use_rslora=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.{name}" for path in report.layers for name in ("lora_A", "lora_B")
    }
    assert torch.equal(model(x), before)
    layer = model[0].q_proj
    assert isinstance(layer, FusedLoRALinear)
    assert (layer.lora_dropout, layer.use_rslora, layer.training) == (0.1, True, True)


def test_numbers_of_the_report():
    model = _model()
    before = sum(p.numel() for p in model.parameters())
    report = inject(model, 2, 4, ["q_proj"])
    assert report.trainable == 2 * (2 * 8 + 8 * 2)
    assert report.total == before + report.trainable
    assert report.adapted == 2 * 64


def test_what_matches_but_is_no_linear_is_reported():
    report = inject(_model(), 2, 4, ["q_proj", "norm"])
    assert report.layers == ("0.q_proj", "2.q_proj")
    assert report.skipped["0.norm"] == "is of type LayerNorm, not an nn.Linear"
    assert "skipped 2.norm" in str(report)


def test_a_module_used_twice_stays_one_module():
    shared = Block()
    model = nn.ModuleDict({"a": shared, "b": shared})
    linear = nn.Linear(8, 8)
    model["c"], model["d"] = linear, linear
    report = inject(model, 2, 4, ["q_proj", "c", "d"])
    assert model["a"].q_proj is model["b"].q_proj
    assert model["c"] is model["d"]
    assert isinstance(model["d"], FusedLoRALinear)
    assert report.trainable == 2 * 32
    assert report.adapted == 2 * 64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": [1]}, TypeError, "model: got list"),
        ({"model": nn.Linear(2, 2)}, ValueError, "use FusedLoRALinear.from_linear"),
        ({"target_modules": ["k_proj"]}, ValueError, "wanted some of ['1', 'q_proj', 'v_proj']"),
        ({"target_modules": ["norm"]}, ValueError, "it does match {'0.norm': 'is of type"),
        ({"target_modules": []}, ValueError, "target_modules: [] matches no nn.Linear"),
        ({"target_modules": "q_proj"}, ValueError, "in a list, a regular expression for the whole"),
        (
            {"exclude_modules": ["q_proj"]},
            ValueError,
            "and not all of them in exclude_modules, ['q_proj']",
        ),
        ({"target_modules": [""]}, ValueError, "matches no nn.Linear"),
        ({"target_modules": "("}, ValueError, "target_modules: '(' is no regular expression"),
        ({"target_modules": [1]}, TypeError, "target_modules: got [1], wanted a string or a list"),
        ({"exclude_modules": 3}, TypeError, "exclude_modules: got 3"),
        ({"r": 0}, ValueError, "r: got 0"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha: got inf"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: got 1.0"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: got torch.int8"),
    ],
)
def test_refused_and_unchanged(changes, error, message):
    model = _model()
    modules = dict(model.named_modules())
    arguments = {"model": model, "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changes
    with pytest.raises(error, match=re.escape(message)):
        inject(**arguments)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


BOTH_WAYS = [
    pytest.param(inject, id="inject"),
    pytest.param(lambda *a: add_adapter(a[0], "one", *a[1:]), id="add_adapter"),
]


@pytest.mark.parametrize("add", BOTH_WAYS)
def test_layers_whose_owner_reads_their_weight(add):
    """nn.TransformerEncoderLayer's fast path, in eval(): the adapters would be left out."""
    torch.manual_seed(0)
    for options in ({}, {"batch_first": True, "bias": False}, {"activation": torch.tanh}):
        add(nn.TransformerEncoderLayer(16, 2, **options), 2, 4, ["linear1"])  # has no such path
    encoder = nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match=r"model: linear1: .*set_fastpath_enabled\(False\)"):
        add(encoder, 2, 4, ["linear1", "linear2"])
    assert type(encoder.linear1) is nn.Linear
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        add(encoder, 2, 4, ["linear1", "linear2"])
        x = torch.randn(2, 3, 16)
        names = {} if add is inject else {"adapter_names": ["one"] * 2}
        for layer in (encoder.linear1, encoder.linear2):
            nn.init.normal_(layer.lora_B if add is inject else layer.lora_B["one"])
        with route(encoder, **names) if names else contextlib.nullcontext():
            torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("add", BOTH_WAYS)
@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [
        ("mamba", "MambaMixer", "dt_proj"),
        ("mamba2", "Mamba2Mixer", "out_proj"),
        ("jamba", "JambaMambaMixer", "dt_proj"),
        ("wavlm", "WavLMAttention", "q_proj"),
    ],
)
def test_layers_of_transformers_that_are_not_called(add, family, layer, name):
    """As PEFT refuses Mamba's: kernels, or PyTorch's attention, read their weights."""
    pytest.importorskip("transformers")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(modeling, layer)
    assert f"self.{name}.weight" in inspect.getsource(kind)
    owner = kind.__new__(kind)
    nn.Module.__init__(owner)
    setattr(owner, name, nn.Linear(4, 8))
    owner.in_proj = nn.Linear(4, 8)
    with pytest.raises(ValueError, match=rf"m.{name}: a {layer} reads its weight"):
        add(nn.ModuleDict({"m": owner}), 2, 4, "all-linear")
    add(nn.ModuleDict({"m": owner}), 2, 4, ["in_proj"])
    assert type(getattr(owner, name)) is nn.Linear


@pytest.mark.parametrize("add", BOTH_WAYS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_layer_with_hooks_is_refused(kind, add):
    model = _model()
    modules = dict(model.named_modules())
    hook = getattr(model[0].q_proj, f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(ValueError, match="model: 0.q_proj: has hooks"):
        add(model, 2, 4, ["q_proj"])
    assert dict(model.named_modules()) == modules
    hook.remove()
    model[0].q_proj.forward = model[0].q_proj.forward  # as accelerate does it
    with pytest.raises(ValueError, match="or a forward of its own"):
        add(model, 2, 4, ["q_proj"])
    del model[0].q_proj.forward
    add(model, 2, 4, ["q_proj"])


def test_twice_is_refused():
    model = _model()
    inject(model, 2, 4, ["q_proj"])
    with pytest.raises(ValueError, match="has adapters already, at 0.q_proj and 1 more"):
        inject(model, 2, 4, ["v_proj"])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_trains_as_peft_does(dropout):
    """The same steps as real PEFT from the same start; with dropout, the same loss at first."""
    peft = pytest.importorskip("peft")
    ours, x, target = _model(), torch.randn(64, 8), torch.randn(64, 4)
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    inject(ours, 2, 4, ["q_proj"], lora_dropout=dropout)
    for path in ("0.q_proj", "2.q_proj"):
        layer = theirs.base_model.model.get_submodule(path)
        ours.get_submodule(path).lora_A.data.copy_(layer.lora_A["default"].weight)

    def losses(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        history = []
        for _ in range(1 if dropout else 20):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


def test_a_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"has PEFT's adapters already.*fused_lora.peft.fuse"):
        inject(model, 2, 4, "all-linear")


def test_a_name_that_matches_nothing_is_reported():
    report = inject(nn.Sequential(Block()), 2, 4, ["q_proj", "vproj"])
    assert report.skipped == {"vproj": "matches no module"}
    assert "skipped vproj: matches no module" in str(report)


def test_patterns_that_match_nothing_are_reported():
    patterns = {"rank_pattern": {"qproj": 4, "q_proj": 3}, "alpha_pattern": {"k_proj": 1}}
    report = inject(nn.Sequential(Block()), 2, 4, ["q_proj"], **patterns)
    why = "matches no layer that gets an adapter"
    assert report.skipped == {"qproj of rank_pattern": why, "k_proj of alpha_pattern": why}

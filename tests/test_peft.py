"""`fused_lora.peft`: fused PEFT models give PEFT's results, and `unfuse` leaves no trace."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora import Linear as PeftLinear  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import fused_lora.peft as fused_peft  # noqa: E402
from fused_lora.peft import FusedPeftLinear, fuse, register, unfuse  # noqa: E402
from fused_lora.peft_state import arguments_of, look, misfit, usual  # noqa: E402


class Net(nn.Module):
    """Two linear layers and one of GPT-2's transposed ones."""

    def __init__(self, bias=True):
        super().__init__()
        self.up = nn.Linear(12, 20, bias=bias)
        self.conv = Conv1D(16, 20)
        self.down = nn.Linear(16, 8, bias=bias)

    def forward(self, x):
        smooth = torch.nn.functional.silu  # a ReLU that rounding flips would move the gradients
        return self.down(smooth(self.conv(smooth(self.up(x)))))


def _model(adapters=1, base_bias=True, base_dtype=torch.float32, **config):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "conv", "down"]} | config
    if "conv" in config["target_modules"]:
        config["fan_in_fan_out"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own advice on fan_in_fan_out and lora_bias
        model = peft.get_peft_model(Net(base_bias).to(base_dtype), peft.LoraConfig(**config))
        for n in range(1, adapters):
            more = config | {"r": 3 + n, "bias": "none"}
            model.add_adapter(f"other{n}", peft.LoraConfig(**more))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
        elif "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def _outputs(model, x):
    """y and the gradients of everything that trains."""
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | grads


def _assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(got[name], expected[name], msg=name, **tolerance)


@pytest.fixture
def calls(monkeypatch):
    """How many layers took the fused path since the last look."""
    seen = []

    def watch(name, dropout_p):
        real = getattr(fused_peft, name)
        watched = lambda *a, **k: seen.append(dropout_p(*a, **k)) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(fused_peft, name, watched)

    watch("call_layer", lambda x, call, **_: call.dropout_p)
    watch("dora_linear", lambda *_, dropout_p, **__: dropout_p)
    return seen


CONFIGS = {
    "plain": {},
    "no bias": {"base_bias": False},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias over no bias": {
        "lora_bias": True,
        "base_bias": False,
        "target_modules": ["up", "down"],
    },
    "trained bias": {"bias": "all"},
    "patterns": {"rank_pattern": {"up": 7}, "alpha_pattern": {"down": 3}},
    "two adapters": {"adapters": 2},
    "three adapters": {"adapters": 3},
    "dora": {"use_dora": True},
    "dora, no bias, rslora": {"use_dora": True, "base_bias": False, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_values_and_gradients_are_pefts(config, calls):
    model = _model(**config).double()
    model.base_model.set_adapter(list(model.peft_config))
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    expected = _outputs(model, x)
    report = fuse(model)
    assert report.not_fused == {}
    _assert_same(_outputs(model, x), expected, rtol=1e-9, atol=1e-9)
    assert len(calls) == len(report.fused)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_dora_trains_as_peft_does(calls, lora_dropout):
    """Several steps from the same start, with PEFT's own dropout masks from the same seed."""
    model = _model(use_dora=True, lora_dropout=lora_dropout)
    plain, x = copy.deepcopy(model), torch.randn(30, 12)
    fuse(model, strict=True)

    def losses(model):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        history = []
        for _ in range(8):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    ours = losses(model)
    assert len(calls) == 3 * 8
    assert ours == pytest.approx(losses(plain), rel=1e-4)
    assert ours[-1] != ours[0]


def test_kernels_run_under_fused_dora(device, launches):
    model = _model(target_modules=["up", "down"], use_dora=True).to(device)
    x = torch.randn(5, 12, device=device)
    expected = _outputs(model, x)
    fuse(model, backend="triton")
    _assert_same(_outputs(model, x), expected, rtol=1e-4, atol=1e-4)
    assert launches


def test_kernels_run_under_a_fused_model(device, launches):
    model = _model(target_modules=["up", "down"]).to(device)
    x = torch.randn(5, 12, device=device)
    expected = _outputs(model, x)
    fuse(model, backend="triton")
    _assert_same(_outputs(model, x), expected, rtol=1e-4, atol=1e-4)
    assert launches.count("gemm_one_pass") + launches.count("gemm_add_lora") >= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_fp32_adapters_over_a_half_base(calls, dtype, use_dora):
    model = _model(base_dtype=dtype, target_modules=["up", "down"], use_dora=use_dora)
    assert model.base_model.model.up.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(50, 12, dtype=dtype)
    exact = _outputs(copy.deepcopy(model).double(), x.double())
    fuse(model)
    for name, tensor in _outputs(model, x).items():
        # Several roundings to the dtype, of every element, on the way through two layers.
        error = (tensor.double() - exact[name]).norm() / exact[name].norm()
        assert error < 4 * torch.finfo(dtype).eps, name
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast(calls, dtype, use_dora):
    model, x = _model(target_modules=["up", "down"], use_dora=use_dora), torch.randn(5, 12)
    with torch.autocast("cpu", dtype):
        expected = model(x)
        fuse(model)
        y = model(x)
    assert y.dtype == expected.dtype
    assert len(calls) == 2
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)


def test_dropout_in_training_only(calls):
    model, x = _model(lora_dropout=0.5, target_modules=["up", "down"]), torch.randn(200, 12)
    expected = model.eval()(x)
    fuse(model)
    torch.testing.assert_close(model(x), expected)
    assert calls == [0.0, 0.0]
    model.train()
    assert not torch.equal(model(x), model(x))
    assert calls[2:] == [0.5] * 4


def test_state_is_looked_at_on_each_call(calls):
    model, x = _model(adapters=2, target_modules=["up", "down"]), torch.randn(5, 12)
    plain = copy.deepcopy(model).eval()
    fuse(model.eval())

    def same():
        calls.clear()
        torch.testing.assert_close(model(x), plain(x))
        return len(calls)

    assert same() == 2
    for m in (model, plain):
        m.set_adapter("other1")
    assert same() == 2
    with model.disable_adapter(), plain.disable_adapter():
        assert same() == 0
    assert same() == 2
    for m in (model, plain):
        m.merge_adapter()
    assert same() == 0
    for m in (model, plain):
        m.unmerge_adapter()
    assert same() == 2
    for m in (model, plain):
        for layer in (m.base_model.model.up, m.base_model.model.down):
            layer.scale_layer(0.5)
    assert same() == 2
    for m in (model, plain):
        m.delete_adapter("other1")
        m.set_adapter("default")
    assert same() == 2


@pytest.fixture
def mixed(monkeypatch):
    """How many layers took the fused path with a mixed batch since the last look."""
    seen = []
    real = fused_peft.lora_linear_multi
    monkeypatch.setattr(
        fused_peft, "lora_linear_multi", lambda *a, **k: seen.append(k["segments"]) or real(*a, **k)
    )
    return seen


MIXED = ["other1", "__base__", "default", "other1", "other2", "default"]


@pytest.mark.parametrize("shape", [(6, 12), (6, 5, 12), (6, 2, 3, 12)])
@pytest.mark.parametrize("rslora", [False, True])
def test_multi_mixed_batches_are_pefts(mixed, shape, rslora):
    model = _model(adapters=3, use_rslora=rslora).double().eval()
    for parameter in model.parameters():  # PEFT trains the active adapter alone
        parameter.requires_grad_("lora_" in _name_of(model, parameter))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def outputs():
        model.zero_grad()
        x.grad = None
        y = model(x, adapter_names=MIXED)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "dx": x.grad} | grads

    expected = outputs()
    fuse(model)
    _assert_same(outputs(), expected, rtol=1e-9, atol=1e-9)
    assert len(mixed) == 3


def _name_of(model, parameter):
    return next(name for name, p in model.named_parameters() if p is parameter)


def test_multi_mixed_batches_through_the_kernels(device, mixed):
    model = _model(adapters=3, target_modules=["up", "down"]).eval().to(device)
    x = torch.randn(6, 3, 12, device=device)
    expected = model(x, adapter_names=MIXED)
    fuse(model, backend="triton")
    torch.testing.assert_close(model(x, adapter_names=MIXED), expected, rtol=1e-4, atol=1e-4)
    assert len(mixed) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multi_mixed_batches_with_fp32_adapters_over_a_half_base(mixed, dtype):
    model = _model(adapters=3, base_dtype=dtype, target_modules=["up", "down"]).eval()
    x = torch.randn(6, 12, dtype=dtype)
    expected = model(x, adapter_names=MIXED)
    fuse(model)
    y = model(x, adapter_names=MIXED)
    assert y.dtype == expected.dtype
    tolerance = 20 * torch.finfo(dtype).eps
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=atol)
    assert len(mixed) == 2


def test_multi_adapters_that_only_some_layers_have(mixed):
    model = _model(adapters=2, target_modules=["up", "down"]).eval()
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["down"]))
    names = ["third", "default", "third", "__base__", "other1", "third"]
    x = torch.randn(6, 12)
    expected = model(x, adapter_names=names)
    fuse(model)
    torch.testing.assert_close(model(x, adapter_names=names), expected)
    assert len(mixed) == 2
    every = ["third"] * 6  # then `up` has nothing to add: PEFT's forward does it
    unfused = model.base_model.model.up
    assert fused_peft.obstacle(unfused, every) == "none of its adapters is active"
    model(x, adapter_names=every)
    assert len(mixed) == 3


def _lora_bias(model):
    B = model.base_model.model.up.lora_B["other1"]
    B.bias = nn.Parameter(torch.randn(B.out_features))


def _other_dropout(model):
    model.base_model.model.up.lora_dropout["other1"] = nn.Dropout(0.5).train()


def _merged(model):
    model.merge_adapter()


def _disabled(model):
    model.base_model.model.up.enable_adapters(False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_lora_bias, "the batch mixes adapters with lora_bias"),
        (_other_dropout, "the batch mixes adapters of different dropout"),
        (_disabled, "its adapters are disabled"),
        (_merged, "its adapters are merged"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_multi_mixed_batches_that_go_to_peft(mixed, change, why):
    model = _model(adapters=3, target_modules=["up", "down"]).eval()
    fuse(model)
    change(model)
    layer = model.base_model.model.up
    assert fused_peft.obstacle(layer, MIXED) == why
    x = torch.randn(6, 12)
    if change is _merged:
        with pytest.raises(ValueError, match="when there are merged adapters"):
            layer(x, adapter_names=MIXED)
        return
    torch.manual_seed(0)
    y = layer(x, adapter_names=MIXED)
    assert mixed == []
    unfuse(model)
    torch.manual_seed(0)
    if change is not _other_dropout:  # PEFT goes through a set of names, in any order
        assert torch.equal(layer(x, adapter_names=MIXED), y)


def test_multi_mixed_batches_under_compile():
    model = _model(adapters=3, target_modules=["up", "down"]).eval()
    x = torch.randn(6, 12)
    expected = model.base_model.model.up(x, adapter_names=MIXED)
    fuse(model)
    operators = []

    def count(graph, inputs):
        operators.extend(n for n in graph.graph.nodes if "lora_linear_multi" in str(n.target))
        return graph

    layer = torch.compile(model.base_model.model.up, backend=count)
    torch.testing.assert_close(layer(x, adapter_names=MIXED), expected)
    assert operators


def test_multi_mixed_batches_of_a_wrong_length_raise_pefts_error():
    model = _model(adapters=3, target_modules=["up", "down"]).eval()
    fuse(model)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(torch.randn(5, 12), adapter_names=MIXED)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_and_unload_of_a_fused_model(use_dora):
    model, x = _model(use_dora=use_dora).double().eval(), torch.randn(5, 12).double()
    fuse(model)
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


def test_nothing_but_the_class_changes(tmp_path):
    model = _model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = dict(model.named_parameters())
    keys, text = list(model.state_dict()), repr(model)
    fuse(model)
    assert all(before[n] is p for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    model(torch.randn(5, 12)).sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for name, value in model.base_model.model.up.lora_A["default"].state_dict().items():
        assert torch.equal(again.base_model.model.up.lora_A["default"].state_dict()[name], value)
    unfuse(model)
    assert repr(model) == text
    layer = model.base_model.model.up
    assert type(layer) is PeftLinear
    assert "fused_lora_backend" not in layer.__dict__
    unfuse(model)


def test_hooks_on_the_layer_still_run():
    model = _model()
    seen = []
    model.base_model.model.up.register_forward_hook(lambda *a: seen.append("up"))
    fuse(model)
    model(torch.randn(5, 12))
    assert seen == ["up"]


def test_dora_beside_another_adapter_goes_to_peft():
    model = _model(target_modules=["up", "down"], use_dora=True, adapters=2).eval()
    x = torch.randn(5, 12)
    model.base_model.set_adapter(list(model.peft_config))
    expected = model(x)
    report = fuse(model)
    assert len(report.not_fused) == 2
    assert "several adapters are active, and 'default' is DoRA's" in str(report)
    torch.testing.assert_close(model(x), expected)


def test_as_a_context_manager():
    model = _model()
    with fuse(model) as report:
        assert len(report.fused) == 3
        assert type(model.base_model.model.up) is FusedPeftLinear
    assert type(model.base_model.model.up) is PeftLinear


def test_copies_of_a_fused_model(calls):
    model, x = _model().eval(), torch.randn(5, 12)
    fuse(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(other(x), expected)
        assert len(calls) == 3


def test_accelerates_hooks():
    accelerate = pytest.importorskip("accelerate")
    model, x = _model(target_modules=["up", "down"]).eval(), torch.randn(5, 12)
    expected = model(x)
    accelerate.hooks.add_hook_to_module(model.base_model.model.up, accelerate.hooks.ModelHook())
    report = fuse(model)
    assert len(report.fused) == 2
    torch.testing.assert_close(model(x), expected)
    unfuse(model)
    torch.testing.assert_close(model(x), expected)


class _Frozen(nn.Linear):
    pass


def _subclass(model):
    model.base_model.model.up.base_layer.__class__ = _Frozen


def test_hooks_on_all_modules_still_run():
    model, x = _model(), torch.randn(5, 12)
    fuse(model)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    model(x)
    hook.remove()
    assert nn.Linear in seen
    seen.clear()
    model(x)
    assert not seen


def _base_hook(model):
    model.base_model.model.up.base_layer.register_forward_hook(lambda *a: None)


def _adapter_hook(model):
    model.base_model.model.up.lora_A["default"].register_forward_hook(lambda *a: None)


def _trainable_base(model):
    model.base_model.model.up.base_layer.weight.requires_grad_(True)


def _odd_dropout(model):
    model.base_model.model.up.lora_dropout["default"] = nn.AlphaDropout(0.1).eval()


def _replaced_forward(model):
    model.base_model.model.up.forward = model.base_model.model.up.base_layer.forward


def _merge(model):
    model.merge_adapter()


def _hotswap(model):
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.base_model.model.down.scaling["default"] = 2.0


def _bias_of_A(model):
    model.base_model.model.up.lora_A["default"].bias = nn.Parameter(torch.ones(4))


def _drops_everything(model):
    model.base_model.model.up.lora_dropout["default"] = nn.Dropout(1.0).train()


REFUSED = [
    (_subclass, "its base layer is a _Frozen, not an nn.Linear or Conv1D"),
    (_base_hook, "its base layer has hooks"),
    (_adapter_hook, "adapter 'default' has hooks"),
    (_trainable_base, "its base weight requires a gradient"),
    (_odd_dropout, "adapter 'default' has a AlphaDropout for its dropout"),
    (_replaced_forward, "its forward was replaced by another library"),
    (_merge, "its adapters are merged"),
    (_hotswap, "adapter 'default' has tensor(2.) for its scaling, not a finite number"),
    (_bias_of_A, "adapter 'default' has a bias in its lora_A"),
    (_drops_everything, "adapter 'default' drops everything"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED, ids=lambda p: getattr(p, "__name__", ""))
def test_what_is_not_fused_is_reported_and_still_right(change, why):
    model, x = _model(target_modules=["up", "down"]).eval(), torch.randn(5, 12)
    change(model)
    expected = model(x)
    with pytest.raises(ValueError, match=re.escape(why)):
        fuse(model, strict=True)
    assert type(model.base_model.model.down) is PeftLinear
    report = fuse(model)
    assert report.not_fused["base_model.model.up"] == why
    assert re.search(rf"base_model\.model\.up +not fused: {re.escape(why)}", str(report))
    torch.testing.assert_close(model(x), expected)


def test_other_lora_layers_and_variants_are_reported():
    net = nn.ModuleDict({"emb": nn.Embedding(10, 4), "lin": nn.Linear(4, 4)})
    config = peft.LoraConfig(r=2, target_modules=["emb", "lin"])
    report = fuse(peft.get_peft_model(net, config))
    assert report.fused == ("base_model.model.lin",)
    assert "Embedding, not a lora.Linear" in report.not_fused["base_model.model.emb"]
    assert str(report).startswith("1 of 2 LoRA layers fused")


def test_refused_models():
    with pytest.raises(TypeError, match="model: got list"):
        fuse([])
    with pytest.raises(ValueError, match=r"has no LoRA layers of PEFT's.*fused_lora\.inject"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        fuse(_model(), backend="cuda")


def test_register_makes_fused_layers_and_lets_subclasses_through(calls):
    config = peft.LoraConfig(r=4, target_modules=["up", "conv", "down"], fan_in_fan_out=True)
    register(config)
    net = Net()
    net.down.__class__ = _Frozen
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peft.get_peft_model(net, config)
    inner = model.base_model.model
    assert [type(m) for m in (inner.up, inner.conv, inner.down)] == [
        FusedPeftLinear,
        FusedPeftLinear,
        PeftLinear,
    ]
    model(torch.randn(5, 12))
    assert len(calls) == 2
    with pytest.raises(TypeError, match="config: got dict"):
        register({})


@pytest.mark.parametrize("use_dora", [False, True])
def test_compile(calls, use_dora):
    model, x = _model(lora_dropout=0.0, use_dora=use_dora).eval(), torch.randn(5, 12)
    expected = model(x)
    fuse(model)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected)


def test_fused_layers_explain_their_calls(launches):
    model, x = _model(adapters=2, use_dora=False), torch.randn(6, 12)
    fuse(model, backend="triton")
    layer = model.base_model.model.up
    names = ["default", "__base__", "other1"] * 2
    explained = layer.explain(x)
    assert (explained.backend, "dora" in explained.reasons) == ("triton", False)
    assert "taken" in str(layer.explain(x, adapter_names=names))
    assert model.base_model.model.conv.explain(torch.randn(6, 20)).backend == "triton"
    assert not launches  # it computes nothing
    why = layer.explain(x, adapter_names=names[:2]).reasons["fused"]
    assert why == "not taken: adapter_names are not one for each sample of x"
    why = layer.explain(x.double()).reasons["fused"]
    assert why == "not taken: x is not what the base layer takes"
    with model.disable_adapter():
        explained = layer.explain(x)
    assert (explained.strategy, explained.strategy_dx) == ("peft", "peft")
    assert explained.reasons["fused"] == "not taken: its adapters are disabled"


def test_fused_dora_layers_explain_their_calls():
    model = _model(use_dora=True)
    fuse(model)
    assert "norm" in model.base_model.model.up.explain(torch.randn(6, 12)).reasons["dora"]


def test_dropout_of_dora_in_evaluation():
    """PEFT's DoRA looks at the layer's mode, plain LoRA at the dropout's."""
    model = _model(use_dora=True, lora_dropout=0.5, target_modules=["up", "down"]).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    x = torch.randn(80, 12)
    expected = model(x)
    fuse(model, strict=True)
    torch.testing.assert_close(model(x), expected)


def test_jit_trace_records_pefts_operators():
    model = _model(target_modules=["up", "down"]).eval()
    fuse(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, torch.randn(5, 12))
    for M in (7, 100):
        x = torch.randn(M, 12)
        torch.testing.assert_close(traced(x), model(x))


def _set(path, value):
    def change(layer):
        owner, _, name = path.rpartition(".")
        owner = layer.get_submodule(owner) if owner else layer
        setattr(owner, name, value(owner) if callable(value) else value)

    change.__name__ = path
    return change


def _hook(path):
    def change(layer):
        layer.get_submodule(path).register_forward_hook(lambda *_: None)

    change.__name__ = f"hook on {path}"
    return change


def _bias_elsewhere(path, value):
    def change(layer):
        module = layer.get_submodule(path)
        del module.bias
        module.bias = value  # no parameter any more

    change.__name__ = f"bias of {path}"
    return change


def _scaling(value):
    return lambda layer: layer.scaling.update(default=value)


CHANGES = [
    lambda layer: None,
    lambda layer: layer.train(),
    lambda layer: layer.enable_adapters(False),
    lambda layer: layer.merge(),
    lambda layer: layer.set_adapter(["default", "other1"]),
    lambda layer: layer.set_adapter("other1"),
    lambda layer: layer.set_adapter("nobody"),
    lambda layer: layer.set_adapter(["nobody", "other1"]),
    _scaling(3),
    _scaling(float("nan")),
    _scaling(True),
    _scaling(torch.tensor(2.0)),
    _hook("base_layer"),
    _hook("lora_A.default"),
    _hook("lora_B.default"),
    _hook("lora_dropout.default"),
    _set("lora_A.default.forward", lambda module: module.forward),
    _set("lora_A.default.bias", lambda module: nn.Parameter(torch.randn(4))),
    _set("lora_B.default.bias", lambda module: nn.Parameter(torch.randn(20))),
    _bias_elsewhere("base_layer", torch.ones(20)),
    _bias_elsewhere("lora_A.default", None),
    _bias_elsewhere("lora_B.default", None),
    _bias_elsewhere("lora_B.default", torch.ones(20)),
    _set("lora_dropout.default", lambda _: nn.AlphaDropout(0.1)),
    _set("lora_dropout.default", lambda _: nn.Identity()),
    _set("lora_dropout.default", lambda _: nn.Dropout(1.0)),
    _set("lora_A.default", lambda _: nn.Sequential(nn.Linear(12, 4, bias=False))),
    _set("base_layer.__class__", lambda _: _Frozen),
    lambda layer: layer.base_layer.requires_grad_(),
    lambda layer: layer.base_layer.to(torch.float8_e4m3fn),
    lambda layer: layer.bfloat16(),
    lambda layer: prune.l1_unstructured(layer.lora_A["default"], "weight", 0.5),
    lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity()),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_quick_look_at_a_layer_says_what_the_whole_one_says(change, use_dora):
    model = _model(adapters=2, target_modules=["up"], lora_dropout=0.1, use_dora=use_dora).eval()
    fuse(model)
    layer, rows = model.base_model.model.up, torch.randn(5, 12)
    assert use_dora or usual(layer, rows) is not None
    try:
        change(layer)
    except ValueError:  # PEFT's: it has no such adapter
        layer._active_adapter = ["nobody"]
    for x in (rows, rows.bfloat16(), rows[0], rows[0, 0], None):
        for context in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu")):
            with context:
                quick, found = usual(layer, x), look(layer)
                if quick is None:
                    continue
                assert not isinstance(found, str), found
                assert misfit(layer, found, x) is None
                assert found.is_simple
                assert quick.same(arguments_of(found))

"""Gated MLPs of PEFT's and of injected models: which take the last layer's input in parts, when."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from small_models import FAMILIES, adapted, assert_same, base, outputs  # noqa: E402

from fused_lora import (  # noqa: E402
    disable_adapter,
    gated_mlp,
    inject,
    merge_and_unload,
)
from fused_lora.peft import fuse, unfuse  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_nodes")
LAYERS = ["gate_proj", "up_proj", "down_proj"]


def _base(family="llama", **config):
    return base(family, **config).double()


def _model(family="llama", targets=LAYERS, **options):
    return adapted(base(family), targets, **options)


def _mlps(model):
    return [m for m in model.modules() if type(m).__name__.endswith("MLP")]


def _batch(rows=35):
    return torch.randint(1, 40, (2, rows))


_assert_same = functools.partial(assert_same, rtol=1e-6, atol=1e-7)


@pytest.fixture
def calls(monkeypatch):
    """The activations of last layers that took their input in parts, with and without gradients."""
    seen = []
    for name in ("call_gated", "gated_input"):
        real = getattr(gated_mlp, name)
        monkeypatch.setattr(
            gated_mlp,
            name,
            lambda gate, up, activation, given, real=real: (
                seen.append(activation) or real(gate, up, activation, given)
            ),
        )
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_pefts(family, calls):
    model, ids = _model(family), _batch()
    expected = outputs(model, ids)
    report = fuse(model)
    assert len(report.gated) == 2
    assert "mlp: down_proj takes act(gate_proj) * up_proj in parts, 2 x" in str(report)
    _assert_same(outputs(model, ids), expected)
    assert calls == ["gelu_pytorch_tanh" if "gemma" in family else "silu"] * 2


def test_kernels_run(device, calls, launches):
    model, ids = _model(dtype=torch.float32).to(device), _batch().to(device)
    expected = outputs(model, ids)
    fuse(model, backend="triton")
    got = outputs(model, ids)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], msg=name, rtol=2e-3, atol=2e-4)
    assert calls == ["silu"] * 2
    assert (launches.count("gated"), launches.count("gated_backward")) == (4, 2)


def test_injected_models(calls):
    model, ids = _base(), _batch()
    report = inject(model, r=3, lora_alpha=6, target_modules=LAYERS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert report.gated == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert "in parts, 2 x" in str(report)
    got = outputs(model, ids)
    assert calls == ["silu"] * 2
    gated_mlp.ungate_mlps(model)
    _assert_same(got, outputs(model, ids))
    assert len(calls) == 2


def test_without_gradients(calls):
    model, ids = _model().eval(), _batch()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        fuse(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert calls == ["silu"] * 4


def test_few_rows_run_apart(calls):
    model, ids = _model(), _batch(32)
    expected = outputs(model, ids)
    fuse(model)
    _assert_same(outputs(model, ids), expected)
    assert calls == []


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "down_proj"], ["up_proj"]])
def test_some_of_the_layers(calls, targets):
    model, ids = _model(targets=targets), _batch()
    expected = outputs(model, ids)
    gated = "down_proj" in targets
    assert len(fuse(model).gated) == 2 * gated
    _assert_same(outputs(model, ids), expected)
    assert len(calls) == 2 * gated


def test_dropout_is_that_of_apart(calls):
    model, ids = _model(targets=["down_proj"], lora_dropout=0.5), _batch()
    results = []
    for groups in (True, False):
        fuse(model, groups=groups)
        torch.manual_seed(5)
        results.append(outputs(model, ids))
    _assert_same(*results)
    assert len(calls) == 2


def test_autocast(calls):
    model, ids = _model(dtype=torch.float32), _batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits
        fuse(model)
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
    assert calls == ["silu"] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(calls, reentrant):
    model, ids = _model(lora_dropout=0.5).train(), _batch()
    fuse(model)
    torch.manual_seed(5)
    expected = outputs(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    torch.manual_seed(5)
    _assert_same(outputs(model, ids), expected)
    assert len(calls) == 4  # each block twice


def test_a_checkpointed_mlp(calls):
    model = _model()
    fuse(model)
    mlp = _mlps(model)[0]
    x = torch.randn(70, 16, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(x).sum(), x)
    (got,) = torch.autograd.grad(checkpoint(mlp, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("where", ["down_proj", "act_fn"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_hear_what_they_would(calls, where, kind):
    model, ids = _model(), _batch()
    expected = outputs(model, ids)
    fuse(model)
    heard = []
    handle = getattr(getattr(_mlps(model)[0], where), kind)(lambda *args: heard.append(args))
    _assert_same(outputs(model, ids), expected)
    assert len(heard) == len(calls) == 1
    handle.remove()
    outputs(model, ids)
    assert len(calls) == 3


def test_hooks_on_every_module(calls):
    model, ids = _model(), _batch()
    fuse(model)
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: heard.append(type(m)))
    outputs(model, ids)
    handle.remove()
    assert calls == []
    assert "FusedPeftLinear" in {kind.__name__ for kind in heard}


def test_state_is_looked_at_on_each_call(calls):
    model, ids = _model().eval(), _batch()
    plain = copy.deepcopy(model)
    fuse(model)

    def same():
        calls.clear()
        logits = [m(input_ids=ids).logits for m in (model, plain)]
        torch.testing.assert_close(*logits)
        return len(calls)

    assert same() == 2
    with model.disable_adapter(), plain.disable_adapter():
        assert same() == 0
    for m in (model, plain):
        m.merge_adapter()
    assert same() == 0
    for m in (model, plain):
        m.unmerge_adapter()
        for mlp in _mlps(m):
            mlp.act_fn = nn.ReLU()
    assert same() == 0
    for m in (model, plain):
        for mlp in _mlps(m):
            mlp.act_fn = nn.SiLU()
    assert same() == 2
    for m in (model, plain):
        torch.manual_seed(0)
        m.add_adapter("dora", peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True))
        m.set_adapter("dora")
    assert same() == 0


def test_disabled_and_merged_layers_of_injected_models(calls):
    model, ids = _base().eval(), _batch()
    with torch.no_grad():
        expected = model(ids).logits
        inject(model, r=3, lora_alpha=6, target_modules=LAYERS)
        with disable_adapter(model):
            torch.testing.assert_close(model(ids).logits, expected)
        assert calls == []
        kinds = {type(mlp).__name__ for mlp in _mlps(model)}
        merge_and_unload(model)
        torch.testing.assert_close(model(ids).logits, expected)
    assert calls == []
    assert kinds == {"GatedLlamaMLP"}
    assert {type(mlp).__name__ for mlp in _mlps(model)} == {"LlamaMLP"}


def test_unfuse_and_fuse_again(calls):
    model = _model()
    before = {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    for _ in range(2):
        first = fuse(model)
        assert fuse(model).gated == first.gated != ()
        assert fuse(model, groups=False).gated == ()
        outputs(model, _batch())
        assert calls == []
        fuse(model)
    unfuse(model)
    assert {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()} == before


def test_peft_merges_and_unloads_around_it():
    model, ids = _model().eval(), _batch()
    fuse(model)
    with torch.no_grad():
        expected = model(ids).logits
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(ids).logits, expected)


def test_copies_and_pickles(calls):
    model, ids = _model(), _batch()
    fuse(model)
    expected = outputs(model, ids)
    _assert_same(outputs(copy.deepcopy(model), ids), expected)
    assert len(calls) == 4
    mlp = _mlps(model)[0]
    x = torch.randn(70, 16, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(mlp)), torch.load(file, weights_only=False)):
        assert type(other) is type(mlp)
        torch.testing.assert_close(other(x), mlp(x))
    unfuse(model)
    assert type(copy.deepcopy(model).base_model.model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_other_formulas_are_left_alone(calls):
    class Added(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.__dict__.update(mlp.__dict__)

        def forward(self, x):
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
            return down_proj

    model, ids = _model(), _batch()
    layers = model.base_model.model.model.layers
    layers[0].mlp = Added(layers[0].mlp)
    mlp = layers[1].mlp  # Liger's way, and accelerate's
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    expected = outputs(model, ids)
    assert fuse(model).gated == ()
    _assert_same(outputs(model, ids), expected)
    assert calls == []


def test_a_class_that_is_patched_later(calls, monkeypatch):
    """As Liger does it, and with a parameter of another name from the start."""
    model, ids = _model(), _batch()
    fuse(model)
    seen = []

    def patched(self, x):
        seen.append(x.shape)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(_mlps(model)[0].plain, "forward", patched)
    outputs(model, ids)
    assert len(seen) == 2
    assert calls == []

    class Named(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.__dict__.update(mlp.__dict__)

        def forward(self, hidden_states):
            down_proj = self.down_proj(
                self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
            )
            return down_proj

    unfuse(model)
    for layer in model.base_model.model.model.layers:
        layer.mlp = Named(layer.mlp)
    assert fuse(model).gated == ()


@pytest.mark.parametrize("leave", ["unfuse", "fuse", "unload"])
def test_whoever_holds_a_forward(leave):
    """accelerate wraps a block's forward, and may outlive what it wrapped."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = _model(), _batch()
    fuse(model)
    for mlp in _mlps(model):
        accelerate.hooks.add_hook_to_module(mlp, accelerate.hooks.ModelHook())
    expected = outputs(model, ids)
    if leave == "unfuse":
        unfuse(model)
    elif leave == "fuse":
        fuse(model)
    else:
        for mlp in _mlps(model):
            accelerate.hooks.remove_hook_from_module(mlp)
        unfuse(model)
    _assert_same(outputs(model, ids), expected)


def test_fusing_again_finds_the_same(calls):
    model = _model(targets="all-linear")
    first = fuse(model)
    assert len(first.groups) == 4
    for _ in range(2):
        again = fuse(model)
        assert (again.groups, again.gated) == (first.groups, first.gated)
    plain = model.merge_and_unload()
    again = fuse(peft.get_peft_model(plain, peft.LoraConfig(target_modules="all-linear")))
    assert len(again.groups) == 4


def test_a_plain_models_pickle_has_nothing_of_ours():
    model = _model()
    fuse(model)
    plain = model.merge_and_unload()
    assert b"fused_lora" not in pickle.dumps(plain)
    assert type(pickle.loads(pickle.dumps(_mlps(plain)[0]))).__name__ == "LlamaMLP"


def test_nested_tensors(calls):
    model = _model(dtype=torch.float32)
    mlp = _mlps(model)[0]
    parts = [torch.randn(40, 16), torch.randn(50, 16)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    expected = mlp(x)
    fuse(model)
    for got, want in zip(mlp(x).unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(got, want)
    assert calls == []


def test_compiled(calls):
    model, ids = _model(dtype=torch.float32).eval(), _batch()
    fuse(model)
    expected = model(input_ids=ids).logits
    calls.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert calls == []


def test_training_saves_memory():
    """Of the intermediate size: gate, up and act(gate), and not the product."""
    model = adapted(base(intermediate_size=23, num_hidden_layers=1), LAYERS)
    ids = _batch()
    counts = []
    for groups in (False, True):
        fuse(model, groups=groups)
        saved = {}

        def pack(t, saved=saved):
            if t.numel() == 70 * 23:
                saved[t.untyped_storage().data_ptr()] = t.detach()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(input_ids=ids, labels=ids)
        out.loss.backward()  # a graph with hooks is not collected
        counts.append(len(saved))
    assert counts == [4, 3]

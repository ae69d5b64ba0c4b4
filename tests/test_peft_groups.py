"""`fuse(model, groups=True)`: layers that share their input, and only they, run together."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from small_models import FAMILIES, MIXTURES, adapted, assert_same, base, outputs  # noqa: E402

from fused_lora import inject, sharing  # noqa: E402
from fused_lora.dispatch import better_apart  # noqa: E402
from fused_lora.peft import fuse, register, unfuse  # noqa: E402

pytestmark = pytest.mark.usefixtures("together")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _model(family="llama", targets=ALL, **options):
    return adapted(base(family), targets, **options)


def _batch():
    return torch.randint(1, 40, (2, 7))


@pytest.fixture
def groups(monkeypatch):
    """The number of members of every group that was computed."""
    seen = []
    real = sharing.call_group
    monkeypatch.setattr(
        sharing, "call_group", lambda *a, **k: seen.append(len(a[1])) or real(*a, **k)
    )
    yield seen
    assert getattr(sharing._local, "prepared", None) is None


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("granite", "olmo2")])
def test_values_and_gradients_are_pefts(family, groups):
    model, ids = _model(family), _batch()
    expected = outputs(model, ids)
    report = fuse(model)
    assert report.not_fused == {}
    assert len(report.groups) == 4
    assert_same(outputs(model, ids), expected)
    assert groups == [3, 2] * 2
    assert "q_proj, k_proj, v_proj share their input, 2 x" in str(report)
    assert "layers.*.mlp: gate_proj, up_proj share" in str(report)


@pytest.mark.parametrize("family", MIXTURES)
def test_models_with_experts(family, groups):
    """Their attention, their shared and dense MLPs, and the experts."""
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    model, ids = _model(family, target_parameters=experts), _batch()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = outputs(model, ids)
    report = fuse(model)
    assert report.not_fused == {}
    mlps = 2 * (family == "qwen2_moe")  # its shared experts; PEFT takes GLM's names for experts'
    assert len(report.groups) == 2 + mlps
    assert_same(outputs(model, ids), expected)
    assert groups.count(3) == 2
    assert groups.count(2) == mlps


def test_kernels_run(device, launches):
    # Small adapters: what the kernels' fp32 rounds stays small through the layers.
    model, ids = _model(dtype=torch.float32, std=0.1).to(device), _batch().to(device)
    expected = outputs(model, ids)
    fuse(model, backend="triton")
    assert_same(outputs(model, ids), expected, rtol=1e-3, atol=1e-4)
    assert launches.count("gemm_group") == 3  # the embeddings are frozen: the first x needs no dx


def test_switched_off(groups):
    model, ids = _model(), _batch()
    assert len(fuse(model).groups) == 4
    report = fuse(model, groups=False)
    assert report.groups == ()
    assert "share" not in str(report)
    outputs(model, ids)
    assert groups == []


def test_some_of_the_projections(groups):
    model, ids = _model(targets=["q_proj", "v_proj", "up_proj"]), _batch()
    expected = outputs(model, ids)
    assert len(fuse(model).groups) == 2
    assert_same(outputs(model, ids), expected)
    assert groups == [2] * 2


def test_unfuse_leaves_nothing(groups):
    model, ids = _model(), _batch()
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    keys, text = list(model.state_dict()), repr(model)
    fuse(model)
    assert list(model.state_dict()) == keys
    outputs(model, ids)
    unfuse(model)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    assert repr(model) == text


def test_registered_models_group_after_fuse(groups):
    config = peft.LoraConfig(r=2, target_modules=ALL)
    register(config)
    model = peft.get_peft_model(base(), config)
    outputs(model, _batch())
    assert groups == []
    assert len(fuse(model).groups) == 4
    outputs(model, _batch())
    assert groups == [3, 2] * 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing(groups, reentrant, dropout):
    model, ids = _model(lora_dropout=dropout).train(), _batch()
    fuse(model)
    torch.manual_seed(5)
    expected = outputs(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    groups.clear()
    torch.manual_seed(5)
    assert_same(outputs(model, ids), expected)
    assert len(groups) == 8  # each block twice


def test_dropout_in_training_only(groups):
    model, ids = _model(lora_dropout=0.5), _batch()
    model.eval()
    expected = model(input_ids=ids).logits
    fuse(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generate(groups, mode):
    model, ids = _model().eval(), _batch()
    with mode():
        expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        fuse(model)
        got = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)
    # Inference tensors count no versions, so that a change could not be seen.
    assert bool(groups) == (mode is torch.no_grad)


def test_autocast(groups):
    model, ids = _model(dtype=torch.float32), _batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits
        fuse(model)
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
    assert groups == [3, 2] * 2


def test_state_is_looked_at_on_each_call(groups):
    model, ids = _model().eval(), _batch()
    plain = copy.deepcopy(model)
    fuse(model)

    def same():
        groups.clear()
        logits = [m(input_ids=ids).logits for m in (model, plain)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        return len(groups)

    assert same() == 4
    for m in (model, plain):
        torch.manual_seed(0)
        m.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        m.set_adapter("other")
    assert same() == 0  # k_proj has no such adapter: its own forward
    for m in (model, plain):
        m.base_model.set_adapter(["default", "other"])
    assert same() == 2  # gate and up have one adapter still
    for m in (model, plain):
        m.set_adapter("default")
    with model.disable_adapter(), plain.disable_adapter():
        assert same() == 0
    for m in (model, plain):
        m.base_model.model.model.layers[0].self_attn.v_proj.scale_layer(0.5)
    assert same() == 4
    for m in (model, plain):
        m.merge_adapter()
    assert same() == 0
    for m in (model, plain):
        m.unmerge_adapter()
    assert same() == 4


def test_an_optimiser_step_is_seen(groups):
    model, ids = _model(), _batch()
    plain = copy.deepcopy(model)
    fuse(model)
    for m in (model, plain):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            outputs(m, ids)
            optimizer.step()
    assert_same(outputs(model, ids), outputs(plain, ids))


def _attention(dtype=torch.float64, **config):
    """The projections of one layer, fused, an input for them and what they give on their own."""
    model = _model(dtype=dtype, **config)
    fuse(model)
    attention = model.base_model.model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    alone = copy.deepcopy(model)
    fuse(alone, groups=False)
    attention = alone.base_model.model.model.layers[0].self_attn
    x = torch.randn(2, 5, 16).to(dtype)
    return layers, [attention.q_proj, attention.k_proj, attention.v_proj], x


def _close(y, expected):
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_outputs_are_handed_out_once(groups):
    (q, k, v), alone, x = _attention()
    for layer, other in zip((q, k, v), alone, strict=True):
        _close(layer(x), other(x))
    assert groups == [3]
    first, second = k(x), k(x)
    assert first is not second
    _close(first, alone[1](x))
    assert groups == [3]
    assert q(x).grad_fn is k(x).grad_fn
    v(x)


def test_x_changed_in_place(groups):
    (q, k, v), alone, x = _attention()
    q(x)
    x.mul_(2)
    _close(k(x), alone[1](x))
    _close(v(x), alone[2](x))


def test_another_x_of_the_same_values(groups):
    (q, k, v), alone, x = _attention()
    q(x)
    y = k(x.clone())
    assert y.grad_fn is not None
    _close(y, alone[1](x))
    _close(v(x), alone[2](x))
    assert groups == [3]


def test_a_weight_changed_in_between(groups):
    (q, k, v), alone, x = _attention()
    for change in ("A", "data", "base"):
        q(x)
        with torch.no_grad():
            for layer in (k, alone[1]):
                parameter = layer.lora_A["default"].weight
                if change == "A":
                    parameter.mul_(2)
                elif change == "data":
                    parameter.data = parameter.data * 3
                else:
                    layer.base_layer.weight.add_(0.5)
        _close(k(x), alone[1](x))
        _close(v(x), alone[2](x))


def test_a_state_changed_in_between(groups):
    (q, k, v), alone, x = _attention()
    for layer in (q, k, v, *alone):
        layer.eval()
    q(x)
    for layer in (k, alone[1]):
        layer.scale_layer(3.0)
    for layer in (v, alone[2]):
        layer.merge()
    _close(k(x), alone[1](x))
    _close(v(x), alone[2](x))
    sharing.forget()  # v, merged, did not ask for its output


def test_a_mode_changed_in_between(groups):
    (q, k, v), alone, x = _attention(torch.float32)  # autocast leaves fp64 alone
    with torch.no_grad():
        q(x)
    y = k(x)
    assert y.requires_grad
    _close(y, alone[1](x))
    q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert k(x).dtype == torch.bfloat16
    q(x)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(v(x).sum(), x)
    (expected,) = torch.autograd.grad(alone[2](x).sum(), x)
    _close(dx, expected)


def test_an_exception_in_between_and_memory(groups):
    (q, *_), alone, x = _attention()
    q(x)  # and then k and v are never called
    y = q(x + 1)
    _close(y, alone[0](x + 1))
    assert groups == [3, 3]
    sharing.forget()
    assert getattr(sharing._local, "prepared", None) is None


def test_nothing_outlives_the_forward(groups):
    model, ids = _model(), _batch()
    fuse(model)
    out = model(input_ids=ids)
    del out
    gc.collect()
    kept = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.grad_fn is not None]
    assert [tuple(t.shape) for t in kept if "LoRALinearGroup" in str(t.grad_fn)] == []


def test_threads_do_not_see_each_other(groups):
    (q, k, v), alone, x = _attention()
    q(x)
    results = {}

    def other():
        results["k"] = k(x)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    _close(results["k"], alone[1](x))
    assert k(x).grad_fn is v(x).grad_fn
    assert results["k"].grad_fn is not None
    assert groups == [3]


def test_training_in_threads(groups):
    models = [_model() for _ in range(2)]
    ids = _batch()
    expected = [outputs(m, ids) for m in models]
    results = [None, None]

    def train(i):
        results[i] = outputs(models[i], ids)

    for m in models:
        fuse(m)
    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        assert_same(got, want)


def test_hooks_run_and_see_their_own_layer(groups):
    model, ids = _model(), _batch()
    expected = outputs(model, ids)
    fuse(model)
    attention = model.base_model.model.model.layers[0].self_attn
    seen = []
    attention.k_proj.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    assert_same(outputs(model, ids), expected)
    assert seen == [(2, 7, 8)]
    assert groups == [3, 2] * 2


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_that_may_change_the_input(groups, kind):
    model, ids = _model(), _batch()
    expected = outputs(model, ids)
    fuse(model)
    getattr(model.base_model.model.model.layers[0].self_attn.k_proj, kind)(lambda *_: None)
    assert_same(outputs(model, ids), expected)
    assert groups == [2, 3, 2]  # the first attention's projections on their own


def test_accelerates_hooks(groups):
    accelerate = pytest.importorskip("accelerate")
    model, ids = _model(), _batch()
    expected = outputs(model, ids)
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    fuse(model)
    assert_same(outputs(model, ids), expected)
    assert groups == [2, 3, 2]


def test_copies(groups):
    model, ids = _model().eval(), _batch()
    fuse(model)
    expected = model(input_ids=ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        groups.clear()
        assert torch.equal(other(input_ids=ids).logits, expected)
        assert groups == [3, 2] * 2
        attention = other.base_model.model.model.layers[0].self_attn
        assert attention.q_proj.fused_lora_group.group.members[1] is attention.k_proj


def test_copies_of_single_layers(groups):
    """They are on their own, and nobody else's layers come along."""
    model, _ = _model().eval(), _batch()
    fuse(model)
    attention = model.base_model.model.model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    x = torch.randn(2, 5, 16).double()
    alone = len(pickle.dumps(fuse(copy.deepcopy(model), groups=False) and q.base_layer))
    assert len(pickle.dumps(q)) < 3 * alone + 20_000
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), copy.copy(q)):
        groups.clear()
        _close(other(x), q.base_layer(x) + 2 * q.lora_B["default"](q.lora_A["default"](x)))
        assert groups == []
        assert q.fused_lora_group.group.members[:2] == (q, k)
    q(x)
    assert groups == [3]
    sharing.forget()


@pytest.mark.parametrize("how", ["fuse", "inject"])
def test_a_model_goes_when_it_is_deleted(how):
    """At once: it has no cycles."""
    model = _model() if how == "fuse" else base()
    if how == "fuse":
        fuse(model)
    else:
        inject(model, r=2, lora_alpha=4, target_modules=ALL)
    parameters = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert [p for p in parameters if p() is not None] == []
    finally:
        gc.enable()


def test_a_layer_that_was_replaced(groups):
    """It goes, and what is left of its group is no group."""
    model = _model()
    fuse(model)
    attention = model.base_model.model.model.layers[0].self_attn
    old = weakref.ref(attention.k_proj)
    attention.k_proj = nn.Linear(16, 8, dtype=torch.float64)
    assert old() is None
    attention.q_proj(torch.randn(2, 5, 16).double())
    assert groups == []


def test_functional_call(groups):
    model, ids = _model().eval(), _batch()
    other = {n: p.detach() * 1.5 for n, p in model.named_parameters() if "lora" in n}
    expected = torch.func.functional_call(model, other, kwargs={"input_ids": ids}).logits
    fuse(model)
    got = torch.func.functional_call(model, other, kwargs={"input_ids": ids}).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_compile(groups):
    torch._dynamo.reset()
    model, ids = _model(), _batch()
    expected = model(input_ids=ids, use_cache=False).logits
    fuse(model)
    attention = model.base_model.model.model.layers[0].mlp
    x = torch.randn(3, 16, dtype=torch.float64)
    want = attention(x)
    groups.clear()
    got = torch.compile(attention, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got = torch.compile(model, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert groups == []


def test_checkpoint_of_the_projections_alone(groups):
    (q, k, v), alone, x = _attention()
    x.requires_grad_()

    def together(layers):
        return lambda x: sum(layer(x).square().sum() for layer in layers)

    (dx,) = torch.autograd.grad(checkpoint(together((q, k, v)), x, use_reentrant=False), x)
    (expected,) = torch.autograd.grad(together(alone)(x), x)
    _close(dx, expected)
    sharing.forget()


def test_a_group_that_is_never_used_warns(groups):
    layers, _, x = _attention()
    for _ in range(8):
        layers[0](x)
    with pytest.warns(UserWarning, match="FusedPeftLinear computed.*groups=False"):
        layers[0](x)
    sharing.forget()


def test_inject_groups_too(groups):
    model, ids = base(), _batch()
    plain = copy.deepcopy(model)
    report = inject(model, 3, 6, ALL)
    inject(plain, 3, 6, ALL, groups=False)
    assert len(report.groups) == 4
    assert "q_proj, k_proj, v_proj share their input, 2 x" in str(report)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    plain.load_state_dict(model.state_dict())
    assert_same(outputs(model, ids), outputs(plain, ids))
    assert groups == [3, 2] * 2
    attention = model.model.layers[0].self_attn
    attention.k_proj.eval().merge()
    groups.clear()
    logits = [m(input_ids=ids).logits for m in (model, plain)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    assert groups == [2, 3, 2]


def test_few_rows_on_a_cpu_prepare_nothing(monkeypatch):
    monkeypatch.setattr(sharing, "better_apart", better_apart)
    model = _model()
    batch = _batch()
    expected = model(batch).logits
    fuse(model)
    with monkeypatch.context() as patched:
        patched.setattr(sharing, "call_group", None)  # would be called, and fail
        torch.testing.assert_close(model(batch).logits, expected)


class OnGPU(torch.Tensor):
    """As far as its device is asked for."""

    is_cuda = True


def test_without_gradients_a_gpu_wants_more_rows():
    group = sharing.SharedInput([nn.Linear(2, 2)] * 2)
    for rows, grad_enabled, backend, expected in (
        (100, True, "auto", True),
        (100, False, "auto", False),
        (100, False, "triton", True),
        (513, False, "auto", True),
    ):
        with torch.set_grad_enabled(grad_enabled):
            assert group.pays(torch.randn(rows, 2).as_subclass(OnGPU), None, backend) == expected
            assert group.pays(torch.randn(rows, 2), None, backend)


@pytest.mark.parametrize("twice", ["in two blocks", "in one"])
def test_a_projection_used_twice(groups, twice):
    """It is in one group, or in none where it would be two members."""
    model, ids = _model(), _batch()
    first, second = (layer.self_attn for layer in model.base_model.model.model.layers)
    if twice == "in one":
        first.v_proj = first.k_proj
    else:
        second.q_proj = first.q_proj
    expected = outputs(model, ids)
    report = fuse(model)
    assert_same(outputs(model, ids), expected)
    assert len(report.groups) == (3 if twice == "in one" else 4)


def test_functional_call_under_a_transform():
    """More rows than PyTorch's own nodes take: the tensors have no address."""
    model = base().double()
    inject(model, 2, 4, ["q_proj", "k_proj", "v_proj"])
    params = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    ids = torch.randint(1, 40, (2, 50))

    def loss(params):
        return functional_call(model, params, (ids,)).logits.square().mean()

    got = grad(loss)(params)
    model(ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(got[name], parameter.grad)

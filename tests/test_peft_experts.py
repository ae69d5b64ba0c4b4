"""PEFT's adapters on mixtures of experts after `fuse`: the same results, in every state."""

import copy
import functools
import importlib
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM

import fused_lora
import fused_lora.peft
from fused_lora.peft_experts import FusedPeftExperts

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
HIDDEN, EXPERTS, TOP = 48, 6, 3

# Of each form that transformers has, a model: its config's class, and what it calls its sizes.
FORMS = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 40}),
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS, "intermediate_size": 40}),
    # a gate of its own, biases, and weights [E, in, out]
    "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS, "intermediate_size": 40}),
    # up_proj alone
    "nemotron_h": ("NemotronH", {"n_routed_experts": EXPERTS, "moe_intermediate_size": 40}),
}


class Block(nn.Module):
    """Experts as a model has them, with the router's choice for input."""

    def __init__(self, form, implementation="grouped_mm"):
        super().__init__()
        name, sizes = FORMS[form]
        models = importlib.import_module(f"transformers.models.{form}")
        config = getattr(models, f"{name}Config")(hidden_size=HIDDEN, **sizes)
        config._experts_implementation = implementation
        modeling = importlib.import_module(f"transformers.models.{form}.modeling_{form}")
        self.experts = getattr(modeling, f"{name}Experts")(config)
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def _adapted(form="qwen3_moe", both=True, implementation="grouped_mm", names=None, **options):
    block = Block(form, implementation)
    first = "up_proj" if form == "nemotron_h" else "gate_up_proj"
    names = names or [f"experts.{first}", "experts.down_proj"][: 1 + both]
    config = LoraConfig(r=4, lora_alpha=6, target_parameters=names, init_lora_weights=False)
    return get_peft_model(block, LoraConfig(**{**config.to_dict(), **options}))


def _routed(T=30, dtype=torch.float32):
    probabilities = torch.rand(T, EXPERTS).softmax(-1)
    weights, index = probabilities.topk(TOP)
    return torch.randn(T, HIDDEN, dtype=dtype), index, weights.to(dtype)


def _results(model, x, index, weights):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights)]
    model.zero_grad()
    y = model(leaves[0], index, leaves[1])
    y.float().square().sum().backward()
    trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [y.detach(), *(t.grad for t in leaves), *trained]


def _check(model, *inputs, launched=None, **tolerance):
    """Results before and after `fuse` are the same."""
    expected = _results(model, *inputs)
    report = fused_lora.peft.fuse(model)
    assert not report.not_fused
    if launched is not None:
        launched.clear()
    for ours, theirs in zip(_results(model, *inputs), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, **tolerance)
    return report


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_same_results(form, both, implementation):
    model = _adapted(form, both, implementation)
    report = _check(model, *_routed())
    assert type(model.base_model.model.experts) is FusedPeftExperts
    assert "FusedPeftExperts" in repr(model)
    assert len(report.fused) == 1 + both
    assert f"{1 + both} of {1 + both} LoRA layers fused" in str(report)
    assert report.mixtures == ("base_model.model.experts",)
    assert "base_model.model.experts: all experts in one autograd node, 1 x" in str(report)


@pytest.mark.parametrize("form", FORMS)
def test_on_the_kernels(form, device, launches):
    model = _adapted(form).to(device)
    inputs = [t.to(device) for t in _routed()]
    expected = _results(model, *inputs)
    fused_lora.peft.fuse(model, backend="triton")
    for ours, theirs in zip(_results(model, *inputs), expected, strict=True):
        assert_close(ours, theirs)
    products = ["shrink", "gemm_experts"]
    gated = form in ("qwen3_moe", "mixtral")
    forward = [*products, *["gated"] * gated, *products]
    gradients = [*products, *["gated_backward"] * gated, *["multi_grads"] * 2]
    assert launches == forward + gradients + [*products, *["multi_grads"] * 2]


def test_only_the_needed_is_computed(launches, device):
    """Without gradients nothing is kept; of frozen inputs and weights no gradient is made."""
    model = _adapted().to(device)
    inputs = [t.to(device) for t in _routed()]
    fused_lora.peft.fuse(model, backend="triton")
    y = model(*inputs)
    launches.clear()
    y.sum().backward()
    assert launches.count("gemm_experts") == 1  # the gradient of a; x needs none
    with torch.no_grad():
        assert not model(*inputs).requires_grad


def test_what_is_kept():
    """Of a row of the experts' order z and act(gate), on the kernels z alone, and h.

    And on a CPU PEFT's B's as the products read them.
    """
    model = _adapted()
    x, index, weights = _routed(50)
    fused_lora.peft.fuse(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x.requires_grad_(), index, weights.requires_grad_())
    known = {p.data_ptr() for p in (*model.parameters(), x, weights)}
    made = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in known)
    rows = 50 * TOP
    adapters = [(EXPERTS, HIDDEN, 4), (EXPERTS, 80, 4)]
    assert made == [*adapters, (rows, 4), (rows, 4), (rows, 40), (rows, 80)]


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept_for_down_alone(autocast):
    """a, where nothing asks for z's gradient; and no weight that autocast has cast."""
    model = _adapted(names=["experts.down_proj"])
    x, index, weights = _routed(50)
    fused_lora.peft.fuse(model)
    saved = []
    model.base_model.model.experts.get_base_layer().config._experts_implementation = "eager"
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = model(x, index, weights)
    y.sum().backward()
    known = {p.data_ptr() for p in (*model.parameters(), x, weights)}
    made = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in known)
    rows = 50 * TOP
    assert made == [(EXPERTS, HIDDEN, 4), (rows, 4), (rows, 40)]


def test_adapters_after_fuse(tmp_path):
    """PEFT knows a fused wrapper for one of its own."""
    model = _adapted()
    plain = copy.deepcopy(model)
    fused_lora.peft.fuse(model)
    inputs = _routed()
    for each in (model, plain):
        torch.manual_seed(1)
        each.add_adapter("more", copy.deepcopy(each.peft_config["default"]))
        each.base_model.set_adapter(["default", "more"])
    assert_close(model(*inputs), plain(*inputs))
    model.save_pretrained(tmp_path)
    for each in (model, plain):
        each.load_adapter(tmp_path / "more", adapter_name="again")
        each.set_adapter("again")
        each.delete_adapter("more")
    assert_close(model(*inputs), plain(*inputs))
    assert type(model.base_model.model.experts) is FusedPeftExperts
    again = pickle.loads(pickle.dumps(model))
    assert type(again.base_model.model.experts) is FusedPeftExperts
    assert_close(again(*inputs), plain(*inputs))


def test_a_forward_that_is_not_transformers_is_left_to_peft(monkeypatch):
    """A subclass's, a patched one, or a registered implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    inputs = _routed()

    def refused(model, why):
        plain = copy.deepcopy(model)
        report = fused_lora.peft.fuse(model)
        assert why in next(iter(report.not_fused.values()))
        assert_close(model(*inputs), plain(*inputs))

    model = _adapted()
    experts = model.base_model.model.experts.get_base_layer()

    class Doubled(type(experts)):
        def forward(self, *args):
            return 2 * super().forward(*args)

    experts.__class__ = Doubled
    refused(model, "the forward of Doubled is not the one")
    model = _adapted()
    kind = type(model.base_model.model.experts.get_base_layer())
    with monkeypatch.context() as patched:
        before = kind.forward
        patched.setattr(kind, "forward", lambda self, *args: 2 * before(self, *args))
        refused(model, "is not the one that transformers gives")
    model = _adapted(implementation="mine")
    with monkeypatch.context() as patched:
        mine = {**ALL_EXPERTS_FUNCTIONS._global_mapping, "mine": lambda self, x, *_: x}
        patched.setattr(type(ALL_EXPERTS_FUNCTIONS), "_global_mapping", mine)
        refused(model, "computed by 'mine'")


def test_the_output_may_be_changed_in_place():
    model = _adapted()
    x, index, weights = _routed()
    fused_lora.peft.fuse(model)
    y = model(x.requires_grad_(), index, weights)
    y += 1
    (changed,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(changed, torch.autograd.grad(model(x, index, weights).sum(), x)[0])


def test_what_autograd_s_node_cannot_goes_to_peft():
    """Forward mode; arguments of inference mode."""
    model = _adapted(implementation="eager")
    x, index, weights = _routed()
    fused_lora.peft.fuse(model)
    with torch.inference_mode():
        inputs = [t.clone() for t in (x, index, weights)]
    assert model(*inputs).requires_grad
    assert "inference mode" in str(model.base_model.model.experts.explain(*inputs))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(model(dual, index, weights)).tangent is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match=r"reference.lora_linear_experts's can"):
        torch.autograd.grad(model(x, index, weights).sum(), trained, create_graph=True)


def test_adapters_without_values_are_reported():
    """As ZeRO-3 and FSDP1 leave them between calls."""
    model = _adapted()
    for p in model.parameters():
        p.data = torch.empty(0)
    assert len(fused_lora.peft.fuse(model).not_fused) == 2
    model = _adapted()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.empty(0)
    assert len(fused_lora.peft.fuse(model).not_fused) == 2


def test_fp32_adapters_over_bf16_and_router_weights_of_another_dtype():
    model = _adapted().to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    x, index, weights = _routed(60, torch.bfloat16)
    _check(model, x, index, weights, rtol=5e-2, atol=5e-1)
    fused_lora.peft.unfuse(model)
    _check(model, x, index, weights.float(), rtol=5e-2, atol=5e-1)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast(implementation):
    """As transformers' implementations: "eager" is cast by it, the others are not."""
    model = _adapted(implementation=implementation)
    x, index, weights = _routed(60)
    exact = model(x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, index, weights)
        fused_lora.peft.fuse(model)
        y = model(x, index, weights)
        assert model.base_model.model.experts.explain(x, index, weights).backend == "torch"
    assert y.dtype == expected.dtype
    cast = implementation == "eager"
    assert_close(y, expected, **({"rtol": 5e-2, "atol": 5e-1} if cast else {}))
    assert cast == ((y - exact).abs().max() > 1e-3)
    y.float().sum().backward()  # outside of it


def test_states():
    """Disabled, merged, of several adapters, of none: what PEFT gives, whatever computes it."""
    model = _adapted()
    inputs = _routed()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    plain = copy.deepcopy(model)
    fused_lora.peft.fuse(model)
    experts = model.base_model.model.experts

    def same(reason=None):
        found = experts.explain(*inputs)
        assert (reason in str(found)) if reason else found.strategy == "library"
        assert_close(model(*inputs), plain(*inputs))

    same()
    for each in (model, plain):
        each.set_adapter("other")
    same()
    for each in (model, plain):
        each.base_model.set_adapter(["default", "other"])
    same()
    for each in (model, plain):
        each.set_adapter("default")
        each.merge_adapter()
    same("merged")
    for each in (model, plain):
        each.unmerge_adapter()
    same()
    with model.disable_adapter(), plain.disable_adapter():
        same("disabled")
    merged, unfused = model.merge_and_unload(), plain.merge_and_unload()
    assert_close(merged(*inputs), unfused(*inputs))


def test_hooks_and_trainable_weights_go_to_peft():
    model = _adapted()
    inputs = _routed()
    fused_lora.peft.fuse(model)
    wrapper = model.base_model.model.experts
    heard = []
    experts = wrapper.get_base_layer()
    handle = experts.register_forward_hook(lambda *_: heard.append(True))
    model(*inputs)
    assert heard
    assert "hooks" in str(wrapper.explain(*inputs))
    handle.remove()
    experts.down_proj.requires_grad_(True)
    assert "requires a gradient" in str(wrapper.explain(*inputs))
    model(*inputs).sum().backward()
    assert experts.down_proj.grad is not None


def test_other_parameters_are_not_fused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))

        def forward(self, x):
            return x @ self.weight.t()

    model = get_peft_model(
        nn.ModuleDict({"lin": Scaled()}), LoraConfig(target_parameters=["lin.weight"])
    )
    report = fused_lora.peft.fuse(model)
    (why,) = report.not_fused.values()
    assert "a Scaled is no mixture of experts" in why
    layer = model.base_model.model["lin"]
    x = torch.randn(3, HIDDEN)
    assert_close(layer(x), layer.base_layer(x))  # B is 0
    with pytest.raises(ValueError, match="cannot be fused"):
        fused_lora.peft.fuse(model, strict=True)


def test_odd_arguments_get_peft_s_own_errors():
    model = _adapted()
    x, index, weights = _routed()
    fused_lora.peft.fuse(model)
    for wrong in ((x, index), (x[:, 1:], index, weights), (x, index[:2], weights)):
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            model(*wrong)
    experts = model.base_model.model.experts
    assert "wanted the experts' dtype" in str(experts.explain(x.double(), index, weights))
    assert_close(model(x.double(), index, weights.double()), model(x, index, weights).double())
    assert_close(experts(x, top_k_weights=weights, top_k_index=index), model(x, index, weights))


def test_no_token(device):
    model = _adapted().to(device)
    fused_lora.peft.fuse(model)
    x, index, weights = (t.to(device) for t in _routed(0))
    results = _results(model, x, index, weights)
    assert results[0].shape == (0, HIDDEN)
    assert not any(t.any() for t in results)


def test_experts_of_others():
    """Expert parallelism marks rows for other ranks' experts by an index beyond the last."""
    model = _adapted()
    x, index, weights = _routed()
    experts = model.base_model.model.experts.get_base_layer()
    experts._is_expert_parallel = True
    elsewhere = torch.rand(index.shape) < 0.3
    index = index.masked_fill(elsewhere, EXPERTS)
    weights = weights.masked_fill(elsewhere, 0.0)
    _check(model, x, index, weights)


def _language_model(**options):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        **options,
    )
    return AutoModelForCausalLM.from_config(config)


LM = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_language_model(reentrant, tmp_path):
    """Attention and experts, with checkpointing, saved and loaded by PEFT."""
    model = get_peft_model(_language_model(), LoraConfig(r=4, init_lora_weights=False, **LM))
    tokens = torch.randint(50, (2, 40))

    def step():
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = step()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
    report = fused_lora.peft.fuse(model)
    assert not report.not_fused
    for ours, theirs in zip(step(), expected, strict=True):
        assert_close(ours, theirs)
    model.eval()
    ids = tokens[:, :5]
    made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    fused_lora.peft.unfuse(model)
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == 4
    assert all(type(m) is ParamWrapper for m in wrappers)
    assert torch.equal(made, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
    loaded = PeftModel.from_pretrained(model.get_base_model(), tmp_path, adapter_name="again")
    assert any("experts" in name and "again" in name for name, _ in loaded.named_parameters())


def test_checkpointed_block():
    model = _adapted()
    x, index, weights = _routed()
    fused_lora.peft.fuse(model)
    expected = _results(model, x, index, weights)

    def again(x, index, weights):
        return checkpoint(model, x, index, weights, use_reentrant=False)

    model.zero_grad()
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    again(leaves[0], index, leaves[1]).square().sum().backward()
    assert torch.equal(leaves[0].grad, expected[1])
    assert torch.equal(leaves[1].grad, expected[2])

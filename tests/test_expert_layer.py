"""`inject` with target_parameters: `FusedLoRAExperts`, against PEFT's, on disk, merged, ..."""

import copy
import functools
import json
import pickle
import re

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_peft_experts import EXPERTS, FORMS, HIDDEN, LM, Block, _language_model, _routed

import fused_lora
from fused_lora import disable_adapter, inject, load_adapter, merge_and_unload, save_adapter
from fused_lora.expert_layer import FusedLoRAExperts

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
NUMBERS = {"r": 4, "lora_alpha": 6}
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


def _names(form, both=True):
    first = "up_proj" if form == "nemotron_h" else "gate_up_proj"
    return [f"experts.{first}", "experts.down_proj"][: 1 + both]


def _injected(form="qwen3_moe", both=True, **options):
    block = Block(form)
    report = inject(block, **NUMBERS, target_parameters=_names(form, both), **options)
    for adapter in block.experts.adapters.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2)
    return block, report


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("both", [True, False])
def test_same_as_peft(form, both, tmp_path):
    """The same start from the same seed, and the same results after training, both ways on disk."""
    plain = Block(form)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    torch.manual_seed(3)
    inject(ours, **NUMBERS, target_parameters=_names(form, both))
    torch.manual_seed(3)
    theirs = get_peft_model(theirs, LoraConfig(**NUMBERS, target_parameters=_names(form, both)))
    inputs = _routed()
    assert_close(ours(*inputs), theirs(*inputs))
    trained = [p for p in ours.parameters() if p.requires_grad]
    for mine, other in zip(
        (p for n, p in ours.named_parameters() if "lora_A" in n),
        (p for n, p in theirs.named_parameters() if "lora_A" in n),
        strict=True,
    ):
        assert torch.equal(mine, other)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        ours(*inputs).square().mean().backward()
        optimizer.step()
    save_adapter(ours, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert_close(loaded(*inputs), ours(*inputs))
    loaded.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(*inputs), ours(*inputs))
    load_adapter(ours, tmp_path / "theirs")  # into the same layers
    assert torch.equal(again(*inputs), ours(*inputs))


def test_report_and_parameters():
    block, report = _injected()
    assert report.layers == ("experts.gate_up_proj", "experts.down_proj")
    assert report.mixtures == ("experts",)
    assert "experts: all experts in one autograd node, 1 x" in str(report)
    trained = {n for n, p in block.named_parameters() if p.requires_grad}
    assert trained == {
        f"experts.adapters.{name}.lora_{side}"
        for name in ("gate_up_proj", "down_proj")
        for side in "AB"
    }
    assert report.trainable == sum(p.numel() for p in block.parameters() if p.requires_grad)
    assert report.adapted == 3 * EXPERTS * HIDDEN * 40
    assert "r=4" in repr(block)
    groups = fused_lora.lora_plus_param_groups(block, lr=1e-3, loraplus_lr_ratio=16)
    assert [len(group["params"]) for group in groups] == [2, 0, 2, 0]


def test_disabled_merged_and_back(tmp_path):
    block, _ = _injected()
    inputs = _routed()
    plain = copy.deepcopy(block.experts.base_layer)
    expected = block(*inputs)
    with disable_adapter(block):
        assert_close(block(*inputs), plain(*inputs))
        assert "disabled" in str(block.experts.explain(*inputs))
        with pytest.raises(RuntimeError, match="disabled"):
            block.experts.merge()
    assert torch.equal(block(*inputs), expected)
    block.experts.merge()
    with pytest.raises(RuntimeError, match="merged and in training mode"):
        block(*inputs)
    block.eval()
    assert_close(block(*inputs), expected)
    assert "merged" in str(block.experts.explain(*inputs))
    assert not any("lora_" in key for key in block.state_dict())
    with pytest.raises(ValueError, match="is merged"):
        save_adapter(block, tmp_path)
    with pytest.raises(ValueError, match="is merged"), disable_adapter(block):
        pass
    block.experts.unmerge()
    assert_close(block(*inputs), expected)
    for name, weight in plain.named_parameters():
        assert_close(dict(block.experts.base_layer.named_parameters())[name], weight)
    merged = merge_and_unload(block)
    assert type(merged.experts) is type(plain)
    assert_close(merged(*inputs), expected)


def test_a_merge_that_fails_changes_nothing():
    block, _ = _injected()
    before = {name: p.clone() for name, p in block.named_parameters()}
    with torch.no_grad():
        block.experts.adapters["down_proj"].lora_B[0, 0] = torch.inf
    with pytest.raises(ValueError, match="down_proj: .* not finite"):
        merge_and_unload(block)
    assert not block.experts.merged
    for name in ("gate_up_proj", "down_proj"):
        key = f"experts.base_layer.{name}"
        assert torch.equal(dict(block.named_parameters())[key], before[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_copies(dtype):
    """fp32 adapters over a half base; copies and pickles are layers of their own."""
    block = Block("qwen3_moe").to(dtype)
    inject(block, **NUMBERS, target_parameters=NAMES)
    assert {p.dtype for p in block.parameters() if p.requires_grad} == {torch.float32}
    inputs = _routed(dtype=dtype)
    y = block(*inputs)
    assert y.dtype == dtype
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(*inputs), y)
        with torch.no_grad():
            other.experts.adapters["down_proj"].lora_B += 1
        assert torch.equal(block(*inputs), y)
    state = block.state_dict()
    assert torch.equal(_loaded(state, dtype)(*inputs), y)


def _loaded(state, dtype):
    block = Block("qwen3_moe").to(dtype)
    inject(block, **NUMBERS, target_parameters=NAMES)
    block.load_state_dict(state)
    return block


def test_on_the_kernels(device, launches):
    block, _ = _injected(backend="triton")
    inputs = [t.to(device) for t in _routed()]
    block = block.to(device)
    y = block(*inputs)
    assert launches.count("gemm_experts") == 2
    plain, _ = _injected()
    plain.load_state_dict(block.state_dict())
    assert_close(plain.to(device)(*inputs), y)


def test_a_language_model(tmp_path):
    """With layers of attention, patterns, saved and loaded by both; tokens of both are the same."""
    base = _language_model()
    ours = copy.deepcopy(base)
    patterns = {"rank_pattern": {r"0\.mlp\.experts\.down_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    report = inject(ours, **NUMBERS, **LM, **patterns)
    assert len(report.layers) == 8
    assert not report.skipped
    assert ours.model.layers[0].mlp.experts.adapters["down_proj"].r == 2
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    tokens = torch.randint(50, (2, 30))
    logits = ours(input_ids=tokens).logits
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["q_proj", "v_proj"]
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(peft(input_ids=tokens).logits, logits)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert_close(again(input_ids=tokens).logits, logits)
    merge_and_unload(again)
    assert_close(again(input_ids=tokens).logits, logits)


def test_experts_among_target_modules_say_where_they_belong():
    model = _language_model()
    with pytest.raises(ValueError, match="experts are for target_parameters to name"):
        inject(model, **NUMBERS, target_modules=["gate_up_proj", "down_proj"])
    report = inject(model, **NUMBERS, target_modules=["q_proj", "experts"])
    why = "is a mixture of experts, for target_parameters to name"
    assert report.skipped == {f"model.layers.{i}.mlp.experts": why for i in (0, 1)}


def test_names_of_experts_say_where_they_belong():
    model = _language_model()
    report = inject(model, **NUMBERS, target_modules=["q_proj", "gate_proj"])
    assert report.skipped["gate_proj"].endswith("; experts are for target_parameters to name")


def test_all_linear_says_what_it_leaves():
    model = _language_model()
    report = inject(model, **NUMBERS, target_modules="all-linear")
    why = "is a mixture of experts, for target_parameters to name"
    assert report.skipped == {f"model.layers.{i}.mlp.experts": why for i in (0, 1)}
    assert why in str(report)


BAD = {
    "target_parameters: got 'experts.down_proj', wanted a list": {
        "target_parameters": "experts.down_proj"
    },
    "matches no nn.Linear": {"target_parameters": []},
    "target_parameters: got [5], wanted a list": {"target_parameters": [5]},
    "target_parameters: ['nope'] matches no projection of experts ({'nope': 'matches no parameter'}"
    "); the model has mixtures at ['experts']": {"target_parameters": ["nope"]},
    "exclude_modules: got 5": {"exclude_modules": 5},
    "lora_dropout: got 0.1, wanted 0": {"lora_dropout": 0.1},
    "use_dora: got True, wanted False": {"use_dora": True},
    "init_lora_weights: got 'gaussian', wanted a bool": {"init_lora_weights": "gaussian"},
    "r: got 0, wanted at least 1": {"r": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    block = Block("qwen3_moe")
    before = copy.deepcopy(block)
    options = {**NUMBERS, "target_parameters": NAMES, **BAD[message]}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        inject(block, **options)
    assert str(block) == str(before)


class Two(torch.nn.Module):
    """One mixture at two paths, as two layers share it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block("qwen3_moe"), Block("qwen3_moe")
        self.b.experts = self.a.experts

    def forward(self, x, index, weights):
        return self.b(self.a(x, index, weights), index, weights)


def test_a_module_at_two_paths_stays_one(tmp_path):
    model, inputs = Two(), _routed()
    report = inject(model, **NUMBERS, target_parameters=NAMES)
    assert model.a.experts is model.b.experts
    assert report.adapted == 3 * EXPERTS * HIDDEN * 40
    for adapter in model.a.experts.adapters.values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2)
    expected = model(*inputs)
    with pytest.raises(ValueError, match="are one module"):
        save_adapter(model, tmp_path)
    merge_and_unload(model)
    assert model.a.experts is model.b.experts
    assert_close(model(*inputs), expected)


def test_weights_that_are_no_stack_of_numbers_are_refused():
    """fp8 with scales beside it, one matrix for all, nothing."""

    def scaled(experts):
        experts.register_parameter("down_proj_scale_inv", torch.nn.Parameter(torch.ones(2)))

    def in_fp8(experts):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name).to(torch.float8_e4m3fn)
            setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))

    def flat(experts):
        experts.down_proj = torch.nn.Parameter(torch.ones(3, 4))

    for change, why in (
        (scaled, "has down_proj_scale_inv too"),
        (in_fp8, "gate_up_proj is a Parameter of torch.float8_e4m3fn"),
        (flat, "down_proj is not one parameter for all experts"),
    ):
        block = Block("qwen3_moe")
        change(block.experts)
        flags = [p.requires_grad for p in block.parameters()]
        with pytest.raises(ValueError, match=why):
            inject(block, **NUMBERS, target_parameters=NAMES)
        assert [p.requires_grad for p in block.parameters()] == flags


def test_a_constructor_that_fails_changes_nothing():
    block = Block("qwen3_moe")
    flags = [p.requires_grad for p in block.parameters()]
    ranks, alphas = {"down_proj": 4}, {"down_proj": 8}
    for options in (
        {"ranks": {"down_proj": 0}},
        {"ranks": {"gate_proj": 4}, "alphas": {"gate_proj": 8}},
        {"alphas": {}},
        {"ranks": {}, "alphas": {}},
        {"adapter_dtype": torch.int8},
        {"adapter_dtype": "fp16"},
        {"use_rslora": "no"},
        {"backend": "cuda"},
    ):
        with pytest.raises((TypeError, ValueError)):
            FusedLoRAExperts(block.experts, **{"ranks": ranks, "alphas": alphas, **options})
        assert [p.requires_grad for p in block.parameters()] == flags
    with pytest.raises(ValueError, match="got a Qwen3MoeExperts itself"):
        inject(block.experts, **NUMBERS, target_parameters=["down_proj"])
    assert [p.requires_grad for p in block.parameters()] == flags


def test_the_mode_stays():
    block = Block("qwen3_moe").eval()
    inject(block, **NUMBERS, target_parameters=NAMES)
    assert not block.experts.training
    assert not merge_and_unload(block).experts.training


def test_a_copy_made_while_disabled_is_not():
    block, _ = _injected()
    inputs = _routed()
    expected = block(*inputs)
    with disable_adapter(block):
        other = copy.deepcopy(block)
    assert torch.equal(other(*inputs), expected)


def test_a_merge_over_a_parametrised_weight_changes_nothing():
    block, _ = _injected()
    inputs = _routed()
    torch.nn.utils.parametrize.register_parametrization(
        block.experts.base_layer, "down_proj", torch.nn.Identity()
    )
    before = block.experts.base_layer.gate_up_proj
    with pytest.raises(RuntimeError, match="down_proj: is computed by a parametrization"):
        merge_and_unload(block)
    assert block.experts.base_layer.gate_up_proj is before
    torch.nn.utils.parametrize.remove_parametrizations(block.experts.base_layer, "down_proj")
    block(*inputs)


def test_nothing_is_loaded_into_a_merged_layer():
    block, _ = _injected()
    state = {key: torch.zeros_like(value) for key, value in block.state_dict().items()}
    block.experts.merge()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    with pytest.raises(RuntimeError, match="is merged"):
        block.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_no_second_adapters_beside_those_of_experts():
    model = _language_model()
    inject(model, **NUMBERS, target_parameters=LM["target_parameters"])
    with pytest.raises(ValueError, match="has adapters already, in a FusedLoRAExperts"):
        fused_lora.add_adapter(model, "one", 4, 8, ["q_proj"])


def test_names_that_match_nothing_or_no_mixture():
    model = _language_model()
    names = [*LM["target_parameters"], "experts.nothing", "q_proj.weight"]
    report = inject(model, **NUMBERS, target_parameters=names)
    assert report.skipped["experts.nothing"] == "matches no parameter"
    assert "experts interface" in report.skipped["model.layers.0.self_attn.q_proj.weight"]


def test_hooks_and_second_adapters_are_refused(tmp_path):
    block = Block("qwen3_moe")
    block.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        inject(block, **NUMBERS, target_parameters=NAMES)
    block, _ = _injected()
    with pytest.raises(ValueError, match="has adapters already, at experts"):
        inject(block, **NUMBERS, target_parameters=NAMES)
    save_adapter(block, tmp_path)
    with pytest.raises(ValueError, match="a mixture of experts has one adapter"):
        load_adapter(Block("qwen3_moe"), tmp_path, adapter_name="one")
    block.experts.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks"):
        block(*_routed())


def test_bad_arguments_of_forward():
    block, _ = _injected()
    x, index, weights = _routed()
    with pytest.raises(TypeError, match="top_k_index"):
        block.experts(x, index)
    with pytest.raises(ValueError, match="wanted the experts' dtype"):
        block(x.double(), index, weights)
    for function in (block, block.experts.explain):
        with pytest.raises(ValueError, match=r"wanted \[T, hidden\]"):
            function(x, index[:2], weights)
        with pytest.raises(ValueError, match="wanted int64"):
            function(x, index.int(), weights)
        with pytest.raises(ValueError, match=r"top_k_index: got shape \[30, 0\], wanted an expert"):
            function(x, index[:, :0], weights[:, :0])
        with pytest.raises(ValueError, match="top_k_weights: got torch.float32 on meta, wanted"):
            function(x, index, weights.to("meta"))
        with pytest.raises(ValueError, match="x: got torch.int64, wanted the experts' dtype"):
            function(x.long(), index, weights)
    in_place = Block("nemotron_h")
    in_place.experts.act_fn = torch.nn.ReLU(inplace=True)
    with pytest.raises(ValueError, match="activation of NemotronHExperts works in place"):
        FusedLoRAExperts(in_place.experts, {"up_proj": 2}, {"up_proj": 2})


def test_files_that_do_not_fit(tmp_path):
    block, _ = _injected()
    save_adapter(block, tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())

    def refused(message, tensors=tensors, **changed):
        save_file(tensors, weights)
        config.write_text(json.dumps(fields | changed))
        for model in (Block("qwen3_moe"), block):
            before = copy.deepcopy(model.state_dict())
            with pytest.raises((ValueError, TypeError), match=message):
                load_adapter(model, tmp_path)
            after = model.state_dict()
            assert all(torch.equal(after[key], value) for key, value in before.items())

    key = "base_model.model.experts.lora_A.weight"
    refused("got shape", {**tensors, key: tensors[key][1:].contiguous()})
    refused("missing", {k: v for k, v in tensors.items() if k != key})
    refused("not finite", {**tensors, key: tensors[key] * torch.nan})
    refused("target_modules: is missing", target_parameters=None)
    refused("target_parameters", target_parameters="experts.down_proj")
    config.write_text(json.dumps(fields | {"target_parameters": ["experts.nothing"]}))
    with pytest.raises(
        ValueError, match="target_parameters: experts.nothing: matches no parameter"
    ):
        load_adapter(Block("qwen3_moe"), tmp_path)


def test_public():
    assert fused_lora.FusedLoRAExperts is FusedLoRAExperts

"""`FusedLoRAExperts` over weights in codes: transformers' modules and models, by `inject`."""

import copy
import functools

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

from test_expert_layer import NUMBERS, _names
from test_peft_experts import (
    EXPERTS,
    FORMS,
    HIDDEN,
    LM,
    Block,
    _language_model,
    _results,
    _routed,
)

from fused_lora import (
    QuantizedWeight,
    disable_adapter,
    inject,
    load_adapter,
    merge_and_unload,
    quantize_fp8,
    save_adapter,
)
from fused_lora.expert_modules import in_order, weight_of

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def _of_values(plain, experts):
    """The block ``plain`` with what the codes of ``experts`` stand for."""
    plain = copy.deepcopy(plain)
    for name in in_order(experts):
        weight_of(plain.experts, name).data.copy_(weight_of(experts, name).dequantize())
    return plain


def _trainable(block):
    return {name: p for name, p in block.named_parameters() if p.requires_grad}


def _injected(form, both=True, format="nf4", **options):
    """A block over codes, and one over their values, with the same adapters."""
    plain = Block(form)
    block = copy.deepcopy(plain)
    report = inject(block, **NUMBERS, target_parameters=_names(form, both), quantize=format)
    values = _of_values(plain, block.experts.base_layer)
    inject(values, **NUMBERS, target_parameters=_names(form, both))
    for name, p in _trainable(block).items():
        torch.nn.init.normal_(p, std=0.2)
        _trainable(values)[name].data.copy_(p)
    return block, values, plain, report


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("both", [True, False])
def test_same_as_over_the_values(form, both, tmp_path):
    """In every state: on, off, on disk, copied, merged, unmerged and unloaded."""
    block, values, plain, _ = _injected(form, both)
    inputs = _routed()
    results = [_results(model, *inputs) for model in (block, values)]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)
    expected = block(*inputs)
    with disable_adapter(block):
        assert_close(block(*inputs), _of_values(plain, block.experts.base_layer)(*inputs))
        assert "disabled" in str(block.experts.explain(*inputs))
    save_adapter(block, tmp_path)
    loaded = copy.deepcopy(plain)
    load_adapter(loaded, tmp_path, quantize="nf4")
    load_adapter(block, tmp_path)
    for same in (loaded, copy.deepcopy(block), block):
        assert torch.equal(same(*inputs), expected)
    load_adapter(over := _of_values(plain, block.experts.base_layer), tmp_path)
    assert_close(over(*inputs), expected)
    state = block.state_dict()
    block.experts.merge()
    assert not any("codes" in key for key in block.state_dict())
    assert_close(block.eval()(*inputs), expected)
    block.experts.unmerge()
    assert list(block.state_dict()) == list(state)
    assert torch.equal(block(*inputs), expected)
    merged = merge_and_unload(block)
    assert type(merged.experts) is type(plain.experts)
    assert_close(merged(*inputs), expected)
    sizes = {name: (p.shape, p.stride()) for name, p in plain.named_parameters()}
    assert {name: (p.shape, p.stride()) for name, p in merged.named_parameters()} == sizes


@pytest.mark.parametrize("format", ["fp4", "int8", "fp8"])
def test_formats_on_the_kernels(device, launches, format):
    """gpt-oss' weights are [E, in, out], and its hidden size no multiple of a block of 4 bits."""
    block, values, _, _ = _injected("gpt_oss", format=format)
    inputs = [t.to(device) for t in _routed()]
    block.to(device).experts.backend = "triton" if format != "fp4" else "auto"
    assert_close(block(*inputs), values.to(device)(*inputs))
    assert launches.count("gemm_experts") == 2 * (format != "fp4")


def test_report_memory_and_what_is_given():
    block, _, plain, report = _injected("qwen3_moe", both=False)
    held = 3 * EXPERTS * HIDDEN * 40
    assert report.adapted == 2 * EXPERTS * HIDDEN * 40
    assert report.total == held + report.trainable
    assert 0.02 < report.quantization_error < 0.2
    codes = block.experts.base_layer
    assert all(isinstance(weight_of(codes, n), QuantizedWeight) for n in in_order(codes))
    assert sum(p.nbytes for p in codes.parameters()) < 0.7 * held  # 4 bytes each before
    experts = plain.experts
    before = dict(experts.named_parameters())
    inject(plain, **NUMBERS, target_parameters=_names("qwen3_moe"), quantize="int8")
    after = dict(experts.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert plain.experts.base_layer is not experts


def test_a_failure_leaves_the_model():
    block = Block("qwen3_moe")
    block.experts.down_proj.data[1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        inject(block, **NUMBERS, target_parameters=_names("qwen3_moe"), quantize="nf4")
    rounding = functools.partial(quantize_fp8, activations="fp8")
    for bad, message in (
        (rounding, "quantize: got activations='fp8'"),
        ("int3", "quantize: got 'int3'"),
        (lambda w: w, "the function gave a Parameter"),
    ):
        names = _names("qwen3_moe")
        with pytest.raises((TypeError, ValueError), match=message):
            inject(Block("qwen3_moe"), **NUMBERS, target_parameters=names, quantize=bad)
    assert isinstance(block.experts.down_proj, torch.nn.Parameter)
    assert not hasattr(block.experts, "base_layer")
    block, *_ = _injected("qwen3_moe")
    with torch.no_grad():
        block.experts.adapters["down_proj"].lora_B[0, 0] = torch.inf
    with pytest.raises(ValueError, match="down_proj: .* not finite"):
        merge_and_unload(block)
    assert not block.experts.merged
    assert isinstance(block.experts.base_layer.gate_up_proj, QuantizedWeight)


def test_a_language_model_trains(tmp_path):
    """Linear layers and experts in codes, halves and a copy."""
    base = _language_model()
    model = copy.deepcopy(base)
    report = inject(model, **NUMBERS, **LM, quantize="nf4")
    assert len(report.layers) == 8
    assert not report.skipped
    weights = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    assert sorted(len(w.shape) for w in weights) == [2] * 4 + [3] * 4
    tokens = torch.randint(50, (2, 30))
    optimizer = torch.optim.Adam(_trainable(model).values(), lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logits = model(input_ids=tokens).logits
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path, quantize="nf4")
    assert torch.equal(base(input_ids=tokens).logits, logits)
    base.bfloat16()
    assert base(input_ids=tokens).logits.dtype == torch.bfloat16
    merge_and_unload(model)
    assert_close(model(input_ids=tokens).logits, logits)
    assert not any(isinstance(m, QuantizedWeight) for m in model.modules())


def test_codes_come_back_in_the_dtype_that_the_merged_layer_was_given():
    block, *_ = _injected("qwen3_moe")
    block.eval().experts.merge()
    block.half().experts.unmerge()
    inputs = [t.half() if t.is_floating_point() else t for t in _routed()]
    assert block(*inputs).dtype == torch.float16

"""Mixtures of experts under torch.compile, torch.export and modes, and the operators behind."""

import pytest
import torch
from test_checkpoint import saving

pytest.importorskip("peft")
pytest.importorskip("transformers")
from test_expert_layer import _injected
from test_peft_experts import FORMS, HIDDEN, _adapted, _results, _routed, assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_lora


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WITH_INDUCTOR = pytest.param("gpt_oss", "inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("form", "compiler"), [*((form, "aot_eager") for form in FORMS), WITH_INDUCTOR]
)
def test_peft_model(form, compiler):
    """In one graph, where PEFT's own breaks."""
    model = _adapted(form)
    inputs = _routed()
    expected = _results(model, *inputs)
    fused_lora.peft.fuse(model)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for ours, theirs in zip(_results(compiled, *inputs), expected, strict=True):
        assert_close(ours, theirs)
    with model.disable_adapter():
        without = model(*inputs)
        assert_close(torch.compile(model, backend="aot_eager")(*inputs), without)


@pytest.mark.parametrize(("form", "codes"), [*((form, None) for form in FORMS), ("gpt_oss", "nf4")])
def test_injected_model(form, codes):
    block, _ = _injected(form, quantize=codes)
    inputs = _routed()
    expected = _results(block, *inputs)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(_results(compiled, *inputs), expected, strict=True):
        assert_close(ours, theirs)


def test_on_the_kernels(device, launches):
    block, _ = _injected(backend="triton")
    block = block.to(device)
    inputs = [t.to(device) for t in _routed(8)]
    expected = _results(block, *inputs)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    launches.clear()
    found = _results(compiled, *inputs)
    assert launches.count("gemm_experts") == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


def test_exported():
    block, _ = _injected()
    block.eval().requires_grad_(False)
    example = _routed(7)
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(block, example, dynamic_shapes=({0: tokens},) * 3)
    for T in (7, 31):
        inputs = _routed(T)
        assert_close(exported.module()(*inputs), block(*inputs))


def test_autocast():
    block, _ = _injected()
    inputs = _routed()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (_results(model, *inputs) for model in (block, compiled))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("saves", [True, False])
def test_selective_checkpointing(device, launches, saves):
    """Of a model whose operators are named; nothing is launched that was saved."""
    block, _ = _injected(backend="triton")
    block = block.to(device)
    inputs = [t.to(device) for t in _routed(8)]
    expected = _results(block, *inputs)
    ours = (torch.ops.fused_lora.lora_linear_experts, torch.ops.fused_lora.lora_experts_sum)
    context = saving(*([op.default for op in ours] if saves else []))

    def again(*inputs):
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=context)

    again.zero_grad, again.parameters = block.zero_grad, block.parameters
    launches.clear()
    found = _results(again, *inputs)
    assert launches.count("gemm_experts") == (4 if saves else 6)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


def test_flops():
    """Of the mixture's two operators: their products, and the sums' over a token's experts."""
    block, _ = _injected()
    inputs = _routed()
    with FlopCounterMode(display=False) as counter:
        block(*inputs)
    M, inner, r = inputs[1].numel(), 40, 4
    up = 2 * M * (HIDDEN * 2 * inner + r * (HIDDEN + 2 * inner))
    down = 2 * M * (inner * HIDDEN + r * (HIDDEN + inner))
    assert counter.get_total_flops() == up + down + 2 * M * HIDDEN

"""Mixtures of experts under torch.compile, torch.export, torch.func and dispatch modes."""

import pytest
import torch
from test_checkpoint import saving

pytest.importorskip("peft")
pytest.importorskip("transformers")
from test_expert_layer import _injected
from test_peft_experts import FORMS, HIDDEN, _adapted, _results, _routed, assert_close
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_lora

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fused", ["peft", "inject"])
def test_exported(fused, strict):
    block = _adapted().base_model.model if fused == "peft" else _injected()[0]
    if fused == "peft":
        fused_lora.peft.fuse(block)
    block.eval().requires_grad_(False)
    example = _routed(7)
    shapes = ({0: torch.export.Dim("tokens")},) * 3
    exported = torch.export.export(block, example, dynamic_shapes=shapes, strict=strict)
    assert "lora_experts_combine" in str(exported.graph)
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
    ours = (torch.ops.fused_lora.lora_linear_experts, torch.ops.fused_lora.lora_experts_combine)
    context = saving(*([op.default for op in ours] if saves else []))

    def again(*inputs):
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=context)

    again.zero_grad, again.parameters = block.zero_grad, block.parameters
    launches.clear()
    found = _results(again, *inputs)
    assert launches.count("gemm_experts") == (4 if saves else 6)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("needs_p", [True, False])
@pytest.mark.parametrize("form", ["qwen3_moe", "nemotron_h"])
def test_flops(form, needs_x, needs_p):
    """Of the mixture's two operators: their products, and the sums' over a token's experts."""
    block, _ = _injected(form, both=False)
    block.requires_grad_(False)
    x, index, weights = _routed()
    x.requires_grad_(needs_x)
    weights.requires_grad_(needs_p)
    with FlopCounterMode(display=False) as counter:
        y = block(x, index, weights)
    M, inner, r = index.numel(), 40, 4
    z = inner * (1 if form == "nemotron_h" else 2)
    up, down = 2 * M * (HIDDEN * z + r * (HIDDEN + z)), 2 * M * inner * HIDDEN
    assert counter.get_total_flops() == up + down + 2 * M * HIDDEN
    if needs_x or needs_p:
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == down + up * needs_x


@pytest.mark.parametrize("fused", ["peft", "inject"])
def test_transforms(fused):
    if fused == "peft":
        model = _adapted()
        fused_lora.peft.fuse(model)
    else:
        model, _ = _injected()
    x, index, weights = _routed()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return functional_call(model, parameters, (x, index, weights)).square().sum()

    expected = torch.autograd.grad(loss(trained, x), list(trained.values()))
    values = {name: p.detach() for name, p in trained.items()}
    for ours, theirs in zip(grad(loss)(values, x).values(), expected, strict=True):
        assert_close(ours, theirs)
    xs = torch.stack((x, 2 * x))
    with pytest.warns(UserWarning, match="once for each example"):
        losses = vmap(loss, in_dims=(None, 0))(values, xs)
    assert_close(losses, torch.stack([loss(trained, each) for each in xs]).detach())

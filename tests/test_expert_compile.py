"""Mixtures of experts under torch.compile, torch.export and modes, and the operators behind."""

from dataclasses import replace

import pytest
import torch
from oracle import check, run
from test_checkpoint import saving
from test_experts import NEEDS, _call, _expression, _problem

pytest.importorskip("peft")
pytest.importorskip("transformers")
from test_expert_layer import _injected
from test_peft_experts import FORMS, HIDDEN, _adapted, _results, _routed, assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_lora
from fused_lora.expert_calls import routing_of
from fused_lora.expert_ops import (
    lora_experts_sum_backward_op,
    lora_experts_sum_op,
    lora_linear_experts_backward_op,
    lora_linear_experts_op,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _graphs():
    """The number of graphs that Dynamo has made."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


COMPILED = [
    ("aot_eager", None, "triton"),
    ("aot_eager", True, "torch"),
    pytest.param("inductor", None, "torch", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("compiler", "dynamic", "backend"), COMPILED)
def test_function(device, launches, compiler, dynamic, backend):
    compiled = torch.compile(_call, backend=compiler, fullgraph=True, dynamic=dynamic)
    for fan in (True, False):
        p = _problem((9, 3), 4, 24, 20, 4, fan=fan, device=device)
        launches.clear()
        check(run(lambda p: compiled(p, backend=backend), p, NEEDS), p, _expression)
        assert ("gemm_experts" in launches) == (backend == "triton")


def test_each_batch_has_a_mask_of_its_own(device):
    p = _problem((37, 3), 5, 40, 24, 4, dropout_p=0.5, device=device)
    compiled = torch.compile(_call, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(p), compiled(p))


def test_one_graph_for_every_number_of_rows():
    p = _problem((9, 3), 5, 40, 24, 4)
    compiled = torch.compile(_call, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(p)
    before = _graphs()
    for rows in (12, 31):
        more = _problem((rows, 3), 5, 40, 24, 4)
        more = replace(more, weight=p.weight, lora_A=p.lora_A, lora_B=p.lora_B, bias=p.bias)
        assert_close(compiled(more), _call(more))
    assert _graphs() == before


def test_what_is_wrong_is_refused():
    p = _problem((9, 3), 5, 40, 24, 4)
    compiled = torch.compile(_call, backend="aot_eager")
    with pytest.raises(ValueError, match=r"lora_A: got shape \[5, 4, 23\], wanted \[5, r, 24\]"):
        compiled(replace(p, lora_A=p.lora_A[..., :23]))


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


def _with_experts(p):
    """Of a row without one h is undefined."""
    return replace(p, indices=p.indices.clamp(0, 2))


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


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("rows", [(6, 2), (0, 2)])
def test_opcheck(device, adapters, rows):
    p = _with_experts(_problem(rows, 3, 5, 7, 2, device=device))
    trained = [t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B)]
    if not adapters:
        trained[1:] = None, None
    groups = routing_of(p.indices, 3).groups
    groups = [groups.order, groups.adapters, groups.offsets]
    numbers = (0.5, None, 0, 2, False, "torch")
    arguments = (*trained, p.bias, [p.weight], "", groups, *numbers, adapters)
    torch.library.opcheck(lora_linear_experts_op, arguments)
    x, A, B = (None if t is None else t.detach() for t in trained)
    g, h = torch.randn(groups[0].shape[0], 5), torch.randn(groups[0].shape[0], 2)
    x, h = (x, h.to(device)) if adapters else (None, None)
    arguments = (g.to(device), x, A, B, h, [p.weight], "", groups, *numbers, True)
    torch.library.opcheck(lora_linear_experts_backward_op, arguments)


@pytest.mark.parametrize("adapters", [True, False])
def test_opcheck_of_the_sum(device, adapters):
    p = _with_experts(_problem((6, 2), 3, 5, 7, 2, fan=False, device=device))
    routing = routing_of(p.indices, 3)
    groups = [routing.groups.order, routing.groups.adapters, routing.groups.offsets]
    a, scores = p.x.view(12, 7), torch.rand(6, 2, device=device)
    A, B = (p.lora_A, p.lora_B) if adapters else (None, None)
    trained = [None if t is None else t.requires_grad_() for t in (a, scores, A, B)]
    rest = ([p.weight], "", groups, routing.experts, 0.5, "torch")
    torch.library.opcheck(lora_experts_sum_op, (*trained, p.bias, *rest, adapters))
    a, scores, A, B = (None if t is None else t.detach() for t in trained)
    g, h = (torch.randn(n, c, device=device) for n, c in ((6, 5), (12, 2)))
    arguments = (g, a, scores, A, B, p.bias, h if adapters else None, *rest, True, True, adapters)
    torch.library.opcheck(lora_experts_sum_backward_op, arguments)

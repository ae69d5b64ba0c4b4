"""`lora_linear_experts` under torch.compile, and the registered operators of experts."""

from dataclasses import replace

import pytest
import torch
from oracle import check, run
from test_experts import NEEDS, _call, _expression, _problem

from fused_lora.expert_calls import routing_of
from fused_lora.expert_ops import (
    lora_experts_combine_backward_op,
    lora_experts_combine_op,
    lora_linear_experts_backward_op,
    lora_linear_experts_op,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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
        torch.testing.assert_close(compiled(more), _call(more), rtol=1e-4, atol=1e-4)
    assert _graphs() == before


def test_what_is_wrong_is_refused():
    p = _problem((9, 3), 5, 40, 24, 4)
    compiled = torch.compile(_call, backend="aot_eager")
    with pytest.raises(ValueError, match=r"lora_A: got shape \[5, 4, 23\], wanted \[5, r, 24\]"):
        compiled(replace(p, lora_A=p.lora_A[..., :23]))


def _with_experts(p):
    """Of a row without one h is undefined."""
    return replace(p, indices=p.indices.clamp(0, 2))


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
    torch.library.opcheck(lora_experts_combine_op, (*trained, p.bias, *rest, adapters))
    a, scores, A, B = (None if t is None else t.detach() for t in trained)
    g, h = (torch.randn(n, c, device=device) for n, c in ((6, 5), (12, 2)))
    arguments = (g, a, scores, A, B, p.bias, h if adapters else None, *rest, True, True, adapters)
    torch.library.opcheck(lora_experts_combine_backward_op, arguments)

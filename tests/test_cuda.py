"""CUDA graphs, streams and several GPUs. Needs a GPU; the CPU can only skip it.

The dropout seed is drawn by torch.randint from the device's default generator, which a capture
registers: each replay draws a new one ("CUDA semantics", CUDA graphs, constraints). The seed stays
on the device, so that nothing here waits for the GPU.
"""

import copy

import pytest
import torch
from oracle import check, fused, problem, run
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fused_lora import FusedLoRALinear
from fused_lora.calls import checked_call, transposed
from fused_lora.dispatch import Plan
from fused_lora.kernels.device import device_info
from fused_lora.kernels.replay import Replay, Replays
from fused_lora.strategies import WAYS, obstacle

pytestmark = pytest.mark.gpu
SIZE = 256
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _mask_layer(device):
    """Over a zero weight, with identities for A and B, y is the scaled mask where x is one."""
    layer = FusedLoRALinear(
        SIZE, SIZE, SIZE, SIZE, lora_dropout=0.5, bias=False, device=device, dtype=torch.bfloat16
    )
    with torch.no_grad():
        layer.weight.zero_()
        nn.init.eye_(layer.lora_A)
        nn.init.eye_(layer.lora_B)
    return layer


def _layer(device, backend="auto"):
    layer = FusedLoRALinear(SIZE, SIZE, 16, device=device, dtype=torch.bfloat16, backend=backend)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def _ones(device):
    return torch.ones(64, SIZE, device=device, dtype=torch.bfloat16, requires_grad=True)


def _captured(step, device):
    """Warmed up on a side stream, as capture needs it: compilation and cuBLAS's handles."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def test_each_replay_draws_a_new_mask(device, launches):
    layer, x = _mask_layer(device), _ones(device)

    def step():
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach(), dx

    graph, (y, dx) = _captured(step, device)
    assert launches
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, dx)  # backward's mask is forward's
        masks.append(y.clone())
    assert 0.45 < (masks[0] != 0).double().mean() < 0.55
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    replayed = []
    for _ in range(2):
        torch.cuda.manual_seed(11)
        graph.replay()
        replayed.append(y.clone())
    assert torch.equal(*replayed)


def test_a_captured_training_step_is_the_eager_one(device):
    layer = _layer(device)
    other = copy.deepcopy(layer)
    x = torch.randn(64, SIZE, device=device, dtype=torch.bfloat16)
    target = torch.randn(64, SIZE, device=device, dtype=torch.bfloat16)
    trained = [[m.lora_A, m.lora_B] for m in (layer, other)]
    optimizers = [torch.optim.AdamW(p, lr=1e-3, capturable=True) for p in trained]

    def step(module, optimizer):
        optimizer.zero_grad(set_to_none=True)
        (module(x) - target).float().square().mean().backward()
        optimizer.step()

    initial = copy.deepcopy(layer.state_dict())
    graph, _ = _captured(lambda: step(layer, optimizers[0]), device)
    layer.load_state_dict(initial)
    for state in optimizers[0].state.values():
        for value in state.values():
            value.zero_()
    for _ in range(3):
        graph.replay()
        step(other, optimizers[1])
    assert torch.equal(layer.lora_A, other.lora_A)
    assert torch.equal(layer.lora_B, other.lora_B)


def test_make_graphed_callables(device):
    layer = _layer(device)
    x = torch.randn(64, SIZE, device=device, dtype=torch.bfloat16, requires_grad=True)
    expected = torch.autograd.grad(layer(x).float().sum(), [x, layer.lora_A, layer.lora_B])
    graphed = torch.cuda.make_graphed_callables(
        copy.deepcopy(layer), (x.detach().requires_grad_(),)
    )
    got = torch.autograd.grad(graphed(x).float().sum(), [x, graphed.lora_A, graphed.lora_B])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_checkpointing_in_a_graph_with_the_seed_saved(device):
    """A capture cannot set the generator's state back: the policy keeps the drawn seed instead."""
    layer, x = _mask_layer(device), _ones(device)

    def policy(context, operator, *args, **kwargs):
        keep = operator is torch.ops.aten.randint.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def step():
        y = checkpoint(
            layer,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach(), dx

    graph, (y, dx) = _captured(step, device)
    for _ in range(2):
        graph.replay()
        assert torch.equal(y, dx)


def test_reduce_overhead(device):
    """torch.compile's own CUDA graphs, over the registered operators."""
    layer = _layer(device)
    x = torch.randn(64, SIZE, device=device, dtype=torch.bfloat16)
    expected = torch.autograd.grad(layer(x).float().sum(), [layer.lora_A, layer.lora_B])
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(compiled(x).float().sum(), [layer.lora_A, layer.lora_B])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_side_stream(device, backend):
    """Work is put on the current stream, in forward and in backward, behind what is there."""
    layer = _layer(device, backend)
    x = torch.randn(4096, SIZE, device=device, dtype=torch.bfloat16)
    trained = [layer.lora_A, layer.lora_B]
    expected = torch.autograd.grad(layer(x * 2).float().sum(), trained)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for the stream reads too early
        doubled = x * 2
        got = torch.autograd.grad(layer(doubled).float().sum(), trained)
    torch.cuda.current_stream(device).wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_waits_for_the_gpu(device):
    layer = FusedLoRALinear(SIZE, SIZE, 16, lora_dropout=0.1, device=device, dtype=torch.bfloat16)
    x = _ones(device)
    layer(x).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@two_gpus
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tensors_on_another_gpu_than_the_current_one(backend):
    layer = _layer("cuda:1", backend)
    here = copy.deepcopy(layer).to("cuda:0")
    x = torch.randn(64, SIZE, device="cuda:0", dtype=torch.bfloat16)
    with torch.cuda.device(0):
        y = layer(x.to("cuda:1"))
        y.float().sum().backward()
        assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda", 1)
    here(x).float().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad.cpu(), here.lora_A.grad.cpu())


@two_gpus
def test_data_parallel():
    layer = _layer("cuda:0")
    x = torch.randn(64, SIZE, device="cuda:0", dtype=torch.bfloat16)
    expected = torch.autograd.grad(layer(x).float().sum(), [layer.lora_A, layer.lora_B])
    y = nn.DataParallel(layer, device_ids=[0, 1])(x)
    got = torch.autograd.grad(y.float().sum(), [layer.lora_A, layer.lora_B])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strategy", ["one_pass", "split", "skinny"])
def test_known_launches_read_the_tensors_of_their_own_call(device, strategy, launches):
    """Only the first of a kind goes through Triton's look at the arguments (kernels/launch.py)."""
    plan = Plan("triton", strategy, strategy)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        p = problem(8, 96, 80, 16, dtype=torch.bfloat16, device=device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = run(fused(plan), p)
        torch.cuda.current_stream().wait_stream(stream)
        check(got, p)
    of_y = {"one_pass": "gemm_one_pass", "split": "gemm_add_lora", "skinny": "skinny"}[strategy]
    assert launches.count(of_y) == 2 * 3  # y and dx, of three calls


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=[pytest.mark.by_hand] * WAYS[name].by_hand)
        for name in sorted({*WAYS} - {"in_loop", "library"})
    ],
)
def test_replayed_calls(device, strategy, dropout_p, monkeypatch):
    """The same launches for tensors elsewhere (kernels/replay.py), on other streams too."""
    replayed = []
    replay = Replay.__call__
    monkeypatch.setattr(
        Replay, "__call__", lambda *given: replayed.append(replay(*given)) or replayed[-1]
    )
    replays, plan = Replays(), Plan("triton", strategy, strategy)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        p = problem((3, 16), 128, 64, 16, dtype=torch.bfloat16, device=device, dropout_p=dropout_p)
        call = checked_call(p.x, p.weight, p.lora_A, p.lora_B, p.bias, dropout_p > 0)
        ways = (call, transposed(call))
        if any(obstacle(way, strategy, device_info(device)) for way in ways):
            pytest.skip(f"{strategy} does not run here with dropout_p {dropout_p}")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = run(fused(plan, replays), p)
        torch.cuda.current_stream().wait_stream(stream)
        check(got, p)
    assert len(replayed) == 2 * 2
    assert None not in replayed

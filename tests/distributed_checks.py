"""What each rank of a multi-process test runs; started by test_distributed.py, one launch for many.

    python distributed_checks.py FOLDER CHECK...     in the environment that `launch` sets

Writes FOLDER/rank-R.json with "ok" or the traceback of each check. Every rank computes the
single-process run itself and holds its own share of the distributed one to it.
"""

import copy
import faulthandler
import json
import os
import re
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import plan_parallel
from fused_lora import (
    FusedLoRAExperts,
    FusedLoRAGroup,
    FusedLoRALinear,
    FusedMultiLoRALinear,
    add_adapter,
    explain,
    inject,
    load_adapter,
    lora_linear,
    merge_and_unload,
    reference,
    route,
    save_adapter,
    triton_backend,
)
from fused_lora.parallel import ColwiseParallel, RowwiseParallel
from fused_lora.seeds import draw_seeds

K, HIDDEN, N, R = 12, 16, 8, 2
BATCH, LENGTH = 4, 8  # the global batch, whatever the number of processes
BACKENDS = ("torch", "triton")
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class MLP(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)  # the same on every rank
        self.up = FusedLoRALinear(K, HIDDEN, R, 16, **kwargs)
        self.down = FusedLoRALinear(HIDDEN, N, R, 16, **kwargs)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.lora_B)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def dtype_of(backend):
    """fp64 wherever it can be: then a wrong term shows, and the order of the sums does not."""
    return torch.float64 if backend == "torch" else torch.float32


def assert_close(got, expected):
    # One sum of a few terms in another order: some ulps of the largest term.
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-2}[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def data(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, K, generator=generator, dtype=dtype)
    target = torch.randn(BATCH, LENGTH, N, generator=generator, dtype=dtype)
    return x, target


def mine(t):
    """This rank's part of the global batch."""
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def optimizer_of(model):
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)


def train(model, x, target, *, share=1.0, steps=3):
    """Losses, the gradients of the last step and the trained parameters, all of them in full.

    ``share``: of this rank's mean loss in the loss whose gradients are added over the ranks.
    """
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean() * share
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    trained = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    return {
        "loss": torch.stack(losses),
        **{f"grad {name}": full(p.grad) for name, p in trained.items()},
        **{name: full(p.detach()) for name, p in trained.items()},
    }


def assert_same_run(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        try:
            assert_close(got[name], expected[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def added(run):
    """With the losses of all ranks; their gradients are added already."""
    dist.all_reduce(run["loss"])
    return run


def averaged(run):
    """With the mean of the losses of all ranks; their gradients are averaged already."""
    added(run)["loss"] /= dist.get_world_size()
    return run


class Launched:
    """Counts the kernels' launches, so that a test can say that they ran."""

    def __enter__(self):
        self.count = 0
        self.saved = {n: getattr(triton_backend, n) for n in ("gemm_one_pass", "gemm_scaled")}
        for name, launcher in self.saved.items():
            setattr(triton_backend, name, self._counting(launcher))
        return self

    def _counting(self, launcher):
        def counted(*args, **kwargs):
            self.count += 1
            return launcher(*args, **kwargs)

        return counted

    def __exit__(self, *_):
        for name, launcher in self.saved.items():
            setattr(triton_backend, name, launcher)


def on_both_backends(run):
    """Calls run(backend, dtype) for each, and asserts that the kernels ran for one of them."""
    for backend in BACKENDS:
        with Launched() as launched:
            run(backend, dtype_of(backend))
        assert bool(launched.count) == (backend == "triton"), backend


def raises(error, message, call):
    with pytest.raises(error, match=re.escape(message)):
        call()


@check
def ddp():
    def run(backend, dtype):
        model = MLP(dtype=dtype, backend=backend)
        x, target = data(dtype)
        expected = train(copy.deepcopy(model), x, target)
        got = train(DistributedDataParallel(model), mine(x), mine(target))
        assert_same_run(averaged(got), expected)

    on_both_backends(run)


@check
def ddp_static_graph_with_checkpointing():
    model = MLP(dtype=torch.float64)
    x, target = data(torch.float64)
    expected = train(copy.deepcopy(model), x, target)
    wrapped = DistributedDataParallel(model, static_graph=True)
    plain = model.forward
    model.forward = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    assert_same_run(averaged(train(wrapped, mine(x), mine(target))), expected)


def sharded(model, **kwargs):
    """Each layer is a group of frozen and trainable parameters."""
    for layer in (model.up, model.down):
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


@check
def fsdp():
    def run(backend, dtype):
        for reshard in (True, False):
            model = MLP(dtype=dtype, backend=backend)
            x, target = data(dtype)
            expected = train(copy.deepcopy(model), x, target)
            got = train(sharded(model, reshard_after_forward=reshard), mine(x), mine(target))
            assert_same_run(averaged(got), expected)

    on_both_backends(run)


class Mixture(nn.Module):
    """A router, experts with adapters, and a layer."""

    def __init__(self, experts, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(K, 6, dtype=dtype).requires_grad_(False)
        self.experts = experts
        self.head = FusedLoRALinear(K, N, R, dtype=dtype)
        for name, p in self.named_parameters():
            if p.requires_grad or "base_layer" in name:
                nn.init.normal_(p, std=0.3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        p, index = self.router(rows).softmax(-1).topk(2)
        return self.head(self.experts(rows, index, p)).view(*x.shape[:2], N)


def experts_of_both(dtype):
    """A mixture of experts with adapters of ours, and one with PEFT's, fused."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import fused_lora.peft

    sizes = {"hidden_size": K, "moe_intermediate_size": 10, "num_experts": 6}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=2)
    names = ("gate_up_proj", "down_proj")
    yield FusedLoRAExperts(
        Qwen3MoeExperts(config).to(dtype), dict.fromkeys(names, R), dict.fromkeys(names, 4)
    )
    holder = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    targets = [f"experts.{name}" for name in names]
    model = get_peft_model(holder, LoraConfig(r=R, target_parameters=targets)).to(dtype)
    assert not fused_lora.peft.fuse(model).not_fused
    yield model.base_model.model["experts"]


@check
def experts_in_ddp_and_fsdp():
    if find_spec("peft") is None or find_spec("transformers") is None:
        return
    x, target = data(torch.float64)
    for experts in experts_of_both(torch.float64):
        model = Mixture(experts, torch.float64)
        expected = train(copy.deepcopy(model), x, target)
        got = train(DistributedDataParallel(copy.deepcopy(model)), mine(x), mine(target))
        assert_same_run(averaged(got), expected)
        fully_shard(model.experts)
        got = train(fully_shard(model), mine(x), mine(target))
        assert_same_run(averaged(got), expected)


@check
def fsdp_cpu_offload():
    model = MLP(dtype=torch.float64)
    x, target = data(torch.float64)
    expected = train(copy.deepcopy(model), x, target)
    model = sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert_same_run(averaged(train(model, mine(x), mine(target))), expected)


@check
def fsdp_merge():
    """Merging a sharded layer changes what the next forward gathers."""
    single, model = MLP(dtype=torch.float64).eval(), sharded(MLP(dtype=torch.float64).eval())
    x, _ = data(torch.float64)
    with torch.no_grad():
        model(x)
        if not isinstance(model.up.weight, DTensor):  # gathered: what is put there would be lost
            raises(RuntimeError, "call reshard() of what fully_shard returned", model.up.merge)
        for m in (single, model):
            for layer in (m.up, m.down):
                if isinstance(m, FSDPModule):
                    layer.reshard()
                layer.merge()
        assert_close(model(x), single(x))
    whole = fully_shard(MLP(dtype=torch.float64).eval())  # one group, which stays gathered
    with torch.no_grad():
        whole(x)
        raises(RuntimeError, "call reshard() of what fully_shard returned", whole.up.merge)
        whole.reshard()
        for layer in (whole.up, whole.down):
            layer.merge()
        assert_close(whole(x), single(x))


def _plain():
    """Two layers for adapters, and one that is trained in whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5))


def _adapted(**options):
    """A whole model, trained a little."""
    model = _plain()
    inject(model, R, 2 * R, ["0", "1"], modules_to_save=["2"], **options)
    for parameter in (model[0].lora_B, model[1].lora_B, model[2].trained_module.weight):
        nn.init.normal_(parameter)
    return model


def _spread():
    """It whole, and in FSDP2 layer by layer, once gathered; from a residual; in tensor parallel."""
    for options in ({}, {"init_lora_weights": "pissa"}):
        model = _adapted(**options)
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        with torch.no_grad():
            model(torch.randn(1, 64))
        yield _adapted(**options), model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    yield _adapted(), parallelize_module(_adapted(), mesh, styles)


@check
def adapters_of_sharded_models():
    """Every process saves and loads, the first one writes, and nobody puts plain layers in."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    x = torch.randn(3, 64)
    for number, (single, model) in enumerate(_spread()):
        folder = Path(folders[0], str(number))
        expected = single(x).detach()
        save_adapter(model, folder)
        dist.barrier()
        loaded = _plain()
        load_adapter(loaded, folder)
        assert_close(loaded(x), expected)
        if single[0].lora_A_init is None:  # a residual's adapter goes into the original model
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.zero_()
            load_adapter(model, folder)
            assert_close(model(x), expected)
        raises(ValueError, "spread over processes", partial(merge_and_unload, model))
        assert not model[0].merged


@check
def named_adapters_of_sharded_models():
    """Saved while a forward's parameters are still gathered."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    add_adapter(model, "one", R, 2 * R, ["0", "1"])
    for layer in model:
        nn.init.normal_(layer.lora_B["one"])
    x = torch.randn(3, 64)
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    with route(model, adapter_names="one"), torch.no_grad():
        expected = model(x)
        fully_shard(model)
        model(x)
    save_adapter(model, folders[0], adapter_name="one")
    dist.barrier()
    torch.manual_seed(0)
    loaded = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    load_adapter(loaded, folders[0])
    assert_close(loaded(x), expected)


@check
def fsdp_mixed_precision_of_codes():
    """The policy casts tables too, which the layer notices."""
    for format in ("nf4", "int8", "fp8"):
        model = _adapted(quantize=format)
        fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        call = partial(model, torch.randn(70, 64))
        raises(TypeError, "MixedPrecisionPolicy(param_dtype=...) casts them", call)


@check
def fsdp_mixed_precision():
    """fp16 compute and fp32 reduction over fp32 parameters, and over an fp16 base."""
    for backend in BACKENDS:
        for dtype in (torch.float32, torch.float16):
            x, target = data(torch.float32)
            model = MLP(dtype=dtype, backend=backend, adapter_dtype=torch.float32)
            half = copy.deepcopy(model).half()
            optimizer = torch.optim.SGD(half.parameters(), 0)  # sets no gradients to None
            y = half(x.half())
            y.float().sub(target).square().mean().backward()
            policy = MixedPrecisionPolicy(torch.float16, torch.float32)
            got = sharded(model, mp_policy=policy)
            with Launched() as launched:
                y = got(mine(x))
                y.float().sub(mine(target)).square().mean().backward()
            assert y.dtype == torch.float16
            assert bool(launched.count) == (backend == "triton")
            for (name, p), q in zip(got.named_parameters(), half.parameters(), strict=True):
                if p.requires_grad:
                    assert p.grad.dtype == torch.float32, name
                    assert_close(full(p.grad).half(), q.grad)
            del optimizer


PLANS = {
    "tensor parallel": {"up": ColwiseParallel(), "down": RowwiseParallel()},
    "sequence parallel": {
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    },
}


@check
def tensor_parallel():
    def run(backend, dtype):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for plan_name, plan in PLANS.items():
            model = MLP(dtype=dtype, backend=backend)
            x, target = data(dtype)
            expected = train(copy.deepcopy(model), x, target)
            model = parallelize_module(model, mesh, plan)
            assert model.up.weight.to_local().shape == (HIDDEN // mesh.size(), K)
            assert model.down.lora_A.to_local().shape == (R, HIDDEN // mesh.size())
            if plan_name == "sequence parallel":
                mine = [t.chunk(mesh.size(), dim=1)[mesh.get_local_rank()] for t in (x, target)]
                got = added(train(model, *mine, share=1 / mesh.size()))
            else:
                got = train(model, x, target)
            assert_same_run(got, expected)
            for layer in (model.up, model.down):
                for p in (layer.lora_A, layer.lora_B):
                    assert p.grad.placements == p.placements

    on_both_backends(run)


@check
def tensor_parallel_reads_what_has_arrived():
    """Split along dimension 0, DTensor hands on unfinished collectives, in both directions."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, target = data(torch.float32)
    plan = {
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    }
    for backend in BACKENDS:
        model = MLP(backend=backend)
        expected = train(copy.deepcopy(model), x, target)
        model = parallelize_module(model, mesh, plan)
        got = train(model, mine(x), mine(target), share=1 / mesh.size())
        assert_same_run(added(got), expected)
    # The same around a layer that is not parallel itself.
    layer = FusedLoRALinear(N, K, R, 16, backend="triton")
    nn.init.normal_(layer.lora_B)
    model = parallelize_module(MLP(backend="triton"), mesh, PLANS["tensor parallel"])
    y = model.up(layer(model(x)))
    y.sum().backward()
    whole = MLP(backend="triton")
    other = copy.deepcopy(layer)
    other.zero_grad()
    whole.up(other(whole(x))).sum().backward()
    assert_close(layer.lora_B.grad, other.lora_B.grad)
    assert_close(full(model.up.lora_A.grad), whole.up.lora_A.grad)


@check
def tensor_parallel_of_single_layers():
    """Gradients of x and of a trainable bias; every layout; explain says what runs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    whole = Replicate()
    layouts = {
        "replicated": ([whole] * 5, whole),
        "column-wise": ([whole, Shard(0), whole, Shard(0), Shard(0)], Shard(2)),
        "row-wise": ([Shard(2), Shard(1), Shard(1), whole, whole], Partial()),
        "batch": ([Shard(0), *[whole] * 4], Shard(0)),
        "sequence": ([Shard(1), *[whole] * 4], Shard(1)),
    }
    for backend in BACKENDS:
        dtype = dtype_of(backend)
        x, g = data(dtype)
        shapes = {"weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
        tensors = {"x": x} | {n: torch.randn(s, dtype=dtype) for n, s in shapes.items()}

        def call(tensors, g, backend=backend):
            leaves = {n: t.detach().requires_grad_(n != "weight") for n, t in tensors.items()}
            y = lora_linear(**leaves, scaling=0.5, backend=backend)
            trained = [t for n, t in leaves.items() if n != "weight"]
            full_y = y.redistribute(placements=[whole]) if isinstance(y, DTensor) else y
            return y, torch.autograd.grad(full_y, trained, g)

        y, gradients = call(tensors, g)
        for layout, (placements, y_placement) in layouts.items():
            placed = {
                n: distribute_tensor(tensors[n], mesh, [p])
                for n, p in zip(names, placements, strict=True)
            }
            got, got_gradients = call(placed, distribute_tensor(g, mesh, [whole]))
            assert got.placements == (y_placement,), layout
            assert got.shape == y.shape
            assert_close(full(got), y)
            for name, a, b in zip(("x", *names[2:]), got_gradients, gradients, strict=True):
                assert a.shape == b.shape, (layout, name)
                assert_close(full(a), b)
        assert explain(**placed, backend=backend).backend == backend


@check
def tensor_parallel_with_uneven_shards():
    """DTensor's last shards are smaller, or empty; the styles refuse them, lora_linear does not."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(6, 5)
    weight, lora_A, lora_B = torch.randn(5, 5), torch.randn(2, 5), torch.randn(5, 2)
    expected = lora_linear(x, weight, lora_A, lora_B, scaling=1.0)
    for placements in (
        [Replicate(), Shard(0), Replicate(), Shard(0)],
        [Shard(1), Shard(1), Shard(1), Replicate()],
    ):
        for backend in BACKENDS:
            tensors = (x, weight, lora_A, lora_B)
            placed = [
                distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=True)
            ]
            got = lora_linear(*placed, scaling=1.0, backend=backend)
            assert_close(full(got), expected)


@check
def tensor_parallel_dropout():
    """The same mask where x is the same, another for every other part of x."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p, scaling, size = 0.5, 1.0, 8 * mesh.size()
    eye, x = torch.eye(size), torch.ones(4, size)
    zero = torch.zeros(size, size)

    def run(placements, backend):
        torch.manual_seed(3)
        tensors = (x, zero, eye, eye)
        placed = [distribute_tensor(t, mesh, [q]) for t, q in zip(tensors, placements, strict=True)]
        placed[0].requires_grad_()
        y = lora_linear(*placed, scaling=scaling, dropout_p=p, backend=backend)
        (dx,) = torch.autograd.grad(y.redistribute(placements=[Replicate()]).sum(), placed[0])
        return full(y.detach()), full(dx)

    for backend in BACKENDS:
        torch.manual_seed(3)
        single = lora_linear(x, zero, eye, eye, scaling=scaling, dropout_p=p, backend=backend)
        y, dx = run([Replicate(), Shard(0), Replicate(), Shard(0)], backend)
        assert torch.equal(y, single)
        assert torch.equal(dx, y)  # with ones and identities both are the scaled mask
        y, dx = run([Shard(1), Shard(1), Shard(1), Replicate()], backend)
        torch.testing.assert_close(dx, y)
        torch.manual_seed(3)
        seed = draw_seeds(1, x.device, backend)
        masks = [reference.keep_mask(seed + i, 2**15, 4, 8) for i in range(mesh.size())]
        assert torch.equal(y != 0, torch.cat(masks, dim=1))
        assert not torch.equal(masks[0], masks[1])


@check
def tensor_parallel_autocast():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, target = data(torch.float32)
    for backend in BACKENDS:
        single = MLP(backend=backend)
        model = parallelize_module(MLP(backend=backend), mesh, PLANS["tensor parallel"])
        for m in (single, model):
            with torch.autocast("cpu", torch.float16):
                y = m(x)
            assert y.dtype == torch.float16
            (y.float() - target).square().mean().backward()
        for got, expected in zip(model.parameters(), single.parameters(), strict=True):
            if expected.requires_grad:
                assert got.grad.dtype == torch.float32
                # Of the norm: one element may be a sum in which most of fp16's digits cancel.
                error = (full(got.grad) - expected.grad).norm()
                assert error <= 0.02 * expected.grad.norm()


@check
def tensor_parallel_checkpointing_and_compile():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, target = data(torch.float64)
    expected = train(MLP(dtype=torch.float64), x, target)

    def parallel():
        return parallelize_module(MLP(dtype=torch.float64), mesh, PLANS["tensor parallel"])

    model = parallel()
    plain = model.forward
    model.forward = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    assert_same_run(train(model, x, target), expected)
    model = parallel()
    model.compile(backend="aot_eager", fullgraph=True)
    assert_same_run(train(model, x, target), expected)


@check
def tensor_parallel_refusals():
    """Every rank gets the error and none waits for another."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    odd = FusedLoRALinear(K, size + 1, R)
    raises(
        ValueError,
        f"ColwiseParallel: out_features = {size + 1} does not divide by the mesh's {size}",
        lambda: parallelize_module(odd, mesh, ColwiseParallel()),
    )
    assert not isinstance(odd.weight, DTensor)
    odd = FusedLoRALinear(size + 1, N, R)
    raises(
        ValueError,
        f"RowwiseParallel: in_features = {size + 1}",
        lambda: parallelize_module(odd, mesh, RowwiseParallel()),
    )
    merged = FusedLoRALinear(K, N, R)
    merged.merge()
    raises(RuntimeError, "unmerge()", lambda: parallelize_module(merged, mesh, ColwiseParallel()))
    several = FusedMultiLoRALinear(64, 64)
    for refused, why in (
        (_adapted(quantize="nf4")[0], "the layer has a quantised weight"),
        (FusedLoRALinear(K, N, R, use_dora=True), "the layer has DoRA"),
        (several, "a layer of several adapters"),
        (FusedLoRAGroup({"q": FusedLoRALinear(K, N, R)}), "a FusedLoRAGroup; wanted each of its"),
    ):
        for style in (ColwiseParallel(), RowwiseParallel()):
            raises(TypeError, why, lambda m=refused, s=style: parallelize_module(m, mesh, s))
    square = init_device_mesh("cpu", (size, 1), mesh_dim_names=("dp", "tp"))
    raises(
        ValueError,
        "ColwiseParallel: got the 2-D mesh",
        lambda: parallelize_module(FusedLoRALinear(K, N, R), square, ColwiseParallel()),
    )

    x, _ = data(torch.float32)
    plain = {
        "x": x,
        "weight": torch.randn(N, K),
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
    }

    def placed(on=mesh, **placements):
        return plain | {n: distribute_tensor(plain[n], on, [p]) for n, p in placements.items()}

    whole = Replicate()
    replicated = placed(x=whole, weight=whole, lora_A=whole, lora_B=whole)
    for changes, error, message in (
        ({"x": plain["x"]}, TypeError, "x: got a Tensor, wanted a DTensor as weight is"),
        ({"lora_A": plain["lora_A"]}, TypeError, "lora_A: got a Tensor, wanted a DTensor as x is"),
        (placed(weight=Shard(0)), TypeError, "x: got a Tensor, wanted a DTensor as weight is"),
        (
            replicated | {"weight": distribute_tensor(plain["weight"], mesh, [Shard(0)])},
            TypeError,
            "has x R, weight S(0), lora_A R, lora_B R on dimension 0",
        ),
        (
            replicated | {"lora_A": distribute_tensor(plain["lora_A"], square["tp"], [whole])},
            ValueError,
            "lora_A: is on DeviceMesh",
        ),
        (
            replicated | {"lora_B": distribute_tensor(torch.randn(N + 1, R), mesh, [whole])},
            ValueError,
            f"lora_B: got shape [{N + 1}, {R}]",
        ),
    ):
        arguments = replicated | changes
        for function in (lora_linear, explain):
            raises(error, message, lambda a=arguments, f=function: f(**a, scaling=1.0))


@check
def tensor_parallel_layer_methods():
    """merge, unmerge, reset, gradient clipping and the state dict of split layers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, target = data(torch.float64)
    single = MLP(dtype=torch.float64)
    model = parallelize_module(MLP(dtype=torch.float64), mesh, PLANS["tensor parallel"])
    for m in (single, model):
        (m(x) - target).square().mean().backward()
    norms = [full(nn.utils.clip_grad_norm_(m.parameters(), 0.1)) for m in (single, model)]
    assert_close(norms[1], norms[0])
    for name, tensor in model.state_dict().items():
        assert_close(full(tensor), single.state_dict()[name])
    single.eval(), model.eval()
    expected = single(x).detach()
    for layer in (model.up, model.down):
        layer.merge()
        assert isinstance(layer.weight, DTensor)
    assert_close(model(x).detach(), expected)
    for layer in (model.up, model.down):
        layer.unmerge()
    assert_close(model(x).detach(), expected)
    model.up.reset_lora_parameters()
    assert not full(model.up.lora_B.detach()).any()


@check
def fsdp_with_tensor_parallel():
    """A 2-D mesh: FSDP over one dimension, tensor parallel over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x, target = data(torch.float64)
    expected = train(MLP(dtype=torch.float64), x, target)
    model = parallelize_module(MLP(dtype=torch.float64), mesh["tp"], PLANS["tensor parallel"])
    model = sharded(model, mesh=mesh["dp"])
    rank = mesh.get_local_rank("dp")
    got = train(model, x.chunk(2)[rank], target.chunk(2)[rank])
    assert_same_run(averaged(got), expected)


class Sent(TorchDispatchMode):
    """The bytes of the tensors that collectives work on: the larger side of each."""

    KINDS = {  # noqa: RUF012
        "c10d.allreduce_": "all_reduce",
        "c10d._allgather_base_": "all_gather",
        "c10d._reduce_scatter_base_": "reduce_scatter",
        "_c10d_functional.all_reduce": "all_reduce",
    }

    NO_MESSAGES = ("_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd")

    def __init__(self):
        super().__init__()
        self.messages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = str(function).rpartition(".")[0]
        if "c10d" in packet and packet not in self.NO_MESSAGES:
            kind = f"{self.KINDS[packet]}/{dist.get_world_size()}"
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.ndim]
            size = max(t.nbytes for t in tensors)
            self.messages[kind] = self.messages.get(kind, 0) + size
        return function(*args, **(kwargs or {}))


def storage(t):
    local = t.to_local() if isinstance(t, DTensor) else t
    return local.untyped_storage()


def bytes_of(tensors):
    """FSDP2's gradients are parts of one buffer."""
    return sum({s.data_ptr(): s.nbytes() for s in map(storage, tensors)}.values())


@check
def plan_is_what_is_measured():
    """benchmarks/plan_parallel.py against the bytes that these processes hold and send."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    setting = plan_parallel.Setting(r=R, M=BATCH * LENGTH, base_bytes=4, adapter_bytes=4)
    for data_name, tp, split in (
        ("ddp", 1, "column"),
        ("fsdp", 1, "column"),
        ("fsdp_columns", 1, "column"),
        ("ddp", size, "column"),
        ("ddp", size, "row"),
    ):
        planned = plan_parallel.cost(
            plan_parallel.Layer("layer", K, N, split), size, tp, data_name, setting
        )
        torch.manual_seed(0)
        layer = FusedLoRALinear(K, N, R, bias=False)
        model, x = nn.Sequential(layer), data(torch.float32)[0].requires_grad_()
        if tp > 1:
            style = ColwiseParallel() if split == "column" else RowwiseParallel()
            parallelize_module(layer, mesh, style)
            x = x.detach()
            if split == "row":
                x = x.chunk(size, dim=-1)[dist.get_rank()].clone()
            x.requires_grad_()
        elif data_name == "ddp":
            model = DistributedDataParallel(model)
        else:
            by_columns = data_name == "fsdp_columns"
            fully_shard(
                layer,
                reshard_after_forward=True,
                shard_placement_fn=lambda p, columns=by_columns, A=layer.lora_A: (
                    Shard(1) if columns and p is A else None
                ),
            )
        optimizer = optimizer_of(model)
        saved = {}
        weights = {storage(p).data_ptr() for p in model.parameters()}

        def note(t, saved=saved, weights=weights):
            if storage(t).data_ptr() not in weights:
                saved[storage(t).data_ptr()] = storage(t).nbytes()
            return t

        with Sent() as sent:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                y = model(x)
            y.sum().backward()
        optimizer.step()
        trained = [layer.lora_A, layer.lora_B]
        moments = [optimizer.state[p][n] for p in trained for n in ("exp_avg", "exp_avg_sq")]
        measured = plan_parallel.Cost(
            base=bytes_of([layer.weight]),
            adapter=bytes_of(trained),
            gradients=bytes_of(p.grad for p in trained),
            optimizer=bytes_of(moments),
            # Under FSDP the gathered weights are among what autograd holds.
            saved=sum(saved.values()) if data_name == "ddp" else planned.saved,
            messages=sent.messages,
        )
        if dist.get_rank() == 0:  # the largest shards are on rank 0
            assert measured == planned, f"{data_name}, tp {tp}, {split}: {measured} != {planned}"


def checkpointed(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def one_step(model, optimizer, x, target):
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()


@check
def dcp_save():
    """Two steps under FSDP2, then a distributed checkpoint."""
    model = sharded(MLP(dtype=torch.float64))
    optimizer = optimizer_of(model)
    x, target = data(torch.float64)
    for _ in range(2):
        one_step(model, optimizer, mine(x), mine(target))
    dcp.save(checkpointed(model, optimizer), checkpoint_id=os.environ["CHECKPOINT"])


@check
def dcp_resume():
    """Onto this world size, under FSDP2 and tensor parallel: the third step is the single run's."""
    x, target = data(torch.float64)
    single = MLP(dtype=torch.float64)
    optimizer = optimizer_of(single)
    for _ in range(3):
        one_step(single, optimizer, x, target)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fresh = MLP(dtype=torch.float64)
    for layer in (fresh.up, fresh.down):
        layer.reset_lora_parameters()
    for model, batch in (
        (sharded(copy.deepcopy(fresh)), (mine(x), mine(target))),
        (parallelize_module(copy.deepcopy(fresh), mesh, PLANS["tensor parallel"]), (x, target)),
    ):
        optimizer = optimizer_of(model)
        state = checkpointed(model, optimizer)
        dcp.load(state, checkpoint_id=os.environ["CHECKPOINT"])
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        one_step(model, optimizer, *batch)
        for name, tensor in get_model_state_dict(model).items():
            assert_close(full(tensor), single.state_dict()[name])


@check
def rank_0_hangs():
    folder = Path(sys.argv[1])
    (folder / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    dist.barrier()
    while dist.get_rank() == 0:
        time.sleep(1)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    results = {}
    for name in names:
        torch.manual_seed(0)
        try:
            CHECKS[name]()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"rank-{rank}.json").write_text(json.dumps(results))
        if results[name] != "ok":
            os._exit(1)  # the others may wait for this rank: the parent ends them
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

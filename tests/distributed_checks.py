"""What each rank of a multi-process test runs; started by test_distributed.py, one launch for many.

    python distributed_checks.py FOLDER CHECK...     with RANK and WORLD_SIZE set

Writes FOLDER/rank-R.json with "ok" or the traceback of each check. Every rank computes the
single-process run itself and holds its own share of the distributed one to it.
"""

import copy
import faulthandler
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any import of fused_lora.kernels
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks import plan_parallel
from fused_lora import FusedLoRALinear, explain, inject, lora_linear, reference, triton_backend
from fused_lora.parallel import ColwiseParallel, RowwiseParallel

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
        self.up = FusedLoRALinear(K, HIDDEN, R, **kwargs)
        self.down = FusedLoRALinear(HIDDEN, N, R, **kwargs)
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


def train(model, x, target, steps=3, forward=None):
    """Losses, the gradients of the last step and the trained parameters, all in full."""
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (forward or model)(x).float().sub(target.float()).square().mean()
        if x.dtype == torch.float64:
            loss = (forward or model)(x).sub(target).square().mean()
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {
        "loss": torch.stack(losses),
        **{f"grad {n.removeprefix('module.')}": full(p.grad) for n, p in trained.items()},
        **{n.removeprefix("module."): full(p.detach()) for n, p in trained.items()},
    }


def assert_same_run(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        try:
            assert_close(got[name], expected[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def averaged(run):
    """The run of data-parallel ranks: their gradients are averaged already, their losses not."""
    dist.all_reduce(run["loss"])
    run["loss"] /= dist.get_world_size()
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
    try:
        call()
    except error as raised:
        assert message in str(raised), f"got {raised}, wanted {message}"
    else:
        raise AssertionError(f"nothing raised, wanted {message}")


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


@check
def fsdp_cpu_offload():
    model = MLP(dtype=torch.float64)
    x, target = data(torch.float64)
    expected = train(copy.deepcopy(model), x, target)
    model = sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert_same_run(averaged(train(model, mine(x), mine(target))), expected)


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
                part = slice(*(mesh.get_local_rank() + i for i in range(2)))
                steps = LENGTH // mesh.size()
                part = slice(part.start * steps, part.stop * steps)
                got = averaged(train(model, x[:, part], mesh_mean(target[:, part], mesh)))
            else:
                got = train(model, x, target)
            assert_same_run(got, expected)
            for layer in (model.up, model.down):
                for p in (layer.lora_A, layer.lora_B):
                    assert p.grad.placements == p.placements

    on_both_backends(run)


def mesh_mean(target, mesh):
    return target


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
        timeout=timedelta(seconds=40),
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

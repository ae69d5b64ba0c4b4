"""`lora_linear_multi` against the fp64 oracle: a loop over the adapters on every row of x."""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracle import FORWARD_FACTOR, GRADIENT_FACTOR
from outside import check_offsets
from torch import nn

from fused_lora import (
    FusedMultiLoRALinear,
    explain_multi,
    lora_linear_multi,
    multi_backends,
    multi_rows,
    reference,
    route,
)
from fused_lora.kernels import rows
from fused_lora.kernels.dropout import dropout_threshold
from fused_lora.kernels.rows import groups_of_indices, groups_of_runs
from fused_lora.multi import LoRALinearMultiFunction
from fused_lora.multi_backends import MultiPlan
from fused_lora.multi_dispatch import plan_multi
from fused_lora.multi_rows import row_groups
from fused_lora.seeds import draw_seeds

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
HALF = [pytest.param(torch.float16, id="fp16"), BF16]
DTYPES = [pytest.param(torch.float32, id="fp32"), *HALF]
PLANS = [
    pytest.param(MultiPlan("triton", "split", "split"), id="split"),
    pytest.param(MultiPlan("triton", "expand", "expand"), id="expand"),
    pytest.param(MultiPlan("torch", "library", "library"), id="torch"),
]
STRADDLING = [(2, 13), (0, 30), (-1, 7), (3, 1), (2, 20)]  # adapter 1 has no row


@dataclass
class Batch:
    x: torch.Tensor
    weight: torch.Tensor
    As: list[torch.Tensor]
    Bs: list[torch.Tensor]
    bias: torch.Tensor | None
    g: torch.Tensor
    scalings: tuple[float, ...]
    indices: torch.Tensor  # [M]
    dropout_p: float
    seed: torch.Tensor

    def map(self, change):
        """With ``change`` applied to every floating-point tensor."""
        return replace(
            self,
            x=change(self.x),
            weight=change(self.weight),
            As=[change(A) for A in self.As],
            Bs=[change(B) for B in self.Bs],
            bias=None if self.bias is None else change(self.bias),
            g=change(self.g),
        )


def batch(
    runs,
    ranks=(3, 16, 17, 33),
    N=45,
    K=70,
    *,
    dtype=torch.float32,
    adapter_dtype=None,
    device="cpu",
    bias=True,
    dropout_p=0.0,
):
    def normal(*shape, std=1.0, dtype=dtype):
        return (torch.randn(*shape) * std).to(device, dtype)

    rows = torch.tensor([n for _, n in runs], dtype=torch.int64)
    indices = torch.tensor([a for a, _ in runs], dtype=torch.int64).repeat_interleave(rows)
    M = len(indices)
    adapter_dtype = adapter_dtype or dtype
    return Batch(
        x=normal(M, K),
        weight=normal(N, K, std=K**-0.5),
        As=[normal(r, K, std=K**-0.5, dtype=adapter_dtype) for r in ranks],
        Bs=[normal(N, r, std=r**-0.5, dtype=adapter_dtype) for r in ranks],
        bias=normal(N) if bias else None,
        g=normal(M, N),
        scalings=tuple(0.75 + 0.5 * i for i in range(len(ranks))),
        indices=indices.to(device),
        dropout_p=dropout_p,
        seed=torch.empty(1, dtype=torch.int64).random_().to(device),
    )


def loop(b):
    """Every adapter on all of x with the same mask, each row taken from its own."""
    y = torch.nn.functional.linear(b.x, b.weight, b.bias)
    for i, (A, B, scaling) in enumerate(zip(b.As, b.Bs, b.scalings, strict=True)):
        delta = reference.lora_linear(
            b.x,
            torch.zeros_like(b.weight),
            A,
            B,
            scaling=scaling,
            dropout_p=b.dropout_p,
            seed=b.seed,
        )
        y = y + torch.where((b.indices == i)[:, None], delta, 0.0)
    return y


def fused(plan, groups=None):
    """The autograd function with the batch's own seed."""

    def call(b):
        threshold = dropout_threshold(b.dropout_p)
        rows = groups
        if rows is None:
            values, counts = b.indices.cpu().unique_consecutive(return_counts=True)
            runs = tuple(zip(values.tolist(), counts.tolist(), strict=True))
            rows = groups_of_runs(runs, b.x.device)
        seed = b.seed if threshold else None
        return LoRALinearMultiFunction.apply(
            b.x, b.weight, b.bias, b.scalings, seed, threshold, rows, plan, None, *b.As, *b.Bs
        )

    return call


def public(**kwargs):
    """`lora_linear_multi`, whose mask is drawn as the batch's own seed was not: no dropout."""

    def call(b):
        arguments = {"adapter_indices": b.indices} | kwargs
        return lora_linear_multi(
            b.x, b.weight, b.As, b.Bs, scalings=list(b.scalings), bias=b.bias, **arguments
        )

    return call


def run(call, b):
    b = b.map(lambda t: t.detach())
    names = ["x", *(f"A{i}" for i in range(len(b.As))), *(f"B{i}" for i in range(len(b.Bs)))]
    leaves = [b.x, *b.As, *b.Bs]
    if b.bias is not None:
        names, leaves = [*names, "bias"], [*leaves, b.bias]
    for leaf in leaves:
        leaf.requires_grad_()
    y = call(b)
    grads = torch.autograd.grad(y, leaves, b.g)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


def check(got, b):
    """The oracle's rule for y and every gradient."""
    doubled = b.map(torch.Tensor.double)
    exact = run(loop, doubled)
    magnitude = run(loop, replace(doubled.map(torch.Tensor.abs), scalings=b.scalings))
    same_dtype = run(loop, b)
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        assert tensor.shape == exact[name].shape, name
        assert tensor.dtype == same_dtype[name].dtype, name
        factor = FORWARD_FACTOR if name == "y" else GRADIENT_FACTOR
        accumulator = torch.promote_types(tensor.dtype, torch.float32)
        floor = torch.finfo(tensor.dtype).eps / 2 * exact[name].norm()
        floor += torch.finfo(accumulator).eps * 2 * magnitude[name].norm()
        ours = (tensor.double() - exact[name]).norm()
        theirs = (same_dtype[name].double() - exact[name]).norm()
        assert ours <= factor * theirs + floor, f"{name}: error {ours:.2e}, PyTorch's {theirs:.2e}"


@pytest.fixture
def multi_launches(monkeypatch):
    """The launchers that were called, in order."""
    from fused_lora.kernels import gemm, multi

    called = []

    def record(module, name):
        launcher = getattr(module, name)

        def recorded(*args, **kwargs):
            called.append(name)
            return launcher(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    for module, name in (
        (gemm, "gemm_add_multi"),
        (multi, "shrink"),
        (multi, "expand"),
        (multi, "multi_grads"),
    ):
        record(module, name)
    return called


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_multi_values_and_gradients(device, plan, dtype, dropout_p):
    b = batch(STRADDLING, dtype=dtype, device=device, dropout_p=dropout_p)
    result = run(fused(plan), b)
    check(result, b)
    assert not result["dA1"].any()
    assert not result["dB1"].any()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", HALF)
def test_multi_fp32_adapters_over_a_half_base(device, plan, dtype):
    b = batch(STRADDLING, dtype=dtype, adapter_dtype=torch.float32, device=device)
    result = run(fused(plan), b)
    assert result["dA0"].dtype == result["dB0"].dtype == torch.float32
    check(result, b)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([], id="M0"),
        pytest.param([(0, 1)], id="M1"),
        pytest.param([(-1, 9)], id="none"),
        pytest.param([(3, 40), (1, 40)], id="two tiles and a half"),
        pytest.param([(i % 5 - 1, 1) for i in range(41)], id="interleaved"),
        pytest.param([(1, 64), (0, 64)], id="whole tiles"),
    ],
)
def test_multi_edge_batches(device, plan, runs):
    b = batch(runs, device=device, dropout_p=0.2)
    check(run(fused(plan), b), b)


@pytest.mark.parametrize("plan", PLANS[:2])
def test_multi_many_rows_reduce_in_parts(device, plan):
    b = batch([(1, 150), (-1, 11), (0, 139)], ranks=(4, 20), N=24, K=20, device=device)
    check(run(fused(plan), b), b)


@pytest.mark.parametrize("plan", PLANS[:2])
@pytest.mark.parametrize("r", [1, 64, 65, 512])
def test_multi_ranks(device, plan, r):
    b = batch([(0, 9), (1, 8)], ranks=(2, r), N=33, K=20, device=device, dropout_p=0.25)
    check(run(fused(plan), b), b)


@pytest.mark.parametrize("plan", PLANS)
def test_multi_indices_on_the_device_need_no_host(device, plan):
    """What a GPU's tensor of indices takes, on whatever device: empty pieces and groups stay."""
    b = batch([(3, 30), (0, 5), (-1, 4), (2, 1), (0, 40), (3, 2)], device=device, dropout_p=0.2)
    groups = groups_of_indices(b.indices, len(b.As))
    assert groups.on_host is None
    check(run(fused(plan, groups), b), b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_strides(device, backend):
    b = batch(STRADDLING, device=device)

    def sliced(t):
        return t.repeat_interleave(2, dim=-1)[..., ::2]

    check(run(public(backend=backend), b.map(sliced)), b)
    transposed = b.map(lambda t: t.mT.contiguous().mT if t.ndim > 1 else t)
    check(run(public(backend=backend), transposed), b)


@pytest.mark.parametrize("M", [64, 300])
def test_multi_ways_of_naming_rows_are_the_same(device, M, multi_launches):
    runs = [(2, M // 2), (0, M // 4), (-1, M // 4)]
    b = batch(runs, N=24, K=20, device=device)
    kwargs = {"backend": "triton"}
    first = run(public(segments=runs, adapter_indices=None, **kwargs), b)
    assert multi_launches[:2] == ["shrink", "expand" if M == 64 else "gemm_add_multi"]
    check(first, b)
    for indices in (b.indices, b.indices.cpu(), b.indices.cpu().tolist(), b.indices.int()):
        again = run(public(adapter_indices=indices, **kwargs), b)
        if isinstance(indices, torch.Tensor) and indices.is_cuda:
            check(again, b)  # adapters in another order: other parts of the sums over rows
            continue
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_multi_changed_indices_are_looked_at_again(device):
    b = batch([(0, 5), (1, 6)], device=device)
    check(run(public(), b), b)
    b.indices.copy_(b.indices.flip(0))
    check(run(public(), b), b)
    b.indices[3] = 4
    with pytest.raises(ValueError, match="got index 4, wanted 0 to 3, or -1"):
        public()(b)


def test_multi_indices_with_other_data_are_looked_at_again(device):
    b = batch([(0, 5), (1, 6)], device=device)
    check(run(public(), b), b)
    b.indices.data = b.indices.flip(0)
    check(run(public(), b), b)


def test_multi_indices_on_a_gpu_are_checked_once():
    """By the function that such a tensor takes, whose check is what waits for the GPU."""
    indices, cpu = torch.tensor([0, 1, 1, -1]), torch.device("cpu")
    first = multi_rows._of_tensor(indices, cpu, 2)
    assert multi_rows._of_tensor(indices, cpu, 2) is first
    assert multi_rows._of_tensor(indices, cpu, 3) is not first
    assert first.spans == (
        (0, 1, 2),
        (1, 2, 4),
    )
    indices[3] = 0
    assert multi_rows._of_tensor(indices, cpu, 2).spans == (
        (0, 0, 2),
        (1, 2, 4),
    )
    indices.data = torch.tensor([1, 1, 1, 1])
    assert multi_rows._of_tensor(indices, cpu, 2).spans == ((1, 0, 4),)
    indices.data = torch.tensor([1, 1, 2, 1])
    with pytest.raises(ValueError, match="got index 2, wanted 0 to 1"):
        multi_rows._of_tensor(indices, cpu, 2)


def test_multi_indices_that_numpy_changes_are_looked_at_again():
    """No version counts its writes."""
    array = torch.tensor([0, 0, 1, 1]).numpy()
    indices = torch.from_numpy(array)
    before = row_groups(torch.Size([4]), torch.device("cpu"), 2, indices, None)
    array[:] = [1, 1, 1, 0]
    after = row_groups(torch.Size([4]), torch.device("cpu"), 2, indices, None)
    assert before.spans == (
        (0, 0, 2),
        (1, 2, 4),
    )
    assert after.spans == (
        (1, 0, 3),
        (0, 3, 4),
    )
    array[3] = 2
    with pytest.raises(ValueError, match="got index 2, wanted 0 to 1"):
        row_groups(torch.Size([4]), torch.device("cpu"), 2, indices, None)


def test_multi_a_capture_takes_the_tables_of_another_stream(monkeypatch):
    """It makes none: a replay would copy them again, from memory that is another's by then."""
    runs, device = ((0, 2), (1, 3)), torch.device("cpu")
    monkeypatch.setattr(rows, "stream_of", lambda device: 1)
    warm = groups_of_runs(runs, device)
    monkeypatch.setattr(rows, "stream_of", lambda device: 2)
    assert groups_of_runs(runs, device) is not warm
    monkeypatch.setattr(rows, "stream_of", lambda device: 3)
    monkeypatch.setattr(rows, "_capturing", lambda device: True)
    assert groups_of_runs(runs, device) is warm
    assert warm in rows._captured
    with pytest.raises(RuntimeError, match="make the same calls once before"):
        groups_of_runs(((7, 41),), device)  # that no other test has made


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_leading_dimensions(device, backend):
    b = batch([(2, 8), (0, 4)], device=device)
    y = public(backend=backend)(b)
    shaped = replace(b, x=b.x.view(3, 4, -1))
    assert torch.equal(public(backend=backend)(shaped), y.view(3, 4, -1))
    indices = b.indices.view(3, 4)
    assert torch.equal(public(backend=backend, adapter_indices=indices)(shaped), y.view(3, 4, -1))
    shaped.x.requires_grad_()
    torch.relu_(
        public(backend=backend)(shaped)
    ).sum().backward()  # no view: may be changed in place
    assert shaped.x.grad.shape == shaped.x.shape


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_the_mask_is_lora_linears(device, backend):
    b = batch(STRADDLING, device=device, dropout_p=0.5)
    torch.manual_seed(3)
    seed = draw_seeds(1, device, backend)
    torch.manual_seed(3)
    y = public(backend=backend, dropout_p=0.5)(b)
    torch.testing.assert_close(y, loop(replace(b, seed=seed)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_multi_the_same_bits_in_every_run_and_nothing_given_is_written_to(device, plan):
    b = batch([(1, 130), (0, 50), (3, 120)], N=24, K=20, device=device, dropout_p=0.1)
    before = b.map(torch.clone)
    first, second = run(fused(plan), b), run(fused(plan), b)
    assert all(torch.equal(first[name], second[name]) for name in first)
    given, kept = ((c.x, c.weight, *c.As, *c.Bs) for c in (b, before))
    pairs = zip(given, kept, strict=True)
    assert all(torch.equal(a, c) for a, c in pairs)


@pytest.mark.parametrize("plan", PLANS)
def test_multi_saves_nothing_large(device, plan):
    b = batch(STRADDLING, N=300, device=device, dropout_p=0.2)
    inputs = {t.data_ptr() for t in (b.x, b.weight, *b.As, *b.Bs, b.seed)}
    b.As[0].requires_grad_()
    b.Bs[0].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(plan)(b)
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in inputs] == [(71, 33)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_only_the_wanted_gradients(device, backend, multi_launches):
    b = batch(STRADDLING, device=device)
    b.Bs[2].requires_grad_()
    public(backend=backend)(b).sum().backward()
    assert b.Bs[2].grad.any()
    assert all(t.grad is None for t in (b.x, *b.As, *b.Bs[:2]))
    assert multi_launches == (["shrink", "expand", "multi_grads"] if backend == "triton" else [])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("M", [4, 300])
def test_multi_forward_mode_is_refused(device, backend, M):
    """Also where nothing trains: kernels would make a y that has no tangent."""
    shapes = ((M, 6), (5, 6), (2, 6), (5, 2))
    x, weight, A, B = (torch.randn(shape, device=device) for shape in shapes)
    rows = {"scalings": 1.0, "segments": [(0, M)], "backend": backend}
    message = "must implement the jvp function"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        lora_linear_multi(forward_ad.make_dual(x, x), weight, [A], [B], **rows)


def test_multi_double_backward_is_refused(device):
    b = batch(STRADDLING, device=device)
    b.x.requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(public()(b).sum(), b.x, create_graph=True)


def test_multi_gradcheck():
    b = batch([(1, 3), (-1, 1), (0, 2)], ranks=(2, 3), N=4, K=5, dtype=torch.float64, dropout_p=0.3)
    plan = MultiPlan("torch", "library", "library")

    def call(x, A0, A1, B0, B1, bias):
        return fused(plan)(replace(b, x=x, As=[A0, A1], Bs=[B0, B1], bias=bias))

    inputs = [t.requires_grad_() for t in (b.x, *b.As, *b.Bs, b.bias)]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_autocast(device, backend):
    b = batch(STRADDLING, device=device)
    A = b.As[0].requires_grad_()
    with torch.autocast(device.type, torch.float16):
        y = public(backend=backend)(b)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert A.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_decode_with_200_adapters(device, dtype, multi_launches):
    ranks = [1 + i % 8 for i in range(200)]
    runs = [(i * 7 % 201 - 1, 1) for i in range(96)]
    b = batch(runs, ranks, N=40, K=300, dtype=dtype, device=device)
    y = public(backend="triton")(b)
    assert multi_launches == ["shrink", "expand"]
    exact, same_dtype = loop(b.map(torch.Tensor.double)), loop(b)
    assert (y.double() - exact).norm() <= 2 * (same_dtype.double() - exact).norm()


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([(i, 1) for i in range(40)], id="a row each"),
        pytest.param([(i * 7 % 41 - 1, 1 + i % 3) for i in range(60)], id="scattered"),
        pytest.param([(i, 4) for i in range(40)], id="four rows each"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_multi_equal_adapters_in_torch(runs, dtype, adapter_dtype, dropout_p, monkeypatch):
    monkeypatch.setattr(multi_backends, "_STACKED", 12 * 3 * 70 * dtype.itemsize)
    dtypes = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    b = batch(runs, [3 + i % 2 for i in range(40)], N=24, dropout_p=dropout_p, **dtypes)
    if dtype == adapter_dtype:
        check(run(fused(PLANS[2].values[0]), b), b)
    else:  # of the gradients, of which some are of a single row, the forward pass knows nothing
        y = run(fused(PLANS[2].values[0]), b)["y"]
        exact, same_dtype = loop(b.map(torch.Tensor.double)), loop(b)
        assert (y.double() - exact).norm() <= 2 * (same_dtype.double() - exact).norm()
    explained = explain_multi(b.x, b.weight, b.As, b.Bs, adapter_indices=b.indices)
    if adapter_dtype == torch.float32:  # the backward pass alone goes side by side
        assert "in turn, added in place" in explained.reasons["library"]
        return
    taken = re.search(r"of (\d+) side by side in (\d+) bmm", explained.reasons["library"])
    adapters, products = map(int, taken.groups())
    assert adapters >= 30
    assert products >= 4


def test_multi_side_by_side_is_for_few_rows_and_small_adapters():
    b = batch([(0, 20), (1, 20), (2, 1), (3, 1)], (4, 4, 5, 7))
    explained = explain_multi(b.x, b.weight, b.As, b.Bs, adapter_indices=b.indices)
    assert "the products of 4 adapters in turn, added" in explained.reasons["library"]
    b = batch([(0, 1), (1, 1)], (16, 16), K=4096)
    explained = explain_multi(b.x, b.weight, b.As, b.Bs, adapter_indices=b.indices)
    assert "the products of 2 adapters in turn, added" in explained.reasons["library"]


def test_multi_shrink_is_split_over_k_for_a_few_rows(device):
    from fused_lora.kernels.configs import choose_config
    from fused_lora.kernels.device import device_info
    from fused_lora.kernels.multi import shrink
    from fused_lora.kernels.rows import adapter_table

    b = batch([(0, 1)], ranks=(4,), K=2000, device=device)
    rows = groups_of_runs(((0, 1),), device)
    table = adapter_table(b.As, b.Bs, b.scalings)
    config = choose_config("plain", 1, 4, 4, 4, False, device_info(device))
    parts = shrink(config, b.x, rows, table, use_A=True, in_parts=True)
    assert parts.shape[0] > 1
    exact = b.scalings[0] * b.x.double() @ b.As[0].double().t()
    torch.testing.assert_close(parts.sum(0).double(), exact, rtol=1e-4, atol=1e-4)


def test_multi_tables_are_kept_and_follow_their_tensors(device):
    from fused_lora.kernels.rows import adapter_table

    b = batch(STRADDLING, device=device)
    first, again = (adapter_table(b.As, b.Bs, b.scalings) for _ in range(2))
    assert first.entries is again.entries
    moved = adapter_table([A.clone() for A in b.As], b.Bs, b.scalings)
    assert moved.entries is not first.entries
    assert groups_of_runs(((0, 3),), device) is groups_of_runs(((0, 3),), device)


def test_multi_rows_in_order_are_not_gathered(device):
    assert groups_of_runs(((2, 3), (0, 4), (-1, 2)), device).order is None
    order = groups_of_runs(((2, 1), (0, 2), (2, 1)), device).order
    assert order.tolist() == [0, 3, 1, 2]


def test_multi_strategy_by_shape():
    from fused_lora.dispatch import Call

    call = Call(8192, 512, 512, 16, torch.float16, torch.device("cpu"), False, True)
    assert plan_multi(call, 4, "triton") == MultiPlan("triton", "split", "split")
    large = replace(call, N=4096, K=4096)  # cuBLAS's product is faster by more than y's way costs
    assert plan_multi(large, 4, "triton") == MultiPlan("triton", "expand", "expand")
    assert plan_multi(replace(call, M=64), 64, "triton") == MultiPlan("triton", "expand", "expand")


def test_multi_explain():
    b = batch(STRADDLING)
    explained = explain_multi(b.x, b.weight, b.As, b.Bs, adapter_indices=b.indices)
    assert explained.backend == "torch"
    assert "the tensors are on the CPU" in explained.reasons["triton"]
    explained = explain_multi(b.x, b.weight, b.As, b.Bs, segments=STRADDLING, backend="triton")
    assert (explained.backend, explained.strategy) == ("triton", "expand")
    assert "a model, not a measurement" in str(explained)


def test_multi_mixed_adapter_dtypes_go_to_torch():
    b = batch(STRADDLING)
    b.As[1] = b.As[1].half()
    message = "lora_As: got torch.float16 and torch.float32, wanted one dtype for all"
    with pytest.raises(TypeError, match=message):
        public(backend="triton")(b)
    explained = explain_multi(b.x, b.weight, b.As, b.Bs, segments=STRADDLING)
    assert message in explained.reasons["triton"]
    check(run(public(), b), b)


GOOD = {
    "x": torch.randn(4, 6),
    "weight": torch.randn(5, 6),
    "lora_As": [torch.randn(2, 6), torch.randn(3, 6)],
    "lora_Bs": [torch.randn(5, 2), torch.randn(5, 3)],
    "scalings": [1.0, 2.0],
    "segments": [(1, 3), (-1, 1)],
}
INDICES = {"segments": None}
BAD = {
    "neither": (INDICES, ValueError, "adapter_indices, segments: got neither"),
    "both": ({"adapter_indices": [0] * 4}, ValueError, "adapter_indices, segments: got both"),
    "no adapters": ({"lora_As": [], "lora_Bs": []}, ValueError, "got 0 and 0 adapters"),
    "counts": ({"lora_Bs": GOOD["lora_Bs"][:1]}, ValueError, "got 2 and 1 adapters"),
    "As a tensor": ({"lora_As": torch.randn(2, 2, 6)}, TypeError, "lora_As: got Tensor"),
    "another K": (
        {"lora_As": [torch.randn(2, 6), torch.randn(3, 7)]},
        ValueError,
        "lora_As[1]: got shape [3, 7], wanted [r, 6]",
    ),
    "another N": (
        {"lora_Bs": [torch.randn(4, 2), torch.randn(5, 3)]},
        ValueError,
        "lora_Bs[0]: got shape [4, 2], wanted [5, 2]",
    ),
    "not a tensor": ({"lora_As": [GOOD["lora_As"][0], 1]}, TypeError, "lora_As[1]: got int"),
    "r = 0": (
        {"lora_As": [torch.randn(0, 6)] * 2, "lora_Bs": [torch.randn(5, 0)] * 2},
        ValueError,
        "lora_As[0]: got shape [0, 6] (r = 0)",
    ),
    "scalings": ({"scalings": [1.0]}, ValueError, "scalings: got 1, wanted one for each of 2"),
    "scaling NaN": ({"scalings": [1.0, math.nan]}, ValueError, "scaling: got nan"),
    "segments short": ({"segments": [(0, 3)]}, ValueError, "segments: have 3 rows in all"),
    "segment empty": (
        {"segments": [(0, 4), (1, 0)]},
        ValueError,
        "segments[1]: got 0 rows, wanted at least 1",
    ),
    "segment's index": (
        {"segments": [(2, 4)]},
        ValueError,
        "segments[0]: got index 2, wanted 0 to 1, or -1",
    ),
    "segment no pair": ({"segments": [4]}, TypeError, "segments[0]: got 4, wanted"),
    "index too large": (
        INDICES | {"adapter_indices": torch.tensor([0, 1, 2, 0])},
        ValueError,
        "adapter_indices: got index 2, wanted 0 to 1",
    ),
    "index too small": (
        INDICES | {"adapter_indices": [0, -2, 0, 0]},
        ValueError,
        "adapter_indices: got index -2",
    ),
    "indices short": (
        INDICES | {"adapter_indices": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        "adapter_indices: got shape [3], wanted [4]",
    ),
    "indices float": (
        INDICES | {"adapter_indices": torch.zeros(4)},
        TypeError,
        "adapter_indices: got dtype torch.float32, wanted integers",
    ),
    "indices names": (
        INDICES | {"adapter_indices": ["a"] * 4},
        TypeError,
        "adapter_indices[0]: got 'a', wanted a tensor or a list of integers",
    ),
    "indices bool": (
        INDICES | {"adapter_indices": torch.ones(4, dtype=torch.bool)},
        TypeError,
        "adapter_indices: got dtype torch.bool, wanted integers",
    ),
    "indices list of bools": (
        INDICES | {"adapter_indices": [1, False, True, True]},
        TypeError,
        "adapter_indices[1]: got False, wanted a tensor or a list of integers",
    ),
    "x nested": (
        INDICES | {"x": torch.nested.nested_tensor([torch.randn(4, 6), torch.randn(3, 6)])},
        TypeError,
        "x: got layout nested",
    ),
    "dropout infinite": (INDICES | {"dropout_p": float("inf")}, ValueError, "dropout_p: got inf"),
    "dropout a text": (INDICES | {"dropout_p": "0.1"}, TypeError, "dropout_p: got str"),
    "indices nested": (
        INDICES | {"adapter_indices": [[0, 1], [0, 1]]},
        TypeError,
        "adapter_indices[0]: got [0, 1], wanted a tensor or a list of integers",
    ),
    "indices one number": (
        INDICES | {"adapter_indices": 0},
        TypeError,
        "adapter_indices: got int, wanted a tensor or a list of integers",
    ),
    "indices of another shape": (
        INDICES | {"adapter_indices": torch.zeros(2, 2, dtype=torch.int64)},
        ValueError,
        "adapter_indices: got shape [2, 2], wanted [4]",
    ),
    "indices of no shape": (
        INDICES | {"adapter_indices": torch.tensor(0)},
        ValueError,
        "adapter_indices: got shape [], wanted [4]",
    ),
    "indices elsewhere": (
        INDICES | {"adapter_indices": torch.zeros(4, dtype=torch.int64, device="meta")},
        ValueError,
        "adapter_indices: is on meta, wanted the CPU or cpu",
    ),
    "indices uint8": (
        INDICES | {"adapter_indices": torch.tensor([0, 1, 255, 0], dtype=torch.uint8)},
        ValueError,
        "adapter_indices: got index 255, wanted 0 to 1",
    ),
    "indices sparse": (
        INDICES | {"adapter_indices": torch.zeros(4, dtype=torch.int64).to_sparse()},
        TypeError,
        "adapter_indices: got layout torch.sparse_coo, wanted a dense tensor",
    ),
    "segments long": ({"segments": [(0, 3), (1, 2)]}, ValueError, "segments: have 5 rows in all"),
    "segments none": ({"segments": []}, ValueError, "segments: have 0 rows in all, wanted x's 4"),
    "segment negative": (
        {"segments": [(0, 5), (1, -1)]},
        ValueError,
        "segments[1]: got -1 rows, wanted at least 1",
    ),
    "segment's index negative": (
        {"segments": [(-2, 4)]},
        ValueError,
        "segments[0]: got index -2, wanted 0 to 1, or -1",
    ),
    "segment of bools": ({"segments": [(True, 4)]}, TypeError, "segments[0]: got (True, 4)"),
    "segment of floats": ({"segments": [(0, 4.0)]}, TypeError, "segments[0]: got (0, 4.0)"),
    "segment of three": ({"segments": [(0, 2, 2)]}, TypeError, "segments[0]: got (0, 2, 2)"),
    "segments a number": ({"segments": 4}, TypeError, "segments: got int, wanted a list of pairs"),
    "segments a tensor": (
        {"segments": torch.tensor([[0, 4]])},
        TypeError,
        "segments: got Tensor, wanted a list of pairs",
    ),
    "adapter elsewhere": (
        {"lora_Bs": [GOOD["lora_Bs"][0], torch.empty(5, 3, device="meta")]},
        ValueError,
        "lora_Bs[1]: is on meta, wanted x's device, cpu",
    ),
    "adapter of integers": (
        {"lora_As": [GOOD["lora_As"][0], torch.ones(3, 6, dtype=torch.int8)]},
        TypeError,
        "lora_As[1]'s dtype: got torch.int8",
    ),
    "adapter flat": (
        {"lora_As": [GOOD["lora_As"][0], torch.tensor(1.0)]},
        ValueError,
        "lora_As[1]: got shape [], wanted [r, 6]",
    ),
    "adapter sparse": (
        {"lora_As": [GOOD["lora_As"][0], torch.ones(3, 6).to_sparse()]},
        TypeError,
        "lora_As[1]: got layout torch.sparse_coo",
    ),
    "ranks of A and B": (
        {"lora_As": GOOD["lora_As"][::-1]},
        ValueError,
        "lora_Bs[0]: got shape [5, 2], wanted [5, 3]",
    ),
    "x of another K": (
        {"x": torch.randn(4, 7)},
        ValueError,
        "x: got shape [4, 7], wanted [..., 6]",
    ),
    "x no tensor": ({"x": [[1.0]]}, TypeError, "x: got list, wanted a torch.Tensor"),
    "bias": ({"bias": torch.randn(4)}, ValueError, "bias: got shape [4], wanted [5]"),
    "scaling text": ({"scalings": ["1", 2.0]}, TypeError, "scaling: got str, wanted a number"),
    "scaling a list": ({"scalings": [[1.0], 2.0]}, TypeError, "scaling: got list, wanted a number"),
    "scalings a tensor": ({"scalings": torch.ones(2)}, TypeError, "scaling: got Tensor"),
    "weight trainable": (
        {"weight": torch.randn(5, 6, requires_grad=True)},
        ValueError,
        "weight: requires a gradient",
    ),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
}


def _call(function, changes):
    arguments = GOOD | changes
    tensors = [arguments.pop(name) for name in ("x", "weight", "lora_As", "lora_Bs")]
    return function(*tensors, **arguments)


@pytest.mark.parametrize("function", [lora_linear_multi, explain_multi])
@pytest.mark.parametrize("name", BAD)
def test_multi_refused(function, name, multi_launches):
    changes, error, message = BAD[name]
    state = torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        _call(function, changes)
    assert multi_launches == []
    assert torch.equal(state, torch.get_rng_state())


def test_multi_ranks_beyond_the_kernels_go_to_torch(multi_launches):
    changes = {
        "lora_As": [torch.randn(513, 6), torch.randn(3, 6)],
        "lora_Bs": [torch.randn(5, 513), torch.randn(5, 3)],
    }
    with pytest.raises(ValueError, match="got r = 513, wanted at most 512"):
        _call(lora_linear_multi, changes | {"backend": "triton"})
    assert _call(lora_linear_multi, changes).shape == (4, 5)
    assert multi_launches == []


def test_multi_offsets_are_64_bit():
    check_offsets("multi", "plain", "expand", "multi_grad", "second")


def _layer(device="cpu", **kwargs):
    layer = FusedMultiLoRALinear(12, 10, device=device, **kwargs)
    layer.add_adapter("german", 4, 8)
    layer.add_adapter("french", 6, 8, use_rslora=True)
    for B in layer.lora_B.values():
        nn.init.normal_(B)
    return layer


def test_multi_layer_parameters_and_state():
    layer = _layer()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.german",
        "lora_A.french",
        "lora_B.german",
        "lora_B.french",
    }
    assert layer.scaling == {"german": 2.0, "french": 8 / math.sqrt(6)}
    other = _layer()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(other(x, adapter_names="french"), layer(x, adapter_names="french"))
    layer.delete_adapter("german")
    assert layer.adapters == ["french"]
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A.french", "lora_B.french"}
    layer.delete_adapter("french")  # of none nothing has to be said
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert "no adapter" in str(layer.explain(x))
    with pytest.raises(ValueError, match="french"):
        layer(x, adapter_names="french")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_multi_layer_forward(device, backend):
    layer = _layer(device, backend=backend)
    x = torch.randn(3, 5, 12, device=device)
    y = layer(x, adapter_names=["french", "__base__", "german"])
    base = nn.functional.linear(x, layer.weight, layer.bias)

    def delta(name):
        return layer.scaling[name] * x @ layer.lora_A[name].t() @ layer.lora_B[name].t()

    expected = torch.stack([base[0] + delta("french")[0], base[1], base[2] + delta("german")[2]])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    same = layer(x, segments=[("french", 5), ("__base__", 5), ("german", 5)])
    assert torch.equal(same, y)
    indices = torch.tensor([1, -1, 0], device=device).repeat_interleave(5)
    assert torch.equal(layer(x, adapter_indices=indices), y)
    assert torch.equal(layer(x, adapter_names="__base__"), base)


def test_multi_joint_training_is_each_adapters_own():
    """Two adapters in one batch learn what each learns alone."""
    torch.manual_seed(0)
    joint = _layer().double()
    alone = {name: _layer().double() for name in joint.adapters}
    for layer in alone.values():
        layer.load_state_dict(joint.state_dict())
    x = {name: torch.randn(7, 12, dtype=torch.float64) for name in joint.adapters}
    packed = torch.cat(list(x.values()))
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (joint, *alone.values())]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        joint(packed, segments=[(name, 7) for name in x]).square().sum().backward()
        for name, layer in alone.items():
            layer(x[name], adapter_names=name).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, layer in alone.items():
        torch.testing.assert_close(joint.lora_A[name], layer.lora_A[name])
        torch.testing.assert_close(joint.lora_B[name], layer.lora_B[name])


def test_multi_dropout_in_training_only():
    layer = _layer(lora_dropout=0.5)
    x = torch.randn(5, 12)
    assert not torch.equal(layer(x, adapter_names="german"), layer(x, adapter_names="german"))
    layer.eval()
    assert torch.equal(layer(x, adapter_names="german"), layer(x, adapter_names="german"))


def test_multi_route_through_a_model():
    model = nn.Sequential(_layer(), nn.ReLU(), FusedMultiLoRALinear.from_linear(nn.Linear(10, 3)))
    model[2].add_adapter("german")
    model[2].add_adapter("french")
    x = torch.randn(6, 12)
    segments = [("german", 2), ("french", 4)]
    expected = model[2](torch.relu(model[0](x, segments=segments)), segments=segments)
    with route(model, segments=segments):
        y = model(x)
    assert torch.equal(y, expected)
    with pytest.raises(ValueError, match=r"inside fused_lora\.route.*got 0 of the three"):
        model(x)
    with (
        pytest.raises(ValueError, match="has no FusedMultiLoRALinear"),
        route(nn.ReLU(), adapter_names="german"),
    ):
        pass


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"adapter_names": 3}, TypeError, "adapter_names: got int, wanted a name or a list"),
        ({"adapter_names": "dutch"}, ValueError, "adapter_names: got 'dutch', wanted one of"),
        ({"adapter_names": [["german"]] * 2}, ValueError, "adapter_names: got ['german'], wanted"),
        ({"segments": 3}, TypeError, "segments: got int, wanted a list of pairs"),
        ({"segments": "german"}, TypeError, "segments: got str, wanted a list of pairs"),
        ({"segments": [("german",)]}, TypeError, "segments[0]: got ('german',), wanted"),
        ({"segments": [("german", 1), 1]}, TypeError, "segments[1]: got 1, wanted"),
        ({"segments": [("german", "2")]}, TypeError, "segments[0]: got (0, '2'), wanted"),
    ],
)
def test_multi_layer_refuses_rows(rows, error, message):
    layer = _layer()
    with pytest.raises(error, match=re.escape(message)):
        layer(torch.randn(2, 12), **rows)
    with pytest.raises(error, match=re.escape(message)), route(nn.Sequential(layer), **rows):
        layer(torch.randn(2, 12))


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("german", {}, ValueError, "there is an adapter 'german' already"),
        ("a.b", {}, ValueError, "name: got 'a.b', which no adapter can be called"),
        ("keys", {}, ValueError, "name: got 'keys'"),
        ("training", {}, ValueError, "name: got 'training'"),
        ("_parameters", {}, ValueError, "name: got '_parameters'"),
        ("__base__", {}, ValueError, "name: got '__base__'"),
        ("", {}, ValueError, "name: got ''"),
        (3, {}, TypeError, "name: got int"),
        ("new", {"r": 0}, ValueError, "r: got 0"),
        ("new", {"lora_alpha": math.inf}, ValueError, "lora_alpha: got inf"),
        ("new", {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: got torch.int8"),
    ],
)
def test_multi_layer_refuses_adapters(name, kwargs, error, message):
    layer = _layer()
    before = set(layer.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        layer.add_adapter(name, **kwargs)
    assert set(layer.state_dict()) == before
    assert layer.adapters == ["german", "french"]


def test_multi_layer_refuses_calls():
    layer, x = _layer(), torch.randn(4, 12)
    with pytest.raises(ValueError, match="adapter_names: got 'dutch', wanted one of"):
        layer(x, adapter_names="dutch")
    with pytest.raises(ValueError, match="adapter_names: got 3, wanted one for each sample"):
        layer(x, adapter_names=["german"] * 3)
    with pytest.raises(ValueError, match="segments: have 3 rows in all, wanted x's 4"):
        layer(x, segments=[("german", 3)])
    with pytest.raises(ValueError, match="name: got 'dutch'"):
        layer.delete_adapter("dutch")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_multi_layer_explains_its_call(backend, launches):
    layer, x = _layer(), torch.randn(4, 12)
    layer.backend = backend
    names = ["german", "french", "__base__", "german"]
    explained = layer.explain(x, adapter_names=names)
    assert not launches  # it computes nothing
    assert (explained.backend, str(explained)[:8]) == (backend, "backend ")
    with route(nn.Sequential(layer), adapter_names=names):
        assert layer.explain(x) == explained
    with pytest.raises(
        ValueError, match=r"wanted a call inside fused_lora.route.*got 0 of the three"
    ):
        layer.explain(x)
    for name in layer.adapters:
        layer.delete_adapter(name)
    explained = layer.explain(x, adapter_names="__base__")
    assert explained.reasons == {"library": "taken: F.linear, as the layer has no adapter"}

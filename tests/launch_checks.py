"""What test_launch.py runs in a process of its own, where Triton compiles: a stand-in for the GPU.

A launch that Triton did not look at has to hand the driver what it would have: the same kernel,
grid and arguments, with addresses for tensors.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import front_end
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks import launch_overhead
from fused_lora import lora_linear_multi, quantize_int8, quantize_nf4
from fused_lora.expert_middle import Middle
from fused_lora.expert_mlp import run_projections
from fused_lora.expert_stack import ExpertAdapter, Projection
from fused_lora.kernels import expand, gemm, persistent
from fused_lora.kernels.dropout import Dropout
from fused_lora.kernels.launch import Launcher, Tiled
from fused_lora.strategies import gluon_problem

LOOKED = []  # kernels that Triton looked at the arguments of
LAUNCHES = {
    "one_pass": 1,
    "split": 2,
    "skinny": 2,
    "in_loop": 2,
}  # of y; the gradients of A and B share one
_run, _launch = JITFunction.run, Launcher.__call__


def _counted(self, *args, **kwargs):
    LOOKED.append(self.fn.__name__)
    return _run(self, *args, **kwargs)


JITFunction.run = _counted


def _address(argument):
    if isinstance(argument, tuple):
        return tuple(map(_address, argument))
    if hasattr(argument, "block_shape"):  # Triton's driver reads these of a descriptor
        d = argument
        return d.base.data_ptr(), [*d.shape], [*d.strides], d.padding
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def launches_of(call):
    """What the driver got, each tensor as its address, and which kernels Triton looked at."""
    launch_overhead.launches = []
    LOOKED.clear()
    call()
    plain = [
        (name, grid, [_address(a) for a in args]) for name, grid, args in launch_overhead.launches
    ]
    return plain, list(LOOKED)


def check_known_launches(strategy, dropout_p, M, backward):
    """Every launch three times: by Triton, as it comes, and again."""
    x = torch.randn(M, launch_overhead.SIDE, dtype=torch.bfloat16, requires_grad=True)
    layer = launch_overhead.kernel_path(strategy, dropout_p)
    with _launched_thrice() as names:
        y = layer(x)
        if backward:
            y.backward(torch.ones_like(y))
    assert len(names) == LAUNCHES[strategy] + backward * (1 + LAUNCHES[strategy])


@contextmanager
def _launched_thrice():
    names = []

    def thrice(self, grid, tensors, sizes, numbers=(), **constants):
        def launch():
            _launch(self, grid, tensors, sizes, numbers, **constants)

        checked = [t.checked() if isinstance(t, Tiled) else t for t in tensors]
        triton, looked = launches_of(
            lambda: self.kernel[grid](*checked, *sizes, *numbers, **constants)
        )
        names.extend(looked)
        assert launches_of(launch)[0] == triton
        assert launches_of(launch) == (triton, [])

    with mock.patch.object(Launcher, "__call__", thrice):
        yield names


def check_known_launches_with_descriptors(turned):
    """W and its adapters as the forward reads them (``turned``), or the input gradient."""
    M, K, N, r = 48, 64, 128, 16
    x, w, a, b, bias = (
        torch.randn(shape).bfloat16() for shape in ((M, K), (K, N), (K, r), (r, N), (N,))
    )
    if turned:
        w, a, b = (t.t().contiguous().t() for t in (w, a, b))
    h = x @ a
    tile = gemm.TileConfig(64, 64, 64, num_warps=4, num_stages=3, GROUP_M=8, SUBTILES=2)
    by_hand = replace(tile, BLOCK_M=128, COOPERATIVE=True, LEAD=2)
    with _launched_thrice() as names:
        persistent.persistent_plain(tile, x, w)
        persistent.persistent_add_lora(tile, x, w, h, b, bias=bias)
        persistent.persistent_one_pass(tile, x, w, a, b, bias=None, scale=2.0, store_h=True)
        persistent.persistent_produced(tile, x, w, a, b, bias=None, scale=2.0)
        if gluon_problem() is None:
            from fused_lora.kernels import specialized

            specialized.specialized_plain(by_hand, x, w)
            specialized.specialized_add_lora(by_hand, x, w, h, b, bias=bias)
            specialized.specialized_produced(by_hand, x, w, a, b, bias=None, scale=2.0)
    assert names.count("lora_persistent_kernel") == 4
    assert gluon_problem() or names.count("lora_specialized_kernel") == 3


def check_known_additions_to_a_product():
    config = gemm.TileConfig(32, 128, 64, num_warps=8, num_stages=2)
    y, h, b = (torch.randn(shape).bfloat16() for shape in ((48, 128), (48, 16), (16, 128)))
    with _launched_thrice() as names:
        for dropout in (None, Dropout(torch.tensor([5]), 9), Dropout(torch.tensor([5]), 99)):
            expand.add_lora(config, y, h, b, dropout=dropout)
    assert names == ["add_lora_kernel"] * 3


def check_another_call_is_looked_at():
    """Where Triton may have another kernel: sizes, strides, dtypes, alignment, what is there."""
    options = {"bias": None, "scale": 1.0, "store_h": True}
    config = gemm.TileConfig(16, 64, 64, num_warps=4, num_stages=4)

    def operands(M=2, K=64, N=64, r=16, dtype=torch.bfloat16):
        shapes = (M, K), (K, N), (K, r), (r, N)
        return [torch.randn(shape).to(dtype) for shape in shapes]

    def looked(operands, **changed):
        found = launches_of(lambda: gemm.gemm_one_pass(config, *operands, **(options | changed)))
        return found[1] != []

    known = operands()
    assert looked(known)
    assert not looked(operands())  # other tensors, the same call
    assert not looked(known, scale=3.0)
    assert looked(known, bias=torch.randn(64).bfloat16())
    assert looked(known, store_h=False)
    for change in ({"M": 1}, {"M": 16}, {"K": 65}, {"N": 48}, {"r": 8}, {"dtype": torch.float16}):
        assert looked(operands(**change)), change
    x, w, a, b = known
    assert looked([x, w.t().contiguous().t(), a, b])
    assert looked([x, w, a.float(), b])
    shifted = torch.randn(2 * 64 + 1).bfloat16()[1:].view(2, 64)  # 2 bytes off
    assert shifted.data_ptr() % 16
    assert looked([shifted, w, a, b])
    assert looked([shifted, w, a, b])  # every time: which of them are aligned is not kept
    with knobs.runtime.scope():
        knobs.runtime.debug = True  # device-side assertions
        assert looked(known)
    assert not looked(known)


def check_profilers_hear_of_known_launches():
    config = gemm.TileConfig(16, 64, 64, num_warps=4, num_stages=4)
    x, w = torch.randn(2, 64).bfloat16(), torch.randn(64, 64).bfloat16()

    def launch():
        gemm.gemm_scaled(config, x, w, scale=1.0)

    launch()
    heard = []
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):

        def hear(metadata):
            heard.append(metadata.get()["name"])

        hooks.add(hear)
        assert launches_of(launch)[1] == []
        hooks.remove(hear)
    assert heard == ["lora_gemm_kernel"] * 2
    launch()
    assert len(heard) == 2


def check_many_adapters_compile(**rows):
    """Rows that lie by adapter already have no `order`: other kernels than compile_report's."""
    launch_overhead.kernel_path("split")
    side = launch_overhead.SIDE
    x, W = (torch.randn(n, side, dtype=torch.bfloat16) for n in (6, side))
    As = [torch.randn(r, side, requires_grad=True) for r in (4, 16)]
    Bs = [torch.randn(side, r, requires_grad=True) for r in (4, 16)]

    def both():
        lora_linear_multi(x.requires_grad_(), W, As, Bs, scalings=2.0, **rows).sum().backward()

    kernels = {"shrink_kernel", "expand_kernel", "multi_grad_kernel"}
    assert kernels <= {name for name, *_ in launches_of(both)[0]}


def check_experts_compile(weights):
    """A mixture of experts, and that its launches are known the second time.

    ``weights``: what is made of the plain ones.
    """
    launch_overhead.kernel_path("split")
    side, E = launch_overhead.SIDE, 3

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16)

    up = ExpertAdapter(torch.randn(E, 4, side), torch.randn(E, side, 4), 2.0)
    down = ExpertAdapter(torch.randn(E, 16, side // 2), torch.randn(E, side, 16), 2.0)
    first = Projection(weights(normal(E, side, side)), None, *up)
    last = Projection(weights(normal(E, side // 2, side).mT), normal(E, side), *down)
    leaves = [normal(6, side), normal(6, 2), up.lora_A, up.lora_B, down.lora_A, down.lora_B]
    for leaf in leaves:
        leaf.requires_grad_()
    index = torch.randint(-1, E + 1, (6, 2))

    def both():
        x, p = leaves[:2]
        run_projections(x, index, p, first, last, Middle("silu")).sum().backward()

    kernels = {"shrink_kernel", "experts_kernel", "multi_grad_kernel", "gated_kernel", "cut_kernel"}
    ran, looked = launches_of(both)
    assert kernels <= {name for name, *_ in ran}
    assert looked
    assert not launches_of(both)[1]


def check_the_memory_of_launches_is_bounded():
    launcher = Launcher(gemm.lora_gemm_kernel)
    launcher._known = {(i,): (None, ()) for i in range(4096)}
    gemm._launch_gemm = launcher
    check_another_call_is_looked_at()
    assert 0 < len(launcher._known) < 20


if __name__ == "__main__":
    torch.set_num_threads(1)
    front_end.compile_so_far()
    check_another_call_is_looked_at()
    check_profilers_hear_of_known_launches()
    check_the_memory_of_launches_is_bounded()
    for strategy in LAUNCHES:
        check_known_launches(strategy, 0.0, 1, False)
        check_known_launches(strategy, 0.0, 3, True)
    for strategy in ("split", "skinny"):
        check_known_launches(strategy, 0.1, 3, True)
    for turned in (False, True):
        check_known_launches_with_descriptors(turned)
    check_known_additions_to_a_product()
    front_end.STOP = "cubin"
    check_many_adapters_compile(segments=[(0, 2), (1, 4)])
    check_many_adapters_compile(adapter_indices=[1, 0, 1, 0, 0, -1])
    for weights in (torch.Tensor.detach, partial(quantize_nf4, block_size=32), quantize_int8):
        check_experts_compile(weights)

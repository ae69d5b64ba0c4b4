"""What test_launch.py runs in a process of its own, where Triton compiles: a stand-in for the GPU.

A layer's call that is replayed has to hand the driver what it would have without: the same kernels,
grids and arguments, addresses of the same tensors included.
"""

from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from unittest import mock

import front_end
import pytest
import torch
from launch_checks import launches_of
from pretending import pretend
from triton import knobs

from benchmarks import launch_overhead
from fused_lora import (
    dispatch,
    dora,
    dora_linear,
    group,
    lora_linear,
    lora_linear_gated,
    lora_linear_group,
    quantize_nf4,
)
from fused_lora.kernels import replay
from fused_lora.kernels.configs import choose_config
from fused_lora.kernels.device import INTERPRETED
from fused_lora.kernels.gemm import gemm_scaled
from fused_lora.kernels.launch import Launcher
from fused_lora.kernels.replay import Recorder, Replay, Replays
from fused_lora.strategies import gluon_problem

K, N, R = 64, 128, 16
STRATEGIES = "one_pass", "split", "skinny", "tma_one_pass", "tma_split", "one_launch"


@contextmanager
def replayed():
    """Counts what is replayed and what is launched by other ways."""
    counts = {"replayed": 0, "launched": 0}
    run, launch = Replay.__call__, Launcher.__call__

    def counted_run(self, *given):
        results = run(self, *given)
        counts["replayed"] += results is not None
        return results

    def counted_launch(self, *args, **kwargs):
        counts["launched"] += 1
        return launch(self, *args, **kwargs)

    with (
        mock.patch.object(Replay, "__call__", counted_run),
        mock.patch.object(Launcher, "__call__", counted_launch),
    ):
        yield counts


def named(launches, tensors):
    """Launches with names of tensors in the place of addresses; what is new gets a number."""
    names = {t.data_ptr(): name for name, t in tensors.items() if t is not None}

    def name(argument):
        if isinstance(argument, (tuple, list)):
            return [name(a) for a in argument]
        if isinstance(argument, int) and argument > 1 << 32:
            return names.setdefault(int(argument), f"new {len(names)}")
        return argument

    return [(kernel, grid, name(arguments)) for kernel, grid, arguments in launches]


class Layer:
    def __init__(self, strategy, *, dropout_p=0.0, bias=False, adapters=torch.bfloat16):
        launch_overhead.kernel_path("split" if strategy == "codes" else strategy)
        plain = torch.randn(N, K).bfloat16()
        self.weight = quantize_nf4(plain) if strategy in ("in_loop", "codes") else plain
        self.A = torch.randn(R, K, dtype=adapters, requires_grad=True)
        self.B = torch.randn(N, R, dtype=adapters, requires_grad=True)
        self.bias = torch.randn(N).bfloat16().requires_grad_() if bias else None
        self.dropout_p = dropout_p

    def __call__(self, x):
        return lora_linear(
            x, self.weight, self.A, self.B, scaling=2.0, bias=self.bias, dropout_p=self.dropout_p
        )

    def tensors(self):
        parts = self.weight
        parts = {"W": parts} if isinstance(parts, torch.Tensor) else dict(parts._parameters)
        return {**parts, "A": self.A, "B": self.B, "bias": self.bias}


class DoRA(Layer):
    """With the norm, whose launch is a function of its own."""

    def __init__(self, strategy, **options):
        super().__init__(strategy, **options)
        self.m = torch.rand(N, requires_grad=True)

    def __call__(self, x):
        adapter = (self.A, self.B, self.m)
        return dora_linear(x, self.weight, *adapter, scaling=2.0, bias=self.bias)

    def tensors(self):
        return {**super().tensors(), "m": self.m}


class Gated(Layer):
    """On act(gate) o up, which has launches of its own beside what is replayed."""

    def __call__(self, x):
        adapter = (self.A, self.B)
        options = {"scaling": 2.0, "bias": self.bias, "dropout_p": self.dropout_p}
        return lora_linear_gated(x, x, self.weight, *adapter, **options)


class Group:
    """Layers of their own on one x, as `lora_linear_group` has them."""

    def __init__(self, strategies, scalings=(2.0, 2.0, 2.0), **options):
        self.layers = [Layer(strategy, **options) for strategy in strategies]
        self.scalings = scalings

    def __call__(self, x):
        return lora_linear_group(
            x,
            [layer.weight for layer in self.layers],
            [layer.A for layer in self.layers],
            [layer.B for layer in self.layers],
            scalings=self.scalings,
            biases=[layer.bias for layer in self.layers],
            dropout_ps=[layer.dropout_p for layer in self.layers],
        )

    def tensors(self):
        return {
            f"{name} {i}": t
            for i, layer in enumerate(self.layers)
            for name, t in layer.tensors().items()
        }


def inputs(shape, *, trained=True):
    x = torch.randn(*shape, K).bfloat16()
    return x.requires_grad_(trained), torch.randn(*shape, N).bfloat16()


def what_happens(layer, shape, backward, train_x=True):
    """The launches of a call and its gradients, and what they returned."""
    x, g = inputs(shape, trained=train_x)
    layers = layer.layers if isinstance(layer, Group) else [layer]
    gs = [g.clone() for _ in layers]
    seeds = []
    draw = torch.randint

    def drawn(*args, **kwargs):
        seeds.append(draw(*args, **kwargs))
        return seeds[-1]

    def call():
        with mock.patch.object(torch, "randint", drawn), torch.set_grad_enabled(backward):
            y = layer(x)
        ys = y if isinstance(y, tuple) else (y,)
        results.extend(ys)
        if backward:
            adapters = [t for member in layers for t in (member.A, member.B)]
            results.extend(torch.autograd.grad(ys, (*[x] * train_x, *adapters), gs))

    results = []
    with all_memory_kept():
        launches, _ = launches_of(call)
    known = {**layer.tensors(), "x": x} | {f"g {i}": g for i, g in enumerate(gs)}
    known |= {f"result {i}": t for i, t in enumerate(results)}
    known |= {f"seed {i}": t for i, t in enumerate(seeds)}
    facts = [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in results]
    return named(launches, known), facts


@contextmanager
def all_memory_kept():
    """So that new memory is told by its address."""
    kept = []

    def keeping(allocate):
        def allocated(*args, **kwargs):
            kept.append(allocate(*args, **kwargs))
            return kept[-1]

        return allocated

    with (
        mock.patch.object(torch, "empty", keeping(torch.empty)),
        mock.patch.object(torch.Tensor, "new_empty", keeping(torch.Tensor.new_empty)),
        mock.patch.object(dora, "column_scale", keeping(dora.column_scale)),
    ):
        yield


def check_replays(layer, shape, backward, train_x=True):
    with mock.patch.object(Replays, "__call__", lambda self, name, operands, function: function()):
        for _ in range(2):
            expected = what_happens(layer, shape, backward, train_x)
    dispatch.forget_plans()
    with replayed() as counts:
        recalled = not isinstance(layer, DoRA) and not (isinstance(layer, Gated) and backward)
        for _ in range(1 + recalled):  # what is recalled, is recorded then
            assert what_happens(layer, shape, backward, train_x) == expected
        assert counts["replayed"] == 0
        counts["launched"] = 0
        for _ in range(3):
            assert what_happens(layer, shape, backward, train_x) == expected
        forward = 2 if isinstance(layer, DoRA) else 1
        beside = (1 + 2 * backward) * isinstance(layer, Gated)
        assert counts == {"replayed": 3 * (forward + backward), "launched": 3 * beside}, counts


def check_compiled_layers():
    """Operators in a graph: each run is a call of its own."""
    layer = Layer("skinny", dropout_p=0.1)
    compiled = torch.compile(layer.__call__, backend="aot_eager", fullgraph=True)
    for shape in ((48,), (2, 3)):
        with replayed() as counts:
            for _ in range(4):
                x, g = inputs(shape)
                compiled(x).backward(g)
        assert counts["replayed"] == 3 * 2, counts


def check_what_is_not_replayed():
    layer = Layer("skinny")
    x, _ = inputs((3,), trained=False)
    with torch.no_grad(), replayed() as counts:

        def is_replayed(call):
            counts["replayed"] = counts["launched"] = 0
            call()
            assert counts in ({"replayed": 1, "launched": 0}, {"replayed": 0, "launched": 2})
            return counts["replayed"] == 1

        for _ in range(2):
            layer(x)
        assert is_replayed(lambda: layer(x))
        assert is_replayed(lambda: layer(torch.randn(3, K).bfloat16()))
        assert not is_replayed(lambda: layer(torch.randn(K, 3).bfloat16().t()))
        off = torch.randn(3 * K + 1).bfloat16()[1:].view(3, K)
        assert off.data_ptr() % 16
        assert not is_replayed(lambda: layer(off))
        with knobs.runtime.scope():
            knobs.runtime.debug = True  # device-side assertions
            assert not is_replayed(lambda: layer(x))
            assert is_replayed(lambda: layer(x))  # by a record of its own
        heard = []

        def hear(metadata):
            heard.append(metadata.get()["name"])

        knobs.runtime.launch_enter_hook.add(hear)
        assert not is_replayed(lambda: layer(x))
        assert len(heard) == 2
        knobs.runtime.launch_enter_hook.remove(hear)
        assert is_replayed(lambda: layer(x))
        layer.A.data = layer.A.detach().t().contiguous().t()  # to Python the same tensor
        assert not is_replayed(lambda: layer(x))
        assert is_replayed(lambda: layer(x))
        other = Layer("skinny")  # of the same sizes, and as yet not known to be
        dispatch.forget_plans()
        for _ in range(2):
            layer(x)
        other(x)
        assert is_replayed(lambda: layer(x))
        assert not is_replayed(lambda: other(x))  # the strides of its A
        assert is_replayed(lambda: other(x))
        dispatch.forget_plans()
        assert not is_replayed(lambda: layer(x))


def check_what_is_not_recorded():
    x, a = torch.randn(32, K).bfloat16(), torch.randn(K, R).bfloat16()
    config = choose_config("plain", 32, R, R, 2, False, INTERPRETED)
    kept = torch.empty(32, K).bfloat16()

    def recorded(function, operands=(x, a)):
        with Recorder() as recorder:
            results = function()
        return recorder.replay(operands, results) is not None

    def scaled(*operands, **options):
        return gemm_scaled(config, *operands, scale=1.0, **options)

    assert recorded(lambda: (scaled(x, a),))
    assert recorded(lambda: (scaled(x, a).view(4, 8, R), None))
    assert not recorded(lambda: (scaled(x, a) + 1,))  # something else is computed
    assert not recorded(lambda: (scaled(x.clone(), a),))
    assert not recorded(lambda: (scaled(kept, a),))  # memory that is nobody's
    assert not recorded(lambda: (scaled(x, a), kept))
    assert not recorded(lambda: (scaled(x, a), x))  # an operand
    assert recorded(lambda: (scaled(x, a)[:, :8], scaled(x, a).t()))
    halves = torch.randn(2, 32, K).bfloat16()
    assert recorded(lambda: (scaled(halves[1], a),), (halves, a))  # begins inside of an operand
    assert not recorded(lambda: (scaled(halves[1], a),), (halves, halves.view(-1)[K:], a))
    assert not recorded(lambda: (scaled(halves[1], a),), (halves[0], a))  # beyond it
    assert not recorded(lambda: (scaled(x, a[:0]),), (x, a[:0]))  # no address

    def twice(x, other, a):
        return scaled(x, a), scaled(other, a)

    replays = Replays()
    other = torch.randn(32, K).bfloat16()
    for given, expected in (((x, x, a), 0), ((other, other, a), 1), ((x, other, a), 0)):
        with replayed() as counts:
            replays("twice", given, partial(twice, *given))
        assert counts["replayed"] == expected, given
    sliced = torch.randn(32, 2 * K).bfloat16()[:, :K]
    assert recorded(lambda: (scaled(sliced, a),), (sliced, a))
    with torch.inference_mode():  # where a copy is an operator that may make a view
        assert not recorded(lambda: (scaled(sliced.contiguous(), a),), (sliced, a))
    assert not recorded(lambda: (x.new_empty(3),))  # there is nothing to launch
    with Recorder() as outer:
        result = scaled(x, a)
        recorded(lambda: (scaled(x, a),))
        assert replay.hearing.recorder is outer
    assert outer.replay((x, a), (result,)) is None  # it has not heard of all
    with suppress(KeyError), Recorder() as failed:
        raise KeyError
    scaled(x, a)
    assert failed.launches == []
    assert replay.hearing.recorder is None


def check_compiled_autograd():
    """A backward that Dynamo traces is neither recorded nor replayed."""
    for seen, layer in product((0, 3), (Layer("skinny"), Gated("split"))):
        x, g = inputs((48,))
        for _ in range(seen):
            layer(x).backward(g)
        with (
            replayed() as counts,
            torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
        ):
            for _ in range(2):
                layer(x).backward(g)
        assert counts["launched"] > 0


def check_quantised_groups():
    """A replay has all memory at a time; they drop one scratch of a W0 before the next is made."""
    group_of = Group(["codes", "in_loop", "codes"])
    with replayed() as counts:
        for _ in range(4):
            what_happens(group_of, (70,), True)
    assert counts["replayed"] == 0
    assert counts["launched"] > 0


def check_tables_of_another_dtype():
    """What FSDP2's param_dtype makes of codes is refused after calls of a layer that is whole."""
    whole, cast = Layer("codes"), Layer("codes")
    x, g = inputs((70,))
    for _ in range(3):
        whole(x).backward(g)
    cast.weight.codebook.data = cast.weight.codebook.bfloat16()
    with replayed() as counts:
        whole(x)
        assert counts["replayed"] == 1
        with pytest.raises(TypeError, match="its tables are in torch.bfloat16"):
            cast(x)


def check_a_group_of_one():
    """It has launches of its own, and a layer of the same facts keeps its."""
    layer = Layer("split")

    def group_of_one(x):
        return lora_linear_group(x, [layer.weight], [layer.A], [layer.B], scalings=2.0)[0]

    x, g = inputs((70,))
    dispatch.forget_plans()
    for _ in range(3):
        group_of_one(x).backward(g)
    with replayed() as counts:
        for _ in range(2):  # one that decides, and one that is recorded
            layer(x).backward(g)
        assert counts["replayed"] == 0
        layer(x).backward(g)
        assert counts["replayed"] == 2


def check_frozen_adapters():
    """A bias alone is trained: nothing is launched in the backward."""
    layer = Layer("split", bias=True)
    layer.A.requires_grad_(False)
    layer.B.requires_grad_(False)
    for _ in range(4):
        x, g = inputs((48,), trained=False)
        layer(x).backward(g)
    assert layer.bias.grad is not None


def check_nothing_is_kept_alive():
    import gc
    import weakref

    launch_overhead.launches = None
    layer = Layer("one_launch")
    for _ in range(4):
        x, g = inputs((48,))
        layer(x).backward(g)
    of = [weakref.ref(t) for t in (layer.weight, layer.A, layer.B, x, g)]
    del layer, x, g
    gc.collect()
    assert all(ref() is None for ref in of)


if __name__ == "__main__":
    torch.set_num_threads(1)
    front_end.compile_so_far()  # what is replayed, not what of: 109 s with machine code
    if gluon_problem() is None:
        pretend(setattr, specialized_obstacle=lambda *_: None)
        STRATEGIES += "ws_split", "ws_one_launch"
    for strategy, backward in product(STRATEGIES, (False, True)):
        check_replays(Layer(strategy), (48,), backward)
    for strategy in ("one_pass", "skinny", "in_loop", "codes"):
        check_replays(Layer(strategy), (1,), True)
        check_replays(Layer(strategy), (1,), True, train_x=False)
        check_replays(Layer(strategy, bias=True, adapters=torch.float32), (2, 3), True)
    for strategy in (s for s in STRATEGIES if s.startswith("ws_")):  # A and B are copied
        check_replays(Layer(strategy, adapters=torch.float32), (70,), True)
    for strategy in ("split", "skinny", "one_launch", "tma_split"):
        check_replays(Layer(strategy, dropout_p=0.1), (4, 8), True)
    for strategy in ("one_pass", "split", *(["ws_split"] if "ws_split" in STRATEGIES else [])):
        for backward in (False, True):
            check_replays(DoRA(strategy), (70,), backward)
        check_replays(DoRA(strategy, bias=True, adapters=torch.float32), (5, 14), True)
    check_replays(DoRA("codes"), (70,), True)
    for strategy, backward in product(("split", "one_launch", "codes"), (False, True)):
        check_replays(Gated(strategy), (70,), backward)
        check_replays(Gated(strategy, bias=True, dropout_p=0.1), (5, 14), backward)
    group.better_apart = lambda x, member: False  # as on a GPU
    plain = ["split"] * 3
    check_replays(Group(plain), (70,), True, train_x=False)
    for backward in (False, True):
        check_replays(Group(plain), (70,), backward)
        check_replays(Group(plain, (2.0, 1.0, 2.0), bias=True), (5, 14), backward)
        check_replays(Group(plain, dropout_p=0.1, adapters=torch.float32), (70,), backward)
        if "ws_split" in STRATEGIES:
            check_replays(Group(["ws_split"] * 3), (70,), backward)
            check_replays(Group(["ws_split"] * 3, dropout_p=0.1), (70,), backward)
    check_quantised_groups()
    check_tables_of_another_dtype()
    check_a_group_of_one()
    check_compiled_layers()
    check_compiled_autograd()
    check_frozen_adapters()
    check_what_is_not_replayed()
    check_what_is_not_recorded()
    check_nothing_is_kept_alive()

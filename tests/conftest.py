"""Where the tests run, and what watches them.

With a CUDA device the kernels run on it, and every test that takes `device` is marked `gpu`.
Without one they run in Triton's interpreter, on CPU tensors. SHARD=i/n takes every n-th test
from test i on: n processes share them where there is no xdist (on_gpu.sh).
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

CUDA = torch.cuda.is_available()
# One thread a process: xdist's workers share the cores, and OpenMP's threads would wait for each
# other (12 Trainer tests in 13 s instead of 5 min on two busy cores).
torch.set_num_threads(1)
INTERPRETED = not CUDA and "FRONT_END" not in os.environ  # front_end.py compiles instead
if INTERPRETED:  # read by Triton when a kernel is defined, so before any import of our kernels
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """Says why no kernel would run, instead of a thousand failures."""
    if INTERPRETED and importlib.util.find_spec("triton") and _interpreter_fails():
        raise pytest.UsageError(
            "Triton 3.6's interpreter makes numbers of arrays of one element, which NumPy refuses "
            "from 2.4 on: install numpy<2.4, or a later Triton"
        )
    if INTERPRETED and importlib.util.find_spec("triton"):
        from quick_interpreter import make_quick

        make_quick()


def _interpreter_fails() -> bool:
    import triton

    @triton.jit
    def loop(n):
        for _ in range(n):
            pass

    try:
        loop[(1,)](2)
    except triton.runtime.errors.InterpreterError as error:
        return "0-dimensional" in str(error)
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if CUDA and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    first, shards = map(int, os.environ.get("SHARD", "0/1").split("/"))
    items[:] = items[first::shards]


@pytest.fixture(autouse=True)
def fresh_randomness(request: pytest.FixtureRequest) -> None:
    """New inputs in every run; the seed is shown when a test fails."""
    seed = int(os.environ.get("SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "randomness", f"SEED={seed}")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that reading what was never written shows."""
    if CUDA:  # cuBLAS wants a workspace setting for this mode; the CPU run is enough
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Dynamo without the graphs of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here: a GPU, or the CPU under the interpreter."""
    return torch.device("cuda", 0) if CUDA else torch.device("cpu")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are groups on a CPU too, where they would be slower for the small inputs of tests."""
    from fused_lora import group, sharing

    for module in (group, sharing):
        monkeypatch.setattr(module, "better_apart", lambda *_: False)


@pytest.fixture
def own_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of many rows have a node of ours on a CPU too, where x is too small in tests."""
    from fused_lora import dispatch

    monkeypatch.setattr(dispatch, "_FEW_ELEMENTS", 0)
    monkeypatch.setattr(dispatch, "_FEW_OF_GROUP", 0)
    dispatch.forget_plans()
    yield
    dispatch.forget_plans()


@pytest.fixture
def cpu_without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Says for which dtypes the CPU has no instructions, whatever it has."""
    from fused_lora import dispatch, products

    def without(*dtypes: torch.dtype) -> None:
        monkeypatch.setattr(products, "WITHOUT_INSTRUCTIONS", frozenset(dtypes))
        dispatch.forget_plans()

    yield without
    monkeypatch.undo()
    dispatch.forget_plans()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel launchers that were called, in order: which backend and strategy really ran.

    Nothing is replayed, which would go past them.
    """
    from fused_lora import triton_backend
    from fused_lora.kernels import experts, gated, multi
    from fused_lora.kernels.replay import Replays
    from fused_lora.strategies import gluon_problem

    monkeypatch.setattr(Replays, "__call__", lambda self, name, operands, function: function())
    called: list[str] = []

    def record(name: str, module: ModuleType = triton_backend) -> None:
        launcher = getattr(module, name)

        def recorded(*args: object, **kwargs: object) -> object:
            called.append(name)
            return launcher(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    for name in (
        "gemm_one_pass",
        "gemm_add_lora",
        "gemm_scaled",
        "gemm_group",
        "add_group",
        "add_lora",
        "persistent_one_pass",
        "persistent_add_lora",
        "persistent_produced",
        "skinny",
        "lora_grads",
        "grad_lora_a",
        "grad_lora_b",
    ):
        record(name)
    for name in ("gated", "gated_backward"):
        record(name, gated)
    record("gemm_experts", experts)
    for name in ("shrink", "multi_grads"):
        record(name, multi)
    if gluon_problem() is None:
        from fused_lora.kernels import specialized

        record("specialized_add_lora", specialized)
        record("specialized_group", specialized)
        record("specialized_produced", specialized)
    return called


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes launches of the hand-scheduled kernel run in the emulator.

    In some seed's order of events, with so many programs, so many of them at a time.
    """
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    import triton.language as tl
    from gluon_emulator import Emulated

    from fused_lora.kernels import persistent, specialized
    from fused_lora.kernels.device import INTERPRETED
    from fused_lora.kernels.launch import Launcher

    def emulate(seed: int | None = None, programs: int = 2, resident: int | None = None) -> None:
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        kernel = Emulated(specialized.lora_specialized_kernel, seed, resident)
        launcher = Launcher(kernel, specialized._launch_specialized.descriptors)
        monkeypatch.setattr(specialized, "_launch_specialized", launcher)
        info = replace(INTERPRETED, num_sms=programs)
        monkeypatch.setattr(specialized, "device_info", lambda device: info)

    monkeypatch.setattr(persistent, "MAX_SPINS", tl.constexpr(20_000))
    persistent._sync_buffers.clear()
    yield emulate
    persistent._sync_buffers.clear()  # a launch that failed has left its tickets drawn


@pytest.fixture
def everywhere(emulated: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hand-scheduled strategies run, in the emulator, and the others in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("there is no interpreter beside a GPU")
    from pretending import pretend

    from fused_lora import dispatch

    pretend(monkeypatch.setattr, specialized_obstacle=lambda *_: None)
    emulated(programs=3)
    dispatch.plan.cache_clear()
    yield
    dispatch.plan.cache_clear()

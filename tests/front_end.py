"""A pytest plugin: every kernel that the tests launch through Triton's compiler, without a GPU.

    make front-end                    # or: PYTHONPATH=tests python -m pytest -p front_end tests/...

The interpreter runs Python: what only a compiler refuses, such as a `return` in a static `if` that
does not end a function, it does not see. Here a stand-in driver takes the interpreter's place, and
calls that would go to PyTorch because of it go to the kernels, fp8, bf16 and Gluon included.
Kernels are compiled for Hopper and never run, so that the values that tests look at are garbage and
no test fails. What was refused is listed at the end, and is the exit status, as is nothing at all.

FRONT_END=ttir (as it is without) stops after Triton's own IR, 50 ms a kernel; FRONT_END=cubin goes
on to machine code, 1.2 s, and fills TRITON_CACHE_DIR.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest

os.environ.pop("TRITON_INTERPRET", None)
STOP = os.environ.setdefault("FRONT_END", "ttir")  # conftest.py leaves the interpreter out

import triton.compiler  # noqa: E402
import triton.compiler.compiler as compiler  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.compiler.compiler import LazyDict  # noqa: E402
from triton.runtime import driver  # noqa: E402

from benchmarks.launch_overhead import StandIn  # noqa: E402

compiled: dict[str, int] = {}
refused: dict[tuple[str, str], int] = {}
_compile = compiler.compile


class _NeverRun(CompiledKernel):  # type: ignore[misc]
    def __init__(self, source: Any) -> None:
        self.src, self.function, self.packed_metadata, self.module = source, 0, (4, 1, 0), object()
        self._run = StandIn.launcher_cls(source, None)

    def launch_metadata(self, *_: object) -> LazyDict:
        """What Triton's hooks hear of."""
        return LazyDict({"name": self.src.fn.__name__})


def _front_end(source: Any, target: Any, options: Any) -> CompiledKernel:
    backend = compiler.make_backend(target)
    parsed = backend.parse_options({**(options or {}), **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed)
    module = source.make_ir(target, parsed, functions, backend.get_module_map(), context)
    assert module.verify()
    return _NeverRun(source)


def _counted(source: Any, target: Any = None, options: Any = None, **rest: Any) -> CompiledKernel:
    name = source.fn.__name__
    compiled[name] = compiled.get(name, 0) + 1
    try:
        if STOP == "cubin":
            return _compile(source, target=target, options=options, **rest)
        return _front_end(source, target, options)
    except Exception as error:
        found = (name, str(error)[-400:])
        refused[found] = refused.get(found, 0) + 1
        raise


def compile_so_far() -> None:
    """As far as STOP says, from now on: a stand-in for the GPU launches what comes of it."""
    driver.set_active(StandIn())
    compiler.compile = triton.compiler.compile = _counted


def pytest_configure() -> None:
    """A GPU that is not there, for Triton and for the dispatcher."""
    from pretending import pretend

    from fused_lora import strategies
    from fused_lora.kernels import device, quantized

    compile_so_far()
    obstacle, gluon_problem = strategies.kernel_obstacle, strategies.gluon_problem

    def without_interpreter(call: Any) -> Exception | None:
        found = obstacle(call)
        return None if "TRITON_INTERPRET" in str(found) else found

    for module in (device, quantized):
        setattr(module, "has_fp8", lambda _: True)  # noqa: B010  # mypy takes no other form
    pretend(
        setattr,
        kernel_obstacle=without_interpreter,
        specialized_obstacle=lambda *_: gluon_problem(),
        has_fp8=lambda _: True,
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """No test fails for its values; what was refused is counted by itself."""
    report = yield
    if report.failed:
        report.outcome = "passed"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The exit status: whether something was refused, or nothing compiled."""
    good = compiled and not refused
    session.exitstatus = pytest.ExitCode.OK if good else pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many were compiled, and what was refused."""
    terminalreporter.section(f"compiled up to {STOP}: {sum(compiled.values())} kernels")
    for name, times in sorted(compiled.items()):
        terminalreporter.line(f"{times:5} {name}")
    for (name, error), times in refused.items():
        terminalreporter.line(f"REFUSED {times} x {name}: {error}")

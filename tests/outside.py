"""Python in a process of its own, where Triton compiles: in the tests' own it may interpret."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def run_outside(*arguments: str, timeout: float | None = None) -> str:
    """What ``python *arguments`` prints; AssertionError, with all of it, if it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *sys.path])
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


_OFFSETS = """
import re, sys
from benchmarks.cases import cases
from benchmarks.sources import source
import triton
from triton.backends.compiler import GPUTarget
form, *kinds = sys.argv[1:]
for kind in kinds:
    found = (c for c in cases([90], ["bf16"]) if c.kind == kind and not c.dropout)
    case = next(c for c in found if c.form == form)
    ttir = triton.compile(source(case), target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    offsets = re.findall(r"tt.addptr [^:]*: tensor<[^>]*ptr<(?:bf16|f32)>+, tensor<(\\S+)>", ttir)
    assert offsets, ttir
    assert all("i64" in offset for offset in offsets), (kind, sorted(set(offsets)))
"""


def check_offsets(form: str, *kinds: str) -> None:
    """That those which make tensors of pointers have 64 bits; tables, which are small, may not."""
    run_outside("-c", _OFFSETS, form, *kinds)

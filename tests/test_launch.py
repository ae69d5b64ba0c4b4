"""Launches past Triton's look at the arguments, without a GPU: see launch_checks.py."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("launch_checks.py")


def _run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PROGRAM.parents[1]), *sys.path])
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_known_launches_hand_the_driver_what_triton_would():
    _run(str(PROGRAM))


def test_launch_overhead():
    rows = _run("-m", "benchmarks.launch_overhead")
    assert all(strategy in rows for strategy in ("one_pass", "split", "skinny"))

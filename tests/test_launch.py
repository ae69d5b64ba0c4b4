"""Launches past Triton's look at the arguments, without a GPU: see launch_checks.py."""

from pathlib import Path

import pytest
from outside import run_outside

PROGRAM = Path(__file__).with_name("launch_checks.py")


def test_known_launches_hand_the_driver_what_triton_would():
    run_outside(str(PROGRAM), timeout=500)


def test_replayed_calls_hand_the_driver_what_others_do():
    run_outside(str(PROGRAM.with_name("replay_checks.py")), timeout=500)


@pytest.mark.parametrize("rank", [8, 40, 64])
def test_nothing_spills_for_odd_operands(rank):
    run_outside(str(PROGRAM.with_name("odd_checks.py")), str(rank), timeout=500)


def test_launch_overhead():
    rows = run_outside("-m", "benchmarks.launch_overhead", timeout=500)
    assert all(strategy in rows for strategy in ("one_pass", "split", "skinny"))

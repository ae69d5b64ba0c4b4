"""DDP, FSDP2, tensor and sequence parallelism, DCP: in real processes over gloo, on CPUs.

The checks are in distributed_checks.py. One launch runs many of them, since starting a process
takes longer than any check; a launch that takes too long is killed as a whole and fails.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("distributed_checks.py")
TIMEOUT = 300  # seconds for one launch, of which an idle machine needs 25


def launch(folder, world_size, checks, checkpoint, timeout=TIMEOUT):
    """Runs the checks in ``world_size`` processes; the outcome of each, by name."""
    processes = []
    try:
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "CHECKPOINT": str(checkpoint),
                "CUDA_VISIBLE_DEVICES": "",
                "TRITON_INTERPRET": "1",
                "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[1]), *sys.path]),
            }
            with (folder / f"rank-{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(PROGRAM), str(folder), *checks],
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        _wait(processes, timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text() for rank in range(world_size))
    ranks = [folder / f"rank-{rank}.json" for rank in range(world_size)]
    results = [json.loads(path.read_text()) if path.exists() else {} for path in ranks]
    outcome = {}
    for name in checks:
        failed = [r[name] for r in results if r.get(name, "ok") != "ok"]
        done = all(name in r for r in results)
        unfinished = f"did not finish\n{logs[-4000:]}"
        outcome[name] = failed[0] if failed else "ok" if done else unfinished
    return outcome


def _wait(processes, timeout):
    """Until all have ended, one has failed, or the time is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(code not in (None, 0) for code in codes):
            return
        time.sleep(0.05)


EVERYWHERE = [
    "ddp",
    "fsdp",
    "fsdp_merge",
    "tensor_parallel",
    "tensor_parallel_reads_what_has_arrived",
    "tensor_parallel_of_single_layers",
    "tensor_parallel_with_uneven_shards",
    "tensor_parallel_dropout",
    "tensor_parallel_layer_methods",
    "tensor_parallel_refusals",
    "adapters_of_sharded_models",
    "named_adapters_of_sharded_models",
    "plan_is_what_is_measured",
]
TWO = [
    *EVERYWHERE,
    "ddp_static_graph_with_checkpointing",
    "experts_in_ddp_and_fsdp",
    "fsdp_cpu_offload",
    "fsdp_mixed_precision",
    "fsdp_mixed_precision_of_codes",
    "tensor_parallel_autocast",
    "tensor_parallel_checkpointing_and_compile",
    "dcp_save",
]
FOUR = [*EVERYWHERE, "fsdp_with_tensor_parallel", "dcp_resume"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed") / "checkpoint"


@pytest.fixture(scope="module")
def two(tmp_path_factory, checkpoint):
    return launch(tmp_path_factory.mktemp("two"), 2, TWO, checkpoint)


@pytest.fixture(scope="module")
def four(tmp_path_factory, checkpoint, two):  # it resumes what two have saved
    return launch(tmp_path_factory.mktemp("four"), 4, FOUR, checkpoint)


@pytest.mark.parametrize("name", TWO)
def test_two_processes(two, name):
    assert two[name] == "ok", two[name]


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(four, name):
    assert four[name] == "ok", four[name]


def test_a_process_that_hangs_is_killed_with_the_others(tmp_path, checkpoint):
    outcome = launch(tmp_path, 2, ["rank_0_hangs"], checkpoint, timeout=8)
    assert "did not finish" in outcome["rank_0_hangs"]
    for path in tmp_path.glob("pid-*"):
        assert not Path(f"/proc/{path.read_text()}").exists()

"""DDP, FSDP2, tensor and sequence parallelism, DCP: in real processes over gloo, on CPUs.

The checks are in distributed_checks.py. One launch runs many of them, since starting a process
takes longer than any check; a launch that takes too long is killed as a whole and fails.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("distributed_checks.py")
TIMEOUT = 150  # seconds for one launch


def launch(folder: Path, world_size: int, checks: list[str], timeout: float = TIMEOUT):
    """Runs the checks in ``world_size`` processes; the outcome of each, by name."""
    processes = []
    try:
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "CUDA_VISIBLE_DEVICES": "",
                "TRITON_INTERPRET": "1",
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
        outcome[name] = failed[0] if failed else "ok" if done else f"did not finish\n{logs[-4000:]}"
    return outcome


def _wait(processes, timeout):
    """Until all have ended, one has failed, or the time is over."""
    import time

    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(code not in (None, 0) for code in codes):
            return
        time.sleep(0.05)

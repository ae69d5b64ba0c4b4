"""Says, above and in the saved results, what `make bench` ran on."""

import pytest
import torch

from . import measure, rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_report_header() -> str:
    """The device, in pytest's first lines."""
    name = rows.environment(DEVICE, "")["device"]
    if DEVICE.type == "cuda":
        return f"benchmarks: GPU shapes on {name}"
    return f"benchmarks: CPU shapes on {name}; no GPU here, and no word about one"


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """The rows' environment, in pytest-benchmark's JSON."""
    machine_info.update(rows.environment(DEVICE, "perf_counter"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the suite runs."""
    return DEVICE


@pytest.fixture(autouse=True)
def fresh_memory() -> None:
    """Nothing of the test before."""
    measure.release()

"""Settings of ``pytest bench``: where it runs, and what a result file says of the machine."""

from typing import Any

import pytest
import torch

from bench.measure import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="of the benchmarks")
    parser.addoption("--full", action="store_true", help="all cases, not the quick ones alone")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    about = machine.describe(torch.device(config.getoption("device")))
    machine_info.clear()
    # Date and commit stand elsewhere; here, they would make every run one of another machine.
    machine_info |= {
        name: value
        for name, value in about.items()
        if name not in ("date", "commit", "changed since")
    }

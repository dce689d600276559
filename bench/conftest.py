"""Settings of ``pytest bench``: where it runs, and what a result file says of the machine."""

from typing import Any

import pytest
import torch

from bench import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="of the benchmarks")
    parser.addoption("--full", action="store_true", help="all cases, not the quick ones alone")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node")  # a machine's name says nothing of its speed
    machine_info |= machine.describe(torch.device(config.getoption("device")))

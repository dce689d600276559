"""What a result file says of the machine."""

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node")  # a machine's name says nothing of its speed
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()

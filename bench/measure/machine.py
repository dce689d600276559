"""What numbers were measured on."""

import contextlib
import datetime
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]

#: what matters for matrix products, as /proc/cpuinfo calls it
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd")


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The machine, the versions and the state of the code; what cannot be known is None.

    Args:
        device: that is measured.
        commit: of the code; git is asked by default, and may not be there.
    """
    status = said_by("git", "status", "--porcelain", "--untracked-files=no")
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or said_by("git", "rev-parse", "HEAD"),
        "changed since": None if status is None else bool(status),
        **_processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "gpu memory, GiB": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def folder(machine: Mapping[str, Any]) -> str:
    """The name of a machine's folder in bench/results: its GPU, or its CPU and number of cores."""
    name = machine.get("gpu") or f"{machine['processor']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip(
        "-"
    )


def _processor() -> dict[str, Any]:
    """Model and instruction sets of the CPU."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        found = dict(re.findall(r"^(.*?)\s*:\s*(.*)$", text, re.MULTILINE))
    flags = (found.get("flags") or found.get("Features") or "").split()
    name = found.get("model name") or platform.processor() or platform.machine()
    return {
        "processor": f"{name}{_generation(found, flags)}",
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "torch uses": torch.backends.cpu.get_cpu_capability(),
    }


def _generation(found: Mapping[str, str], flags: list[str]) -> str:
    """What a virtual machine may leave out of the name of an AMD CPU."""
    if found.get("vendor_id") != "AuthenticAMD":
        return ""
    family = int(found["cpu family"])
    return {25: " Zen4" if "avx512f" in flags else " Zen3", 26: " Zen5"}.get(family, "")


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def said_by(*command: str) -> str | None:
    """What a program prints, or None if there is no such program or it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()
    return None

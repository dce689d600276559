"""The golden values in tests/data, computed with the authors' code (see the README there)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mintnet_triton as mint

DATA = Path(__file__).parent / "data"
LAYERS = sorted(path.name for path in DATA.glob("layer_*.npz"))
HARD_LAYERS = sorted(path.name for path in DATA.glob("hard_*.npz"))


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(DATA / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def layer(name: str, kind: type[mint.MintLayer] = mint.MintLayer) -> tuple[mint.MintLayer, Any]:
    """One golden layer in float64, and the file's arrays."""
    values = arrays(name)
    _, _, _, _, upper, channel = (int(number) for number in values["meta"])
    state = {
        key.removeprefix("param."): value.double()
        for key, value in values.items()
        if key.startswith("param.")
    }
    built = mint.layer_from_authors(
        state, "upper" if upper else "lower", "channel" if channel else "pixel"
    )
    if kind is mint.MintLayer:
        return built, values
    other = kind(
        built.channels,
        built.size,
        built.hidden,
        "upper" if upper else "lower",
        "channel" if channel else "pixel",
    ).double()
    other.load_state_dict(built.state_dict())
    return other, values


def network_file(name: str, path: Path, entries: int = 5, legacy: bool = False) -> dict[str, Any]:
    """Write a golden network as the authors' script would; returns the file's arrays."""
    values = arrays(name)
    state = {
        "module." + key.removeprefix("param."): value
        for key, value in values.items()
        if key.startswith("param.")
    }
    content = [state, {"state": {}, "param_groups": []}, 7, 1234, {"last_epoch": 7}][:entries]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return values


def assert_golden(computed: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """|computed - expected| <= tolerance * max(1, |expected|), everywhere."""
    computed, expected = computed.detach(), expected.double().reshape(computed.shape)
    error = ((computed.double() - expected).abs() / expected.abs().clamp(min=1)).max()
    assert float(error) <= tolerance, f"error {float(error):.3g}, tolerance {tolerance:.3g}"

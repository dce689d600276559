"""Models and how they are trained, one TOML file a data set: the paper's, and small ones.

A name with a ``+`` is that of the same model and data with what pays beyond the paper: its file has
what differs from the plain one.
"""

import tomllib
from importlib.resources import files
from typing import Any


class PresetError(ValueError):
    """No preset is called so, or it says nothing of what was asked."""


def model_arguments(name: str, section: str) -> dict[str, Any]:
    """Constructor's arguments of a preset's "density" or "classifier" model.

    Raises:
        PresetError: no such preset, or it lacks the section.
    """
    data = load_preset(name, "data")
    shape = {key: data[key] for key in ("channels", "image_size")}
    return {**shape, **load_preset(name, section)}


def load_preset(name: str, section: str) -> dict[str, Any]:
    """One section of a preset: "data", or "density" or "classifier" and how each is trained.

    Args:
        name: "mnist", "cifar10" or "imagenet32" of the paper; "digits", "mnist5k", "fashion" or
            "patches"; with a "+", what there is beyond the paper.
        section: "data", "density", "density_training", "classifier" or "classifier_training".

    Raises:
        PresetError: no such preset, or it lacks the section.
    """
    folder = files(__name__)
    names = sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )
    if name not in names:
        raise PresetError(f"name must be one of the presets {names}, got {name!r}")
    preset = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
    if name.endswith("+"):
        plain = load_preset(name.removesuffix("+"), section)
        return {**plain, **preset.get(section, {})}
    if section not in preset:
        raise PresetError(f"preset {name!r} has no {section} section, only {sorted(preset)}")
    return dict(preset[section])

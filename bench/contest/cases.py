"""What is measured: one table of operations, shapes, numbers and passes; and what counts as right.

The same table serves ``python -m bench run``, ``python -m bench.gpu`` and ``pytest bench``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

import mintnet_triton as mint
from mintnet_triton import MintLayer
from mintnet_triton.kernels import backend


class Scale(NamedTuple):
    """A layer of one scale of a model: colours, hidden units of each, side of the image."""

    channels: int
    hidden: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} K{self.hidden}"


#: the model of ImageNet 32 has the same scales
CIFAR10 = (Scale(3, 85, 32), Scale(12, 21, 16), Scale(48, 5, 8))
MNIST = (Scale(1, 45, 28), Scale(4, 11, 14), Scale(16, 2, 7))
TINY = Scale(2, 2, 3)
#: one colour of many channels, which no mask hides
SINGLE = Scale(1, 256, 16)


class Mode(NamedTuple):
    """How numbers are multiplied; in 16 bits, layers and models are under autocast."""

    name: str
    dtype: torch.dtype  # of a product's operands
    precision: str  # of float32 products, as torch calls it
    tolerance: float  # a result further off is taken to be wrong

    @property
    def kernels(self) -> str:
        """The precision as the kernels call it."""
        return "ieee" if self.precision == "highest" else "tf32"


FLOAT32 = Mode("float32", torch.float32, "highest", 1e-4)
TF32 = Mode("tf32", torch.float32, "high", 1e-2)
BFLOAT16 = Mode("bfloat16", torch.bfloat16, "highest", 5e-2)
FLOAT16 = Mode("float16", torch.float16, "highest", 1e-2)


def is_emulated(mode: Mode, device: torch.device) -> bool:
    """Whether a CPU does not multiply such numbers itself: a product takes some forty times as long
    as in float32, and says nothing of the code."""
    half = mode.dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cpu" and not backend.multiplies(mode.dtype)


#: how many cases: one of each kind, on shapes that Triton's interpreter can do; what two slow cores
#: do in two minutes; everything that is worth knowing on the device
Extent = Literal["tiny", "quick", "full"]
EXTENTS: tuple[Extent, ...] = get_args(Extent)

Pass = Literal["forward", "training", "inverse"]

#: of a layer's three convolutions
Part = Literal["first", "middle", "last"]


@dataclass(frozen=True)
class Case:
    """Rivals that are timed against each other at the same problem.

    Args:
        section: of the report.
        subject: "convolution", one of a layer; "layer"; or "model".
        scale: of a convolution or a layer.
        part: which convolution.
        preset: of a model; None is a tiny one.
        batch: samples.
        passes: what is timed: forward (with log-det), training (forward and backward), inverse.
        rivals: to forward and backward passes, by name.
        inversions: rivals to an inversion, by name.
        resources: measure the peaks of memory, and the energy where a driver tells, too.
        priority: lower ones come first where time is short.
    """

    section: str
    subject: Literal["convolution", "layer", "model"]
    mode: Mode
    batch: int
    passes: tuple[Pass, ...]
    rivals: tuple[str, ...]
    inversions: tuple[str, ...] = ()
    scale: Scale | None = None
    part: Part = "middle"
    preset: str | None = None
    resources: bool = False
    priority: int = 0

    @property
    def name(self) -> str:
        what = self.scale or (f"{self.preset} model" if self.preset else "tiny model")
        part = "" if self.part == "middle" else f", {self.part}"
        return f"{what}{part}, batch {self.batch}, {self.mode.name}"

    def rivals_of(self, pass_: Pass) -> tuple[str, ...]:
        return self.inversions if pass_ == "inverse" else self.rivals


#: sections that show how cost grows, each with the field of a scale, or the batch, that grows
SWEEPS = {"growing batch": "batch", "growing K": "hidden", "growing image": "size"}


def all_cases(device: torch.device, extent: Extent) -> list[Case]:
    """The table."""
    if extent == "tiny":
        return _tiny()
    gpu, full = device.type == "cuda", extent == "full"
    cases: list[Case] = []

    def layers(scales: Sequence[Scale], batch: int, mode: Mode, priority: int) -> None:
        rivals: tuple[str, ...] = ("ours", "torch", "naive") if full else ("ours", "naive")
        if full and (gpu or (mode is FLOAT32 and scales[0] in CIFAR10)):  # compiling takes its time
            rivals += ("compiled",)
        if gpu:
            rivals += ("ours, graph", "torch, graph")
        single = mode is FLOAT32  # an inversion never takes less
        if not gpu and not single:
            rivals += ("float32",)
        inversions: tuple[str, ...] = ("ours", "paper", "one by one, cached")
        if full:
            inversions = ("ours", "torch", "fixed point", *inversions[1:], "one by one")
        if gpu:
            inversions += ("wavefront",)
        passes: tuple[Pass, ...] = ("forward", "training")
        if single:
            passes += ("inverse",)
        for scale in scales:
            cases.append(
                Case("layer", "layer", mode, batch, passes, rivals, inversions, scale,
                     resources=single, priority=priority)
            )  # fmt: skip

    def convolutions(
        scales: Sequence[Scale], batch: int, mode: Mode, priority: int, part: Part = "middle"
    ) -> None:
        rivals: tuple[str, ...] = ("ours", "dense")
        if gpu:  # where the layout is ours to choose
            rivals += ("dense, channels last",)
        passes: tuple[Pass, ...] = ("forward", "training") if full else ("forward",)
        for scale in scales:
            cases.append(
                Case("convolution", "convolution", mode, batch, passes, rivals, scale=scale,
                     part=part, priority=priority)
            )  # fmt: skip

    def model(preset: str, batch: int, samples: int, mode: Mode, priority: int) -> None:
        rivals = ("ours", "torch", "naive") if gpu else ("ours", "naive")
        inversions = ("ours", "paper", "one by one, cached") if gpu else ("ours", "paper")
        # In 16 bits the gradients of a deep network of random weights are little but rounding.
        train = full and mode is FLOAT32
        passes: tuple[Pass, ...] = ("forward", "training") if train else ("forward",)
        cases.append(
            Case("model", "model", mode, batch, passes, rivals, preset=preset, priority=priority)
        )
        if mode is FLOAT32:
            cases.append(
                Case("model", "model", mode, samples, ("inverse",), (), inversions, preset=preset,
                     priority=priority)
            )  # fmt: skip

    def sweeps(batches: Sequence[int], units: Sequence[int], sides: Sequence[int]) -> None:
        mode, passes = (BFLOAT16 if gpu else FLOAT32), get_args(Pass)[:2]
        rivals = ("ours", "naive")
        scale, batch = (CIFAR10[0], 32) if gpu else (CIFAR10[1], 4)
        points = [("growing batch", scale, count) for count in batches]
        points += [("growing K", Scale(3, count, scale.size), batch) for count in units]
        points += [("growing image", Scale(3, 16, side), batch) for side in sides]
        for section, point, count in points:
            cases.append(
                Case(section, "layer", mode, count, passes, rivals, scale=point,
                     resources=section == "growing batch", priority=3)
            )  # fmt: skip

    if gpu:
        for mode in (BFLOAT16, FLOAT16, TF32, FLOAT32):
            convolutions(CIFAR10, 32, mode, 0)
            convolutions(MNIST, 32, mode, 2)
            convolutions(CIFAR10, 128, mode, 2)
        for mode in (FLOAT32, TF32, BFLOAT16):
            layers(CIFAR10, 32, mode, 0)
            layers(MNIST, 32, mode, 1)
            layers(CIFAR10, 128, mode, 2)
            layers(MNIST, 128, mode, 3)
        for mode in (FLOAT32, BFLOAT16):
            model("cifar10", 32, 64, mode, 1)
            model("mnist", 32, 64, mode, 1)
        sweeps([2**power for power in range(10)], (16, 32, 64, 128, 256), (8, 16, 32, 64))
    else:
        # As in the paper, but at the first scale, where the literal layer would take minutes.
        layers(CIFAR10[:1], 8, FLOAT32, 0)
        layers(CIFAR10[1:], 32 if full else 8, FLOAT32, 0)
        convolutions(CIFAR10, 8, FLOAT32, 0)
        if full:
            convolutions(CIFAR10, 8, BFLOAT16, 0)
            layers(CIFAR10, 8, BFLOAT16, 0)
        if full:
            convolutions((*MNIST, SINGLE), 8, FLOAT32, 0)
            for part in ("first", "last"):
                convolutions((*CIFAR10, *MNIST), 8, FLOAT32, 0, part)
            convolutions((TINY,), 8, FLOAT32, 0)
        layers(MNIST if full else MNIST[:1], 32 if full else 8, FLOAT32, 0)
        model("mnist", 8, 16, FLOAT32, 1)
        if full:
            model("cifar10", 2, 4, FLOAT32, 1)
            sweeps((1, 4, 16, 64), (8, 16, 32, 64), (8, 16, 32, 64))
        else:
            sweeps((1, 4, 16), (8, 16), (8, 16))
    return sorted(cases, key=lambda case: case.priority)


def _tiny() -> list[Case]:
    # The interpreter cannot multiply bfloat16.
    everything: dict[str, Any] = {
        "passes": ("forward", "training", "inverse"),
        "rivals": ("ours", "torch", "compiled", "naive"),
        "inversions": ("ours", "paper", "one by one", "one by one, cached"),
    }
    return [
        Case("convolution", "convolution", FLOAT16, 2, ("forward", "training"),
             ("ours", "dense", "dense, channels last"), scale=TINY),
        Case("layer", "layer", FLOAT32, 2, **everything, scale=TINY, resources=True),
        Case("layer", "layer", FLOAT16, 2, ("forward",), ("ours", "ours, graph"), scale=TINY),
        Case("model", "model", FLOAT32, 1, ("forward",), ("ours", "naive")),
        Case("model", "model", FLOAT32, 1, ("inverse",), (), ("paper",)),
        *(Case("growing batch", "layer", FLOAT32, batch, ("forward",), ("torch", "naive"),
               scale=TINY, resources=True) for batch in (1, 2, 4)),
    ]  # fmt: skip


def make_layer(scale: Scale, **arguments: Any) -> MintLayer:
    """A layer far from the identity, which Algorithm 1 still inverts."""
    layer = MintLayer(
        scale.channels, scale.size, scale.hidden, initialisation="classifier", **arguments
    )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name == "t":
                parameter.uniform_(0.5, 2)
            else:
                parameter.mul_(2)
    return layer


def random_flow(preset: str | None) -> mint.MintNet:
    """A model of the paper, its layers as :func:`make_layer` makes them; None is a tiny one."""
    if preset is None:
        flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1)
    else:
        flow = mint.MintNet.from_preset(preset)
    for layer in layers_of(flow):
        layer.load_state_dict(make_layer(scale_of(layer)).state_dict())
    return flow


def layers_of(module: nn.Module) -> list[MintLayer]:
    return [layer for layer in module.modules() if isinstance(layer, MintLayer)]


def scale_of(layer: MintLayer) -> Scale:
    return Scale(layer.channels, layer.hidden, layer.size[0])


class WrongResultError(AssertionError):
    """A result is too far from that in float64."""


def relative_rms(computed: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values."""
    expected = expected.detach().double()
    difference = computed.detach().double() - expected
    return float(difference.norm() / expected.norm().clamp(min=1e-300))


def gate(mode: Mode, computed: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error, as ``{"error": ...}``, unless an error means that something is wrong.

    Raises:
        WrongResultError: naming a result that is further off than the mode allows, or missing.
    """
    errors = {}
    for name, value in expected.items():
        if name not in computed:
            raise WrongResultError(f"wrong: there is no {name}")
        errors[name] = relative_rms(computed[name], value)
        if not errors[name] <= mode.tolerance:  # NaN too
            raise WrongResultError(f"wrong: {name} has a relative error of {errors[name]:.2e}")
    return {"error": max(errors.values())}

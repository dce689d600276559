"""Who is timed: each rival is one entry of a table.

To forward and backward passes a rival is a :class:`Rival`: what it makes of a module, and how that
is called. To an inversion it is a function that gives the :class:`Inversion` of a layer. What the
paper and a pixel-by-pixel solver need for a whole layer takes minutes: their first steps are timed,
and the time of all is extrapolated, which ``times`` says.
"""

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mintnet_triton as mint
from bench.contest.naive import literally
from mintnet_triton import FixedPoint, MaskedConv2d, MintLayer
from mintnet_triton.kernels.backend import INTERPRETED
from mintnet_triton.kernels.reference import mint_forward

Map = Callable[[Tensor], Any]


class UnavailableError(RuntimeError):
    """A rival cannot run here, through no fault of its own; says why."""


def same(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True)
class Rival:
    """How a module is made ready and called.

    Args:
        prepare: what is made of a copy of the module; its parameters keep their names.
        wrap: what is called instead of it.
        backend: of the library, see :func:`mintnet_triton.use_backend`.
        layout: of images and weights.
        graph: replay a CUDA graph; on a GPU only.
        autocast: under it, where the case is.
    """

    prepare: Callable[[nn.Module], nn.Module] = same
    wrap: Callable[[nn.Module], Map] = same
    backend: str = "auto"
    layout: torch.memory_format = torch.contiguous_format
    graph: bool = False
    autocast: bool = True


def insist(backend: str, device: torch.device) -> str:
    """The backend to choose, so that no plain PyTorch quietly stands in for kernels."""
    return "triton" if backend == "auto" and (device.type == "cuda" or INTERPRETED) else backend


def compiled(module: nn.Module) -> Map:
    """``torch.compile`` of the whole module for its shapes.

    Raises:
        UnavailableError: there is no C++ compiler, which a CPU needs, or it does not work; the
            latter at the first call.
    """
    from torch._inductor.exc import InductorError

    device = next(module.parameters()).device
    if INTERPRETED:  # a dry run, to which compiling would only add time
        return torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UnavailableError(f"there is no C++ compiler: none of {', '.join(compilers)}")
    # It warns of its own ways, while it compiles.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    torch.compiler.reset()
    function = torch.compile(module, fullgraph=True, dynamic=False)

    def call(x: Tensor) -> Any:
        try:
            return function(x)
        except InductorError as error:
            if device.type == "cpu" and "CppCompile" in f"{type(error.inner_exception)}{error}":
                raise UnavailableError(f"the C++ compiler fails: {error}") from error
            raise

    return call


class Dense(nn.Module):
    """A masked convolution as a dense one: the weights are masked, and the library does the rest.

    Without gradients it takes weights that were masked before, the best that it can be given.
    """

    def __init__(self, conv: MaskedConv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        units = [size // conv.colours for size in conv.weight.shape[:2]]
        mask = conv.mask.repeat_interleave(units[0], 0).repeat_interleave(units[1], 1)
        self.register_buffer("mask", mask.to(conv.weight.dtype))
        self.register_buffer("masked", conv.masked_weight().detach())

    def forward(self, x: Tensor) -> Tensor:
        mask, masked = cast(Tensor, self.mask), cast(Tensor, self.masked)
        weight = self.weight * mask if torch.is_grad_enabled() else masked
        return F.conv2d(x, weight, self.bias, padding="same")


def dense(module: nn.Module) -> nn.Module:
    assert isinstance(module, MaskedConv2d)
    return Dense(module)


RIVALS = {
    # The library as users call it.
    "ours": Rival(),
    # The library in plain PyTorch.
    "torch": Rival(backend="torch"),
    "compiled": Rival(wrap=compiled, backend="torch"),
    # Without autocast.
    "float32": Rival(autocast=False),
    # The paper's formulas read literally.
    "naive": Rival(prepare=literally, backend="torch"),
    # cuDNN's or oneDNN's convolution, for a masked convolution alone; the faster one counts.
    "dense": Rival(prepare=dense),
    "dense, channels last": Rival(prepare=dense, layout=torch.channels_last),
    # Without the time that launches take.
    "ours, graph": Rival(graph=True),
    "torch, graph": Rival(backend="torch", graph=True),
}


class Inversion(NamedTuple):
    """One way to invert a layer at z."""

    work: Callable[[], Tensor]  #: what is timed; returns what it has found of x
    expected: Tensor  #: what it has to find
    times: float = 1  #: the whole inversion takes so many times the work


class Target(NamedTuple):
    """What is to be inverted: z = f(x), with the x that float64 says is the inverse."""

    layer: MintLayer
    x: Tensor  # (B, C, H, W), float64
    z: Tensor


#: residual at which all inversions stop, but the paper's, which counts its iterations
RESIDUAL = 1e-5
#: iterations of the paper's inversion, and how many of them are timed
PAPER_ITERATIONS, TIMED_ITERATIONS = 100, 2
#: variables that are solved when they are solved one by one, for the time of all
TIMED_VARIABLES = 4


def by_solver(target: Target, solver: mint.Solver, backend: str = "auto") -> Inversion:
    """An inversion by the library.

    Raises:
        NotConvergedError: by the work, if it does not converge.
    """

    def work() -> Tensor:
        with mint.use_backend(insist(backend, target.z.device)):
            result = mint.invert(target.layer, target.z, solver)
        result.raise_if_not_converged()
        return result.x

    return Inversion(work, target.x)


def paper(target: Target) -> Inversion:
    """Algorithm 1 with T = 100 on the literal layer, extrapolated from its first iterations.

    Every iteration evaluates the layer once, and one evaluation precedes them.
    """
    solver = FixedPoint(iterations=TIMED_ITERATIONS, tolerance=0)
    naive = literally(copy.deepcopy(target.layer))
    assert isinstance(naive, MintLayer)

    def iterate(layer: MintLayer, z: Tensor) -> Tensor:
        with torch.no_grad(), mint.use_backend("torch"):
            return layer.solve(z, solver, trace=False, reference=None).x

    expected = iterate(copy.deepcopy(target.layer).double(), target.z.double())
    times = (PAPER_ITERATIONS + 1) / (TIMED_ITERATIONS + 1)
    return Inversion(lambda: iterate(naive, target.z), expected, times)


def one_by_one(target: Target, *, cached: bool) -> Inversion:
    """Newton's method on one variable after the other, as one samples an autoregressive model.

    Some variables are solved, those before them being known, and the time of all is extrapolated.

    Args:
        cached: evaluate the layer only where the variable matters, in the 7 x 7 pixels around it,
            instead of everywhere.
    """
    layer, z = target.layer, target.z
    channels, height, width = z.shape[1:]
    variables = _in_order(layer, channels, height, width)
    chosen = variables[len(variables) // (2 * TIMED_VARIABLES) :: len(variables) // TIMED_VARIABLES]
    known = target.x.to(z.dtype)
    reach = sum(conv.weight.shape[-1] // 2 for conv in (layer.conv1, layer.conv2, layer.conv3))
    tolerance = RESIDUAL * z.abs().flatten(1).amax(1).clamp(min=1)

    @torch.no_grad()
    def work() -> Tensor:
        weights = layer.effective_weights()
        structure = (layer.activation, layer.conv1.ordering.order, layer.conv1.ordering.triangle)
        x, found = known.clone(), []
        for channel, row, column in chosen:
            rows, columns = slice(0, height), slice(0, width)
            if cached:
                rows = slice(max(0, row - reach), row + reach + 1)
                columns = slice(max(0, column - reach), column + reach + 1)
            part = weights._replace(t=weights.t[:, rows, columns])
            place = (slice(None), channel, row - rows.start, column - columns.start)
            view, wanted = x[:, :, rows, columns], z[:, channel, row, column]
            view[place] = wanted / part.t[place[1:]]
            for _ in range(PAPER_ITERATIONS):
                y, diagonal = mint_forward(view, part, *structure)
                error = y[place] - wanted
                if bool((error.abs() <= tolerance).all()):
                    break
                view[place] -= error / diagonal[place]
            found.append(view[place].clone())
        return torch.stack(found)

    expected = torch.stack([target.x[:, channel, row, column] for channel, row, column in chosen])
    return Inversion(work, expected, len(variables) / len(chosen))


def _in_order(
    layer: MintLayer, channels: int, height: int, width: int
) -> list[tuple[int, int, int]]:
    """Every variable (channel, row, column), one after the other."""
    places: Iterator[tuple[int, ...]]
    if layer.conv1.ordering.order == "channel":
        ordered = list(product(range(channels), range(height), range(width)))
    else:
        places = product(range(height), range(width), range(channels))
        ordered = [(channel, row, column) for row, column, channel in places]
    return ordered if layer.conv1.ordering.triangle == "lower" else ordered[::-1]


INVERSIONS: dict[str, Callable[[Target], Inversion]] = {
    "ours": lambda target: by_solver(target, mint.Auto(RESIDUAL)),
    "torch": lambda target: by_solver(target, mint.Auto(RESIDUAL), "torch"),
    "wavefront": lambda target: by_solver(target, mint.Wavefront(RESIDUAL)),
    "fixed point": lambda target: by_solver(target, FixedPoint(tolerance=RESIDUAL)),
    "paper": paper,
    "one by one": lambda target: one_by_one(target, cached=False),
    "one by one, cached": lambda target: one_by_one(target, cached=True),
}

"""Latents of several scales: channels that are done stay aside, and the rest may predict them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Self, cast

import torch
from torch import Tensor, nn

from mintnet_triton.checks import check_axes, check_integer, check_positive
from mintnet_triton.hooks import run_weight_hooks
from mintnet_triton.invertible import Invertible, Reshaping, Shape, Stage, as_invertible
from mintnet_triton.solvers import (
    Evaluator,
    LinearSolver,
    Solution,
    Solver,
    log_det_dtype,
    relative_residual,
    rounded,
)

#: what a prior's log-scale is kept within: none may be so narrow that its inverse is not exact
WIDEST = 3.0


class FactorOut(Invertible):
    """``(a, b) -> (a, inner(b))``: the first ``kept`` channels are latents already.

    Where ``inner`` squeezes b, a is squeezed likewise, so that the result is one image: z of a
    flow keeps its shape, and its inverse is that of ``inner``, stage by stage. (Dinh et al.,
    "Density estimation using Real NVP", 2017, section 3.6.)

    Args:
        inner: an invertible map of the other channels.
        kept: number of channels of a.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(self, inner: nn.Module, kept: int) -> None:
        super().__init__()
        as_invertible("inner", inner)
        self.inner = inner
        self.kept = check_integer("kept", kept, least=1)

    @property
    def _map(self) -> Invertible:
        return as_invertible("inner", self.inner)

    @property
    def context(self) -> int | None:  # type: ignore[override]  # that of the map inside
        return self._map.context

    @property
    def input_shape(self) -> Shape | None:
        return _beside(self._map.input_shape, self.kept)

    @property
    def output_shape(self) -> Shape | None:
        shape, kept = self._map.output_shape, self.kept
        for reshaping in self._reshapings():
            kept = reshaping.channels_after(kept)
        return _beside(shape, kept)

    def context_after(self, context: Tensor | None) -> Tensor | None:
        return self._map.context_after(context)

    def stages(self) -> Iterator[tuple[str, Stage]]:
        kept = self.kept
        for name, stage in self._map.stages():
            name = f"inner.{name}" if name else "inner"
            if isinstance(stage, Reshaping):
                yield name, _BesideReshaping(stage, kept)
                kept = stage.channels_after(kept)
            else:
                yield name, _Beside(stage, kept)

    def _reshapings(self) -> list[Reshaping]:
        return [stage for _, stage in self._map.stages() if isinstance(stage, Reshaping)]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.kept], x[:, self.kept :]
        own = () if self._context is None else (self._context,)
        y, log_det = self.inner(b, *own)
        for reshaping in self._reshapings():
            a = reshaping.moved(a)
        return torch.cat([a, y], 1), log_det

    def extra_repr(self) -> str:
        return f"kept={self.kept}"


def _beside(shape: Shape | None, kept: int) -> Shape | None:
    """That of an image with so many channels more."""
    if shape is None:
        return None
    channels, *size = shape
    return None if channels is None else kept + channels, *size


class _Beside(Stage):
    """A stage of the last channels; the first ones stay as they are."""

    def __init__(self, stage: Stage, kept: int) -> None:
        super().__init__()
        self.stage, self.kept = stage, kept

    @property
    def context(self) -> int | None:  # type: ignore[override]  # that of the stage inside
        return self.stage.context

    @property
    def starts_from_data(self) -> bool:  # type: ignore[override]  # as the stage inside does
        return self.stage.starts_from_data

    @property
    def input_shape(self) -> Shape | None:
        return _beside(self.stage.input_shape, self.kept)

    def given(self, context: Tensor | None) -> Self:
        return self._with(self.stage.given(context))

    def context_after(self, context: Tensor | None) -> Tensor | None:
        return self.stage.context_after(context)

    def of_samples(self, chosen: Tensor) -> Self:
        return self._with(self.stage.of_samples(chosen))

    def tensors(self) -> dict[str, Tensor]:
        return self.stage.tensors()

    def view(self, tensors: Mapping[str, Tensor]) -> Self:
        return self._with(self.stage.view(tensors))

    def _with(self, stage: Stage) -> Self:
        return self if stage is self.stage else type(self)(stage, self.kept)

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.kept], x[:, self.kept :]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self._apart(x)
        y, log_det = self.stage._forward(b)
        return torch.cat([a, y], 1), log_det

    def evaluator(self) -> Evaluator:
        evaluate = self.stage.evaluator()

        def beside(x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self._apart(x)
            y, diagonal = evaluate(b)
            return torch.cat([a, y], 1), torch.cat([torch.ones_like(a), diagonal], 1)

        return beside

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        a, b = self._apart(z)
        known = None if reference is None else self._apart(reference)[1]
        solution = self.stage.solve(b, solver, trace=trace, reference=known)
        return replace(solution, x=torch.cat([a, solution.x], 1))

    def exact_residual(self, x: Tensor, z: Tensor) -> Tensor:
        (own, b), (target, inner_target) = self._apart(x), self._apart(z)
        inner = self.stage.exact_residual(b, inner_target)
        return torch.maximum(inner, relative_residual(own.to(inner.dtype), target.to(inner.dtype)))

    def jacobian_solver(self, x: Tensor, *, transpose: bool = False) -> LinearSolver:
        solve = self.stage.jacobian_solver(self._apart(x)[1], transpose=transpose)

        def beside(right: Tensor) -> Tensor:
            a, b = self._apart(right)
            return torch.cat([a, solve(b)], 1)

        return beside

    def magnitude(self, x: Tensor) -> Tensor:
        a, b = self._apart(x)
        return torch.cat([torch.zeros_like(a), self.stage.magnitude(b)], 1)

    def innermost(self, x: Tensor) -> tuple[Stage, Tensor]:
        return self.stage.innermost(self._apart(x)[1])

    def start_from(self, x: Tensor) -> None:
        self.stage.start_from(self._apart(x)[1])


class _BesideReshaping(Reshaping):
    """A reshaping of the last channels, and of the first ones likewise."""

    def __init__(self, stage: Reshaping, kept: int) -> None:
        super().__init__()
        self.stage, self.kept = stage, kept

    def context_after(self, context: Tensor | None) -> Tensor | None:
        return self.stage.context_after(context)

    def channels_after(self, channels: int) -> int:
        return self.stage.channels_after(channels)

    def moved(self, x: Tensor) -> Tensor:
        return self.stage.moved(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.stage._forward(x[:, self.kept :])
        return torch.cat([self.moved(x[:, : self.kept]), y], 1), log_det

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        kept = self.channels_after(self.kept)
        back = self.stage.solve(z[:, kept:], solver, trace=trace, reference=None)
        return replace(back, x=torch.cat([self.moved_back(z[:, :kept]), back.x], 1))

    def moved_back(self, z: Tensor) -> Tensor:
        return self.stage.moved_back(z)


class ConditionalPrior(Stage):
    """``(a, b) -> ((a - mean(b)) exp(-log_scale(b)), b)``, a being the first ``kept`` channels.

    With standard normal latents it makes a normal given b, of a mean and a scale that a network
    reads from b: for what :class:`FactorOut` leaves aside. It starts as the identity. (Kingma and
    Dhariwal, "Glow", 2018: the learned prior of their code; Dinh et al., 2017, equation 7.)

    Args:
        channels: of a and b together.
        kept: of a.
        width: channels of the network's hidden layers: 3 x 3, 1 x 1 and 3 x 3 convolutions.
        axes: of the images: 1 for series (B, C, L), 2 for (B, C, H, W), 3 for volumes.
        device, dtype: of the parameters; torch's defaults if None.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(
        self,
        channels: int,
        kept: int,
        width: int = 32,
        axes: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.kept, width = check_positive(channels=channels, kept=kept, width=width)
        self.axes = check_axes(axes)
        if not self.kept < self.channels:
            raise ValueError(f"kept must be below channels={channels}, got {kept}")
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.axes - 1]

        def made(inputs: int, outputs: int, side: int) -> nn.Module:
            return conv(inputs, outputs, side, padding=side // 2, device=device, dtype=dtype)

        self.network = nn.Sequential(
            made(channels - kept, width, 3),
            nn.ELU(),
            made(width, width, 1),
            nn.ELU(),
            made(width, 2 * kept, 3),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As convolutions start, but for the last, which is zero: the identity."""
        for layer in self.network.children():
            if callable(start := getattr(layer, "reset_parameters", None)):
                start()
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    @property
    def input_shape(self) -> Shape:
        return self.channels, *[None] * self.axes

    def _prior(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """mean and log_scale of a."""
        mean, raw = cast(Tensor, self.network(b)).chunk(2, 1)
        return mean, WIDEST * torch.tanh(raw / WIDEST)

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x[:, : self.kept], x[:, self.kept :]
            mean, log_scale = self._prior(b)
            slope = (-log_scale).exp()
            y = torch.cat([(a - mean) * slope, b], 1)
            return y, torch.cat([slope, torch.ones_like(b)], 1)

        return evaluate

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.kept], x[:, self.kept :]
        mean, log_scale = self._prior(b)
        log_det = -log_scale.to(log_det_dtype(x)).flatten(1).sum(1)
        return torch.cat([(a - mean) * (-log_scale).exp(), b], 1), log_det

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        exact = z.double()
        a, b = exact[:, : self.kept], exact[:, self.kept :]
        mean, log_scale = self.in_dtype(torch.float64)._prior(b)
        x = rounded(torch.cat([a * log_scale.exp() + mean, b], 1), z.dtype)
        return self.solve_exactly(z, x, solver, trace=trace, reference=reference)

    def magnitude(self, x: Tensor) -> Tensor:
        a, b = x[:, : self.kept], x[:, self.kept :]
        mean, log_scale = self._prior(b)
        return torch.cat([(a.abs() + mean.abs() + 1) * (-log_scale).exp(), b.abs()], 1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kept={self.kept}, axes={self.axes}"

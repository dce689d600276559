"""What is invertible, and how it is inverted: Algorithm 1 of the paper.

A :class:`Stage` is solved as a whole; a :class:`Chain` (a pair, a network) is not triangular and is
inverted stage by stage, from the last to the first.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mintnet_triton.checks import NonFiniteError, check_finite, check_integer, check_tensor
from mintnet_triton.kernels import full_float32

Evaluator = Callable[[Tensor], tuple[Tensor, Tensor]]
Shape = tuple[int | None, ...]


class Invertible(nn.Module):
    """A map x -> (y, log_det) over batches, with an inverse y -> (x, log_det).

    ``log_det`` is log|det| of the Jacobian per sample, shape (B,): float64 for float64 input, else
    float32. ``forward`` goes from data to latent.
    """

    @property
    def input_shape(self) -> Shape | None:
        """Sizes of an input after the batch dimension; None where any will do."""
        return None

    @property
    def output_shape(self) -> Shape | None:
        """Sizes of an output after the batch dimension; None where any will do."""
        return self.input_shape

    def check(self, name: str, x: Tensor, shape: Shape | None) -> None:
        """Raise a typed error unless ``x`` is a finite tensor of this shape, dtype and device."""
        if isinstance(x, Tensor) and shape is None:
            if x.ndim < 2:
                raise ValueError(f"{name} must have shape (batch, ...), got {tuple(x.shape)}")
            shape = (None,) * (x.ndim - 1)
        check_tensor(name, x, shape or (), like=next(self.parameters(), None))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to y.

        Returns:
            y, and log|det dy/dx| of shape (B,).

        Raises:
            TypeError, ValueError: x is not a finite tensor of the right shape, dtype and device.
        """
        self.check("x", x, self.input_shape)
        return self._forward(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def stages(self) -> Iterator[tuple[str, "Stage"]]:
        """The named stages from data to latent; a stage is its own only one, with no name."""
        raise NotImplementedError

    def inverse(self, y: Tensor, solver: "FixedPoint | None" = None) -> tuple[Tensor, Tensor]:
        """Map y back to x; ``FixedPoint()`` is the default solver.

        Not differentiable: x and log_det carry no gradient.

        Returns:
            x, and log|det dx/dy| of shape (B,).

        Raises:
            NotConvergedError: some sample did not converge; it carries the ``result``.
            TypeError, ValueError: y is not a finite tensor of the right shape, dtype and device.
        """
        result = invert(self, y, solver)
        result.raise_if_not_converged()
        return result.x, result.log_det


class Stage(Invertible):
    """An invertible map that is inverted in one go."""

    def stages(self) -> Iterator[tuple[str, "Stage"]]:
        yield "", self

    def evaluator(self) -> Evaluator:
        """x -> (y, diagonal), with all that depends on the parameters alone computed once."""
        raise NotImplementedError

    def solve(
        self, z: Tensor, solver: "FixedPoint", *, trace: bool, reference: Tensor | None
    ) -> "Solution":
        """Find x with f(x) = z."""
        raise NotImplementedError


class Reshaping(Stage):
    """A stage that only moves values: its inverse is exact and its log-det 0."""


class Chain(Invertible):
    """Invertible maps one after the other."""

    def steps(self) -> Iterable[tuple[str, Invertible]]:
        """The named maps, first one first."""
        raise NotImplementedError

    def stages(self) -> Iterator[tuple[str, Stage]]:
        for name, step in self.steps():
            for inner, stage in step.stages():
                yield (f"{name}.{inner}" if inner else name), stage

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0], dtype=log_det_dtype(x))
        for name, step in self.steps():
            try:
                x, step_log_det = step(x)
            except NonFiniteError as error:
                # Its own input has passed the check: the fault is in here.
                raise NonFiniteError(f"inside the network, entering {name!r}: {error}") from error
            log_det = log_det + step_log_det
        return x, log_det


def log_det_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def log_abs_det(diagonal: Tensor) -> Tensor:
    """log|det| (B,) of a triangular matrix from its diagonal (B, ...) (Theorem 1)."""
    return diagonal.to(log_det_dtype(diagonal)).abs().log().flatten(1).sum(1)


@dataclass(frozen=True)
class Solution:
    """A solver's answer for one stage, per sample."""

    x: Tensor  # (B, ...)
    log_det: Tensor  # (B,), of the inverse map
    residual: Tensor  # (B,), at x
    iterations: Tensor  # (B,), int64
    trace: Tensor | None = None  # (T, B)
    error_trace: Tensor | None = None  # (T, B)


def max_error(x: Tensor, reference: Tensor) -> Tensor:
    """Largest absolute difference per sample, (B,)."""
    return (x - reference).abs().flatten(1).amax(1)


def relative_residual(y: Tensor, z: Tensor) -> Tensor:
    """``max |y - z| / max(1, max |z|)`` per sample, (B,)."""
    return max_error(y, z) / z.abs().flatten(1).amax(1).clamp(min=1)


@dataclass(frozen=True)
class FixedPoint:
    """Algorithm 1: ``x <- x - alpha (f(x) - z) / diag J_f(x)``, from x = z / t.

    A Newton iteration that ignores everything off the diagonal, hence parallel over all variables;
    it converges locally (Theorem 2). A sample stops as soon as its residual is within the
    tolerance.

    Args:
        alpha: step, in the open interval (0, 2).
        iterations: most updates of a layer, T in the paper.
        tolerance: largest residual of a converged sample, ``max |f(x) - z| / max(1, max |z|)``.
            None means 1e-5 in float32 and 1e-12 in float64.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    alpha: float = 1.0
    iterations: int = 100
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float):
            raise TypeError(f"alpha must be a number, got {self.alpha!r}")
        if not 0 < self.alpha < 2:
            raise ValueError(
                f"alpha must be in the open interval (0, 2), got {self.alpha}: outside it the "
                "iteration does not converge even locally (Theorem 2)"
            )
        check_integer("iterations", self.iterations, least=1)
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be finite and at least 0, got {self.tolerance}")

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance, or the default of that dtype."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-12 if dtype == torch.float64 else 1e-5

    def solve(
        self,
        evaluate: Evaluator,
        z: Tensor,
        start: Tensor,
        *,
        trace: bool,
        reference: Tensor | None,
    ) -> Solution:
        """Solve f(x) = z for one triangular map.

        Args:
            evaluate: x -> (f(x), diagonal of the Jacobian), both shaped like x.
            z: (B, ...).
            start: first x, shaped like z.
            trace: keep the residuals after every iteration.
            reference: the true x, for the trace of errors.
        """
        tolerance = self.tolerance_for(z.dtype)
        x = start.clone()
        y, diagonal = evaluate(x)
        diagonal = diagonal.clone()  # it may be a view of one value, and is written to below
        residual = relative_residual(y, z)
        iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        # A sample that has stopped keeps its last value in the rows that follow.
        residuals = residual.repeat(self.iterations, 1) if trace else None
        errors = None
        if trace and reference is not None:
            errors = max_error(x, reference).repeat(self.iterations, 1)

        # What follows runs on the samples that are still active; NaN counts as stopped.
        active = torch.arange(len(z), device=z.device)
        active_x, active_y, active_z, active_diagonal = x, y, z, diagonal
        active_residual = residual
        for iteration in range(self.iterations):
            running = active_residual.isfinite() & (active_residual > tolerance)
            if not bool(running.all()):
                active = active[running]
                active_x, active_y, active_z, active_diagonal = (
                    values[running] for values in (active_x, active_y, active_z, active_diagonal)
                )
            if len(active) == 0:
                break
            active_x = active_x - self.alpha * (active_y - active_z) / active_diagonal
            active_y, active_diagonal = evaluate(active_x)
            active_residual = relative_residual(active_y, active_z)
            iterations[active] += 1
            x[active], diagonal[active] = active_x, active_diagonal
            residual[active] = active_residual
            if residuals is not None:
                residuals[iteration:, active] = active_residual
            if errors is not None and reference is not None:
                errors[iteration:, active] = max_error(active_x, reference[active])
        return Solution(x, -log_abs_det(diagonal), residual, iterations, residuals, errors)


@dataclass(frozen=True, repr=False)
class InversionResult:
    """What came of an inversion, per sample and per layer; check ``converged`` before using ``x``.

    ``converged`` bounds the residual |f(x) - z|, not the error of x: where the map is nearly flat
    or steep, a small residual leaves a larger error, and float64 makes both smaller.

    L layers are listed in the direction of ``forward``, data first; a reshaping (squeeze) is not
    counted. T is the solver's number of iterations; a sample that stopped earlier keeps its last
    value in the rows that follow.
    """

    x: Tensor  #: (B, ...), the answer where ``converged``, the last iterate elsewhere
    log_det: Tensor  #: (B,), of the inverse map at x
    residual: Tensor  #: (B,), of the worst layer; of a composition as a whole, if that is worse
    iterations: Tensor  #: (B,), int64, the largest over the layers
    converged: Tensor  #: (B,), bool: x and log_det finite, every residual within the tolerance
    layers: tuple[str, ...]  #: names of the layers
    layer_residuals: Tensor  #: (L, B)
    layer_converged: Tensor  #: (L, B), bool
    tolerance: float  #: the one applied
    trace: list[Tensor] | None = None  #: residuals (T, B) of each layer, if asked for
    error_trace: list[Tensor] | None = None  #: ``max |x - reference|`` (T, B), if a reference came

    def __repr__(self) -> str:
        most = int(self.iterations.max()) if len(self.iterations) else 0
        worst = float(self.residual.max()) if len(self.residual) else 0.0
        return (
            f"InversionResult({int(self.converged.sum())} of {len(self.converged)} samples "
            f"converged, worst residual {worst:.3g}, at most {most} iterations a layer)"
        )

    @property
    def failed_layer(self) -> str | None:
        """The layer where the first failure happened (solving goes from the last to the first)."""
        failed = (~self.layer_converged).any(1).tolist()
        names = [name for name, fails in zip(self.layers, failed, strict=True) if fails]
        return names[-1] if names else None

    def raise_if_not_converged(self) -> None:
        """Raise :class:`NotConvergedError` unless every sample converged."""
        if not bool(self.converged.all()):
            raise NotConvergedError(self)


class NotConvergedError(RuntimeError):
    """An inversion did not converge for some sample; ``result`` holds all that is known."""

    def __init__(self, result: InversionResult) -> None:
        self.result = result
        layer = result.failed_layer
        residuals = result.layer_residuals[result.layers.index(layer)] if layer else result.residual
        failed = int((~result.converged).sum())
        place = f"layer {layer!r}" if layer else "the map as a whole"
        super().__init__(
            f"{failed} of {len(result.converged)} samples did not converge; the first failure is "
            f"in {place}, worst residual {float(residuals.max()):.3g}, tolerance "
            f"{result.tolerance:.3g}. Try solver=FixedPoint(alpha, iterations) with a smaller "
            "alpha and more iterations, a larger tolerance, or float64; a z outside the range of "
            "the map has no inverse, nor has a map whose parameters are not finite. The error's "
            ".result tells the samples apart."
        )

    def __reduce__(self) -> tuple[type["NotConvergedError"], tuple[InversionResult]]:
        return type(self), (self.result,)


@torch.no_grad()
def invert(
    module: Invertible,
    z: Tensor,
    solver: FixedPoint | None = None,
    *,
    trace: bool = False,
    reference: Tensor | None = None,
) -> InversionResult:
    """Invert a layer, a pair, a network or anything of the calculus, and report how it went.

    Never runs below float32: half-precision z and parameters are taken to float32 first, and
    autocast and TensorFloat-32 are off inside. Not differentiable.

    Args:
        module: what to invert.
        z: (B, ...), an output of ``module``.
        solver: ``FixedPoint()`` by default.
        trace: also return the residual of every sample after every iteration, for each layer.
        reference: the true x (B, ...): with the trace come the errors against it.

    Raises:
        TypeError, ValueError: z or reference is not a finite tensor of the right shape, dtype and
            device, module or solver is of another kind, or a reference came without ``trace``.
    """
    if not isinstance(module, Invertible):
        raise TypeError(f"module must be an Invertible, got {type(module).__name__}")
    solver = FixedPoint() if solver is None else solver
    if not isinstance(solver, FixedPoint):
        raise TypeError(f"solver must be a FixedPoint, got {type(solver).__name__}")
    if reference is not None and not trace:
        raise ValueError("reference is for the trace: give trace=True with it")
    module = _at_least_float32(module)
    z = _prepare(module, "z", z, module.output_shape)
    stages = list(module.stages())
    with torch.autocast(z.device.type, enabled=False), full_float32():
        references: list[Tensor | None] = [None] * len(stages)
        if reference is not None:
            point = _prepare(module, "reference", reference, module.input_shape)
            if len(point) != len(z):
                raise ValueError(f"reference has {len(point)} samples, z has {len(z)}")
            for index, (_, stage) in enumerate(stages):
                references[index] = point
                point, _ = stage(point)

        solved: list[tuple[str, Solution]] = []
        x = z
        log_det = z.new_zeros(len(z))
        for (name, stage), known in zip(reversed(stages), reversed(references), strict=True):
            solution = stage.solve(x, solver, trace=trace, reference=known)
            x = solution.x
            log_det = log_det + solution.log_det
            if not isinstance(stage, Reshaping):
                solved.insert(0, (name or type(stage).__name__, solution))
        # Residuals of the factors do not bound that of a composition, which is one map.
        whole = z.new_zeros(len(z))
        if isinstance(module, Stage) and len(stages) > 1:
            whole = relative_residual(module.evaluator()(x)[0], z)
    return _collect(x, log_det, whole, solved, solver.tolerance_for(z.dtype))


def _collect(
    x: Tensor, log_det: Tensor, whole: Tensor, solved: list[tuple[str, Solution]], tolerance: float
) -> InversionResult:
    """Join the solutions of the layers, of which there may be none, and the residual as a whole."""
    solutions = [solution for _, solution in solved]
    none = x.new_zeros(0, len(x))
    residuals = torch.cat([none, *(solution.residual[None] for solution in solutions)])
    iterations = torch.cat([none.long(), *(solution.iterations[None] for solution in solutions)])
    converged = torch.cat(
        [
            none.bool(),
            *(
                (
                    solution.x.isfinite().flatten(1).all(1)
                    & solution.log_det.isfinite()
                    & (solution.residual <= tolerance)
                )[None]
                for solution in solutions
            ),
        ]
    )
    traces = [solution.trace for solution in solutions if solution.trace is not None]
    errors = [solution.error_trace for solution in solutions if solution.error_trace is not None]
    return InversionResult(
        x=x,
        log_det=log_det,
        residual=torch.cat([whole[None], residuals]).amax(0),  # keeps a NaN
        iterations=torch.cat([iterations.new_zeros(1, len(x)), iterations]).amax(0),
        converged=converged.all(0) & (whole <= tolerance),
        layers=tuple(name for name, _ in solved),
        layer_residuals=residuals,
        layer_converged=converged,
        tolerance=tolerance,
        trace=traces or None,
        error_trace=errors or None,
    )


def _at_least_float32(module: Invertible) -> Invertible:
    """The module, or a float32 copy if any of its parameters is of lower precision."""
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
        return copy.deepcopy(module).float()
    return module


def _prepare(module: Invertible, name: str, x: Tensor, shape: Shape | None) -> Tensor:
    """Take a half-precision input to float32, then check it."""
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    module.check(name, x, shape)
    check_finite(name, x)
    return x

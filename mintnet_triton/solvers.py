"""Solvers of f(x) = z for one triangular map: Algorithm 1, the wavefront, and a choice of both."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from mintnet_triton.checks import check_integer, check_number
from mintnet_triton.kernels import Bracket, Wave

Evaluator = Callable[[Tensor], tuple[Tensor, Tensor]]
LinearSolver = Callable[[Tensor], Tensor]


class Solvable(Protocol):
    """What solvers ask of a map."""

    def evaluator(self) -> Evaluator:
        """x -> (f(x), diagonal of the Jacobian), both shaped like x."""

    def start(self, z: Tensor) -> Tensor:
        """Where Algorithm 1 starts."""

    def slope_bounds(self) -> tuple[Tensor, Tensor] | None:
        """Bounds of the Jacobian's diagonal that broadcast against x, if they are known."""

    def of_samples(self, chosen: Tensor) -> Self:
        """The map for some samples alone; itself, where it is the same for all."""

    @property
    def has_wavefront(self) -> bool:
        """Whether :meth:`wavefront` solves it."""

    def wavefront(self, z: Tensor) -> Wave:
        """The solution, in float64, in the order of dependency."""

    def exact_residual(self, x: Tensor, z: Tensor) -> Tensor:
        """The relative residual of x, (B,), computed in float64."""

    def solve(
        self, z: Tensor, solver: "Solver", *, trace: bool, reference: Tensor | None
    ) -> "Solution":
        """Let a solver find x, or find it in a better way."""


@dataclass(frozen=True)
class Solution:
    """A solver's answer for one map, per sample."""

    x: Tensor  # (B, ...)
    log_det: Tensor  # (B,), of the inverse map
    residual: Tensor  # (B,), at x
    iterations: Tensor  # (B,), int64
    wavefront: Tensor  # (B,), bool: whether the wavefront finished it
    trace: Tensor | None = None  # (T, B)
    error_trace: Tensor | None = None  # (T, B)


def log_det_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def log_abs_det(diagonal: Tensor) -> Tensor:
    """log|det| (B,) of a triangular matrix from its diagonal (B, ...) (Theorem 1)."""
    return diagonal.to(log_det_dtype(diagonal)).abs().log().flatten(1).sum(1)


def max_error(x: Tensor, reference: Tensor) -> Tensor:
    """Largest absolute difference per sample, (B,)."""
    return (x - reference).abs().flatten(1).amax(1)


def relative_residual(y: Tensor, z: Tensor) -> Tensor:
    """``max |y - z| / max(1, max |z|)`` per sample, (B,)."""
    return max_error(y, z) / z.abs().flatten(1).amax(1).clamp(min=1)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, kept within its finite numbers."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


class Solver:
    """A way to solve f(x) = z for a triangular map f."""

    tolerance: float | None

    def __post_init__(self) -> None:
        if self.tolerance is None:
            return
        tolerance = check_number("tolerance", self.tolerance)
        if not 0 <= tolerance < float("inf"):
            raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
        object.__setattr__(self, "tolerance", tolerance)  # a solver is frozen

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance, or the default of that dtype."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-12 if dtype == torch.float64 else 1e-5

    def with_tolerance(self, tolerance: float) -> Self:
        """The same solver with that tolerance."""
        other = copy(self)
        object.__setattr__(other, "tolerance", tolerance)
        return other

    def dtype_for(self, z: Tensor) -> torch.dtype:
        """What a problem with this z is solved in: its own dtype, or float64."""
        return z.dtype

    @property
    def rows(self) -> int:
        """Rows of the trace of a solution in closed form."""
        return 1

    def solve(
        self, map_: Solvable, z: Tensor, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        """Find x with f(x) = z.

        Args:
            map_: f.
            z: (B, ...).
            trace: keep residuals, one row an iteration.
            reference: the true x, for the trace of errors.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Algorithm 1: ``x <- x - alpha (f(x) - z) / diag J_f(x)``, from x = z / t.

    A Newton iteration that ignores everything off the diagonal, hence parallel over all variables;
    it converges locally (Theorem 2). A sample stops as soon as its residual is within the
    tolerance.

    Args:
        alpha: step, in the open interval (0, 2).
        iterations: most updates of a layer, T in the paper.
        tolerance: largest residual of a converged sample, ``max |f(x) - z| / max(1, max |z|)``.
            None means 1e-5 in float32 and 1e-12 in float64.
        safeguard: keep each variable inside a bracket of its own, from the signs of its errors and
            the bounds of its slope, and bisect where two steps have not halved it; a bracket that
            an error contradicts, for the variables before have moved, is opened anew. So nothing
            cycles once what comes before has settled: with enough iterations it converges for
            every Mint layer. Where the slope has no known bound, it changes nothing.
        coarse: on a GPU, begin with products in float16 where z is float32, up to a residual of
            1e-4 or until an update does not halve it, and finish without; up to T updates each. A
            trace has none of it.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    alpha: float = 1.0
    iterations: int = 100
    tolerance: float | None = None
    safeguard: bool = False
    coarse: bool = False

    def __post_init__(self) -> None:
        alpha = check_number("alpha", self.alpha)
        if not 0 < alpha < 2:
            raise ValueError(
                f"alpha must be in the open interval (0, 2), got {alpha}: outside it the "
                "iteration does not converge even locally (Theorem 2)"
            )
        object.__setattr__(self, "alpha", alpha)
        iterations = check_integer("iterations", self.iterations, least=1)
        object.__setattr__(self, "iterations", iterations)
        super().__post_init__()

    @property
    def rows(self) -> int:
        return self.iterations

    def solve(
        self, map_: Solvable, z: Tensor, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        evaluate, x = map_.evaluator(), map_.start(z).clone()
        tolerance = self.tolerance_for(z.dtype)
        y, diagonal = evaluate(x)
        diagonal = diagonal.clone()  # it may be a view of one value, and is written to below
        residual = relative_residual(y, z)
        iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        bounds = map_.slope_bounds() if self.safeguard else None
        bracket = None if bounds is None else Bracket(*bounds, x, moving=True)
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
                if bracket is not None:
                    bracket.keep(running)
                if (some := map_.of_samples(running)) is not map_:
                    map_, evaluate = some, some.evaluator()
            if len(active) == 0:
                break
            error = active_y - active_z
            step = self.alpha * error / active_diagonal
            active_x = bracket.step(active_x, error, step) if bracket else active_x - step
            active_y, active_diagonal = evaluate(active_x)
            active_residual = relative_residual(active_y, active_z)
            iterations[active] += 1
            x[active], diagonal[active] = active_x, active_diagonal
            residual[active] = active_residual
            if residuals is not None:
                residuals[iteration:, active] = active_residual
            if errors is not None and reference is not None:
                errors[iteration:, active] = max_error(active_x, reference[active])
        finished = torch.zeros_like(iterations, dtype=torch.bool)
        return Solution(
            x, -log_abs_det(diagonal), residual, iterations, finished, residuals, errors
        )


@dataclass(frozen=True)
class Wavefront(Solver):
    """Solve every variable exactly, in the order of dependency: it converges for every input.

    What does not depend on each other is solved at once, each variable by Newton's method inside a
    bracket that the bounds of its slope give. All of a layer costs about one forward pass, and
    K x K more for each step of Newton's method. Always in float64: x is as exact as the dtype of z
    can say, unless the map is so steep that float64 itself is not enough, and then
    ``converged`` is False. For Mint layers whose activation has a bounded slope.

    Args:
        tolerance: as that of :class:`FixedPoint`; it decides what counts as converged, not when
            to stop: every variable is solved to rounding.

    Raises:
        ValueError: an argument outside its range; at a call, an activation whose steepest slope
            is not known.
        TypeError: at a call, a map that is not a Mint layer and has no inverse in closed form.
    """

    tolerance: float | None = None

    def dtype_for(self, z: Tensor) -> torch.dtype:
        return torch.float64

    def solve(
        self, map_: Solvable, z: Tensor, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        wave = map_.wavefront(z)
        x = rounded(wave.x, z.dtype)
        if x.dtype == wave.x.dtype:
            size = z.abs().flatten(1).amax(1).clamp(min=1)
            residual = wave.error.abs().flatten(1).amax(1) / size
        else:
            residual = map_.exact_residual(x, z).to(z.dtype)
        # Where numbers overflow there is no residual, and no solution.
        residual = residual.nan_to_num(nan=torch.inf, posinf=torch.inf)
        log_det = -log_abs_det(wave.diagonal)
        return Solution(
            x,
            log_det.to(log_det_dtype(z)),
            residual,
            wave.steps.flatten(1).amax(1),
            torch.ones(len(z), dtype=torch.bool, device=z.device),
            residual[None] if trace else None,
            max_error(x, reference)[None] if trace and reference is not None else None,
        )


@dataclass(frozen=True)
class Auto(Solver):
    """The default: whatever is fast on the device at hand, and the wavefront where that fails.

    On a CPU, the wavefront at once: it does less arithmetic than a few iterations of Algorithm 1.
    On a GPU, Algorithm 1 first, which keeps it busier, and that with coarse products first (see
    :class:`FixedPoint`); x is then judged by a residual in float64, and the samples that have not
    converged are solved by the wavefront, layer by layer. Maps that have no wavefront are left to
    Algorithm 1 with its safeguard.

    Args:
        tolerance: as that of :class:`FixedPoint`.

    Raises:
        ValueError: an argument outside its range.
    """

    tolerance: float | None = None

    #: iterations of Algorithm 1 before the wavefront: what converges does so in 3 to 20
    ITERATIONS = 30

    def dtype_for(self, z: Tensor) -> torch.dtype:
        return torch.float64 if self._exact_at_once(z) else z.dtype

    def _exact_at_once(self, z: Tensor) -> bool:
        return z.device.type == "cpu"

    def solve(
        self, map_: Solvable, z: Tensor, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        if not map_.has_wavefront:
            cautious = FixedPoint(tolerance=self.tolerance, safeguard=True)
            return cautious.solve(map_, z, trace=trace, reference=reference)
        exact = Wavefront(self.tolerance)
        if self._exact_at_once(z):
            return exact.solve(map_, z, trace=trace, reference=reference)
        first = FixedPoint(iterations=self.ITERATIONS, tolerance=self.tolerance, coarse=True)
        solution = map_.solve(z, first, trace=trace, reference=reference)
        residual = map_.exact_residual(solution.x, z).to(z.dtype)
        solution = replace(solution, residual=residual)
        failed = ~(residual <= self.tolerance_for(z.dtype))
        if bool(failed.any()):
            known = None if reference is None else reference[failed]
            some = map_.of_samples(failed)
            exactly = exact.solve(some, z[failed], trace=trace, reference=known)
            solution = _with_rest(solution, failed, exactly)
        return solution


def _with_rest(solution: Solution, failed: Tensor, rest: Solution) -> Solution:
    """A solution whose failed samples another solver has finished; traces get one row more."""

    def put(values: Tensor, new: Tensor) -> Tensor:
        values = values.clone()
        values[..., failed] = new
        return values

    def append(rows: Tensor | None, last: Tensor | None) -> Tensor | None:
        if rows is None or last is None:
            return None
        return torch.cat([rows, put(rows[-1:], last)])

    x = solution.x.clone()
    x[failed] = rest.x
    return Solution(
        x,
        put(solution.log_det, rest.log_det),
        put(solution.residual, rest.residual),
        put(solution.iterations, solution.iterations[failed] + rest.iterations),
        put(solution.wavefront, rest.wavefront),
        append(solution.trace, rest.trace),
        append(solution.error_trace, rest.error_trace),
    )

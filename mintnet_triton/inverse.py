"""Inverting a map, stage by stage, and what is known of the result."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mintnet_triton.certificate import ErrorBound
from mintnet_triton.checks import check_finite
from mintnet_triton.implicit import differentiable_solution
from mintnet_triton.invertible import (
    Invertible,
    Reshaping,
    Shape,
    Stage,
    as_invertible,
    given_stages,
)
from mintnet_triton.kernels import full_float32, is_exported, is_transformed
from mintnet_triton.solvers import Auto, Solution, Solver, log_det_dtype, rounded
from mintnet_triton.views import in_dtype

CPU = torch.device("cpu")


@dataclass(frozen=True, repr=False)
class InversionResult:
    """What came of an inversion, per sample and per layer; check ``converged`` before using ``x``.

    ``converged`` bounds the residual ``|f(x) - z|``, not the error of x: where the map is nearly
    flat or steep, a small residual leaves a larger error, which ``error_bound`` tells.

    L layers are listed in the direction of ``forward``, data first; a reshaping (squeeze) is not
    counted. T is the solver's number of iterations, 1 for the wavefront; a sample that stopped
    earlier keeps its last value in the rows that follow.
    """

    x: Tensor  #: (B, ...), the answer where ``converged``, the last iterate elsewhere
    log_det: Tensor  #: (B,), of the inverse map at x
    residual: Tensor  #: (B,), of the worst layer; of a composition as a whole, if that is worse
    iterations: Tensor  #: (B,), int64, the largest over the layers; of the wavefront, Newton steps
    converged: Tensor  #: (B,), bool: x and log_det finite, every residual within the tolerance
    layers: tuple[str, ...]  #: names of the layers
    layer_residuals: Tensor  #: (L, B)
    layer_converged: Tensor  #: (L, B), bool
    layer_wavefront: Tensor  #: (L, B), bool: whether the wavefront finished it
    tolerance: float  #: the one applied
    error_bound: Tensor | None = (
        None  #: (B,), float64, of ``max |x - exact inverse|``, if asked for
    )
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
            f"{result.tolerance:.3g}. The default solver does not fail on a Mint layer unless "
            "rounding keeps it from the tolerance: a larger tolerance, or float64, helps then. "
            "With FixedPoint, a smaller alpha, more iterations or the safeguard may help. A z "
            "outside the range of the map has no inverse, nor has a map whose parameters are not "
            "finite. The error's .result tells the samples apart."
        )

    def __reduce__(self) -> tuple[type["NotConvergedError"], tuple[InversionResult]]:
        return type(self), (self.result,)


@torch.no_grad()
def invert(
    module: Invertible,
    z: Tensor,
    solver: Solver | None = None,
    *,
    trace: bool = False,
    reference: Tensor | None = None,
    certify: bool = False,
    context: Tensor | None = None,
) -> InversionResult:
    """Invert a layer, a pair, a network or anything of the calculus, and report how it went.

    Never runs below float32: half-precision z and parameters are taken to float32 first, and
    autocast and TensorFloat-32 are off inside. The wavefront runs in float64, through all layers,
    and x is rounded at the end. Not differentiable; ``module.inverse`` is. Under ``FixedPoint`` a
    CUDA graph may capture it; nobody looks at z then: if it is not finite, it has not converged.

    Args:
        module: what to invert.
        z: (B, ...), an output of ``module``.
        solver: ``Auto()`` by default.
        trace: also return the residual of every sample after every iteration, for each layer.
        reference: the true x (B, ...): with the trace come the errors against it.
        certify: also bound the error of x, by residuals in float64 carried through the inverse's
            Jacobian, layer by layer; costs about three forward passes. Parameters, and what context
            networks give, are taken for exact.
        context: as ``module`` takes it, one row a sample.

    Raises:
        TypeError, ValueError: z, reference or context is not a finite tensor of the right shape,
            dtype and device, module or solver is of another kind, a reference came without
            ``trace``, or context is missing or superfluous.
    """
    result: InversionResult = invert_with_gradients(
        module, z, solver, context, trace=trace, reference=reference, certify=certify
    )
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its steps depend on values
def invert_with_gradients(
    module: Invertible,
    z: Tensor,
    solver: Solver | None,
    context: Tensor | None = None,
    *,
    trace: bool = False,
    reference: Tensor | None = None,
    certify: bool = False,
) -> InversionResult:
    """What :func:`invert` does, differentiable wherever gradients are on."""
    module = as_invertible("module", module)
    solver = Auto() if solver is None else solver
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver, got {type(solver).__name__}")
    if reference is not None and not trace:
        raise ValueError("reference is for the trace: give trace=True with it")
    z = _prepare(module, "z", z, module.output_shape)
    if reference is not None:
        reference = _prepare(module, "reference", reference, module.input_shape)
        if len(reference) != len(z):
            raise ValueError(f"reference has {len(reference)} samples, z has {len(z)}")
    module.check_context(context, z)
    if context is not None and (like := module._like()) is not None:
        context = context.to(like.dtype)  # which is another one under autocast alone
    solver = solver.with_tolerance(solver.tolerance_for(z.dtype))
    # A default device of the user's may be another one than that of z.
    default = torch.device(z.device) if torch.get_default_device() != CPU else nullcontext()
    with torch.autocast(z.device.type, enabled=False), full_float32(), default:
        return _solve_stages(module, z, context, solver, trace, reference, certify)


def _solve_stages(
    module: Invertible,
    z: Tensor,
    context: Tensor | None,
    solver: Solver,
    trace: bool,
    reference: Tensor | None,
    certify: bool,
) -> InversionResult:
    """Solve the stages of a module in the dtype that the solver wants."""
    dtype = solver.dtype_for(z)
    differentiable = torch.is_grad_enabled() or is_transformed()
    stages = list(given_stages(module, context))
    tensors = [in_dtype(stage.tensors(), dtype, detached=not differentiable) for _, stage in stages]
    references = _references(stages, tensors, reference, dtype)
    left = sum(not isinstance(stage, Reshaping) for _, stage in stages)
    x = z.to(dtype)
    log_det = x.new_zeros(len(x), dtype=log_det_dtype(x))
    bound = ErrorBound(x) if certify else None
    solved: list[tuple[str, Solution]] = []
    for (name, stage), weights, known in zip(
        reversed(stages), reversed(tensors), reversed(references), strict=True
    ):
        if isinstance(stage, Reshaping):
            x = _moved_back(stage, solver, x)
            if bound is not None:
                bound.reshape(partial(_moved_back, stage, solver))
            continue
        left -= 1
        solve = partial(
            _solve,
            solver=solver,
            trace=trace,
            reference=known,
            rounding=z.dtype if not left else dtype,
        )
        target = x
        if differentiable:
            solution, x, step_log_det = differentiable_solution(stage, weights, target, solve)
        else:
            solution = solve(stage.view(weights), target)
            x, step_log_det = solution.x, solution.log_det
        if bound is not None:
            exact = stage.view(in_dtype(weights, torch.float64, detached=True))
            bound.through(exact, solution.x, target)
        log_det = log_det + step_log_det
        solved.insert(0, (name or type(stage).__name__, solution))
    # Residuals of the factors do not bound that of a composition, which is one map.
    whole = z.new_zeros(len(z), dtype=dtype)
    if isinstance(module, Stage) and len(stages) > 1:
        with torch.no_grad():
            whole = module.in_dtype(dtype).exact_residual(x, z.to(dtype))
    x, log_det = x.to(z.dtype), log_det.to(log_det_dtype(z))
    return _collect(x, log_det, whole, solved, solver, bound)


def _solve(
    stage: Stage,
    z: Tensor,
    solver: Solver,
    trace: bool,
    reference: Tensor | None,
    rounding: torch.dtype,
) -> Solution:
    """Solve a stage; where x is to be rounded afterwards, it is judged as such."""
    with torch.no_grad():
        solution = stage.solve(z, solver, trace=trace, reference=reference)
        if rounding != z.dtype:
            nearest = rounded(solution.x, rounding).to(z.dtype)
            residual = stage.exact_residual(nearest, z).nan_to_num(nan=torch.inf)
            solution = replace(solution, x=nearest, residual=residual)
    return solution


def _moved_back(stage: Reshaping, solver: Solver, values: Tensor) -> Tensor:
    return stage.solve(values, solver, trace=False, reference=None).x


def _references(
    stages: list[tuple[str, Stage]],
    tensors: list[dict[str, Tensor]],
    reference: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """The true x of each stage."""
    if reference is None:
        return [None] * len(stages)
    points: list[Tensor | None] = []
    point = reference.to(dtype)
    for (_, stage), weights in zip(stages, tensors, strict=True):
        points.append(point)
        point, _ = stage.view(weights)._forward(point)
    return points


def _collect(
    x: Tensor,
    log_det: Tensor,
    whole: Tensor,
    solved: list[tuple[str, Solution]],
    solver: Solver,
    bound: ErrorBound | None,
) -> InversionResult:
    """Join the solutions of the layers, of which there may be none, and the residual as a whole."""
    solutions = [solution for _, solution in solved]
    tolerance = solver.tolerance_for(x.dtype)

    def stack(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        none = x.new_zeros(0, len(x), dtype=dtype)
        return torch.cat([none, *(row[None].to(dtype) for row in rows)])

    residuals = stack([solution.residual for solution in solutions], x.dtype)
    iterations = stack([solution.iterations for solution in solutions], torch.int64)
    finite = [
        solution.x.isfinite().flatten(1).all(1) & solution.log_det.isfinite()
        for solution in solutions
    ]
    converged = stack(finite, torch.bool) & (residuals <= tolerance)
    traces = [solution.trace for solution in solutions if solution.trace is not None]
    errors = [solution.error_trace for solution in solutions if solution.error_trace is not None]
    return InversionResult(
        x=x,
        log_det=log_det,
        residual=torch.cat([whole[None].to(x.dtype), residuals]).amax(0),  # keeps a NaN
        iterations=torch.cat([iterations.new_zeros(1, len(x)), iterations]).amax(0),
        # A value that rounding has made infinite is no answer.
        converged=converged.all(0) & (whole <= tolerance) & x.isfinite().flatten(1).all(1),
        layers=tuple(name for name, _ in solved),
        layer_residuals=residuals,
        layer_converged=converged,
        layer_wavefront=stack([solution.wavefront for solution in solutions], torch.bool),
        tolerance=tolerance,
        error_bound=None if bound is None else bound.value(),
        trace=[trace.to(x.dtype) for trace in traces] or None,
        error_trace=[trace.to(x.dtype) for trace in errors] or None,
    )


def _prepare(module: Invertible, name: str, x: Tensor, shape: Shape | None) -> Tensor:
    """Check an input, which half-precision modules take in float32, too, and take it there."""
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    module.check(name, x, shape, widened=True)
    if is_exported() or x.is_meta or isinstance(x, FakeTensor):
        raise NotImplementedError(
            f"{name} has no values while a graph is exported or traced, or on the meta device, and "
            "an inverse takes as many steps as they need; export the forward pass"
        )
    check_finite(name, x)
    return x

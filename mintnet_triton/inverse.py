"""What is invertible, how it is inverted, and what is known of the result.

A :class:`Stage` is solved as a whole by one of the :mod:`.solvers`; a :class:`Chain` (a pair, a
network) is not triangular and is inverted stage by stage, from the last to the first.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mintnet_triton.certificate import ErrorBound
from mintnet_triton.checks import NonFiniteError, check_finite, check_tensor
from mintnet_triton.context import check_context
from mintnet_triton.implicit import differentiable_solution
from mintnet_triton.kernels import full_float32, is_exported, is_transformed
from mintnet_triton.solvers import (
    Auto,
    Evaluator,
    LinearSolver,
    Solution,
    Solver,
    log_det_dtype,
    relative_residual,
    rounded,
)
from mintnet_triton.views import tensors_of, twin, view_of

Shape = tuple[int | None, ...]
CPU = torch.device("cpu")
#: where torch's modules around another keep it
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "module")


class Invertible(nn.Module):
    """A map x -> (y, log_det) over batches, with an inverse y -> (x, log_det).

    ``log_det`` is log|det| of the Jacobian per sample, shape (B,): float64 for float64 input, else
    float32. ``forward`` goes from data to latent.

    A map may be made for a ``context``: then it is one for each context, (B, channels) or
    (B, channels, H, W), one row a sample, and whatever takes x takes one, too.
    """

    context: int | None = None  #: channels of the context; None where none is taken
    _context: Tensor | None = None  # of what :meth:`given` returns

    @property
    def input_shape(self) -> Shape | None:
        """Sizes of an input after the batch dimension; None where any will do."""
        return None

    @property
    def output_shape(self) -> Shape | None:
        """Sizes of an output after the batch dimension; None where any will do."""
        return self.input_shape

    def check(self, name: str, x: Tensor, shape: Shape | None, *, widened: bool = False) -> None:
        """Raise a typed error unless ``x`` is a finite tensor of this shape, dtype and device.

        Args:
            widened: whether x is float32 where the parameters are of lower precision.
        """
        if isinstance(x, Tensor) and shape is None:
            if x.ndim < 2:
                raise ValueError(f"{name} must have shape (batch, ...), got {tuple(x.shape)}")
            shape = (None,) * (x.ndim - 1)
        like = self._like()
        if widened and like is not None:
            like = like.new_empty(0, dtype=log_det_dtype(like))
        check_tensor(name, x, shape or (), like)

    def _like(self) -> Tensor | None:
        """A parameter, whose dtype and device are those of inputs."""
        return next((one for one in self.parameters() if one.is_floating_point()), None)

    def check_context(self, context: Tensor | None, x: Tensor) -> None:
        """Raise a typed error unless there is a context if one is taken, and it fits x."""
        size = (self.input_shape or (None, None, None))[1:]
        check_context(self, context, x, size, self._like())

    def given(self, context: Tensor | None) -> Self:
        """The map for a context that has been checked, or itself if it takes none.

        It is to be computed at once, or solved: it shares everything else.
        """
        if self.context is None or context is None:
            return self
        view = twin(self)
        view._context = context
        return view

    def context_after(self, context: Tensor | None) -> Tensor | None:
        """The context of a map that follows this one."""
        return context

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to y.

        Args:
            x: (B, ...).
            context: (B, channels) or (B, channels, H, W), H and W as those of x, in the dtype of
                the parameters, where the map was made for one.

        Returns:
            y, and log|det dy/dx| of shape (B,).

        Raises:
            TypeError, ValueError: x or context is not a finite tensor of the right shape, dtype and
                device, or context is missing or superfluous.
        """
        self.check("x", x, self.input_shape)
        self.check_context(context, x)
        return self.given(context)._forward(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def stages(self) -> Iterator[tuple[str, "Stage"]]:
        """The named stages from data to latent; a stage is its own only one, with no name."""
        raise NotImplementedError

    def inverse(
        self, y: Tensor, solver: Solver | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map y back to x; ``Auto()`` is the default solver.

        Differentiable by y, the context and the parameters, by the implicit function theorem:
        memory does not grow with iterations. Under ``torch.func``, ``vmap`` alone is refused.

        Returns:
            x, and log|det dx/dy| of shape (B,).

        Raises:
            NotConvergedError: some sample did not converge; it carries the ``result``.
            TypeError, ValueError: y or context is not a finite tensor of the right shape, dtype and
                device, or context is missing or superfluous.
        """
        result = _invert(self, y, solver, context)
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
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        """Find x with f(x) = z."""
        raise NotImplementedError

    def exact_residual(self, x: Tensor, z: Tensor) -> Tensor:
        """``max |f(x) - z| / max(1, max |z|)`` (B,), computed in float64 where weights allow it."""
        return relative_residual(self.evaluator()(x)[0], z)

    def jacobian_solver(self, x: Tensor, *, transpose: bool = False) -> LinearSolver:
        """right -> v with ``J v = right``, or ``J^T v = right``, for the Jacobian J at x (B, ...).

        ``right`` may have several times as many samples, x being repeated for them.
        """
        raise NotImplementedError

    def magnitude(self, x: Tensor) -> Tensor:
        """What rounding in f(x) is relative to, shaped like x: the sum of absolute values."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All that the map depends on but x, by name, with gradients; computed once."""
        return tensors_of(self)

    def view(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same map with these for what :meth:`tensors` gave, to be evaluated or solved."""
        return view_of(self, tensors)

    def of_samples(self, chosen: Tensor) -> Self:
        """The map for some samples of a batch, a mask or indices: itself, if it is one for all."""
        return self

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """A view in that dtype, without gradients."""
        return self.view(_in_dtype(self.tensors(), dtype, detached=True))


class Reshaping(Stage):
    """A stage that only moves values: its inverse is exact and its log-det 0."""


class Chain(Invertible):
    """Invertible maps one after the other."""

    def steps(self) -> Iterable[tuple[str, Invertible]]:
        """The named maps, first one first."""
        raise NotImplementedError

    def stages(self) -> Iterator[tuple[str, Stage]]:
        for name, step in self.steps():
            step = as_invertible(name, step)
            for inner, stage in step.stages():
                yield (f"{name}.{inner}" if inner else name), stage

    @property
    def context(self) -> int | None:  # type: ignore[override]  # that of its steps
        inner = (as_invertible(name, step).context for name, step in self.steps())
        found = {one for one in inner if one is not None}
        if len(found) > 1:
            raise ValueError(f"the maps of one network take contexts of {sorted(found)} channels")
        return next(iter(found), None)

    def context_after(self, context: Tensor | None) -> Tensor | None:
        for name, step in self.steps():
            context = as_invertible(name, step).context_after(context)
        return context

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0], dtype=log_det_dtype(x))
        context = self._context
        for name, step in self.steps():
            own: tuple[Tensor, ...] = ()
            if context is not None:
                inner = as_invertible(name, step)
                own = () if inner.context is None else (context,)
                context = inner.context_after(context)
            try:
                x, step_log_det = step(x, *own)
            except NonFiniteError as error:
                # Its own input has passed the check: the fault is in here.
                raise NonFiniteError(f"inside the network, entering {name!r}: {error}") from error
            log_det = log_det + step_log_det
        return x, log_det


def given_stages(module: Invertible, context: Tensor | None) -> Iterator[tuple[str, Stage]]:
    """The named stages of a map, each for the context as it gets there."""
    for name, stage in module.stages():
        yield name, stage.given(context)
        context = stage.context_after(context)


def as_invertible(name: str, module: nn.Module) -> Invertible:
    """The invertible map itself, around which torch may have put a module of its own.

    To compile it, to checkpoint it, or to train it in many processes or as an average.

    Raises:
        TypeError: it is none.
    """
    inner: nn.Module | None = module
    while not isinstance(inner, Invertible):
        wrapped = (getattr(inner, one, None) for one in WRAPPED)
        inner = next((one for one in wrapped if isinstance(one, nn.Module)), None)
        if inner is None:
            raise TypeError(f"{name} must be an Invertible, got {type(module).__name__}")
    return inner


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
    result: InversionResult = _invert(
        module, z, solver, context, trace=trace, reference=reference, certify=certify
    )
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its steps depend on values
def _invert(
    module: Invertible,
    z: Tensor,
    solver: Solver | None,
    context: Tensor | None = None,
    *,
    trace: bool = False,
    reference: Tensor | None = None,
    certify: bool = False,
) -> InversionResult:
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
    tensors = [
        _in_dtype(stage.tensors(), dtype, detached=not differentiable) for _, stage in stages
    ]
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
            exact = stage.view(_in_dtype(weights, torch.float64, detached=True))
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


def _in_dtype(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, *, detached: bool
) -> dict[str, Tensor]:
    """Floating tensors in that dtype, or their own if that is wider."""

    def cast(one: Tensor) -> Tensor:
        one = one.detach() if detached and one.requires_grad else one
        return one.to(torch.promote_types(one.dtype, dtype)) if one.is_floating_point() else one

    return {name: cast(one) for name, one in tensors.items()}


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

"""What is invertible: a map with an inverse and a log-determinant, a stage, and a chain of them.

A :class:`Stage` is solved as a whole by one of the :mod:`.solvers`; a :class:`Chain` (a pair, a
network) is not triangular and is inverted stage by stage, from the last to the first, in
:mod:`.inverse`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from mintnet_triton.checks import NonFiniteError, check_finite, check_tensor
from mintnet_triton.context import check_context
from mintnet_triton.solvers import (
    Evaluator,
    LinearSolver,
    Solution,
    Solver,
    log_abs_det,
    log_det_dtype,
    max_error,
    relative_residual,
)
from mintnet_triton.views import in_dtype, tensors_of, twin, view_of

Shape = tuple[int | None, ...]
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

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Start the parameters that start from data, as those of an :class:`.ActNorm`.

        Each stage in turn sees what the stages before it, so started, make of x. Mint layers stay
        as they are, and where nothing starts from data, nothing is done. Call it once, before
        training: with the same x in all processes, and before a wrapper of torch's copies or
        divides the parameters.

        Args:
            x: (B, ...), a batch of at least two samples; some hundreds do well.
            context: as the map takes it, one row a sample.

        Raises:
            TypeError, ValueError: as ``forward``; fewer samples; or what would start from data is
                computed, by a parametrization or pruning.
        """
        self.check("x", x, self.input_shape)
        self.check_context(context, x)
        stages = list(given_stages(self, context))
        while stages and not stages[-1][1].starts_from_data:
            stages.pop()
        if stages and len(x) < 2:
            raise ValueError(f"x must have at least two samples to start from, got {len(x)}")
        for name, stage in stages:
            check_finite(f"x, on its way into {name!r},", x)
            _check_stored(name, stage.innermost(x)[0])
            stage.start_from(x)
            x, _ = stage.view(stage.tensors())._forward(x)

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
        from mintnet_triton.inverse import invert_with_gradients  # which builds on this file

        result = invert_with_gradients(self, y, solver, context)
        result.raise_if_not_converged()
        return result.x, result.log_det


class Stage(Invertible):
    """An invertible map that is inverted in one go."""

    starts_from_data = False  #: whether :meth:`start_from` does something

    def stages(self) -> Iterator[tuple[str, "Stage"]]:
        yield "", self

    def evaluator(self) -> Evaluator:
        """x -> (y, diagonal), with all that depends on the parameters alone computed once.

        The determinant of the Jacobian is the product of what stands for its diagonal.
        """
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

        ``right`` may have several times as many samples, x being repeated for them. J is to be
        triangular in some order of the variables, unless a stage has a solver of its own.
        """
        evaluate = self.evaluator()

        def solve(right: Tensor) -> Tensor:
            # Jacobi's method ends for what is triangular in any order of its rows, within as many
            # steps as there are rows.
            point = x.repeat(len(right) // max(1, len(x)), *[1] * (x.ndim - 1))
            _, diagonal = evaluate(point)
            with torch.enable_grad():
                pull = torch.func.vjp(lambda v: evaluate(v)[0], point)[1]
                # J v is the transpose of J^T v; forward mode would do more, and compile for it.
                push = torch.func.vjp(lambda v: pull(v)[0], torch.zeros_like(point))[1]
            solved = right / diagonal
            for _ in range(x.shape[1:].numel()):
                (image,) = (pull if transpose else push)(solved)
                change = (right - image) / diagonal
                solved = solved + change
                if bool((change.abs() <= torch.finfo(x.dtype).eps * solved.abs()).all()):
                    break
            return solved

        return solve

    def magnitude(self, x: Tensor) -> Tensor:
        """What rounding in f(x) is relative to, shaped like x: the sum of absolute values."""
        raise NotImplementedError

    def solve_exactly(
        self, z: Tensor, x: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        """The solution x, known in closed form, with the residual it really has."""
        # In float64: rounding of this dtype may hide what is left.
        y, diagonal = self.in_dtype(torch.float64).evaluator()(x.double())
        residual = relative_residual(y, z.double()).to(z.dtype)
        rows, none = solver.rows, torch.zeros(len(z), dtype=torch.int64, device=z.device)
        return Solution(
            x,
            -log_abs_det(diagonal).to(log_det_dtype(z)),
            residual,
            none,
            none.bool(),
            residual.repeat(rows, 1) if trace else None,
            max_error(x, reference).repeat(rows, 1) if trace and reference is not None else None,
        )

    def start_from(self, x: Tensor) -> None:
        """Start from the inputs x of this stage, in place, where that is its way; else nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the map depends on but x, by name, with gradients; computed once."""
        return tensors_of(self)

    def view(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same map with these for what :meth:`tensors` gave, to be evaluated or solved."""
        return view_of(self, tensors)

    def of_samples(self, chosen: Tensor) -> Self:
        """The map for some samples of a batch, a mask or indices: itself, if it is one for all."""
        return self

    def innermost(self, x: Tensor) -> tuple["Stage", Tensor]:
        """The stage that does the work, and what it sees of x: itself, and all of x."""
        return self, x

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """A view in that dtype, without gradients."""
        return self.view(in_dtype(self.tensors(), dtype, detached=True))


class Reshaping(Stage):
    """A stage that only moves values: its inverse is exact and its log-det 0."""

    def moved(self, x: Tensor) -> Tensor:
        """Images of any number of channels, moved as x is."""
        raise NotImplementedError

    def moved_back(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`moved`."""
        raise NotImplementedError

    def channels_after(self, channels: int) -> int:
        """What so many channels become."""
        raise NotImplementedError

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.moved(x), _no_log_det(x)

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        none = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        nothing = _no_log_det(z)
        return Solution(self.moved_back(z), nothing, z.new_zeros(len(z)), none, none.bool())


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


def _check_stored(name: str, stage: Stage) -> None:
    """Raise where something would be started that is computed anew at the next call."""
    stored = {one for one, _ in (*stage.named_parameters(), *stage.named_buffers())}
    if stage.starts_from_data and stage.tensors().keys() != stored:
        raise TypeError(
            f"{name or 'the map'} ({type(stage).__name__}) has parameters that are computed, by a "
            "parametrization or pruning: initialise it before"
        )


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


def _no_log_det(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=log_det_dtype(x))

"""Gradients of an inverse by the implicit function theorem.

With f(x) = z, dx = J^-1 (dz - df/dw dw) for the weights w of f. So a gradient g by x becomes
``v = J^-T g`` by z and ``-v df/dw`` by the weights: one triangular solve, and one pass forward and
backward through f at x, however x was found. All of it can be differentiated again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mintnet_triton.kernels import is_transformed
from mintnet_triton.solvers import LinearSolver, Solution

Pull = Callable[..., tuple[Tensor, ...]]


@dataclass
class _Problem:
    """A stage to be inverted, as a function of the tensors that it depends on."""

    stage: Any
    names: tuple[str, ...]
    constants: dict[str, Tensor]  # that have no gradient
    solve: Callable[[Any, Tensor], Solution]
    solution: Solution | None = None

    def at(self, tensors: Sequence[Tensor]) -> Any:
        """The stage with those tensors."""
        return self.stage.view(self.constants | dict(zip(self.names, tensors, strict=True)))

    def map(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and its log-determinant."""
        return cast(tuple[Tensor, Tensor], self.at(tensors)._forward(x))

    def jacobian_solver(
        self, x: Tensor, tensors: Sequence[Tensor], transpose: bool
    ) -> LinearSolver:
        return cast(LinearSolver, self.at(tensors).jacobian_solver(x, transpose=transpose))


def _pullback(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Pull]:
    """Outputs, and what takes gradients by them to gradients by all inputs, or the first ones.

    What torch.func.vjp does, but open to the kernels, which know no transforms.
    """
    if is_transformed():
        outputs, back, *_ = torch.func.vjp(function, *inputs)
        return outputs, lambda upstream, first=None: back(upstream)[:first]
    with torch.enable_grad():
        # Names of their own, for an input may depend on another. Constants are variables here, too.
        own = [
            one.view_as(one) if one.requires_grad else one.detach().requires_grad_()
            for one in inputs
        ]
        outputs = function(*own)

    several = isinstance(outputs, tuple)

    def pull(upstream: Any, first: int | None = None) -> tuple[Tensor, ...]:
        pairs = zip(outputs, upstream, strict=True) if several else [(outputs, upstream)]
        # A constant, as the log-det of a map of constant slope, has no gradient to ask for.
        varying = [pair for pair in pairs if pair[0].requires_grad]
        if not varying:
            return tuple(map(torch.zeros_like, own[:first]))
        results, along = zip(*varying, strict=True)
        return torch.autograd.grad(
            results, own[:first], along, create_graph=torch.is_grad_enabled(), retain_graph=True,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip

    return outputs, pull


def _push(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """The derivative of a function along tangents."""
    # J v is the transpose of J^T v; forward mode does not nest everywhere.
    output, pull, *_ = torch.func.vjp(function, *inputs)
    _, push, *_ = torch.func.vjp(pull, torch.zeros_like(output))
    return cast(Tensor, push(tuple(tangents))[0])


def _refuse_batched_weights(dims: Sequence[int | None]) -> None:
    if any(dim is not None for dim in dims):
        raise NotImplementedError(
            "torch.func.vmap over the weights of an inverse; loop over the models instead"
        )


class _JacobianSolve(torch.autograd.Function):
    """``A v = right`` for the Jacobian A of a stage at x, or its transpose."""

    @staticmethod
    def forward(
        problem: _Problem, transpose: bool, x: Tensor, right: Tensor, *tensors: Tensor
    ) -> Tensor:
        return problem.jacobian_solver(x, tensors, transpose)(right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.problem, ctx.transpose, x, _, *tensors = inputs
        ctx.save_for_backward(x, output, *tensors)

    @staticmethod
    def backward(ctx: Any, by_solved: Tensor) -> tuple[Tensor | None, ...]:
        x, solved, *tensors = ctx.saved_tensors
        by_right = _jacobian_solve(ctx.problem, not ctx.transpose, x, by_solved, tensors)
        # <by_solved, dv> = <by_right, d right - dA v>, and <u, J^T v> = <v, J u>.
        left, along = (solved, by_right) if ctx.transpose else (by_right, solved)

        def product(x: Tensor, *tensors: Tensor) -> Tensor:
            again = torch.arange(len(x), device=x.device).repeat(len(left) // max(1, len(x)))
            stage = ctx.problem.at(tensors).of_samples(again)
            _, pull = _pullback(lambda point: stage._forward(point)[0], x[again])
            return (pull(left)[0] * along).sum()

        result, pull = _pullback(product, x, *tensors)
        by_x, *by_tensors = pull(-torch.ones_like(result))
        return None, None, by_x, by_right, *by_tensors

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "forward-mode derivatives of the gradient of an inverse; take both in reverse mode, as "
            "torch.func.jacrev(torch.func.grad(...)) does"
        )

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[int | None],
        problem: _Problem,
        transpose: bool,
        *arguments: Tensor,
    ) -> tuple[Tensor, int]:
        x, right, *tensors = arguments
        _refuse_batched_weights(in_dims[4:])
        if in_dims[3] is None:
            right = right.expand(info.batch_size, *right.shape)
        else:
            right = right.movedim(in_dims[3], 0)
        if in_dims[2] is not None:
            x = x.movedim(in_dims[2], 0).flatten(0, 1)
        solved = _jacobian_solve(problem, transpose, x, right.flatten(0, 1), tensors)
        return solved.view(right.shape), 0


def _jacobian_solve(
    problem: _Problem, transpose: bool, x: Tensor, right: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    solved = _JacobianSolve.apply(problem, transpose, x, right, *tensors)  # type: ignore[no-untyped-call]
    return cast(Tensor, solved)


class _Inverse(torch.autograd.Function):
    """x and log_det of the inverse map, as functions of z and of the tensors of a stage."""

    @staticmethod
    def forward(problem: _Problem, z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        problem.solution = problem.solve(problem.at(tensors), z)
        x, log_det = problem.solution.x, problem.solution.log_det
        return x.view_as(x), log_det.view_as(log_det)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.problem, _, *tensors = inputs
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor, by_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        (y, _), pull = _pullback(ctx.problem.map, x, *tensors)
        # The log-det of the inverse is that of the map with the sign changed.
        (through,) = pull((torch.zeros_like(y), -by_log_det), first=1)
        by_z = _jacobian_solve(ctx.problem, True, x, by_x + through, tensors)
        _, *by_tensors = pull((-by_z, -by_log_det))
        return None, by_z, *by_tensors

    @staticmethod
    def jvp(
        ctx: Any, _: None, along_z: Tensor | None, *along_tensors: Any
    ) -> tuple[Tensor, Tensor]:
        x, *tensors = ctx.saved_tensors
        along = [
            torch.zeros_like(one) if tangent is None else tangent
            for one, tangent in zip((x, *tensors), (along_z, *along_tensors), strict=True)
        ]

        def joined(x: Tensor, *tensors: Tensor) -> Tensor:
            y, log_det = ctx.problem.map(x, *tensors)
            return torch.cat([y.flatten(1), log_det[:, None]], 1)

        still = [torch.zeros_like(x), *along[1:]]
        moved = _push(joined, (x, *tensors), still)[:, :-1].reshape(x.shape)
        along_x = _jacobian_solve(ctx.problem, False, x, along[0] - moved, tensors)
        along_log_det = -_push(joined, (x, *tensors), [along_x, *along[1:]])[:, -1]
        return along_x, along_log_det

    @staticmethod
    def vmap(info: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "torch.func.vmap over an inverse, which takes a batch already: give it all samples at "
            "once"
        )


def differentiable_solution(
    stage: nn.Module,
    tensors: dict[str, Tensor],
    z: Tensor,
    solve: Callable[[Any, Tensor], Solution],
) -> tuple[Solution, Tensor, Tensor]:
    """A solution, and its x and log_det as functions of z and of the tensors.

    Args:
        stage: that is inverted.
        tensors: that it is to have, in the dtype of the solution.
        z: (B, ...).
        solve: finds the solution of a view of the stage.
    """
    variables = {
        name: one
        for name, one in tensors.items()
        if one.requires_grad or (one.is_floating_point() and is_transformed())
    }
    constants = {name: one for name, one in tensors.items() if name not in variables}
    problem = _Problem(stage, tuple(variables), constants, solve)
    x, log_det = _Inverse.apply(problem, z, *variables.values())  # type: ignore[no-untyped-call]
    assert problem.solution is not None
    return problem.solution, x, log_det

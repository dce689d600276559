"""Gradients of an inverse by the implicit function theorem.

With f(x) = z, dx = J^-1 (dz - df/dtheta dtheta). So a gradient g by x becomes ``v = J^-T g`` by z
and ``-v df/dtheta`` by the parameters: one triangular solve, and one pass forward and backward
through f at x, however x was found.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mintnet_triton.solvers import Solution


class _Inverse(torch.autograd.Function):
    """x and log_det of the inverse map, with gradients by z and the map's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        original: nn.Module,
        stage: Any,
        names: tuple[str, ...],
        x: Tensor,
        log_det: Tensor,
        z: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.original, ctx.stage, ctx.names = original, stage, names
        ctx.save_for_backward(x, *parameters)
        return x.view_as(x), log_det.view_as(log_det)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_x: Tensor, by_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            used = [parameter.detach().requires_grad_() for parameter in parameters]
            given = dict(zip(ctx.names, (one.to(x.dtype) for one in used), strict=True))
            y, log_det = functional_call(ctx.original, given, (point,))
        # The log-det of the inverse is that of the map with the sign changed.
        (through,) = torch.autograd.grad(
            log_det,
            point,
            -by_log_det,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        by_z = ctx.stage.jacobian_solver(x, transpose=True)(by_x + through)
        by_parameters: tuple[Tensor, ...] = ()
        if used:
            by_parameters = torch.autograd.grad(
                (y, log_det), used, (-by_z, -by_log_det), materialize_grads=True
            )
        return None, None, None, None, None, by_z, *by_parameters


def differentiable_solution(
    original: nn.Module, stage: nn.Module, z: Tensor, solution: Solution
) -> tuple[Tensor, Tensor]:
    """x and log_det of a solution, as functions of z and of the parameters of ``original``.

    Args:
        original: the stage that was asked for.
        stage: the same in the dtype of the solution.
    """
    named = dict(original.named_parameters())
    results = _Inverse.apply(
        original, stage, tuple(named), solution.x, solution.log_det, z, *named.values()
    )  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], results)

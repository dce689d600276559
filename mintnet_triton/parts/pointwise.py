"""An invertible 1 x 1 convolution: it mixes channels, as a permutation would, but learnt."""

import torch
from torch import Tensor, nn

from mintnet_triton.checks import check_axes, check_positive
from mintnet_triton.hooks import run_weight_hooks
from mintnet_triton.invertible import Shape, Stage
from mintnet_triton.solvers import Evaluator, LinearSolver, Solution, Solver, log_det_dtype, rounded


class PointwiseConv(Stage):
    """``y = W x`` at every pixel, W = P L (U + diag(sign exp(log_scale))).

    P is a permutation, L lower triangular with a diagonal of ones, U strictly upper triangular, so
    that the log-determinant is a sum and the inverse two triangular solves. It starts as a rotation
    drawn at random, of log-det 0. (Kingma and Dhariwal, "Glow", 2018, section 3.2.)

    Args:
        channels: number of channels C.
        axes: of the images: 1 for series (B, C, L), 2 for (B, C, H, W), 3 for volumes.
        device, dtype: of the parameters; torch's defaults if None.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    order: Tensor
    sign: Tensor

    def __init__(
        self,
        channels: int,
        axes: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (self.channels,), self.axes = check_positive(channels=channels), check_axes(axes)
        self.lower, self.upper = (
            nn.Parameter(torch.empty(channels, channels, device=device, dtype=dtype))
            for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        #: P: channel i of W x is channel ``order[i]`` of the rest
        self.register_buffer("order", torch.empty(channels, dtype=torch.int64, device=device))
        self.register_buffer("sign", torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Another rotation."""
        device = self.lower.device
        drawn = torch.empty(self.channels, self.channels, device=device)
        if drawn.is_meta:
            return
        rotation, _ = torch.linalg.qr(nn.init.normal_(drawn).double())
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_scale.copy_(upper.diagonal().abs().log())
        self.sign.copy_(upper.diagonal().sign())
        self.order.copy_(permutation.argmax(1))

    @property
    def input_shape(self) -> Shape:
        return self.channels, *[None] * self.axes

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U with their diagonals, (C, C)."""
        return self._factors(self.log_scale)

    def weight(self) -> Tensor:
        """W, (C, C)."""
        return self._weight(self.log_scale)

    def _factors(self, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        lower = self.lower
        ones = torch.eye(self.channels, device=lower.device, dtype=lower.dtype)
        return lower.tril(-1) + ones, self.upper.triu(1) + (self.sign * log_scale.exp()).diag()

    def _weight(self, log_scale: Tensor) -> Tensor:
        lower, upper = self._factors(log_scale)
        return (lower @ upper)[self.order]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale
        y = (self._weight(log_scale) @ x.flatten(2)).view_as(x)
        log_det = x.shape[2:].numel() * log_scale.to(log_det_dtype(x)).sum()
        return y, log_det.expand(x.shape[0])

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)
        log_scale = self.log_scale
        weight, slope = self._weight(log_scale), log_scale.exp().view(-1, *[1] * self.axes)
        return lambda x: ((weight @ x.flatten(2)).view_as(x), slope.expand_as(x))

    def _solve(self, z: Tensor) -> Tensor:
        lower, upper = self.factors()
        moved = z.flatten(2)[:, self.order.argsort()]
        middle = torch.linalg.solve_triangular(lower, moved, upper=False, unitriangular=True)
        x: Tensor = torch.linalg.solve_triangular(upper, middle, upper=True).view_as(z)
        return x

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        x = rounded(self.in_dtype(torch.float64)._solve(z.double()), z.dtype)
        return self.solve_exactly(z, x, solver, trace=trace, reference=reference)

    def jacobian_solver(self, x: Tensor, *, transpose: bool = False) -> LinearSolver:
        if not transpose:
            return self._solve
        lower, upper = self.factors()

        def solve(right: Tensor) -> Tensor:
            middle = torch.linalg.solve_triangular(upper.mT, right.flatten(2), upper=False)
            moved = torch.linalg.solve_triangular(lower.mT, middle, upper=True, unitriangular=True)
            found: Tensor = moved[:, self.order].view_as(right)
            return found

        return solve

    def magnitude(self, x: Tensor) -> Tensor:
        # Of the factors, for W itself is rounded relative to them.
        lower, upper = (one.abs() for one in self.factors())
        return ((lower @ upper)[self.order] @ x.abs().flatten(2)).view_as(x) + 1

    def extra_repr(self) -> str:
        return f"channels={self.channels}, axes={self.axes}"

"""A scale and a shift that start from data, so that what follows sees mean 0 and deviation 1."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mintnet_triton.calculus import TriangularMap
from mintnet_triton.checks import as_size, check_axes, check_positive
from mintnet_triton.hooks import run_weight_hooks
from mintnet_triton.invertible import Shape
from mintnet_triton.solvers import Evaluator, Solution, Solver, rounded

#: a deviation below this, relative to the mean, is rounding: such a variable keeps its scale
STEADY = 1e-6


class ActNorm(TriangularMap):
    """``y = exp(log_scale) (x + shift)``, of each channel, or of each variable.

    It is the identity until :meth:`initialise` has seen a batch, whose every channel (or variable)
    then has mean 0 and deviation 1 in y; from there it is trained as any parameter, and kept in
    the state dict. (Kingma and Dhariwal, "Glow", 2018, section 3.1.)

    Args:
        channels: number of channels C.
        size: (H, W), or one integer for both, or sizes along other axes, for a scale and a shift of
            every variable; None, the default, for one of each channel, at any size.
        axes: of the images, where no size is given: 1 for series (B, C, L), 2 for (B, C, H, W), 3
            for volumes (B, C, D, H, W).
        device, dtype: of the parameters; torch's defaults if None.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    starts_from_data = True

    def __init__(
        self,
        channels: int,
        size: int | Sequence[int] | None = None,
        axes: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (self.channels,), axes = check_positive(channels=channels), check_axes(axes)
        self.ordering = None
        self._size: Shape = (None,) * axes if size is None else as_size("size", size)
        shape = self.channels, *(side or 1 for side in self._size)
        self.shift = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Back to the identity."""
        nn.init.zeros_(self.shift)
        nn.init.zeros_(self.log_scale)

    @property
    def input_shape(self) -> Shape:
        return self.channels, *self._size

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)
        shift, scale = self.shift, self.log_scale.exp()
        return lambda x: (scale * (x + shift), scale.expand_as(x))

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        exact = self.in_dtype(torch.float64)
        x = rounded(z.double() * (-exact.log_scale).exp() - exact.shift, z.dtype)
        return self.solve_exactly(z, x, solver, trace=trace, reference=reference)

    def start_from(self, x: Tensor) -> None:
        pooled = [0, *(2 + axis for axis, side in enumerate(self._size) if side is None)]
        deviation, mean = torch.std_mean(x.double(), pooled, correction=0, keepdim=True)
        steady = deviation <= STEADY * mean.abs().clamp(min=1)
        self.shift.copy_(-mean[0])
        self.log_scale.copy_(-torch.where(steady, 1, deviation).log()[0])

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shift.shape)}"

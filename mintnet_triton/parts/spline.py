"""A learnt monotone map of logits, alike at all pixels, that starts from what levels look like.

Many pixels are black, and some are white. Uniform noise on such a level has a density with a cliff
at one end, and its logit has, too, which every layer would meet at every pixel. The spline starts
with a bump for black, one for white and a wide one for all between, and learns what suits the flow.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.special import ndtr

from mintnet_triton.calculus import TriangularMap
from mintnet_triton.checks import check_axes, check_integer, check_positive
from mintnet_triton.hooks import run_weight_hooks
from mintnet_triton.invertible import Shape
from mintnet_triton.solvers import Evaluator, Solution, Solver, log_det_dtype, rounded

#: where it starts: centres of the bumps of the end levels, of deviation 1; deviation between them
END, MIDDLE = 5.0, 1.7
#: how far beyond the centres there are knots, and how many to a unit
REACH, FINENESS = 3.5, 4
#: of y, about as wide as the nonlinear layers that follow are curved
SCALE = 0.5


class LevelSpline(TriangularMap):
    """A monotone rational-quadratic spline of each channel, of logits of images with L levels.

    It starts as ``y = F^-1(sigmoid(x)) / 2``, F of the mixture ``(N(-5, 1) + N(5, 1)) / L +
    (1 - 2 / L) N(0, 1.7)``, under which the lowest level is spread about as N(-5, 1), and the
    highest as N(5, 1). Knots in x stay; heights of the pieces and slopes at knots are learnt, as
    logarithms. Linear beyond the knots; its inverse is the root of a quadratic. (Durkan et al.,
    "Neural spline flows", 2019, section 3.1.)

    Have a small ``logit_lambda``, say 1e-6, or the bumps lack their outer sides.

    Args:
        channels: number of channels C.
        levels: values a pixel may take, L, at least 3.
        axes: of the images: 1 for series (B, C, L), 2 for (B, C, H, W), the default, 3 for volumes
            (B, C, D, H, W).
        device, dtype: of the parameters; torch's defaults if None.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    knots: Tensor

    def __init__(
        self,
        channels: int,
        levels: int,
        axes: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (self.channels,), self.axes = check_positive(channels=channels), check_axes(axes)
        self.levels = check_integer("levels", levels, least=3)
        self.ordering = None
        pieces = len(_curve(self.levels)[0]) - 1
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("knots", torch.empty(pieces + 1, device=device, dtype=dtype))
        self.least, self.log_height, self.log_slope = (
            nn.Parameter(torch.empty(self.channels, count, device=device, dtype=dtype))
            for count in (1, pieces, pieces + 1)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to where it starts."""
        x, y, slope = _curve(self.levels)
        self.knots.copy_(x)
        self.least.copy_(y[:1])
        self.log_height.copy_(y.diff().log())
        self.log_slope.copy_(slope.log())

    @property
    def input_shape(self) -> Shape:
        return self.channels, *[None] * self.axes

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            y, log_slope = self._map(x)
            return y.to(x.dtype), log_slope.exp().to(x.dtype)

        return evaluate

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        run_weight_hooks(self)
        y, log_slope = self._map(x)
        return y.to(x.dtype), log_slope.flatten(1).sum(1)

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and the logarithm of its slope, both shaped as x and of the dtype of log-dets."""
        x = x.to(log_det_dtype(x))
        knots = self.knots.to(x.dtype)
        piece = torch.searchsorted(knots[1:-1], x.detach().contiguous())
        width, left, low, height, first, last = self._pieces(piece, x.dtype)
        inside = x.clamp(knots[0], knots[-1])
        share, mean = (inside - left) / width, height / width
        rising, falling = torch.lerp(first, mean, share), torch.lerp(mean, last, share)
        below = mean + (first + last - 2 * mean) * share * (1 - share)
        y = low + height * share * rising / below
        log_slope = 2 * (mean.log() - below.log()) + torch.lerp(rising, falling, share).log()
        return y + (x - inside) * log_slope.exp(), log_slope

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        x = rounded(self.in_dtype(torch.float64)._inverse(z.double()), z.dtype)
        return self.solve_exactly(z, x, solver, trace=trace, reference=reference)

    def _inverse(self, y: Tensor) -> Tensor:
        """x with y(x) = y."""
        ends = self._ends(self.log_height.exp())
        by_channel = y.transpose(0, 1).reshape(self.channels, -1).contiguous()
        piece = torch.searchsorted(ends[:, 1:-1].contiguous(), by_channel)
        piece = piece.view(self.channels, len(y), *y.shape[2:]).transpose(0, 1)
        width, left, low, height, first, last = self._pieces(piece, y.dtype)
        edge = [-1, *[1] * (y.ndim - 2)]
        inside = torch.minimum(torch.maximum(y, ends[:, 0].view(edge)), ends[:, -1].view(edge))
        mean, risen = height / width, inside - low
        bend = risen * (first + last - 2 * mean)
        a, b, c = height * (mean - first) + bend, height * first - bend, -mean * risen
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        # In each form, nothing cancels.
        share = torch.where(b > 0, -2 * c / (b + root), (root - b) / (2 * a)).clamp(0, 1)
        slope = torch.where(
            y < inside, self.log_slope[:, :1].view(edge), self.log_slope[:, -1:].view(edge)
        )
        return left + share * width + (y - inside) * (-slope).exp()

    def _pieces(self, piece: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of the pieces of those indices: width, left end, low end, height, both slopes."""
        knots, log_height = self.knots.to(dtype), self.log_height.to(dtype)
        height, slope = log_height.exp(), self.log_slope.to(dtype).exp()
        low = self._ends(height)[:, :-1]
        count = height.shape[1]
        rows = torch.stack([low, height, slope[:, :-1], slope[:, 1:]]).flatten(1)
        channel = torch.arange(self.channels, device=piece.device)
        index = piece + count * channel.view(-1, *[1] * (piece.ndim - 2))
        fixed = torch.stack([knots.diff(), knots[:-1]])
        return *_picked(fixed, piece), *_picked(rows, index)

    def _ends(self, height: Tensor) -> Tensor:
        """y at the knots, (C, pieces + 1)."""
        return self.least.to(height.dtype) + F.pad(height.cumsum(1), (1, 0))

    def extra_repr(self) -> str:
        return f"{self.channels}, levels={self.levels}"


def _picked(rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Each row's entries at the index, shaped as the index."""
    # The gradient, added at an index, takes a tenth of an embedding's time on a CPU.
    return rows.index_select(1, index.flatten()).view(len(rows), *index.shape).unbind()


def _curve(levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where it starts: x, y and slope at the knots, float64."""
    outermost = END + REACH
    count = round(2 * outermost * FINENESS) + 1
    y = torch.linspace(-outermost, outermost, count, dtype=torch.float64, device="cpu")
    end = 1 / levels
    below, density = torch.zeros_like(y), torch.zeros_like(y)
    for share, centre, deviation in ((end, -END, 1), (1 - 2 * end, 0, MIDDLE), (end, END, 1)):
        scaled = (y - centre) / deviation
        below += share * ndtr(scaled)
        density += share / deviation * torch.exp(-0.5 * scaled.square()) / math.sqrt(2 * math.pi)
    above = below.flip(0)  # the mixture is symmetric, and 1 - F would be rounded
    return (below / above).log(), SCALE * y, SCALE * below * above / density

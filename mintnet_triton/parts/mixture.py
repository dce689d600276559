"""A monotone map of each variable that may be far from linear: the quantiles of a mixture.

With F the distribution function of a mixture of logistics, F(x) is uniform where x is distributed
so, and logit F(x) is logistic: the map takes densities of several humps, or with edges, to one of
a single hump, which is what a normal latent asks for.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mintnet_triton.calculus import TriangularMap
from mintnet_triton.checks import as_size, check_integer, check_positive
from mintnet_triton.hooks import run_weight_hooks
from mintnet_triton.invertible import Shape
from mintnet_triton.solvers import Evaluator, Solution, Solver, log_det_dtype, rounded

#: of a logistic variable, so that y has deviation 1 where x is distributed as the mixture
TO_UNIT = math.sqrt(3) / math.pi
#: least scale that a start gives a component, where data are all alike
LEAST_START = 1e-2
#: most steps of Newton's method or bisection: more than enough to halve any bracket of float64
MOST_STEPS = 300


class LogisticMixture(TriangularMap):
    """``y = sqrt(3) / pi logit(sum_k w_k sigmoid((x - mean_k) / exp(log_scale_k)))``.

    One mixture for each variable, w the softmax of ``logits``. Monotone, onto all reals; near
    linear beyond the outermost components. It starts with means spread evenly from -2 to 2, and
    :meth:`initialise` puts them at the quantiles of a batch. The inverse is found by bisection and
    Newton's method inside a bracket that is known, and ends for every y. (Ho et al., "Flow++",
    2019, section 3.2, without what conditions it there.)

    Args:
        channels: number of channels C.
        size: (H, W), or one integer for both, or sizes along other axes.
        components: of each mixture; 8 by default.
        device, dtype: of the parameters; torch's defaults if None.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    starts_from_data = True

    def __init__(
        self,
        channels: int,
        size: int | Sequence[int],
        components: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (channels,) = check_positive(channels=channels)
        components = check_integer("components", components, least=1)
        self.ordering = None
        self._shape = (channels, *as_size("size", size))
        shape = *self._shape, components
        self.mean, self.log_scale, self.logits = (
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Means spread from -2 to 2, alike for all variables."""
        components = self.mean.shape[-1]
        with torch.no_grad():
            self.mean.copy_(_centred(components, self.mean))
        nn.init.constant_(self.log_scale, math.log(2 / components))
        nn.init.zeros_(self.logits)

    @property
    def input_shape(self) -> Shape:
        return self._shape

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            y, log_slope = self._map(x)
            return y, log_slope.exp()

        return evaluate

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and the logarithm of its slope, both shaped as x."""
        log_scale = self.log_scale
        scaled = (x.unsqueeze(-1) - self.mean) * (-log_scale).exp()
        log_weight = self.logits.log_softmax(-1)
        left, right = logsigmoid(scaled), logsigmoid(-scaled)
        below, above = (log_weight + left).logsumexp(-1), (log_weight + right).logsumexp(-1)
        log_density = (log_weight - log_scale + left + right).logsumexp(-1)
        return TO_UNIT * (below - above), log_density - below - above + math.log(TO_UNIT)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Between components far from each other slopes are below what float32 can say.
        y, log_slope = self._map(x)
        return y, log_slope.to(log_det_dtype(x)).flatten(1).sum(1)

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        exact = self.in_dtype(torch.float64)
        x = rounded(exact._quantile(z.double()), z.dtype)
        solution = self.solve_exactly(z, x, solver, trace=trace, reference=reference)
        _, log_det = exact._forward(x.double())
        return replace(solution, log_det=-log_det.to(log_det_dtype(z)))

    def _quantile(self, z: Tensor) -> Tensor:
        """x with y(x) = z, for all of float64."""
        # logit F is between the least and the greatest of (x - mean_k) / scale_k.
        ends = self.mean + self.log_scale.exp() * (z / TO_UNIT).unsqueeze(-1)
        largest = torch.finfo(z.dtype).max / 2  # so that the sum of both is finite
        low, high = ends.clamp(-largest, largest).aminmax(dim=-1)
        x, last = (low + high) / 2, (high - low) / 2
        for _ in range(MOST_STEPS):
            y, log_slope = self._map(x)
            low, high = torch.where(y < z, x, low), torch.where(y < z, high, x)
            newton = x - (y - z) * (-log_slope).exp()
            # As long as it is well inside, and steps become shorter as fast as by halving.
            taken = (newton >= low) & (newton <= high) & ((newton - x).abs() <= last / 2)
            following = torch.where(taken, newton, (low + high) / 2)
            if bool((following == x).all()):
                break
            x, last = following, (following - x).abs()
        return x

    def start_from(self, x: Tensor) -> None:
        components = self.mean.shape[-1]
        places = (torch.arange(components, device=x.device, dtype=torch.float64) + 0.5) / components
        # torch.quantile knows small tensors alone.
        ordered, at = x.double().sort(0).values, places * (len(x) - 1)
        low, high = ordered[at.floor().long()], ordered[at.ceil().long()]
        quantiles = torch.lerp(low.movedim(0, -1), high.movedim(0, -1), at.frac())
        self.mean.copy_(quantiles)
        gaps = quantiles.diff(dim=-1)
        if components > 1:  # as wide as the wider of the gaps beside it
            wider = torch.maximum(
                torch.cat([gaps[..., :1], gaps], -1), torch.cat([gaps, gaps[..., -1:]], -1)
            )
        else:
            wider = x.double().std(0, correction=0).unsqueeze(-1)
        self.log_scale.copy_(wider.clamp(min=LEAST_START).log())
        nn.init.zeros_(self.logits)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mean.shape[:-1])}, components={self.mean.shape[-1]}"


def _centred(components: int, like: Tensor) -> Tensor:
    """Evenly spread from -2 to 2; 0 for one."""
    steps = torch.arange(components, device=like.device, dtype=like.dtype)
    return 4 * (steps + 0.5) / components - 2

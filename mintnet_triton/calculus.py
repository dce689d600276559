"""The calculus of triangular maps (Proposition 1) and their determinants (Theorem 1).

Affine maps with triangular matrices are triangular; so are sums and compositions of triangular
maps. The diagonal of the Jacobian is linear under addition and multiplies under composition, hence
whatever is built here knows its log-determinant, and Algorithm 1 inverts it on its range.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton.checks import check_odd, is_traced
from mintnet_triton.hooks import HookError, has_idle_hooks, run_weight_hooks
from mintnet_triton.invertible import Shape, Stage
from mintnet_triton.kernels import Activation, Wave, convolve, find_activation
from mintnet_triton.ordering import Ordering, common_ordering
from mintnet_triton.solvers import (
    Evaluator,
    LinearSolver,
    Solution,
    Solver,
    log_abs_det,
)

Scale = float | Tensor


class SingularJacobianError(ValueError):
    """The diagonal of a Jacobian has a zero: the map is not invertible there (Theorem 1)."""


class TriangularMap(Stage):
    """A map whose Jacobian is triangular in the order of ``ordering``.

    ``ordering`` is None for a map that acts on each variable alone and so fits any order.
    """

    ordering: Ordering | None

    def forward_and_diagonal(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y and the diagonal of the Jacobian at x, both shaped like x.

        Raises:
            TypeError, ValueError: as ``forward``.
        """
        self.check("x", x, self.input_shape)
        self.check_context(context, x)
        return self.given(context).evaluator()(x)

    def start(self, z: Tensor) -> Tensor:
        """Where Algorithm 1 starts to look for the x with f(x) = z."""
        return z

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        return solver.solve(self, z, trace=trace, reference=reference)

    def slope_bounds(self) -> tuple[Tensor, Tensor] | None:
        """Bounds of the diagonal that broadcast against x, if they are known."""
        return None

    @property
    def has_wavefront(self) -> bool:
        """Whether :meth:`wavefront` inverts it."""
        return False

    def wavefront(self, z: Tensor) -> Wave:
        """The inverse in the order of dependency, in float64.

        Raises:
            TypeError: this map is not a Mint layer.
        """
        raise TypeError(
            f"Wavefront inverts Mint layers, and {type(self).__name__} is none; Auto and "
            "FixedPoint invert it"
        )

    def jacobian_solver(self, x: Tensor, *, transpose: bool = False) -> LinearSolver:
        if self.ordering is not None:
            return super().jacobian_solver(x, transpose=transpose)
        _, slope = self.evaluator()(x)  # it acts on each variable alone
        again = [1] * (x.ndim - 1)
        return lambda right: right / slope.repeat(len(right) // max(1, len(x)), *again)

    def magnitude(self, x: Tensor) -> Tensor:
        y, diagonal = self.evaluator()(x)
        return y.abs() + (diagonal * x).abs() + 1

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, diagonal = self.evaluator()(x)
        zeros = diagonal.detach() == 0
        if not (x.is_meta or is_traced(x)) and bool(zeros.any()):
            raise SingularJacobianError(
                f"{int(zeros.sum())} of {zeros.numel()} diagonal entries of the Jacobian of "
                f"{type(self).__name__} are zero, the first at index "
                f"{tuple(int(i) for i in zeros.nonzero()[0])}; Theorem 1 needs every one non-zero"
            )
        return y, log_abs_det(diagonal)


class MaskedAffine(TriangularMap):
    """``Wx + b`` with the entries of W that would break the order set to zero.

    Args:
        weight: (n, n) for vectors (B, n), or (C, C, k, k) with odd k for a convolution of images
            (B, C, H, W), zero-padded to the same size; (C, C, k) for series (B, C, L), and
            (C, C, k, k, k) for volumes (B, C, D, H, W). Raw: entries outside the triangle are
            ignored. Weight and bias are copied into parameters.
        bias: (n,) or (C,), or None.
        ordering: order of the variables; for a vector, only its triangle matters.

    Raises:
        ValueError, TypeError: weight or bias of another shape or kind.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, ordering: Ordering) -> None:
        super().__init__()
        square = weight.ndim in (2, 3, 4, 5) and weight.shape[0] == weight.shape[1]
        if not square or len(set(weight.shape[2:])) > 1:
            raise ValueError(
                "weight must have shape (n, n) or (C, C, k, k), or with one or three k, got "
                f"{tuple(weight.shape)}"
            )
        if not weight.dtype.is_floating_point:
            raise TypeError(f"weight must be of a floating dtype, got {weight.dtype}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if not isinstance(ordering, Ordering):
            raise TypeError(f"ordering must be an Ordering, got {type(ordering).__name__}")
        if weight.ndim > 2:
            check_odd("kernel_size", weight.shape[-1])
        else:
            ordering = Ordering(triangle=ordering.triangle)
        self.ordering = ordering
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def masked_weight(self) -> Tensor:
        """The weight with zeros outside the triangle, a new tensor."""
        assert self.ordering is not None
        colours, _, *sides = self.weight.shape
        if sides:
            mask = self.ordering.conv_mask(colours, sides[0], axes=len(sides))
            return self.weight.masked_fill(~mask.to(self.weight.device), 0)
        return self.weight.tril() if self.ordering.triangle == "lower" else self.weight.triu()

    @property
    def input_shape(self) -> Shape:
        return (len(self.weight), *[None] * (self.weight.ndim - 2))

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)
        weight = self.masked_weight()
        if weight.ndim == 2:
            diagonal = weight.diagonal()
            return lambda x: (F.linear(x, weight, self.bias), diagonal.expand_as(x))
        axes = weight.ndim - 2
        middle: Any = (..., *[weight.shape[-1] // 2] * axes)
        diagonal = weight[middle].diagonal().view(-1, *[1] * axes)
        return lambda x: (convolve(x, weight, self.bias), diagonal.expand_as(x))

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        if self.weight.ndim > 2:
            return super().solve(z, solver, trace=trace, reference=reference)
        assert self.ordering is not None
        shifted = z if self.bias is None else z - self.bias
        x = torch.linalg.solve_triangular(
            self.masked_weight(), shifted.mT, upper=self.ordering.triangle == "upper"
        ).mT
        return self.solve_exactly(z, x, solver, trace=trace, reference=reference)


class Elementwise(TriangularMap):
    """A monotone function h of each variable alone, on tensors of any shape (B, ...).

    Args:
        name: "elu", "leaky_relu", "softplus", "tanh", "sigmoid", "identity", or an
            :class:`Activation`. The inverse is exact on the range of h, if the inverse of h is
            known, and else by Algorithm 1.

    Raises:
        ValueError: not a known monotone function.
    """

    def __init__(self, name: str | Activation) -> None:
        super().__init__()
        self.ordering = None
        self.activation = find_activation(name)

    def evaluator(self) -> Evaluator:
        return lambda x: (self.activation.function(x), self.activation.derivative(x))

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        if self.activation.inverse is None:
            return super().solve(z, solver, trace=trace, reference=reference)
        x = self.activation.inverse(z)
        return self.solve_exactly(z, x, solver, trace=trace, reference=reference)

    def extra_repr(self) -> str:
        return repr(self.activation.name)


class Sum(TriangularMap):
    """``lambda f1(x) + mu f2(x)``.

    Args:
        f1, f2: maps of the same ordering.
        scales: lambda and mu; each a number, or a tensor that broadcasts against the images (a
            diagonal matrix, as the t of a Mint layer is), which is learnt if it is a parameter.

    Raises:
        OrderingError: f1 and f2 have different orderings.
        TypeError: f1 or f2 is not of the calculus.
    """

    lambda_: Tensor
    mu: Tensor

    def __init__(
        self, f1: TriangularMap, f2: TriangularMap, scales: tuple[Scale, Scale] = (1, 1)
    ) -> None:
        super().__init__()
        self.ordering = _combined_ordering(f1=f1, f2=f2)
        self.f1, self.f2 = f1, f2
        if len(scales) != 2:
            raise ValueError(f"scales must be (lambda, mu), got {scales!r}")
        for name, scale in zip(("lambda_", "mu"), scales, strict=True):
            if isinstance(scale, nn.Parameter):
                self.register_parameter(name, scale)
            else:
                # A number in float64: a float32 one would round it for float64 inputs.
                value = (
                    scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
                )
                self.register_buffer(name, value)

    @property
    def input_shape(self) -> Shape | None:
        return _common_shape(self.f1.input_shape, self.f2.input_shape)

    def evaluator(self) -> Evaluator:
        first, second = (_evaluator(f"f{i}", f) for i, f in enumerate((self.f1, self.f2), start=1))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            y1, diagonal1 = first(x)
            y2, diagonal2 = second(x)
            y = self.lambda_ * y1 + self.mu * y2
            if y.shape != x.shape or y.dtype != x.dtype:
                raise ValueError(
                    f"the sum of an x of {x.dtype}, shape {tuple(x.shape)}, is of {y.dtype}, shape "
                    f"{tuple(y.shape)}: the scales do not fit"
                )
            return y, self.lambda_ * diagonal1 + self.mu * diagonal2

        return evaluate


class Compose(TriangularMap):
    """``f2(f1(x))``. It is inverted factor by factor, f2 first.

    Args:
        f2: applied last.
        f1: applied first; of the same ordering.

    Raises:
        OrderingError: f1 and f2 have different orderings.
        TypeError: f1 or f2 is not of the calculus.
    """

    def __init__(self, f2: TriangularMap, f1: TriangularMap) -> None:
        super().__init__()
        self.ordering = _combined_ordering(f1=f1, f2=f2)
        self.f2, self.f1 = f2, f1

    @property
    def input_shape(self) -> Shape | None:
        return _common_shape(self.f1.input_shape, self.f2.input_shape)

    def stages(self) -> Iterator[tuple[str, Stage]]:
        for name, factor in (("f1", self.f1), ("f2", self.f2)):
            for inner, stage in factor.stages():
                yield (f"{name}.{inner}" if inner else name), stage

    def evaluator(self) -> Evaluator:
        first, second = (_evaluator(f"f{i}", f) for i, f in enumerate((self.f1, self.f2), start=1))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            middle, diagonal1 = first(x)
            y, diagonal2 = second(middle)
            return y, diagonal2 * diagonal1

        return evaluate


def _evaluator(name: str, factor: TriangularMap) -> Evaluator:
    """That of a part of a map, which has a diagonal that its ``forward`` does not give."""
    if has_idle_hooks(factor):
        raise HookError(
            f"{name} ({type(factor).__name__}) has hooks that would not run: the parts of a map "
            "are not called one by one. Register them on the whole map"
        )
    return factor.evaluator()


def _combined_ordering(**maps: TriangularMap) -> Ordering | None:
    for name, map_ in maps.items():
        if not isinstance(map_, TriangularMap):
            raise TypeError(f"{name} must be a TriangularMap, got {type(map_).__name__}")
    _common_shape(*(map_.input_shape for map_ in maps.values()))
    return common_ordering(*(map_.ordering for map_ in maps.values()))


def _common_shape(shape1: Shape | None, shape2: Shape | None) -> Shape | None:
    """The sizes that both ask for; None, of a shape or a size, fits any."""
    if shape1 is None or shape2 is None:
        return shape1 or shape2
    pairs = list(zip(shape1, shape2, strict=False))
    if len(shape1) != len(shape2) or any(None not in pair and len(set(pair)) > 1 for pair in pairs):
        raise ValueError(f"maps of different shapes cannot be combined: {shape1} and {shape2}")
    return tuple(one if two is None else two for one, two in pairs)

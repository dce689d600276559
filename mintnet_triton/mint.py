"""The Mint layer, its pairs, and the squeeze between scales."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from mintnet_triton.calculus import TriangularMap
from mintnet_triton.checks import as_kernel_sizes, as_size, check_positive
from mintnet_triton.conv import MaskedConv2d
from mintnet_triton.hooks import call_watched, is_watched, run_weight_hooks
from mintnet_triton.inverse import Chain, Invertible, Reshaping, Shape
from mintnet_triton.kernels import (
    Activation,
    FrozenWeights,
    MintWeights,
    Wave,
    find_activation,
    fixed_point,
    mint_exact_map,
    mint_forward,
    mint_jacobian_solver,
    mint_magnitude,
    mint_map,
    mint_wavefront,
    steepest_share,
    use_triton,
    with_centres,
)
from mintnet_triton.ordering import Order, Ordering, Triangle
from mintnet_triton.solvers import (
    Evaluator,
    FixedPoint,
    LinearSolver,
    Solution,
    Solver,
    log_det_dtype,
    relative_residual,
)
from mintnet_triton.views import shallow

#: of :class:`MintWeights`, those that are not views of others
_TENSORS = ("weight1", "bias1", "weight2", "bias2", "weight3", "bias3", "t")

Initialisation = Literal["density", "classifier", "near_identity"]


class MintLayer(TriangularMap):
    """``m(x) = t x + sum_i W3_i h(sum_j W2_ij h(W1_j x + b1_j) + b2_ij) + b3_i``.

    W1, W2, W3 are masked convolutions, h is monotone, and t > 0 has one value per variable. The
    centre weights of W2 take the sign of those of W3 and W1, so that
    ``diag(W3_i) diag(W2_ij) diag(W1_j) >= 0`` for every i, j, and the diagonal of the Jacobian is
    at least t.

    Parameters are raw, as the authors' are: ``t_eff = max(|t|, 1e-12)``; a centre weight of W2 is
    used as ``sign(W3_i) sign(W1_j) |W2_ij|``, with sign(0) = 0.

    The convolutions are computed as one, and their hooks run so: forward pre-hooks once a call,
    before anything is computed and in an inverse too, to compute weights (as pruning does); forward
    and backward hooks wherever the layer is called, which is then computed by plain PyTorch.

    Args:
        channels: number of colours C.
        size: (H, W), or one integer for both.
        hidden: hidden units K per colour.
        triangle: ``"lower"`` or ``"upper"``.
        order: ``"channel"`` or ``"pixel"``.
        kernel_size: odd, one for all three convolutions or three.
        activation: name of a monotone function, or an :class:`Activation`; "elu" by default.
        initialisation: ``"density"``, the paper's flows: Xavier normal with gain 0.005;
            ``"classifier"``, the paper's classifiers: as ``nn.Conv2d``; both with biases uniform in
            ±1 / sqrt(fan in). ``"near_identity"``: weights normal with deviation 1e-5, no bias.
            t starts at 1.
        recompute: keep x alone for the backward pass, and compute the hidden layers again there;
            an attribute that may be set at any time.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(
        self,
        channels: int,
        size: int | Sequence[int],
        hidden: int,
        triangle: Triangle = "lower",
        order: Order = "channel",
        kernel_size: int | Sequence[int] = 3,
        activation: str | Activation = "elu",
        initialisation: Initialisation = "density",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        channels, hidden = check_positive(channels=channels, hidden=hidden)
        self.channels, self.size, self.hidden = channels, as_size("size", size), hidden
        self.ordering = Ordering(order, triangle)
        self.activation = find_activation(activation)
        self.recompute = recompute
        self._frozen: FrozenWeights | None = None
        if self.activation.slope is None:
            raise ValueError(
                f"activation {self.activation.name!r} must have a slope for use in a Mint layer"
            )
        widths = (channels, channels * hidden, channels * hidden, channels)
        self.conv1, self.conv2, self.conv3 = (
            MaskedConv2d(inputs, outputs, side, colours=channels, triangle=triangle, order=order)
            for inputs, outputs, side in zip(
                widths, widths[1:], as_kernel_sizes(kernel_size), strict=False
            )
        )
        self.t = nn.Parameter(torch.ones(channels, *self.size))
        self._initialise(initialisation)

    def _initialise(self, initialisation: Initialisation) -> None:
        if initialisation not in ("density", "classifier", "near_identity"):
            raise ValueError(
                "initialisation must be 'density', 'classifier' or 'near_identity', "
                f"got {initialisation!r}"
            )
        for conv in (self.conv1, self.conv2, self.conv3):
            if initialisation == "density":
                nn.init.xavier_normal_(conv.weight, gain=0.005)
            elif initialisation == "near_identity":
                nn.init.normal_(conv.weight, std=1e-5)
                nn.init.zeros_(cast(Tensor, conv.bias))

    @property
    def input_shape(self) -> Shape:
        return (self.channels, *self.size)

    @property
    def _structure(self) -> tuple[Order, Triangle]:
        assert self.ordering is not None
        return self.ordering.order, self.ordering.triangle

    def positive_t(self) -> Tensor:
        """``max(|t|, 1e-12)``, (C, H, W), never below float32, where that is not zero."""
        return self.t.to(log_det_dtype(self.t)).abs().clamp(min=1e-12)

    def effective_weights(self) -> MintWeights:
        """Masked, sign-corrected weights, computed from the parameters at each call.

        Raises:
            HookError: a forward pre-hook of a convolution wants its input.
        """
        convs = [self.conv1, self.conv2, self.conv3]
        for number, conv in enumerate(convs, start=1):
            run_weight_hooks(conv, f"'conv{number}' in a MintLayer")
        weight1, weight2, weight3 = (conv.masked_weight() for conv in convs)
        bias1, bias2, bias3 = (
            conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias
            for conv in convs
        )
        weights = with_centres(weight1, bias1, weight2, bias2, weight3, bias3, self.positive_t())
        # |w| = sign(w) w, with the derivative that abs has; in place, for weight2 is new.
        weights.centre2.mul_(
            weights.centre3.detach().sign().unsqueeze(2)
            * weights.centre1.detach().sign().unsqueeze(1)
            * weights.centre2.detach().sign()
        )
        return weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._frozen is not None:
            weights = MintWeights(*(fn(weight) for weight in self._frozen.weights))
            t = weights.t.to(log_det_dtype(weights.t))
            self._frozen = FrozenWeights(weights._replace(t=t))
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {"_frozen": None}  # a copy has parameters of its own

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._frozen = None  # it is on another device
        return replica

    def _weights(self) -> MintWeights | FrozenWeights:
        return self._frozen or self.effective_weights()

    def _call(self) -> Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor] | None:
        """How to call the convolutions, if hooks look at them."""
        convs = dict(self.named_children())
        if not any(is_watched(conv) for conv in convs.values()):
            return None

        def call(number: int, convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            name = f"conv{number}"
            return call_watched(f"{name!r} in a MintLayer", convs[name], convolution, x)

        return call

    def tensors(self) -> dict[str, Tensor]:
        run_weight_hooks(self)
        weights = self._weights()
        weights = weights.weights if isinstance(weights, FrozenWeights) else weights
        return {name: getattr(weights, name) for name in _TENSORS}

    def view(self, tensors: Mapping[str, Tensor]) -> Self:
        view = shallow(self)
        view.__dict__.update(_parameters={}, _modules={})  # nothing to be looked at by hooks
        frozen = self._frozen and self._frozen.weights._asdict()
        if not frozen or any(frozen[name] is not tensor for name, tensor in tensors.items()):
            view._frozen = FrozenWeights(with_centres(**tensors))  # else what is packed, is shared
        return view

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)
        weights, call = self._weights(), self._call()
        if isinstance(weights, MintWeights) and not torch.is_grad_enabled():
            weights = FrozenWeights(weights)  # packed once for all evaluations
        arguments = (weights, self.activation, *self._structure)
        return lambda x: mint_forward(x, *arguments, call=call)[:2]

    def start(self, z: Tensor) -> Tensor:
        return z / (self._frozen.weights.t if self._frozen else self.positive_t())

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        # The kernels keep no iterates to compare with a reference, and have one step for all.
        plain = isinstance(solver, FixedPoint) and not solver.safeguard and reference is None
        if not plain or not use_triton(z, self.activation):
            return super().solve(z, solver, trace=trace, reference=reference)
        assert isinstance(solver, FixedPoint)
        x, log_det, residuals, iterations = fixed_point(
            z,
            self.start(z),
            self._frozen or FrozenWeights(self.effective_weights()),
            self.activation,
            *self._structure,
            solver.alpha,
            solver.iterations,
            solver.tolerance_for(z.dtype),
        )
        # A sample that has stopped keeps its last value in the rows that follow.
        rows = torch.arange(1, solver.iterations + 1, device=z.device)[:, None]
        traced = residuals.gather(0, rows.minimum(iterations)) if trace else None
        last = residuals.gather(0, iterations[None])[0]
        return Solution(x, -log_det, last, iterations, torch.zeros_like(last).bool(), traced)

    def _weights_in(self, dtype: torch.dtype) -> MintWeights:
        """Effective weights of that dtype, without gradients."""
        weights = self._frozen.weights if self._frozen else self.effective_weights()
        return MintWeights(*(weight.detach().to(dtype) for weight in weights))

    def slope_bounds(self) -> tuple[Tensor, Tensor] | None:
        if self.activation.steepest is None:
            return None
        weights = self._weights()
        weights = weights.weights if isinstance(weights, FrozenWeights) else weights
        weights = MintWeights(*(weight.detach().to(weights.t.dtype) for weight in weights))
        return weights.t, weights.t + steepest_share(weights, self.activation)[:, None, None]

    @property
    def has_wavefront(self) -> bool:
        return self.activation.steepest is not None

    def wavefront(self, z: Tensor) -> Wave:
        """The inverse in the order of dependency, in float64.

        Raises:
            ValueError: the activation's steepest slope is not known.
        """
        if not self.has_wavefront:
            raise ValueError(
                f"activation {self.activation.name!r} has no steepest slope, which Wavefront needs "
                "for its brackets: give Activation(..., steepest=...) a bound of the derivative"
            )
        weights = self._weights_in(torch.float64)
        return mint_wavefront(z.double(), weights, self.activation, *self._structure)

    def exact_residual(self, x: Tensor, z: Tensor) -> Tensor:
        weights = self._weights_in(torch.float64)
        y = mint_exact_map(x.double(), weights, self.activation, *self._structure)
        return relative_residual(y, z.double())

    def jacobian_solver(self, x: Tensor, *, transpose: bool = False) -> LinearSolver:
        weights = self._weights_in(torch.float64)
        arguments = (weights, self.activation, *self._structure, transpose)
        solve = mint_jacobian_solver(x.double(), *arguments)
        return lambda right: solve(right.double()).to(x.dtype)

    def magnitude(self, x: Tensor) -> Tensor:
        return mint_magnitude(x, self._weights_in(x.dtype), self.activation)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (self._weights(), self.activation, *self._structure)
        y, _, log_det = mint_forward(x, *arguments, self.recompute, self._call())
        return y, log_det  # t > 0 keeps the diagonal from zero

    def transform(self, x: Tensor) -> Tensor:
        """y alone, for use where the determinant is not wanted (a classifier).

        Raises:
            TypeError, ValueError: x is not a finite tensor of the right shape, dtype and device.
        """
        self.check("x", x, self.input_shape)
        run_weight_hooks(self)
        return mint_map(x, self._weights(), self.activation, *self._structure, self._call())

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, size={self.size}, hidden={self.hidden}, "
            f"activation={self.activation.name!r}"
        )


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the ``with`` block, the parameters of every Mint layer inside ``module`` stand still.

    Their weights are masked, corrected and packed once, instead of at every call: for sampling and
    evaluation in many batches. Changes made to the parameters inside are not seen until the end.
    Gradients are off, as under ``torch.no_grad()``.

    Args:
        module: a layer, a network, or any module that has Mint layers inside; a copy of it made in
            the block is not frozen.

    Raises:
        TypeError: ``module`` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    layers = [layer for layer in module.modules() if isinstance(layer, MintLayer)]
    previous = [layer._frozen for layer in layers]
    with torch.no_grad():
        # Copies: a bias is used as it is, and would follow its parameter.
        copies = []
        for layer in layers:
            run_weight_hooks(layer)
            copies.append(MintWeights(*(one.clone() for one in layer.effective_weights())))
        try:
            for layer, weights in zip(layers, copies, strict=True):
                layer._frozen = FrozenWeights(weights)
            yield
        finally:
            for layer, frozen_before in zip(layers, previous, strict=True):
                # The layer may have gone to another dtype or device meanwhile.
                like = layer.conv2.weight
                fits = frozen_before is not None and (
                    frozen_before.weights.weight2.dtype == like.dtype
                    and frozen_before.weights.weight2.device == like.device
                )
                layer._frozen = frozen_before if fits else None


class MintPair(Chain, nn.Sequential):
    """A lower- and then an upper-triangular Mint layer, so that no blind spot remains.

    Takes the arguments of :class:`MintLayer` but ``triangle``; ``pair[0]`` and ``pair[1]`` are the
    layers.
    """

    def __init__(self, channels: int, size: int | Sequence[int], hidden: int, **layer: Any) -> None:
        super().__init__()
        for triangle in ("lower", "upper"):
            self.append(MintLayer(channels, size, hidden, triangle=triangle, **layer))

    @property
    def input_shape(self) -> Shape | None:
        return cast(MintLayer, self[0]).input_shape

    def steps(self) -> Iterable[tuple[str, Invertible]]:
        return cast(Iterator[tuple[str, Invertible]], self.named_children())


class Squeeze(Reshaping):
    """Trade resolution for channels: (B, C, H, W) -> (B, 4C, H/2, W/2).

    Channel order of the result is (dy, dx, c).

    Raises:
        ValueError: at a call, if H or W (or, inverting, C) does not divide.
    """

    @property
    def input_shape(self) -> Shape:
        return (None, None, None)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, colours, height, width = x.shape
        if height % 2 or width % 2:
            raise ValueError(f"x must have even height and width, got {tuple(x.shape)}")
        by_tap = x.reshape(batch, colours, height // 2, 2, width // 2, 2)
        y = by_tap.permute(0, 3, 5, 1, 2, 4)
        return y.reshape(batch, 4 * colours, height // 2, width // 2), _no_log_det(x)

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        batch, channels, height, width = z.shape
        if channels % 4:
            raise ValueError(f"z must have a multiple of 4 channels, got {tuple(z.shape)}")
        by_tap = z.reshape(batch, 2, 2, channels // 4, height, width)
        x = by_tap.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // 4, 2 * height, 2 * width)
        steps = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        return Solution(x, _no_log_det(z), z.new_zeros(len(z)), steps, steps.bool())


def _no_log_det(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=log_det_dtype(x))

"""The Mint layer, its pairs, and the squeeze between scales."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, SupportsIndex, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mintnet_triton.calculus import TriangularMap
from mintnet_triton.checks import (
    as_kernel_sizes,
    as_size,
    check_axes,
    check_finite,
    check_integer,
    check_positive,
)
from mintnet_triton.context import ContextLinear, ContextNetwork, check_maker, make_network
from mintnet_triton.conv import MaskedConv, MaskedConv1d, MaskedConv2d, MaskedConv3d
from mintnet_triton.hooks import call_watched, is_watched, run_conv_hooks, run_weight_hooks
from mintnet_triton.invertible import Chain, Invertible, Reshaping, Shape
from mintnet_triton.kernels import (
    Activation,
    Condition,
    FrozenWeights,
    MintWeights,
    Wave,
    Weights,
    find_activation,
    fixed_point,
    is_exported,
    mint_exact_map,
    mint_forward,
    mint_jacobian_solver,
    mint_magnitude,
    mint_map,
    mint_wavefront,
    positive,
    scaled,
    steepest_share,
    use_triton,
    with_centres,
)
from mintnet_triton.ordering import Order, Ordering, Triangle
from mintnet_triton.position import PositionBias
from mintnet_triton.solvers import (
    Evaluator,
    FixedPoint,
    LinearSolver,
    Solution,
    Solver,
    log_det_dtype,
    relative_residual,
)
from mintnet_triton.views import shallow, twin

#: of :class:`MintWeights`, those that are not views of others
_TENSORS = ("weight1", "bias1", "weight2", "bias2", "weight3", "bias3", "t")
#: what a context may scale t by at least, so that it stays positive in float32
LEAST_SCALE = 1e-12

Initialisation = Literal["density", "classifier", "near_identity"]


class _Blocks(list[FrozenWeights]):
    """What the :func:`frozen` blocks around a layer keep, of which there may be several threads'.

    A copy of a layer has parameters of its own, and none of this.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type["_Blocks"], tuple[()]]:
        return _Blocks, ()


class _Keys(set[int]):
    """Keys of hooks, which may stand for others in a copy that another process reads."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type["_Keys"], tuple[()]]:
        return _Keys, ()


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
        size: (H, W), or one integer for both; (L,) for series (B, C, L), (D, H, W) for volumes
            (B, C, D, H, W). What is said of (B, C, H, W) holds for them.
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
        context: channels of a context that the layer is given beside x, a vector (B, context) or a
            map (B, context, H, W), as x has axes; None, the default, for none.
        context_network: maps it to values (B, P) or (B, P, H, W), P = 2 C K + 2 C: what is added to
            b1 (C K of them), b2 (C K) and b3 (C), and s (C), for t is multiplied by exp(s). An
            ``nn.Module``, or a function that makes one for P outputs; None, the default, for a
            :class:`.ContextLinear`, which starts at zero. That one alone takes ``device`` and
            ``dtype``, and is started anew by :meth:`reset_parameters`.
        position_bias: frequencies along each axis of a :class:`.PositionBias`: values as those of a
            context, (P, H, W), that are learnt and added to them; None, the default, for none.
        device, dtype: of the parameters; torch's defaults if None.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        context: int | None = None,
        context_network: ContextNetwork | None = None,
        position_bias: int | None = None,
    ) -> None:
        super().__init__()
        channels, hidden = check_positive(channels=channels, hidden=hidden)
        self.channels, self.size, self.hidden = channels, as_size("size", size), hidden
        self.ordering = Ordering(order, triangle)
        self.activation = find_activation(activation)
        self.recompute = recompute
        self._blocks = _Blocks()
        self._watching = _Keys()  # of pre-hooks of convolutions that want their input
        self._given: Condition | None = None  # of a view for a context, or with tensors given
        if initialisation not in get_args(Initialisation):
            raise ValueError(
                f"initialisation must be one of {get_args(Initialisation)}, got {initialisation!r}"
            )
        self.initialisation = initialisation
        if self.activation.slope is None:
            raise ValueError(
                f"activation {self.activation.name!r} must have a slope for use in a Mint layer"
            )
        widths = (channels, channels * hidden, channels * hidden, channels)
        self.conv1, self.conv2, self.conv3 = (
            self._conv_type(
                inputs,
                outputs,
                side,
                colours=channels,
                triangle=triangle,
                order=order,
                device=device,
                dtype=dtype,
            )
            for inputs, outputs, side in zip(
                widths, widths[1:], as_kernel_sizes(kernel_size), strict=False
            )
        )
        self.t = nn.Parameter(torch.empty(self.input_shape, device=device, dtype=dtype))
        self.context, self.context_network = make_network(
            context, context_network, self._context_outputs, device=device, dtype=dtype
        )
        self.position_bias = None
        if position_bias is not None:
            frequencies = check_integer("position_bias", position_bias, least=1)
            self.position_bias = PositionBias(
                frequencies, self.size, self._context_outputs, device=device, dtype=dtype
            )
        self._initialise()

    def reset_parameters(self) -> None:
        """Start all parameters anew, as ``initialisation`` says."""
        for conv in (self.conv1, self.conv2, self.conv3):
            conv.reset_parameters()
        if isinstance(self.context_network, ContextLinear):
            self.context_network.reset_parameters()
        if self.position_bias is not None:
            self.position_bias.reset_parameters()
        self._initialise()

    def _initialise(self) -> None:
        """What is not as in ``nn.Conv2d``."""
        nn.init.ones_(self.t)
        for conv in (self.conv1, self.conv2, self.conv3):
            if self.initialisation == "density":
                nn.init.xavier_normal_(conv.weight, gain=0.005)
            elif self.initialisation == "near_identity":
                nn.init.normal_(conv.weight, std=1e-5)
                nn.init.zeros_(cast(Tensor, conv.bias))

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.channels, *self.size)

    @property
    def _conv_type(self) -> type[MaskedConv]:
        return (MaskedConv1d, MaskedConv2d, MaskedConv3d)[len(self.size) - 1]

    @property
    def _context_outputs(self) -> int:
        """How many values the context network gives, P."""
        return 2 * self.channels * self.hidden + 2 * self.channels

    def given(self, context: Tensor | None) -> Self:
        """As of any map; here its context network has been called.

        Raises:
            TypeError, ValueError: it gives something else than a floating tensor of the right shape
                and device.
            NonFiniteError: it gives a NaN or an infinity, or an s whose exponential is infinite.
        """
        if self.context is None or context is None:
            return self
        assert self.context_network is not None
        values = self.context_network(context)
        batch, outputs = context.shape[0], self._context_outputs
        shapes = (batch, outputs), (batch, outputs, *self.size)
        if not isinstance(values, Tensor) or all(values.shape != shape for shape in shapes):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"context_network of a MintLayer must give a tensor of shape {shapes[0]} or "
                f"{shapes[1]}, got {found}"
            )
        like = first_tensor(self)
        if not values.is_floating_point():
            raise TypeError(
                "context_network of a MintLayer must give a tensor of a floating dtype, got "
                f"{values.dtype}"
            )
        if values.device != like.device:
            raise ValueError(
                f"context_network of a MintLayer gives a tensor on {values.device}, the layer's "
                f"parameters are on {like.device}"
            )
        if values.ndim == 2:  # the same at every pixel
            values = values.reshape(batch, outputs, *[1] * len(self.size))
        given = self._as_condition(values)
        if values.device.type == "cpu":  # as inputs are looked at
            check_finite("what context_network gives", values)
            check_finite("exp(s) of what context_network gives", given.scale)
        if self.position_bias is not None:
            given = self._as_condition(values + self.position_bias())
        view = twin(self)
        view.context, view._given = None, given
        return view

    def _as_condition(self, values: Tensor) -> Condition:
        """From (B, P, H, W), or (B, P, 1, 1)."""
        inner = self.channels * self.hidden
        shift1, shift2, shift3, s = values.split([inner, inner, self.channels, self.channels], 1)
        dtype = torch.promote_types(s.dtype, log_det_dtype(first_tensor(self)))
        scale = s.to(dtype).exp().clamp(min=LEAST_SCALE)
        return Condition(shift1, shift2, shift3, scale)

    @property
    def _condition(self) -> Condition | None:
        """What a context and the position bias change; that bias alone is one sample for all."""
        if self._given is not None or self.position_bias is None:
            return self._given
        return self._as_condition(self.position_bias())

    def _condition_of(self, x: Tensor) -> Condition | None:
        condition = self._condition
        return condition and condition.to(log_det_dtype(x))

    @property
    def _frozen(self) -> FrozenWeights | None:
        """What the innermost :func:`frozen` block keeps."""
        return self._blocks[-1] if self._blocks else None

    @property
    def _structure(self) -> tuple[Order, Triangle]:
        assert self.ordering is not None
        return self.ordering.order, self.ordering.triangle

    def positive_t(self) -> Tensor:
        """``max(|t|, 1e-12)``, (C, H, W), never below float32, where that is not zero."""
        return positive(self.t)

    def raw_weights(self) -> Weights:
        """The parameters as the Triton kernels take them, which mask and correct them.

        Raises:
            HookError: a forward pre-hook of a convolution keeps an input that there is not.
            TypeError, ValueError: a convolution or a parameter has been replaced by one that does
                not fit.
        """
        convs = self._checked_convs()
        # Each is asked for once, for a parametrization computes it every time.
        weight1, weight2, weight3 = (conv.raw_weight() for conv in convs)
        bias1, bias2, bias3 = (conv.bias for conv in convs)
        weights = Weights(weight1, bias1, weight2, bias2, weight3, bias3, self.t)
        self._check_tensors(weights, self.t.dtype)
        return weights

    def effective_weights(self) -> MintWeights:
        """Masked, sign-corrected weights, computed from the parameters at each call.

        Raises:
            HookError, TypeError, ValueError: as :meth:`raw_weights`.
        """
        convs = self._checked_convs()
        weight1, weight2, weight3 = (conv.masked_weight() for conv in convs)
        bias1, bias2, bias3 = (
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(
                (weight1, weight2, weight3), (conv.bias for conv in convs), strict=True
            )
        )
        t = self.positive_t()
        tensors = (weight1, bias1, weight2, bias2, weight3, bias3, t)
        self._check_tensors(Weights(*tensors), log_det_dtype(weight1))
        weights = with_centres(*tensors)
        if is_exported():
            return with_centres(weight1, bias1, _signed(weights), *tensors[3:])
        # |w| = sign(w) w, with the derivative that abs has; in place, for weight2 is new.
        weights.centre2.mul_(
            weights.centre3.detach().sign().unsqueeze(2)
            * weights.centre1.detach().sign().unsqueeze(1)
            * weights.centre2.detach().sign()
        )
        return weights

    def _checked_convs(self) -> list[MaskedConv]:
        """The convolutions, after the hooks by which their weights are computed."""
        convs = [self.conv1, self.conv2, self.conv3]
        if self._watching:  # but not hooks that have been removed
            present = {key for conv in convs for key in conv._forward_pre_hooks}
            self._watching.intersection_update(present)
        for number, conv in enumerate(convs, start=1):
            self._check_conv(f"conv{number}", conv)
            run_conv_hooks(conv, self._watching, f"'conv{number}' of a MintLayer")
        return convs

    def _check_conv(self, name: str, conv: nn.Module) -> None:
        """Refuse what would be called in vain, or is not of the layer's structure."""
        if not isinstance(conv, self._conv_type) or (
            (conv.ordering, conv.colours, conv.strict) != (self.ordering, self.channels, False)
        ):
            raise TypeError(
                f"{name} of a MintLayer must be a {self._conv_type.__name__} of its order and "
                f"colours, got {conv}"
            )
        kind: type[MaskedConv] = type_before_parametrizations(conv)
        if "forward" in vars(conv) or kind.forward is not MaskedConv.forward:
            raise TypeError(
                f"{name} of a MintLayer has a forward of its own, and would not be called: a layer "
                "is computed as a whole. Change its weight by torch.nn.utils.parametrize, or "
                "override masked_weight"
            )

    def _check_tensors(self, tensors: Weights, dtype_of_t: torch.dtype) -> None:
        """Refuse what does not fit together: kernels that are compiled would read beyond it."""
        weight1, weight2, weight3 = tensors[0:6:2]
        outer, inner = self.channels, len(weight1)
        shapes = (
            (inner, outer, *weight1.shape[2:]), (inner,), (inner, inner, *weight2.shape[2:]),
            (inner,), (outer, inner, *weight3.shape[2:]), (outer,), self.input_shape,
        )  # fmt: skip
        for name, tensor, shape in zip(_TENSORS, tensors, shapes, strict=True):
            dtype = dtype_of_t if name == "t" else weight1.dtype
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} of a MintLayer must have shape {shape}, got {tuple(tensor.shape)}"
                )
            if tensor.device != weight1.device:
                raise ValueError(
                    f"{name} of a MintLayer is on {tensor.device}, weight1 on {weight1.device}"
                )
            if tensor.dtype != dtype:
                raise TypeError(f"{name} of a MintLayer is {tensor.dtype}, weight1 {weight1.dtype}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def convert(tensor: Tensor) -> Tensor:
            if tensor.ndim != 4 or len(self.size) != 3:
                return fn(tensor)
            # The t of volumes is no image, as torch would have it where layouts are changed.
            return fn(tensor[None])[0]

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]  # as torch leaves it
        for frozen in self._blocks:
            weights = MintWeights(*(convert(weight) for weight in frozen.weights))
            frozen.replace(weights._replace(t=weights.t.to(log_det_dtype(weights.t))))
        return self

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._blocks = _Blocks()  # it is on another device
        return replica

    def _weights(self) -> MintWeights | FrozenWeights:
        if self.context is not None:
            raise TypeError(
                f"a MintLayer made for a context of {self.context} channels is used without one: "
                "it may be called and inverted, but is no part of a Sum or a Compose"
            )
        return self._frozen or self.effective_weights()

    def _weights_for(self, x: Tensor) -> MintWeights | Weights | FrozenWeights:
        """The same, but raw where the kernels that x goes to want it so."""
        if self._frozen or self._call() is not None or not use_triton(x, self.activation):
            return self._weights()
        for conv in (self.conv1, self.conv2, self.conv3):
            plain = getattr(type(conv), "masked_weight", None) is MaskedConv.masked_weight
            if not plain or "masked_weight" in vars(conv):
                return self.effective_weights()
        return self.raw_weights()

    def _call(self) -> Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor] | None:
        """How to call the convolutions, if hooks look at them."""
        convs = {
            name: conv
            for name, conv in self._modules.items()
            if conv is not None and conv not in (self.context_network, self.position_bias)
        }
        watched = any(
            is_watched(conv) or self._watching & conv._forward_pre_hooks.keys()
            for conv in convs.values()
        )
        if not watched:
            return None

        def call(number: int, convolution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            conv, name = convs[f"conv{number}"], f"'conv{number}' of a MintLayer"
            return call_watched(name, conv, self._watching, convolution, x)

        return call

    def tensors(self) -> dict[str, Tensor]:
        run_weight_hooks(self)
        weights = self._weights()
        weights = weights.weights if isinstance(weights, FrozenWeights) else weights
        found = {name: getattr(weights, name) for name in _TENSORS}
        condition = self._condition
        return found | (condition._asdict() if condition else {})

    def view(self, tensors: Mapping[str, Tensor]) -> Self:
        view = shallow(self)
        view.__dict__.update(_parameters={}, _modules={})  # nothing to be looked at by hooks
        weights = {name: tensors[name] for name in _TENSORS}
        frozen = self._frozen and self._frozen.weights._asdict()
        if not frozen or any(frozen[name] is not tensor for name, tensor in weights.items()):
            view._blocks = _Blocks([FrozenWeights(with_centres(**weights))])
        # Else it shares what is packed, for its weights are those that are frozen.
        if set(Condition._fields) <= tensors.keys():
            view._given = Condition(*(tensors[name] for name in Condition._fields))
        return view

    def of_samples(self, chosen: Tensor) -> Self:
        if self._given is None:
            return self
        view = twin(self)
        view._given = self._given.of_samples(chosen)
        return view

    def evaluator(self) -> Evaluator:
        run_weight_hooks(self)
        weights, call = self._weights(), self._call()
        if isinstance(weights, MintWeights) and not torch.is_grad_enabled():
            weights = FrozenWeights(weights)  # packed once for all evaluations
        arguments, condition = (weights, self.activation, *self._structure), self._condition

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            given = condition and condition.to(log_det_dtype(x))
            return mint_forward(x, *arguments, call=call, condition=given)[:2]

        return evaluate

    def start(self, z: Tensor) -> Tensor:
        t = self._frozen.weights.t if self._frozen else self.positive_t()
        return z / scaled(t, self._condition_of(z))

    def solve(
        self, z: Tensor, solver: Solver, *, trace: bool, reference: Tensor | None
    ) -> Solution:
        # The kernels keep no iterates to compare with a reference, and have one step for all.
        plain = isinstance(solver, FixedPoint) and not solver.safeguard and reference is None
        if not plain or not use_triton(z, self.activation):
            return super().solve(z, solver, trace=trace, reference=reference)
        assert isinstance(solver, FixedPoint)
        x, log_det, residuals, finish, iterations = fixed_point(
            z,
            self.start(z),
            self._frozen or FrozenWeights(self.effective_weights()),
            self.activation,
            *self._structure,
            solver.alpha,
            solver.iterations,
            solver.tolerance_for(z.dtype),
            solver.coarse and not trace,
            self._condition_of(z),
        )
        # A sample that has stopped keeps its last value in the rows that follow.
        rows = torch.arange(1, solver.iterations + 1, device=z.device)[:, None]
        traced = residuals.gather(0, rows.minimum(finish)) if trace else None
        last = residuals.gather(0, finish[None])[0]
        return Solution(x, -log_det, last, iterations, torch.zeros_like(last).bool(), traced)

    def _weights_in(self, dtype: torch.dtype) -> MintWeights:
        """Effective weights of that dtype, without gradients."""
        weights = self._weights()
        weights = weights.weights if isinstance(weights, FrozenWeights) else weights
        return MintWeights(*(weight.detach().to(dtype) for weight in weights))

    def _condition_in(self, dtype: torch.dtype) -> Condition | None:
        given = self._condition
        return given and Condition(*(one.detach().to(dtype) for one in given))

    def slope_bounds(self) -> tuple[Tensor, Tensor] | None:
        if self.activation.steepest is None:
            return None
        weights = self._weights()
        weights = weights.weights if isinstance(weights, FrozenWeights) else weights
        weights = MintWeights(*(weight.detach().to(weights.t.dtype) for weight in weights))
        t = scaled(weights.t, self._condition_in(weights.t.dtype))
        share = steepest_share(weights, self.activation)
        return t, t + share.view(-1, *[1] * len(self.size))

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
        weights, given = self._weights_in(torch.float64), self._condition_in(torch.float64)
        return mint_wavefront(z.double(), weights, self.activation, *self._structure, given)

    def exact_residual(self, x: Tensor, z: Tensor) -> Tensor:
        weights, given = self._weights_in(torch.float64), self._condition_in(torch.float64)
        y = mint_exact_map(x.double(), weights, self.activation, *self._structure, given)
        return relative_residual(y, z.double())

    def jacobian_solver(self, x: Tensor, *, transpose: bool = False) -> LinearSolver:
        weights, given = self._weights_in(torch.float64), self._condition_in(torch.float64)
        arguments = (weights, self.activation, *self._structure, transpose, given)
        solve = mint_jacobian_solver(x.double(), *arguments)
        return lambda right: solve(right.double()).to(x.dtype)

    def magnitude(self, x: Tensor) -> Tensor:
        weights, given = self._weights_in(x.dtype), self._condition_in(x.dtype)
        return mint_magnitude(x, weights, self.activation, given)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (self._weights_for(x), self.activation, *self._structure)
        call, condition = self._call(), self._condition_of(x)
        y, _, log_det = mint_forward(x, *arguments, self.recompute, call, condition)
        return y, log_det  # t > 0 keeps the diagonal from zero

    def transform(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """y alone, for use where the determinant is not wanted (a classifier).

        Raises:
            TypeError, ValueError: as ``forward``.
        """
        self.check("x", x, self.input_shape)
        self.check_context(context, x)
        run_weight_hooks(self)
        layer = self.given(context)
        arguments = (layer._weights_for(x), self.activation, *self._structure)
        return mint_map(x, *arguments, self._call(), layer._condition_of(x))

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, size={self.size}, hidden={self.hidden}, "
            f"activation={self.activation.name!r}"
            f"{'' if self.context is None else f', context={self.context}'}"
        )


def _signed(weights: MintWeights) -> Tensor:
    """weight2 with the signs of the others, by no writing into a diagonal: ONNX has none."""
    weight2, units = weights.weight2, weights.centre1.shape[1]
    outer, inner = (one.detach().sign().flatten() for one in (weights.centre3, weights.centre1))
    colour = torch.arange(len(inner), device=weight2.device) // units
    own = (colour[:, None] == colour).view(*weight2.shape[:2], *[1] * (weight2.ndim - 2))
    centre = F.pad(own, [side // 2 for side in reversed(weight2.shape[2:]) for _ in range(2)])
    return torch.where(centre, torch.outer(outer, inner).view_as(own) * weight2.abs(), weight2)


def first_tensor(module: nn.Module) -> Tensor:
    """A tensor of the first Mint layer of a network, of the dtype and device of its inputs.

    Parameters at large are another matter: replicas have none, and a head may be quantised.
    """
    layer = next(layer for layer in module.modules() if isinstance(layer, MintLayer))
    parameter = next(layer.parameters(), None)
    return layer.t if parameter is None else parameter


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the ``with`` block, the parameters of every Mint layer inside ``module`` stand still.

    Their weights are masked, corrected and packed once, instead of at every call: for sampling and
    evaluation in many batches. Changes made to the parameters inside are not seen until the end;
    but context networks and position biases are called as ever. Gradients are off, as under
    ``torch.no_grad()``.

    Args:
        module: a layer, a network, or any module that has Mint layers inside; a copy of it made in
            the block is not frozen.

    Raises:
        TypeError: ``module`` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    layers = [layer for layer in module.modules() if isinstance(layer, MintLayer)]
    with torch.no_grad():
        kept = []
        for layer in layers:
            run_weight_hooks(layer)
            # Copies: a bias is used as it is, and would follow its parameter.
            weights = MintWeights(*(one.clone() for one in layer.effective_weights()))
            kept.append(FrozenWeights(weights))
        try:
            for layer, frozen_weights in zip(layers, kept, strict=True):
                layer._blocks.append(frozen_weights)
            yield
        finally:
            for layer, frozen_weights in zip(layers, kept, strict=True):
                layer._blocks.remove(frozen_weights)


class MintPair(Chain, nn.Sequential):
    """A lower- and then an upper-triangular Mint layer, so that no blind spot remains.

    Takes the arguments of :class:`MintLayer` but ``triangle``; ``pair[0]`` and ``pair[1]`` are the
    layers. Each has a context network of its own: what makes one is to be given, not a module.
    """

    def __init__(self, channels: int, size: int | Sequence[int], hidden: int, **layer: Any) -> None:
        super().__init__()
        check_maker(layer.get("context_network"))
        for triangle in ("lower", "upper"):
            self.append(MintLayer(channels, size, hidden, triangle=triangle, **layer))

    @property
    def input_shape(self) -> Shape | None:
        return cast(MintLayer, self[0]).input_shape

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError("a MintPair is not sliced: pair[0] and pair[1] are its layers")
        return super().__getitem__(index)

    def steps(self) -> Iterable[tuple[str, Invertible]]:
        return cast(Iterator[tuple[str, Invertible]], self.named_children())


class Squeeze(Reshaping):
    """Trade resolution for channels: (B, C, H, W) -> (B, 4C, H/2, W/2).

    Channel order of the result is (dy, dx, c). Along one axis channels double, and their order is
    (dx, c); along three there are eight times as many, (dz, dy, dx, c).

    Args:
        axes: of the images: 1 for series (B, C, L), 3 for volumes (B, C, D, H, W).

    Raises:
        TypeError, ValueError: axes is not 1, 2 or 3; at a call, if H or W (or, inverting, C) does
            not divide.
    """

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        self.axes = check_axes(axes)

    @property
    def input_shape(self) -> Shape:
        return (None,) * (1 + self.axes)

    def channels_after(self, channels: int) -> int:
        return int(2**self.axes) * channels

    def moved(self, x: Tensor) -> Tensor:
        batch, colours, *size = x.shape
        if any(side % 2 for side in size):
            sides = ("length", "height and width", "depth, height and width")[self.axes - 1]
            raise ValueError(f"x must have even {sides}, got {tuple(x.shape)}")
        halves = [side // 2 for side in size]
        by_tap = x.reshape(batch, colours, *(n for half in halves for n in (half, 2)))
        taps, pixels = (range(first, 2 * self.axes + 2, 2) for first in (3, 2))
        y = by_tap.permute(0, *taps, 1, *pixels)
        return y.reshape(batch, self.channels_after(colours), *halves)

    def moved_back(self, z: Tensor) -> Tensor:
        batch, channels, *size = z.shape
        axes, taps = self.axes, 2**self.axes
        if channels % taps:
            raise ValueError(f"z must have a multiple of {taps} channels, got {tuple(z.shape)}")
        by_tap = z.reshape(batch, *[2] * axes, channels // taps, *size)
        pairs = (n for axis in range(1, axes + 1) for n in (1 + axes + axis, axis))
        x = by_tap.permute(0, 1 + axes, *pairs)
        return x.reshape(batch, channels // taps, *(2 * side for side in size))

    def context_after(self, context: Tensor | None) -> Tensor | None:
        """A map is averaged over the pixels that become one."""
        if context is None or context.ndim == 2:
            return context
        halves = (n for side in context.shape[2:] for n in (side // 2, 2))
        by_tap = context.reshape(
            *context.shape[:2], *halves
        )  # torch's pooling has no 16 bits in 3-D
        return by_tap.mean(tuple(range(3, 3 + 2 * self.axes, 2)))

"""The operations that the layers call: each goes to the backend chosen for its input."""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mintnet_triton.kernels import fronts, reference
from mintnet_triton.kernels.activation import Activation
from mintnet_triton.kernels.backend import (
    TRITON_INSTALLED,
    is_capturing,
    use_float32,
    use_numba,
    use_numba_layer,
    use_triton,
)
from mintnet_triton.kernels.cpu import products as cpu_products
from mintnet_triton.kernels.fronts import Slopes, Wave
from mintnet_triton.kernels.reference import (
    Call,
    Condition,
    MintWeights,
    Structure,
    Weights,
    scaled,
)
from mintnet_triton.kernels.series import as_image, as_square, given_images, of_images

if TRITON_INSTALLED:
    from mintnet_triton.kernels._library import compute_dtype
    from mintnet_triton.kernels.gpu import inversion as triton_inversion
    from mintnet_triton.kernels.gpu import masked_conv as triton_conv
    from mintnet_triton.kernels.gpu import mint_layer as triton_layer
    from mintnet_triton.kernels.gpu import wavefront as triton_wavefront
    from mintnet_triton.kernels.gpu.launching import precision_of
    from mintnet_triton.kernels.gpu.weights import Packed


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, colours: int, order: str, triangle: str
) -> Tensor:
    """Convolution with masked weights; see :func:`.reference.masked_conv2d`."""
    if use_triton(x):
        image = as_image(x)
        y = triton_conv.masked_conv2d(image, as_square(weight), bias, colours, order, triangle)
        return y if image is x else y.squeeze(-2)
    if use_float32(x, weight):
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            structure = (colours, order, triangle)
            return reference.masked_conv2d(x.float(), weight.float(), bias, *structure).to(dtype)
    return reference.masked_conv2d(x, weight, bias, colours, order, triangle)


class FrozenWeights:
    """Effective weights that do not change while this lives, packed for the kernels only once.

    Args:
        weights: without gradients.
    """

    def __init__(self, weights: MintWeights) -> None:
        self.replace(weights)

    def replace(self, weights: MintWeights) -> None:
        """Other weights, of another dtype or device."""
        self.weights = weights
        self._packed_for_cpu: Any = None
        #: by dtype and precision, with what other streams than that of the packing have to wait for
        self._packed: dict[tuple[torch.dtype, str], tuple[Packed, torch.cuda.Event | None]] = {}

    @property
    def weight2(self) -> Tensor:
        return self.weights.weight2

    def packed(self, dtype: torch.dtype, precision: str, structure: Structure) -> "Packed":
        """The weights as the kernels read them, for products of that dtype and precision."""
        t = self.weights.t
        # A graph neither waits for what is outside it, nor has anything for others in its memory.
        in_graph = torch.compiler.is_compiling() or is_capturing(t)
        key = dtype, precision
        if key in self._packed:
            packed, ready = self._packed[key]
            if ready is not None and not in_graph:
                stream = torch.cuda.current_stream(t.device)
                ready.wait(stream)
                for one in (*packed, *self.weights):  # which nobody may overwrite before it is done
                    if one is not None:
                        one.record_stream(stream)
            return packed
        packed = triton_layer.packed(
            of_images(as_weights(self.weights)), dtype, precision, structure
        )
        if not in_graph:
            ready = torch.cuda.current_stream(t.device).record_event() if t.is_cuda else None
            self._packed[key] = packed, ready
        return packed

    def packed_for_cpu(self, order: str, triangle: str) -> Any:
        """The weights as :mod:`.cpu.mint_layer` reads them."""
        from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer

        if self._packed_for_cpu is None:
            parts = (*self.weights[:6], self.weights.t)
            self._packed_for_cpu = cpu_mint_layer.pack_layer(parts, order, triangle)
        return self._packed_for_cpu


def as_weights(weights: MintWeights | Weights) -> Weights:
    """What the Triton kernels take, which find the centres by themselves."""
    return weights if isinstance(weights, Weights) else Weights(*weights[:6], weights.t)


def _in_float32(weights: MintWeights | FrozenWeights) -> MintWeights | FrozenWeights:
    if weights.weight2.dtype == torch.float32:
        return weights  # frozen ones with what has been packed
    if isinstance(weights, FrozenWeights):
        weights = weights.weights
    return MintWeights(*(weight.float() for weight in weights))


def _numba_layer(
    x: Tensor,
    weights: MintWeights | FrozenWeights,
    activation: Activation,
    order: str,
    triangle: str,
    diagonal: bool,
    recompute: bool = False,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor]:
    from mintnet_triton.kernels.cpu import (
        mint_layer as cpu_mint_layer,  # here, for numba takes time to import
    )

    condition = condition and condition.to(torch.float32)
    frozen = isinstance(weights, FrozenWeights) and not torch.compiler.is_compiling()
    if frozen and not (torch.is_grad_enabled() and x.requires_grad):
        assert isinstance(weights, FrozenWeights)
        packed = weights.packed_for_cpu(order, triangle)
        t = weights.weights.t
        return cpu_mint_layer.packed_forward(x, packed, t, activation.name, diagonal, condition)
    if isinstance(weights, FrozenWeights):
        weights = weights.weights
    structure = Structure(order, triangle, activation.name)
    return cpu_mint_layer.mint_forward(x, weights, structure, diagonal, recompute, condition)


def mint_map(
    x: Tensor,
    weights: MintWeights | Weights | FrozenWeights,
    activation: Activation,
    order: str,
    triangle: str,
    call: Call | None = None,
    condition: Condition | None = None,
) -> Tensor:
    """y of a Mint layer, (B, C, H, W) in the dtype of x; all else as in :func:`mint_forward`."""
    watched = call is not None
    if use_triton(x, activation, watched):
        return mint_forward(x, weights, activation, order, triangle, condition=condition)[0]
    assert not isinstance(weights, Weights)
    if use_float32(x, weights.weight2, activation):
        with torch.autocast("cpu", enabled=False):
            condition = condition and condition.to(torch.float32)
            arguments = (activation, order, triangle, call, condition)
            return mint_map(x.float(), _in_float32(weights), *arguments).to(x.dtype)
    if not watched and use_numba_layer(x, activation):
        return _numba_layer(
            x, weights, activation, order, triangle, diagonal=False, condition=condition
        )[0]
    if isinstance(weights, FrozenWeights):
        weights = weights.weights
    call = call or reference.call_plainly
    return reference.mint_map(x, weights, activation, order, triangle, call, condition)[0]


def mint_forward(
    x: Tensor,
    weights: MintWeights | Weights | FrozenWeights,
    activation: Activation,
    order: str,
    triangle: str,
    recompute: bool = False,
    call: Call | None = None,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Mint layer, the diagonal of its Jacobian, and its log-determinant.

    Args:
        weights: effective ones; where :func:`use_triton` says yes, raw ones do as well.
        recompute: keep x alone for the backward pass, and compute the hidden layers again there.
        call: calls each convolution, which is then computed on its own, by plain PyTorch.
        condition: of the samples, where a context gives one.

    Returns:
        y in the dtype of x, the diagonal, both (B, C, H, W), and log_det (B,), both in that of t.
    """
    watched = call is not None
    if use_triton(x, activation, watched):
        condition = condition and condition.of_batch(x.shape[0])
        if x.ndim == 3:
            y, diagonal, log_det = mint_forward(
                as_image(x), weights, activation, order, triangle, recompute,
                condition=given_images(condition),
            )  # fmt: skip
            return y.squeeze(-2), diagonal.squeeze(-2), log_det
        structure = Structure(order, triangle, activation.name)
        if isinstance(weights, FrozenWeights) and torch.is_grad_enabled() and x.requires_grad:
            weights = weights.weights
        if isinstance(weights, FrozenWeights):
            dtype = compute_dtype(weights.weights.weight2)
            packed = weights.packed(dtype, precision_of(dtype), structure)
            owned = as_weights(weights.weights)
            return triton_layer.packed_forward(x, packed, owned, structure, condition)
        owned = of_images(as_weights(weights))
        return triton_layer.mint_forward(x, owned, structure, recompute, condition)
    assert not isinstance(weights, Weights)
    if use_float32(x, weights.weight2, activation):
        with torch.autocast("cpu", enabled=False):
            condition = condition and condition.to(torch.float32)
            arguments = (order, triangle, recompute, call, condition)
            results = mint_forward(x.float(), _in_float32(weights), activation, *arguments)
        return results[0].to(x.dtype), *results[1:]
    if not watched and use_numba_layer(x, activation):
        y, diagonal = _numba_layer(
            x, weights, activation, order, triangle, True, recompute, condition
        )
        return y, diagonal, diagonal.log().flatten(1).sum(1)
    if isinstance(weights, FrozenWeights):
        weights = weights.weights
    call = call or reference.call_plainly
    if recompute and torch.is_grad_enabled():
        y, diagonal = checkpoint(
            reference.mint_forward, x, weights, activation, order, triangle, call, condition,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    else:
        y, diagonal = reference.mint_forward(
            x, weights, activation, order, triangle, call, condition
        )
    return y, diagonal, diagonal.log().flatten(1).sum(1)


#: residual to which coarse products bring a sample, about their rounding; and the largest quotient
#: of a residual and the one before, above which only rounding is left
COARSE, GAIN = 1e-4, 0.5


def fixed_point(
    z: Tensor,
    start: Tensor,
    weights: FrozenWeights,
    activation: Activation,
    order: str,
    triangle: str,
    alpha: float,
    iterations: int,
    tolerance: float,
    coarse: bool = False,
    condition: Condition | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1 on a Mint layer, where :func:`use_triton` says yes.

    Args:
        coarse: for float32, begin with products in float16, and finish without.
        condition: of the samples, where a context gives one.

    Returns:
        As :class:`.inversion.Iterated`, of the finish; and the iterations of both.
    """
    condition = condition and condition.of_batch(z.shape[0])
    if z.ndim == 3:
        x, *rest = fixed_point(
            as_image(z), as_image(start), weights, activation, order, triangle, alpha, iterations,
            tolerance, coarse, given_images(condition),
        )  # fmt: skip
        return x.squeeze(-2), rest[0], rest[1], rest[2], rest[3]
    structure = Structure(order, triangle, activation.name)
    arguments = (as_weights(weights.weights), structure, alpha, iterations)
    steps: Tensor | int = 0
    if coarse and z.dtype == torch.float32:
        packed = weights.packed(torch.float16, "ieee", structure)
        limit = max(tolerance, COARSE)
        begun = triton_inversion.fixed_point(z, start, packed, *arguments, limit, GAIN, condition)
        # What went astray begins anew.
        last = begun.residuals.gather(0, begun.iterations[None])[0]
        found = last <= begun.residuals[0]
        start = torch.where(found.view(-1, 1, 1, 1), begun.x, start)
        steps = begun.iterations
    packed = weights.packed(z.dtype, "ieee", structure)
    x, log_det, residuals, iterated = triton_inversion.fixed_point(
        z, start, packed, *arguments, tolerance, inf, condition
    )
    return x, log_det, residuals, iterated, steps + iterated


def mint_wavefront(
    z: Tensor,
    weights: MintWeights,
    hidden: Activation | Slopes,
    order: str,
    triangle: str,
    condition: Condition | None = None,
) -> Wave:
    """A Mint layer inverted in the order of dependency; see :func:`.fronts.wavefront`."""
    if not len(z):
        return fronts.empty_wave(z)
    condition = condition and condition.of_batch(len(z))
    if use_triton(z, None if isinstance(hidden, Slopes) else hidden):
        image = as_image(z)
        if isinstance(hidden, Slopes):
            hidden = Slopes(*map(as_image, hidden))
        wave = triton_wavefront.wavefront(
            image, of_images(weights), hidden, order, triangle, given_images(condition)
        )
        return wave if image is z else Wave(*(one.squeeze(-2) for one in wave))
    if use_numba(z, hidden, torch.float64):
        from mintnet_triton.kernels.cpu import (
            wavefront as cpu_wavefront,  # here, for numba takes time to import
        )

        return cpu_wavefront.wavefront(z, weights, hidden, order, triangle, condition)
    return fronts.wavefront(z, weights, hidden, order, triangle, condition)


def mint_exact_map(
    x: Tensor,
    weights: MintWeights,
    activation: Activation,
    order: str,
    triangle: str,
    condition: Condition | None = None,
) -> Tensor:
    """y of a Mint layer in float64, without gradients."""
    if x.device.type == "cpu" and not use_triton(x, activation):
        return cpu_products.mint_map(x, weights, activation, condition)
    return mint_map(x, weights, activation, order, triangle, condition=condition)


def mint_jacobian_solver(
    x: Tensor,
    weights: MintWeights,
    activation: Activation,
    order: str,
    triangle: str,
    transpose: bool,
    condition: Condition | None = None,
) -> Callable[[Tensor], Tensor]:
    """right -> v with ``J v = right``, or ``J^T v = right``, for the Jacobian J of a layer at x.

    ``right`` may have several times as many samples, x being repeated for them.
    """
    assert activation.slope is not None
    _, h1, h2 = reference.mint_map(
        x, weights, activation, order, triangle, reference.call_plainly, condition
    )
    slopes = Slopes(activation.slope(h1), activation.slope(h2))
    linear = fronts.transpose_weights(weights)
    if transpose:
        slopes = Slopes(slopes.second, slopes.first)
        triangle = "upper" if triangle == "lower" else "lower"
    else:
        linear = fronts.transpose_weights(linear)  # back, without biases

    def solve(right: Tensor) -> Tensor:
        times = len(right) // max(1, len(x))
        ones = [1] * (right.ndim - 1)
        repeated = Slopes(*(one.repeat(times, *ones) for one in slopes))
        again = linear
        if condition is not None:  # of which a linear layer keeps the scale alone
            t = scaled(linear.t, condition.of_batch(len(x)))
            again = linear._replace(t=t.repeat(times, *ones))
        return mint_wavefront(right, again, repeated, order, triangle).x

    return solve

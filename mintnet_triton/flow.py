"""MintNet: Mint pairs at several scales, as a normalizing flow."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from mintnet_triton.checks import (
    as_kernel_sizes,
    as_size,
    check_finite,
    check_integer,
    check_number,
    check_positive,
)
from mintnet_triton.context import rows_of_context
from mintnet_triton.invertible import Chain, Invertible, Shape
from mintnet_triton.kernels import Activation
from mintnet_triton.mint import MintPair, Squeeze, first_tensor
from mintnet_triton.ordering import Order
from mintnet_triton.parts import (
    ActNorm,
    ConditionalPrior,
    Dequantiser,
    FactorOut,
    InvertibleSequential,
    LevelSpline,
    LogisticMixture,
    PointwiseConv,
)
from mintnet_triton.presets import model_arguments
from mintnet_triton.solvers import Solver, log_det_dtype


def squeeze_positions(pairs: int, squeezes: int) -> list[int]:
    """Indices of the pairs that a squeeze precedes: ``i * (pairs // (squeezes + 1))``.

    Raises:
        TypeError, ValueError: pairs below 1, squeezes below 0, or pairs not above squeezes.
    """
    pairs = check_integer("pairs", pairs, least=1)
    squeezes = check_integer("squeezes", squeezes, least=0)
    if pairs <= squeezes:
        raise ValueError(f"pairs must be more than squeezes={squeezes}, got {pairs}")
    return [pairs // (squeezes + 1) * (i + 1) for i in range(squeezes)]


def squeezed(size: tuple[int, ...], squeezes: int) -> tuple[int, ...]:
    """(H, W), or sizes along other axes, after that many squeezes.

    Raises:
        ValueError: one of them does not divide by 2 that often.
    """
    factor = 2**squeezes
    if any(side % factor for side in size):
        raise ValueError(
            f"image_size must divide by {factor} for squeezes={squeezes}, got "
            f"{' x '.join(map(str, size))}"
        )
    return tuple(side // factor for side in size)


class Parts(TypedDict, total=False):
    """What a flow has beyond the paper; nothing of it by default."""

    level_spline: int | None
    position_bias: int | None
    mixture: int | None
    actnorm: bool
    mixing: bool
    factor_out: bool
    conditional_prior: int | None
    learned_base: bool
    dequantiser: int | None


#: of the parts, those that are a number, or None
NUMBERS = ("level_spline", "position_bias", "mixture", "conditional_prior", "dequantiser")


class MintNet(Chain):
    """A flow of Mint pairs with a standard normal latent; images come in logit space.

    ``flow(x)`` maps data to latent and returns ``(z, log_det)``; z has the shape of the last scale
    (``latent_shape``). Images themselves are another map, :class:`ImagePreprocess`.

    Args:
        channels: of an image.
        image_size: (H, W), or one integer for both; (L,) for series (B, C, L), (D, H, W) for
            volumes (B, C, D, H, W). What is said of (B, C, H, W) holds for them.
        pairs: number of Mint pairs.
        hidden: hidden units K per colour at the first scale; divided by 4 at each squeeze, by 2 for
            series and 8 for volumes, as channels are multiplied.
        squeezes: number of squeezes, evenly spread; 2 in the paper's models.
        order: "channel" or "pixel".
        kernel_size: odd, or three odd sizes.
        activation: name of a monotone function, or an :class:`Activation`.
        zero_init_start: pairs after the one of this index start near the identity (weights of
            deviation 1e-5, no bias). None, the default, starts all pairs alike, as the published
            models were trained.
        context: channels of a context, as :class:`MintLayer` takes it, that every layer is given;
            maps of it have the size of an image, and are averaged at squeezes.
        context_network: a function that makes the network of a layer, of P outputs; by default each
            is linear, and starts at zero.
        level_spline: levels of the images, for a :class:`.LevelSpline` of their logits, before all
            else.
        position_bias: frequencies along each axis of a :class:`.PositionBias` of every Mint layer.
        mixture: components of a :class:`.LogisticMixture` of every variable, before the pairs.
        actnorm: an :class:`.ActNorm` before each pair, of every variable before the first, and of
            each channel before the others.
        mixing: a :class:`.PointwiseConv` before each pair of more than one channel.
        factor_out: at each squeeze, the first half of the channels are latents
            (:class:`.FactorOut`), and what follows is a map of the others.
        conditional_prior: hidden channels of a :class:`.ConditionalPrior` of what is factored out.
        learned_base: latents with a mean and a scale each that are learnt; in terms of z, an
            :class:`.ActNorm` of every variable after all else.
        dequantiser: hidden units of a :class:`.Dequantiser` of images, for training by the bound of
            :func:`.variational_bits`. It is no part of the map: all else is as without it.

    Parts beyond the paper, from ``level_spline`` on, are off by default. Some start from data: call
    :meth:`initialise` before training.

    Raises:
        ValueError, TypeError: an argument outside its range, a size that does not divide, hidden
            units used up by the squeezes.
    """

    def __init__(
        self,
        channels: int,
        image_size: int | Sequence[int],
        pairs: int,
        hidden: int,
        squeezes: int = 2,
        order: Order = "channel",
        kernel_size: int | Sequence[int] = 3,
        activation: str | Activation = "elu",
        zero_init_start: int | None = None,
        *,
        context: int | None = None,
        context_network: Callable[[int], nn.Module] | None = None,
        **parts: Unpack[Parts],
    ) -> None:
        super().__init__()
        channels, pairs, hidden = check_positive(channels=channels, pairs=pairs, hidden=hidden)
        squeezes = check_integer("squeezes", squeezes, least=0)
        if zero_init_start is not None:
            zero_init_start = check_integer("zero_init_start", zero_init_start, least=-1)
        size = as_size("image_size", image_size)
        positions = squeeze_positions(pairs, squeezes)
        squeezed(size, squeezes)
        taps = 2 ** len(size)  # of a squeeze
        if hidden // taps**squeezes == 0:
            raise ValueError(
                f"hidden must be at least {taps**squeezes}, for it is divided by {taps} at each of "
                f"{squeezes} squeezes, got {hidden}"
            )
        #: what the constructor was called with, for :func:`mintnet_triton.save`
        self.arguments: dict[str, Any] = {
            "channels": channels,
            "image_size": size,
            "pairs": pairs,
            "hidden": hidden,
            "squeezes": squeezes,
            "order": order,
            "kernel_size": as_kernel_sizes(kernel_size),
            "activation": activation,
            "zero_init_start": zero_init_start,
        }
        if context is not None:
            self.arguments["context"] = check_integer("context", context, least=1)
        if context_network is not None:  # itself it could be neither pickled nor written to a file
            self.arguments["context_network"] = True
        self.arguments |= (chosen := _checked(parts))
        self.image_shape = (channels, *size)
        axes = len(size)
        self.layers = nn.ModuleList()
        layers: nn.ModuleList | InvertibleSequential = self.layers
        if levels := chosen.get("level_spline"):
            layers.append(LevelSpline(channels, levels, axes))
        if components := chosen.get("mixture"):
            layers.append(LogisticMixture(channels, size, components))
        for pair in range(pairs):
            if pair in positions:
                layers.append(Squeeze(axes))
                channels, size, hidden = channels * taps, squeezed(size, 1), hidden // taps
                if chosen.get("factor_out"):
                    kept = channels // 2
                    if width := chosen.get("conditional_prior"):
                        layers.append(ConditionalPrior(channels, kept, width, axes))
                    inner = InvertibleSequential()
                    layers.append(FactorOut(inner, kept))
                    layers, channels = inner, channels - kept
            if chosen.get("actnorm"):
                layers.append(ActNorm(channels, None if pair else size, axes))
            if chosen.get("mixing") and channels > 1:
                layers.append(PointwiseConv(channels, axes))
            near_identity = zero_init_start is not None and pair > zero_init_start
            layers.append(
                MintPair(
                    channels,
                    size,
                    hidden,
                    order=order,
                    kernel_size=kernel_size,
                    activation=activation,
                    initialisation="near_identity" if near_identity else "density",
                    context=context,
                    context_network=context_network,
                    position_bias=chosen.get("position_bias"),
                )
            )
        if chosen.get("learned_base"):
            self.layers.append(ActNorm(self.latent_shape[0], self.latent_shape[1:]))
        self.dequantiser: Dequantiser | None = None
        if hidden := chosen.get("dequantiser", 0):
            channels, *sides = self.image_shape
            self.dequantiser = Dequantiser(channels, sides, hidden, context=context)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) of z, at the last scale."""
        channels, *size = self.image_shape
        factor = 2 ** sum(isinstance(layer, Squeeze) for layer in self.modules())
        return channels * factor ** len(size), *(side // factor for side in size)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """A model of the paper.

        Args:
            name: "mnist", "cifar10" or "imagenet32"; "digits", "mnist5k", "fashion" or "patches"
                for small ones, not the paper's; all of these but "patches" with a "+", too, for
                what pays beyond the paper.
            changes: constructor arguments to use instead of the preset's.

        Raises:
            ValueError: no such preset.
        """
        return cls(**{**model_arguments(name, "density"), **changes})

    @property
    def input_shape(self) -> Shape:
        return self.image_shape

    @property
    def output_shape(self) -> Shape:
        return self.latent_shape

    @property
    def context(self) -> int | None:  # type: ignore[override]  # what it was made for
        return self.arguments.get("context")

    def steps(self) -> Iterable[tuple[str, Invertible]]:
        for index, layer in enumerate(self.layers):
            yield f"layers.{index}", cast(Invertible, layer)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density at x (B, C, H, W) in nats, (B,); float64 for float64 input, else float32.

        Given a context, one row a sample, it is the conditional one.

        Raises:
            TypeError, ValueError: as ``forward``.
        """
        for name, value in (("x", x), ("context", context)):
            if isinstance(value, Tensor):
                check_finite(name, value)
        z: Tensor
        log_det: Tensor
        z, log_det = self(x) if context is None else self(x, context)
        return standard_normal_log_prob(z) + log_det

    def dequantise(
        self, values: Tensor, levels: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Put the noise of the flow's dequantiser in the place of uniform noise on images.

        Args:
            values, levels, context: as :class:`.Dequantiser` takes them: images with uniform noise,
                not their logits.

        Returns:
            Images with the other noise, and the log-determinant (B,), without which the density of
            the flow there is no bound.

        Raises:
            TypeError, ValueError: as :class:`.Dequantiser`; or the flow has none.
        """
        if self.dequantiser is None:
            raise ValueError(
                "the flow has no dequantiser: make it as MintNet(..., dequantiser=hidden units)"
            )
        found: tuple[Tensor, Tensor] = self.dequantiser(values, levels, context)
        return found

    @torch.no_grad()
    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        solver: Solver | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Draw n samples x (n, C, H, W) in logit space, without gradients.

        They are of the parameters' dtype; in half precision, rounded from float32 at the end.

        Args:
            n: how many.
            generator: source of randomness; the default one of the device if None.
            temperature: standard deviation of the latents.
            solver: of the inverse; ``Auto()`` if None.
            context: of the samples: n rows, or one for all, (1, context) or (context,), or maps
                likewise.

        Raises:
            NotConvergedError: the inverse of some sample did not converge.
            ValueError, TypeError: an argument outside its range, or a context that does not fit.
        """
        z = self._latents(n, generator, temperature)
        x, _ = self.inverse(z, solver, self._rows_of(context, len(z)))
        return x.to(self._like().dtype)

    def sample_and_log_prob(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        solver: Solver | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples as :meth:`sample` draws them, and their ``log_prob`` (n,) under the flow.

        Both are differentiable by the parameters, as training by reverse KL divergence needs.

        Raises:
            NotConvergedError: the inverse of some sample did not converge.
            ValueError, TypeError: an argument outside its range, or a context that does not fit.
        """
        z = self._latents(n, generator, temperature)
        x, log_det = self.inverse(z, solver, self._rows_of(context, len(z)))
        return x.to(self._like().dtype), standard_normal_log_prob(z) - log_det

    def _like(self) -> Tensor:
        return first_tensor(self)

    def _rows_of(self, context: Tensor | None, n: int) -> Tensor | None:
        return rows_of_context(context, n, len(self.image_shape) - 1)

    def _latents(self, n: int, generator: torch.Generator | None, temperature: float) -> Tensor:
        n = check_integer("n", n, least=0)
        temperature = check_number("temperature", temperature)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
        like = self._like()
        dtype = log_det_dtype(like)
        return temperature * torch.randn(
            n, *self.latent_shape, generator=generator, device=like.device, dtype=dtype
        )


def _checked(parts: Parts) -> dict[str, Any]:
    """Those that are on, as JSON takes them."""
    known = Parts.__annotations__
    if unknown := sorted(set(parts) - set(known)):
        raise TypeError(f"MintNet has no argument {unknown[0]!r}; its parts are {sorted(known)}")
    chosen: dict[str, Any] = {}
    for name, value in parts.items():
        if name in NUMBERS:
            value = None if value is None else check_integer(name, value, least=1)
        elif not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {value!r}")
        if value:
            chosen[name] = value
    if "conditional_prior" in chosen and "factor_out" not in chosen:
        raise ValueError("conditional_prior is of what is factored out: give factor_out=True")
    return chosen


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log-density of N(0, I) at z (B, ...), (B,)."""
    z = z.flatten(1).to(log_det_dtype(z))
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))

"""Noise on images that fits a density better than uniform noise does: learnt, image by image.

A density p of real values v gives an image the mass of its cube, ``P = integral of p(image + u)``
over u in [0, 1)^D. With noise of any density q(u | image) there, ``log P`` is at least the mean of
``log p(image + u) - log q(u | image)``, and equal to it where q follows p within the cube. Uniform
noise has q = 1, and asks of p that it be flat there; a flow for q asks less. Its ``-log q`` is the
log-determinant of the map from uniform noise u0 to u.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton.checks import as_size, check_integer, check_positive, check_tensor, is_traced
from mintnet_triton.context import check_context
from mintnet_triton.mint import MintLayer, MintPair, first_tensor
from mintnet_triton.noise import NOISE_BITS, add_noise, holds_noise
from mintnet_triton.parts.sequential import InvertibleSequential
from mintnet_triton.solvers import log_det_dtype

#: uniform noise keeps so far from 0 and 1, whose logits are infinite: half of what it can tell
MARGIN = 2.0 ** -(NOISE_BITS + 1)


class Dequantiser(nn.Module):
    """``image + u0 -> image + u``, u = sigmoid(g(logit(u0))), g being Mint pairs given the image.

    Each layer of g sees the image, and what is given with it, through a small network: a 3 x 3
    and a 1 x 1 convolution. It starts as the identity, to rounding. (Ho et al., "Flow++", 2019,
    section 3.1.)

    Args:
        channels: of an image.
        size: (H, W), or one integer for both, or sizes along other axes.
        hidden: hidden units per colour, of the Mint layers.
        pairs: how many.
        context: channels of a context that is given beside the image.
        width: channels between the convolutions.
        device, dtype: of the parameters; torch's defaults if None.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(
        self,
        channels: int,
        size: int | Sequence[int],
        hidden: int,
        pairs: int = 2,
        context: int | None = None,
        width: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels, hidden, pairs, width = check_positive(
            channels=channels, hidden=hidden, pairs=pairs, width=width
        )
        self.context = None if context is None else check_integer("context", context, least=1)
        self.input_shape = channels, *as_size("size", size)
        seen = channels + (self.context or 0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.input_shape) - 2]

        def network(outputs: int) -> nn.Module:
            return nn.Sequential(
                conv(seen, width, 3, padding=1, device=device, dtype=dtype),
                nn.ELU(),
                conv(width, outputs, 1, device=device, dtype=dtype),
            )

        self.pairs = InvertibleSequential(
            *(
                MintPair(
                    channels,
                    self.input_shape[1:],
                    hidden,
                    device=device,
                    dtype=dtype,
                    context=seen,
                    context_network=network,
                )
                for _ in range(pairs)
            )
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the identity: what is last in a layer, and in its network, is zero."""
        for layer in self.modules():
            if isinstance(layer, MintLayer):
                layer.reset_parameters()
                first, _, last = cast(nn.Sequential, layer.context_network)
                cast(nn.Conv2d, first).reset_parameters()
                for parameter in (*layer.conv3.parameters(), *last.parameters()):
                    nn.init.zeros_(parameter)

    def forward(
        self, values: Tensor, levels: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Put the noise of the model in the place of uniform noise.

        Args:
            values: (B, C, H, W), images of integers with uniform noise in [0, 1) added; float32 up
                to 256 levels, or float64.
            levels: values a pixel may take.
            context: (B, context) or (B, context, H, W), where one is taken.

        Returns:
            The images with the other noise, shaped and typed as the values; never below the image,
            nor as large as the image + 1. And ``log|det du/du0|`` (B,): the bound is the
            log-density there plus this.

        Raises:
            TypeError, ValueError: values are not finite (on a CPU), not within [0, levels) (there),
                or of another shape, device or precision; the context does not fit.
        """
        levels = check_integer("levels", levels, least=2)
        like = first_tensor(self)
        check_tensor("values", values, self.input_shape, like=None)
        if values.device != like.device:
            raise ValueError(f"values are on {values.device}, the parameters on {like.device}")
        if not holds_noise(values.dtype, levels):
            raise TypeError(
                f"values must be of a dtype with room for noise beside levels={levels}, float32 up "
                f"to 256 levels or else float64, got {values.dtype}"
            )
        if values.numel() and values.device.type == "cpu" and not is_traced(values):
            least, most = (float(bound) for bound in values.detach().aminmax())
            if least < 0 or most >= levels:
                raise ValueError(
                    f"values must be at least 0 and below levels={levels}, got {least} to {most}"
                )
        check_context(self, context, values, self.input_shape[1:], like)
        images = values.detach().floor()
        uniform = (values - images).to(log_det_dtype(like))
        inner = 1 - 2 * MARGIN
        # 1 - u0 is exact near 1, where a difference from the sum would not be.
        start = (MARGIN + inner * uniform).log() - (MARGIN + inner * (1 - uniform)).log()
        seen = 2 * (images + 0.5) / levels - 1
        end, log_det = self.pairs(start.to(like.dtype), self._given(seen.to(like.dtype), context))
        end = end.to(start.dtype)
        log_det = log_det + (_minus_log_slope(start) - _minus_log_slope(end)).flatten(1).sum(1)
        log_det = log_det + images.shape[1:].numel() * math.log(inner)
        return add_noise(images, torch.sigmoid(end).to(values.dtype)), log_det

    def _given(self, seen: Tensor, context: Tensor | None) -> Tensor:
        """What the layers are given: the image, and the context at every pixel."""
        if context is None:
            return seen
        if context.ndim == 2:
            context = context.reshape(*context.shape, *[1] * (seen.ndim - 2))
            context = context.expand(*context.shape[:2], *seen.shape[2:])
        return torch.cat([seen, context], 1)


def _minus_log_slope(logits: Tensor) -> Tensor:
    """``-log`` of the derivative of the sigmoid."""
    return F.softplus(logits) + F.softplus(-logits)

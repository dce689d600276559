"""Images and their logits: dequantisation, the logit map, and bits per dimension."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton.checks import check_integer, check_number, check_tensor, is_traced
from mintnet_triton.flow import MintNet
from mintnet_triton.noise import add_noise, holds_noise
from mintnet_triton.presets import load_preset
from mintnet_triton.solvers import log_det_dtype

#: dimensions of a batch of series, images or volumes
RANKS = (3, 4, 5)

# PyTorch has no order for these.
_UNORDERED = (torch.uint16, torch.uint32, torch.uint64)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_INTEGERS = (torch.bool, torch.uint8, *_SIGNED, *_UNORDERED)


class ImagePreprocess(nn.Module):
    """Images of integer levels -> real values v in [0, levels) -> logits x.

    ``v = image + u`` with u uniform in [0, 1); ``x = logit(lambda + (1 - 2 lambda) v / levels)``.
    The log-determinant is that of v -> x. Hence
    ``-(flow.log_prob(x) + log_det) / (D log 2)`` are bits per dimension, with no constant to add.

    Args:
        levels: values a pixel may take, 0 to levels - 1; from 2 to 2**37, beyond which float64 has
            no room for the noise.
        logit_lambda: keeps the logits finite, in (0, 0.5); 0.05 for CIFAR-10, 1e-6 for MNIST.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(self, levels: int = 256, logit_lambda: float = 0.05) -> None:
        super().__init__()
        self.levels = check_integer("levels", levels, least=2)
        self.logit_lambda = check_number("logit_lambda", logit_lambda)
        if not 0 < self.logit_lambda < 0.5:
            raise ValueError(f"logit_lambda must be in (0, 0.5), got {logit_lambda}")
        if not holds_noise(torch.float64, self.levels):
            raise ValueError(f"levels must be at most 2**37, got {levels}")

    @property
    def values_dtype(self) -> torch.dtype:
        """What values v need: float32 up to 256 levels, which leaves room for noise, or float64."""
        return torch.float32 if holds_noise(torch.float32, self.levels) else torch.float64

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """The preprocessing of a model of the paper: "mnist", "cifar10" or "imagenet32"."""
        data = load_preset(name, "data")
        return cls(levels=data["levels"], logit_lambda=data["logit_lambda"])

    def forward(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Dequantise images and map them to logits.

        Args:
            images: (B, C, H, W), or series (B, C, L) or volumes (B, C, D, H, W), of any integer
                dtype or bool, values 0 to levels - 1.
            generator: source of the noise; the default one of the device if None.
            dtype: of the logits; the default dtype if None. For more than 256 levels all is
                computed in float64 and rounded once, which can bring v across the edge of its
                level: give float64 if :meth:`to_images` has to return the very images.

        Returns:
            x, shaped like the images, and the log-determinant (B,) of v -> x.

        Raises:
            TypeError: images are not of an integer dtype.
            ValueError: a value outside 0 to levels - 1, or a wrong number of dimensions.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        exact = torch.float64 if dtype == torch.float64 else self.values_dtype
        x, log_det = self.transform(self.dequantise(images, generator, exact))
        x = x.to(dtype)
        return x, log_det.to(log_det_dtype(x))

    def dequantise(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``v = image + u``, never rounded up to image + 1; errors as :meth:`forward`.

        Args:
            dtype: float64, or float32 up to 256 levels, the default there; a lower precision would
                lose the noise.

        Raises:
            ValueError: dtype has no room for the noise.
        """
        dtype = self.values_dtype if dtype is None else dtype
        if not holds_noise(dtype, self.levels):
            raise ValueError(
                f"dtype must be {self.values_dtype} for levels={self.levels}, so that noise is not "
                f"rounded away, got {dtype}"
            )
        if not isinstance(images, Tensor) or images.dtype not in _INTEGERS:
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"images must be a tensor of an integer dtype, got {kind}; values in [0, 1] become "
                "images by (values * (levels - 1)).round().long()"
            )
        if images.ndim not in RANKS:
            raise ValueError(
                f"images must be (batch, C, H, W), got shape {tuple(images.shape)}; or series "
                "(batch, C, L), or volumes (batch, C, D, H, W)"
            )
        if images.numel() and not is_traced(images):
            ordered = images.double() if images.dtype in _UNORDERED else images
            least, most = (int(bound) for bound in ordered.aminmax())
            if least < 0 or most >= self.levels:
                raise ValueError(
                    f"images must be within 0 and {self.levels - 1} for levels={self.levels}, got "
                    f"values from {least} to {most}"
                )
        noise = torch.rand(images.shape, generator=generator, dtype=dtype, device=images.device)
        return add_noise(images, noise)

    def transform(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Map real values v, shaped as images, in [0, levels] to logits x, with the log-det (B,).

        Raises:
            TypeError, ValueError: not a finite floating tensor within [0, levels].
        """
        _check_images("values", values)
        if values.numel() and not is_traced(values):
            least, most = (float(bound) for bound in values.detach().aminmax())
            if least < 0 or most > self.levels:
                raise ValueError(
                    f"values must be within 0 and {self.levels}, got {least} to {most}"
                )
        p = self.logit_lambda + (1 - 2 * self.logit_lambda) * (values / self.levels)
        x = p.log() - (-p).log1p()
        return x, self._log_det(x)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map logits x, shaped as images, to values v, with the log-det (B,) of x -> v.

        v lies outside [0, levels] where x lies outside the logits of images.

        Raises:
            TypeError, ValueError: not a finite floating tensor of three to five dimensions.
        """
        _check_images("x", x)
        p = torch.sigmoid(x)
        return (p - self.logit_lambda) * (self.levels / (1 - 2 * self.logit_lambda)), -(
            self._log_det(x)
        )

    def to_images(self, x: Tensor) -> Tensor:
        """Images, int64 in 0 to levels - 1, from logits x; values outside are clipped.

        Raises:
            TypeError, ValueError: as :meth:`inverse`.
        """
        _check_images("x", x)
        return self.inverse(x.double())[0].floor().clamp(0, self.levels - 1).long()

    def _log_det(self, x: Tensor) -> Tensor:
        # dv -> dp is a constant; dp -> dx is 1 / (p (1 - p)).
        x = x.flatten(1).to(log_det_dtype(x))
        constant = math.log((1 - 2 * self.logit_lambda) / self.levels)
        return (F.softplus(x) + F.softplus(-x) + constant).sum(1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, logit_lambda={self.logit_lambda}"


def _check_images(name: str, x: Tensor) -> None:
    """Raise a typed error unless x is a finite floating tensor of as many dimensions as images."""
    rank = x.ndim if isinstance(x, Tensor) and x.ndim in RANKS else 4
    check_tensor(name, x, [None] * (rank - 1), like=None)


def bits_per_dim(
    flow: MintNet,
    images: Tensor,
    levels: int = 256,
    logit_lambda: float = 0.05,
    generator: torch.Generator | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Bits per dimension of images under a flow over their logits, one draw of the noise each.

    Args:
        flow: over logits.
        images: as the flow takes them, but of any integer dtype or bool, values 0 to levels - 1.
        levels: values a pixel may take.
        logit_lambda: the one that the flow was trained with.
        generator: source of the dequantisation noise.
        context: as the flow takes it, one row an image.

    Returns:
        (B,), in bits.

    Raises:
        TypeError, ValueError: as :class:`ImagePreprocess` and ``flow.log_prob``.
    """
    preprocess = ImagePreprocess(levels, logit_lambda)
    like = next(flow.parameters())
    x, log_det = preprocess(images, generator, log_det_dtype(like))
    given = () if context is None else (context,)
    bits: Tensor = -(flow.log_prob(x.to(like.dtype), *given) + log_det) / (
        math.log(2) * images.shape[1:].numel()
    )
    return bits


def variational_bits(
    flow: MintNet,
    images: Tensor,
    levels: int = 256,
    logit_lambda: float = 0.05,
    draws: int = 1,
    generator: torch.Generator | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Bits per dimension of images, bounded from above with the noise of the flow's dequantiser.

    With one draw, the mean over the noise is the variational bound, which a dequantiser is trained
    for. With more, it is the importance-weighted estimate, a bound that falls with the draws to the
    bits of the integers themselves. Neither is what :func:`bits_per_dim` measures. (Ho et al.,
    "Flow++", 2019, section 3.1; Burda et al., "Importance weighted autoencoders", 2016.)

    Args:
        flow: over logits, made with ``dequantiser=``.
        images, levels, logit_lambda, generator, context: as of :func:`bits_per_dim`.
        draws: of the noise, for each image.

    Returns:
        (B,), in bits.

    Raises:
        TypeError, ValueError: as :func:`bits_per_dim`; the flow has no dequantiser, or draws is
            below 1.
    """
    draws = check_integer("draws", draws, least=1)
    preprocess = ImagePreprocess(levels, logit_lambda)
    like = next(flow.parameters())
    exact = torch.promote_types(preprocess.values_dtype, log_det_dtype(like))
    given = () if context is None else (context,)
    log_probs = []
    for _ in range(draws):
        values = preprocess.dequantise(images, generator, exact)
        values, noise_log_det = flow.dequantise(values, levels, *given)
        x, log_det = preprocess.transform(values)
        log_prob = flow.log_prob(x.to(like.dtype), *given) + noise_log_det
        log_probs.append(log_prob + log_det.to(log_prob.dtype))
    mean = torch.stack(log_probs).logsumexp(0) - math.log(draws)
    return -mean / (math.log(2) * images.shape[1:].numel())

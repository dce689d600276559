"""Flows of other libraries behind one face, as rivals of a MintNet: ``python -m bench.peers``.

Every peer is a :class:`PeerFlow` over the same logits as a MintNet, with the same standard normal
latent and, to within a tenth, as many parameters as are asked for: its depth is fixed, its hidden
layers are as wide as the budget allows. None is written here: an adapter picks a library's own
parts, turns them from data to latent, and says what they compute inexactly. The libraries are
imported when a peer is built, not before.
"""

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mintnet_triton.checks import check_finite, check_integer, check_tensor

Shape = tuple[int, int, int]

#: how far the number of parameters may be from the wanted one
TOLERANCE = 0.1
#: of the peers that have several, as a MintNet of the paper
SQUEEZES = 2


class MissingLibraryError(ModuleNotFoundError):
    """The library of a peer is not installed; the message says how to install it."""


class BudgetError(ValueError):
    """No width gives a peer the wanted number of parameters."""


class FixedPointError(ArithmeticError):
    """An inverse that a library finds by iterations did not converge."""


def library(name: str) -> Any:
    """Import a library.

    Raises:
        MissingLibraryError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Python warns of an escape in a docstring of FrEIA 0.2 when it compiles it.
            warnings.filterwarnings("ignore", ".*invalid escape sequence")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # what it needs itself is missing
            raise
        message = f"{name} is not installed: pip install {name}"
        raise MissingLibraryError(message, name=name) from error


class PeerFlow(nn.Module):
    """A flow with a standard normal latent, over logits as :class:`mintnet_triton.MintNet` is.

    Train it in training mode and evaluate it in evaluation mode: in the latter, a log-det that is
    estimated has no gradients. The first batch seen sets the ActNorms, where there are any.

    Args:
        shape: (C, H, W) of an image.
        flow: what the library makes.
    """

    def __init__(self, shape: Shape, flow: Any) -> None:
        super().__init__()
        self.shape = shape
        self.flow = flow

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data (B, C, H, W) -> latent (B, C * H * W), and the log-det (B,); no checks."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, C * H * W) -> data (B, C, H, W); no checks.

        Raises:
            FixedPointError: of a residual flow or a NAF, an inverse did not converge.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data x (B, C, H, W) -> latent z (B, C * H * W), and the log-det (B,) of that map.

        Raises:
            TypeError, ValueError: x is not a finite tensor of the right shape, dtype and device.
        """
        check_tensor("x", x, self.shape, like=next(self.parameters()))
        return self.encode(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at x (B, C, H, W) in nats, (B,).

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        z: Tensor
        log_det: Tensor
        z, log_det = self(x)
        return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi)) + log_det

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples (n, C, H, W) in logit space, without gradients.

        Args:
            n: how many.
            generator: source of the latents; the default one of the device if None.

        Raises:
            TypeError, ValueError: n is not a positive integer.
            NonFiniteError: a sample is not finite.
            FixedPointError: of a residual flow or a NAF, an inverse did not converge.
        """
        check_integer("n", n, least=1)
        like = next(self.parameters())
        z = torch.randn(
            n, math.prod(self.shape), generator=generator, dtype=like.dtype, device=like.device
        )
        x = self.decode(z)
        check_finite("samples", x)
        return x


class ZukoFlow(PeerFlow):
    """Flows of zuko, over flattened images."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.flow().transform.call_and_ladj(x.flatten(1)))

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self.flow().transform.inv(z)
        return x.view(-1, *self.shape)


def nice(shape: Shape, width: int) -> PeerFlow:
    """NICE (Dinh et al. 2015): four additive couplings, then a scale and shift of each variable."""
    zuko = library("zuko")
    features = math.prod(shape)
    additive = {"univariate": zuko.transforms.AdditiveTransform, "shapes": [()]}
    couplings = zuko.flows.NICE(features, transforms=4, hidden_features=[width] * 3, **additive)
    scale = zuko.flows.ElementWiseTransform(features)
    for parameter in scale.parameters():
        nn.init.zeros_(parameter)
    return ZukoFlow(
        shape, zuko.flows.Flow([*couplings.transform.transforms, scale], couplings.base)
    )


def maf(shape: Shape, width: int) -> PeerFlow:
    """MAF (Papamakarios et al. 2017): five masked networks, every second in reverse order."""
    flows = library("zuko").flows
    features = math.prod(shape)
    sizes = {"hidden_features": [width, width], "passes": _groups(features, width)}
    return ZukoFlow(shape, flows.MAF(features, transforms=5, **sizes))


def _standardised(flow: Any) -> Any:
    """A flow of zuko behind a scale and shift of each variable, at first the identity.

    Beyond their bounds, which suit variables of mean zero and variance one, its splines do nothing
    and its bisection finds nothing. So zuko wants data standardised; logits of bytes reach 14.
    """
    flows = library("zuko").flows
    standardise = flows.ElementWiseTransform(math.prod(flow.base().event_shape))
    for parameter in standardise.parameters():
        nn.init.zeros_(parameter)
    return flows.Flow([standardise, *flow.transform.transforms], flow.base)


def _groups(features: int, width: int) -> int:
    """How many groups of variables follow one another in a masked network of zuko.

    Its hidden units see what precedes the first group, the second, and so on, as far as there are
    units: of more groups, the later would be seen by nobody.
    """
    return min(features, width + 1)


def nsf(shape: Shape, width: int) -> PeerFlow:
    """Neural spline flow (Durkan et al. 2019): three masked networks, 8 bins, linear tails."""
    flows = library("zuko").flows
    features = math.prod(shape)
    sizes = {"hidden_features": [width, width], "passes": _groups(features, width)}
    return ZukoFlow(shape, _standardised(flows.NSF(features, **sizes)))


def nsf_coupling(shape: Shape, width: int) -> PeerFlow:
    """The same of four couplings; a masked network of two groups would hide half its weights."""
    zuko = library("zuko")
    spline = {
        "univariate": zuko.transforms.MonotonicRQSTransform,
        "shapes": [(8,), (8,), (7,)],  # widths, heights and slopes of 8 bins
    }
    couplings = zuko.flows.NICE(
        math.prod(shape), transforms=4, hidden_features=[width, width], **spline
    )
    return ZukoFlow(shape, _standardised(couplings))


class BisectedFlow(ZukoFlow):
    """Flows of zuko that are inverted by bisection, which knows of no failure."""

    def decode(self, z: Tensor) -> Tensor:
        x = super().decode(z)
        _check_inverse(self(x)[0], z)
        return x


def naf(shape: Shape, width: int) -> PeerFlow:
    """NAF (Huang et al. 2018): three masked networks, which steer a monotone one of each variable.

    The library has 16 numbers steer one of 64 units a layer. Those of all variables would exceed
    the budget by themselves, hence 4 and 8.
    """
    flows = library("zuko").flows
    features = math.prod(shape)
    sizes = {"hidden_features": [width, width], "passes": _groups(features, width)}
    monotone = {"signal": 4, "network": {"hidden_features": [8, 8]}}
    return BisectedFlow(shape, _standardised(flows.NAF(features, **monotone, **sizes)))


def ffjord(shape: Shape, width: int) -> PeerFlow:
    """FFJORD (Grathwohl et al. 2019): one ordinary differential equation, fully connected."""
    flows = library("zuko").flows
    return ZukoFlow(shape, flows.CNF(math.prod(shape), hidden_features=[width] * 3, exact=False))


class MultiscaleFlow(PeerFlow):
    """Flows of normflows that drop half the channels at each scale but the last."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales, log_det = self.flow.inverse_and_log_det(x)
        return torch.cat([z.flatten(1) for z in scales], 1), log_det

    def decode(self, z: Tensor) -> Tensor:
        shapes = [base.shape for base in self.flow.q0]
        parts = z.split([math.prod(shape) for shape in shapes], 1)
        scales = [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        return cast(Tensor, self.flow.forward_and_log_det(scales)[0])


def multiscale(shape: Shape, layers: Callable[[Any, int], list[nn.Module]]) -> PeerFlow:
    """Scales of squeeze, layers, and a split (Real NVP, section 3.6).

    Args:
        shape: (C, H, W) of an image.
        layers: the library and the channels before a squeeze -> layers from latent to data, the
            squeeze among them.
    """
    nf = library("normflows")
    channels, height, width = shape
    scales, latents = [], []
    for scale in range(SQUEEZES):
        height, width = height // 2, width // 2
        scales.append(layers(nf, channels))
        channels *= 4 if scale == SQUEEZES - 1 else 2
        latents.append(nf.distributions.DiagGaussian((channels, height, width), trainable=False))
    # The library counts from latent to data.
    merges = [nf.flows.Merge() for _ in range(SQUEEZES - 1)]
    flow = nf.MultiscaleFlow(latents[::-1], scales[::-1], merges, class_cond=False)
    return MultiscaleFlow(shape, flow)


def real_nvp(shape: Shape, width: int) -> PeerFlow:
    """Real NVP (Dinh et al. 2017), with ActNorm where it has batch normalisation."""

    def layers(nf: Any, channels: int) -> list[nn.Module]:
        def couplings(channels: int, split: str) -> list[nn.Module]:
            shared: list[nn.Module] = []
            for kind in (split, f"{split}_inv", split):
                inside = channels if split == "checkerboard" else channels // 2
                sizes = [inside, width, width, 2 * inside]
                net = nf.nets.ConvNet2d(sizes, [3, 1, 3])
                shared += [
                    nf.flows.AffineCouplingBlock(net, split_mode=kind),
                    nf.flows.ActNorm((channels, 1, 1)),
                ]
            return shared

        after = couplings(4 * channels, "channel")
        return [*after, nf.flows.Squeeze(), *couplings(channels, "checkerboard")]

    return multiscale(shape, layers)


def glow(shape: Shape, width: int) -> PeerFlow:
    """Glow (Kingma and Dhariwal 2018): eight steps a scale."""

    def layers(nf: Any, channels: int) -> list[nn.Module]:
        steps = [nf.flows.GlowBlock(4 * channels, width) for _ in range(8)]
        return [*steps, nf.flows.Squeeze()]

    return multiscale(shape, layers)


def rq_nsf(shape: Shape, width: int) -> PeerFlow:
    """The image model of Durkan et al. (2019): a Glow whose couplings are splines, four a scale.

    They have the library's 8 bins in [-3, 3], which suits what an ActNorm leaves before each.
    """

    def layers(nf: Any, channels: int) -> list[nn.Module]:
        channels *= 4
        half = channels // 2

        def network(channels: int, outputs: int) -> nn.Module:
            net: nn.Module = nf.nets.resnet.ConvResidualNet(channels, outputs, width)
            return net

        steps: list[nn.Module] = []
        for _ in range(4):
            coupling = nf.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(
                torch.arange(channels) // half, network, num_bins=8, tails="linear", tail_bound=3.0
            )
            # It alone counts from data to latent.
            steps.append(nf.flows.Reverse(coupling))
            steps.append(nf.flows.Invertible1x1Conv(channels, use_lu=True))
            steps.append(nf.flows.ActNorm((channels, 1, 1)))
        return [*steps, nf.flows.Squeeze()]

    return multiscale(shape, layers)


class ResidualFlow(PeerFlow):
    """Residual blocks of normflows; they contract only while their norms are kept up to date."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:  # an optimiser may have moved the weights
            self._update_norms(5)
        log_det = x.new_zeros(len(x))
        for layer in self.flow:
            x, term = layer.inverse(x)
            log_det = log_det + term
        return x.flatten(1), log_det

    def decode(self, z: Tensor) -> Tensor:
        channels, height, width = self.shape
        factor = 2**SQUEEZES
        x = z.view(-1, channels * factor**2, height // factor, width // factor)
        for layer in reversed(self.flow):
            # A block is not called itself, for it would estimate a log-det as well.
            x = _invert(layer.iresblock, x) if hasattr(layer, "iresblock") else layer(x)[0]
        return x

    def train(self, mode: bool = True) -> "ResidualFlow":
        super().train(mode)
        if not mode:
            self._update_norms(50)
        return self

    def _update_norms(self, iterations: int) -> None:
        library("normflows").utils.update_lipschitz(self.flow, iterations)


def _invert(block: Any, y: Tensor) -> Tensor:
    """The library's fixed point, which ends in silence after 1000 steps, and its residual."""
    x: Tensor = block.inverse(y)
    _check_inverse(block(x), y)
    return x


def _check_inverse(found: Tensor, y: Tensor) -> None:
    """Whether f(x) is found where y is wanted."""
    residual = float((found - y).detach().abs().max() / y.detach().abs().max().clamp(min=1))
    if not residual <= 1e-2:
        raise FixedPointError(f"f(x) = y is off by {residual:.1e} of max(1, max |y|)")


def residual_flow(shape: Shape, width: int) -> PeerFlow:
    """Residual flow (Chen et al. 2019), the i-ResNet with an unbiased log-det: four a scale."""
    nf = library("normflows")
    channels, height, breadth = shape
    layers = nn.ModuleList()
    for _ in range(SQUEEZES):
        channels, height, breadth = 4 * channels, height // 2, breadth // 2
        layers.append(nf.flows.Squeeze())
        for _ in range(4):
            net = nf.nets.LipschitzCNN([channels, width, width, channels], [3, 1, 3])
            net(torch.zeros(1, channels, height, breadth))  # tells it the size of its images
            # To save memory, the library would return something else than the log-det.
            residual = nf.flows.Residual(net, reduce_memory=False)
            layers.extend([nf.flows.ActNorm((channels, 1, 1)), residual])
    return ResidualFlow(shape, layers)


class FreiaFlow(PeerFlow):
    """Flows of FrEIA."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.flow(x))

    def decode(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.flow(z, rev=True, jac=False)[0])


def all_in_one(shape: Shape, width: int) -> PeerFlow:
    """FrEIA's AllInOneBlock: clamped affine coupling, scale and shift, permutation; six a scale."""
    freia = library("FrEIA")

    def network(channels: int, outputs: int) -> nn.Module:
        first = nn.Conv2d(channels, width, 3, padding=1)
        middle, last = nn.Conv2d(width, width, 1), nn.Conv2d(width, outputs, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)

    flow = freia.framework.SequenceINN(*shape)
    for _ in range(SQUEEZES):
        flow.append(freia.modules.IRevNetDownsampling)
        for _ in range(6):
            flow.append(freia.modules.AllInOneBlock, subnet_constructor=network)
    flow.append(freia.modules.Flatten)
    return FreiaFlow(shape, flow)


class TorchflowsFlow(PeerFlow):
    """Flows of torchflows. Batch normalisation is in their networks: evaluate them trained."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with _own_warning():
            z, log_det = self.flow.forward(x)
        return z.flatten(1), log_det

    def decode(self, z: Tensor) -> Tensor:
        with _own_warning():
            return cast(Tensor, self.flow.inverse(z.view(-1, *self.shape))[0])


@contextlib.contextmanager
def _own_warning() -> Iterator[None]:
    """torchflows 1.2 indexes by a list, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)
        yield


def multiscale_real_nvp(shape: Shape, depth: int) -> PeerFlow:
    """Multiscale Real NVP of torchflows, whose networks are of one size: as deep as is to be.

    Its relatives are no rivals yet. Its Glows count the log-det of a 1 x 1 convolution for one
    pixel alone, and that of its deep sigmoids differs from the Jacobian's, too; its splines take 23
    outputs a variable from 100 units, many times what a MintNet has in all.
    """
    library("torchflows")
    architectures = importlib.import_module("torchflows.architectures")
    flow = architectures.MultiscaleRealNVP(
        shape, n_checkerboard_layers=depth, n_channel_wise_layers=depth
    )
    return TorchflowsFlow(shape, flow)


def count_parameters(module: nn.Module) -> int:
    """Trainable parameters; weights that a mask hides count, as they do for a MintNet."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Peer:
    """A rival, and what is to be known of its numbers."""

    name: str
    library: str  #: as it is imported and installed
    kind: str
    log_det: str  #: "exact", or what is inexact about ``forward`` and ``log_prob``
    sampling: str  #: "exact", or what is inexact about ``sample`` and ``decode``
    construct: Callable[[Shape, int], PeerFlow]  #: from a shape and the width of hidden layers
    image_sides: int = 1  #: what height and width have to divide by

    def build(self, shape: Shape, parameters: int) -> PeerFlow:
        """The peer with nearly the wanted number of parameters, of the default dtype.

        Its weights are random: torch's default generator makes them, FrEIA's permutations come
        from numpy's. A residual flow draws from numpy's whenever it is evaluated.

        Args:
            shape: (C, H, W) of an image.
            parameters: how many; the peer has them to within a tenth.

        Raises:
            TypeError, ValueError: a size below 1 or that does not divide as often as needed.
            BudgetError: no width gives that number.
            MissingLibraryError: the library is not installed.
        """
        check_integer("parameters", parameters, least=1)
        if len(shape) != 3:
            raise ValueError(f"shape must be (C, H, W), got {shape}")
        for size in shape:
            check_integer("each size of shape", size, least=1)
        if shape[1] % self.image_sides or shape[2] % self.image_sides:
            raise ValueError(
                f"{self.name} halves its images: height and width of shape must divide by "
                f"{self.image_sides}, got {shape}"
            )
        # Layers of one width after another: their weights are a quadratic of it.
        one, two, three = (count_parameters(self._construct(shape, width)) for width in (1, 2, 3))
        square = (three - 2 * two + one) / 2
        linear = two - one - 3 * square
        roots = np.roots([square, linear, one - square - linear - parameters])
        flow = self._construct(shape, max(1, round(float(roots.real.max()))))
        count = count_parameters(flow)
        if abs(count - parameters) > TOLERANCE * parameters:
            raise BudgetError(
                f"{self.name} over images of shape {shape} has no width for {parameters} "
                f"parameters; the nearest has {count}"
            )
        return flow

    def _construct(self, shape: Shape, width: int) -> PeerFlow:
        with warnings.catch_warnings():
            # normflows 1.7 decomposes the rotations of its Glow by a function that torch renamed.
            warnings.filterwarnings("ignore", "torch.lu is deprecated", UserWarning)
            # A library's constant may be float64, whatever the default is.
            return self.construct(shape, width).to(torch.get_default_dtype())


#: the rivals by a short name
PEERS: dict[str, Peer] = {
    "nice": Peer("NICE", "zuko", "coupling, fully connected", "exact", "exact", nice),
    "maf": Peer(
        "MAF", "zuko", "autoregressive, fully connected", "exact", "exact, a pass a variable", maf
    ),
    "nsf": Peer(
        "Neural spline flow",
        "zuko",
        "autoregressive, fully connected",
        "exact",
        "exact, a pass a group of variables",
        nsf,
    ),
    "nsf_coupling": Peer(
        "Neural spline couplings",
        "zuko",
        "coupling, fully connected",
        "exact",
        "exact",
        nsf_coupling,
    ),
    "naf": Peer(
        "NAF",
        "zuko",
        "autoregressive, fully connected",
        "exact",
        "bisection within [-10, 10] to 1e-6, a pass a group of variables",
        naf,
    ),
    "real_nvp": Peer(
        "Real NVP", "normflows", "coupling, convolutional", "exact", "exact", real_nvp, 4
    ),
    "glow": Peer("Glow", "normflows", "coupling, convolutional", "exact", "exact", glow, 4),
    "rq_nsf": Peer(
        "Glow with splines", "normflows", "coupling, convolutional", "exact", "exact", rq_nsf, 4
    ),
    "multiscale_real_nvp": Peer(
        "Multiscale Real NVP",
        "torchflows",
        "coupling, convolutions before a fully connected layer",
        "exact",
        "exact",
        multiscale_real_nvp,
        2,
    ),
    "freia": Peer("AllInOne", "FrEIA", "coupling, convolutional", "exact", "exact", all_in_one, 4),
    "ffjord": Peer(
        "FFJORD",
        "zuko",
        "continuous, fully connected",
        "Hutchinson's trace, one draw; Dormand-Prince, atol 1e-4, rtol 1e-5",
        "Dormand-Prince, atol 1e-6, rtol 1e-5",
        ffjord,
    ),
    "residual": Peer(
        "Residual flow",
        "normflows",
        "residual, convolutional",
        "Hutchinson's trace, one draw; power series of random length, unbiased after 2 terms "
        "in training, 20 in evaluation",
        "fixed point until steps are below 3e-3 sqrt(1 + |y|), 1000 at most; norms are estimated, "
        "hence no certain contraction",
        residual_flow,
        4,
    ),
}


def table() -> str:
    """The peers and what they compute inexactly, in Markdown."""
    rows = [
        f"| {peer.name} | {peer.library} | {peer.kind} | {peer.log_det} | {peer.sampling} |"
        for peer in PEERS.values()
    ]
    return "\n".join(["| peer | library | kind | log-det | sampling |", "| --- " * 5 + "|", *rows])


class ResNet(nn.Module):
    """The classifier beside a MintClassifier in Table 1 (He et al. 2016, section 4.2).

    Written here, unlike the flows: torchvision's wheels do not load beside a torch without CUDA,
    and the packages that have this network need torchvision.

    Args:
        channels: of an image.
        classes: number of classes.
        depth: layers with weights, 6 n + 2; 38 are as deep as the paper's 19 Mint pairs.
        width: channels of the first stage, doubled at the two others.

    Raises:
        TypeError, ValueError: an argument outside its range.
    """

    def __init__(
        self, channels: int = 3, classes: int = 10, depth: int = 38, width: int = 16
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("classes", classes), ("width", width)):
            check_integer(name, value, least=1)
        check_integer("depth", depth, least=8)
        if depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2, got {depth}")
        self.stem = nn.Sequential(*_conv_and_norm(channels, width, 1), nn.ReLU())
        self.blocks = nn.Sequential()
        for stage in range(3):
            for block in range((depth - 2) // 6):
                halves = stage > 0 and block == 0
                self.blocks.append(_ResidualBlock(width, 2 * width if halves else width))
                width = 2 * width if halves else width
        self.fc = nn.Linear(width, classes)

    @classmethod
    def of_size(cls, channels: int, classes: int, layers: int, parameters: int) -> "ResNet":
        """The network with about as many layers, of the width that is nearest in parameters."""
        depth = 6 * max(1, round((layers - 2) / 6)) + 2
        # Nearly a square of the width, so its root at one width tells the others.
        width = 16
        for _ in range(3):
            count = count_parameters(cls(channels, classes, depth, width))
            width = max(1, round(width * math.sqrt(parameters / count)))
        return cls(channels, classes, depth, width)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, classes) of images (B, C, H, W)."""
        return F.log_softmax(self.fc(self.blocks(self.stem(images)).mean((2, 3))), dim=1)


class _ResidualBlock(nn.Module):
    """Two convolutions beside the identity; more channels come with half the resolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.residual = nn.Sequential(
            *_conv_and_norm(before, after, stride), nn.ReLU(), *_conv_and_norm(after, after, 1)
        )
        self.stride, self.padding = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut has no parameters: it drops pixels and adds empty channels.
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(shortcut + self.residual(x))


def _conv_and_norm(before: int, after: int, stride: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(after)


if __name__ == "__main__":
    print(table())

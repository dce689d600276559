"""MintNet: invertible networks of masked convolutions.

Song, Meng, Ermon: MintNet: Building Invertible Neural Networks with Masked Convolutions,
NeurIPS 2019. ``forward`` maps data to latent and returns ``(y, log_det)``; ``inverse`` mirrors it.
"""

from mintnet_triton import calculus
from mintnet_triton.calculus import (
    Compose,
    Elementwise,
    MaskedAffine,
    SingularJacobianError,
    Sum,
    TriangularMap,
)
from mintnet_triton.checkpoint import (
    CheckpointError,
    layer_from_authors,
    load,
    load_authors_checkpoint,
    save,
)
from mintnet_triton.checks import NonFiniteError
from mintnet_triton.classifier import MintClassifier
from mintnet_triton.conv import MaskedConv1d, MaskedConv2d, MaskedConv3d
from mintnet_triton.flow import MintNet
from mintnet_triton.hooks import HookError
from mintnet_triton.images import ImagePreprocess, bits_per_dim, variational_bits
from mintnet_triton.inverse import InversionResult, NotConvergedError, invert
from mintnet_triton.invertible import Invertible
from mintnet_triton.kernels import Activation, BackendError, use_backend
from mintnet_triton.mint import MintLayer, MintPair, Squeeze, frozen
from mintnet_triton.ordering import Ordering, OrderingError
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
from mintnet_triton.scores import (
    entropy_estimate,
    interpolate,
    likelihood_ratio,
    log_prob_per_dim,
    reconstruct,
    typicality,
)
from mintnet_triton.solvers import Auto, FixedPoint, Solver, Wavefront
from mintnet_triton.step import NonFiniteStepError, TrainingStep
from mintnet_triton.tuning import tune
from mintnet_triton.verify import VerifyReport, verify
from mintnet_triton.version import __version__

__all__ = [
    "ActNorm",
    "Activation",
    "Auto",
    "BackendError",
    "CheckpointError",
    "Compose",
    "ConditionalPrior",
    "Dequantiser",
    "Elementwise",
    "FactorOut",
    "FixedPoint",
    "HookError",
    "ImagePreprocess",
    "InversionResult",
    "Invertible",
    "InvertibleSequential",
    "LevelSpline",
    "LogisticMixture",
    "MaskedAffine",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MintClassifier",
    "MintLayer",
    "MintNet",
    "MintPair",
    "NonFiniteError",
    "NonFiniteStepError",
    "NotConvergedError",
    "Ordering",
    "OrderingError",
    "PointwiseConv",
    "SingularJacobianError",
    "Solver",
    "Squeeze",
    "Sum",
    "TrainingStep",
    "TriangularMap",
    "VerifyReport",
    "Wavefront",
    "__version__",
    "bits_per_dim",
    "calculus",
    "entropy_estimate",
    "frozen",
    "interpolate",
    "invert",
    "layer_from_authors",
    "likelihood_ratio",
    "load",
    "load_authors_checkpoint",
    "log_prob_per_dim",
    "reconstruct",
    "save",
    "tune",
    "typicality",
    "use_backend",
    "variational_bits",
    "verify",
]

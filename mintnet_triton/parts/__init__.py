"""Invertible stages beyond the paper, a file each: they stand between Mint layers, or alone."""

from mintnet_triton.parts.actnorm import ActNorm
from mintnet_triton.parts.dequantiser import Dequantiser
from mintnet_triton.parts.factor_out import ConditionalPrior, FactorOut
from mintnet_triton.parts.mixture import LogisticMixture
from mintnet_triton.parts.pointwise import PointwiseConv
from mintnet_triton.parts.sequential import InvertibleSequential
from mintnet_triton.parts.spline import LevelSpline

__all__ = [
    "ActNorm",
    "ConditionalPrior",
    "Dequantiser",
    "FactorOut",
    "InvertibleSequential",
    "LevelSpline",
    "LogisticMixture",
    "PointwiseConv",
]

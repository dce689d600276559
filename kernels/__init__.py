"""The arithmetic of the Mint layer, one room per operation.

The folder is imported as ``mintnet_triton.kernels`` through a symbolic link; it imports nothing of
the package above it.
"""

if __name__ != "mintnet_triton.kernels":
    raise ImportError(
        f"this folder is not the top-level package {__name__!r}; import mintnet_triton.kernels"
    )

from mintnet_triton.kernels.activation import Activation, find_activation
from mintnet_triton.kernels.backend import (
    BackendError,
    full_float32,
    is_capturing,
    is_exported,
    is_transformed,
    use_backend,
    use_triton,
)
from mintnet_triton.kernels.dispatch import (
    FrozenWeights,
    fixed_point,
    masked_conv2d,
    mint_exact_map,
    mint_forward,
    mint_jacobian_solver,
    mint_map,
    mint_wavefront,
)
from mintnet_triton.kernels.fronts import Bracket, Wave, steepest_share
from mintnet_triton.kernels.reference import (
    Condition,
    MintWeights,
    Weights,
    convolve,
    mint_magnitude,
    positive,
    scaled,
    with_centres,
)

__all__ = [
    "Activation",
    "BackendError",
    "Bracket",
    "Condition",
    "FrozenWeights",
    "MintWeights",
    "Wave",
    "Weights",
    "convolve",
    "find_activation",
    "fixed_point",
    "full_float32",
    "is_capturing",
    "is_exported",
    "is_transformed",
    "masked_conv2d",
    "mint_exact_map",
    "mint_forward",
    "mint_jacobian_solver",
    "mint_magnitude",
    "mint_map",
    "mint_wavefront",
    "positive",
    "scaled",
    "steepest_share",
    "use_backend",
    "use_triton",
    "with_centres",
]

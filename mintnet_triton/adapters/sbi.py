"""sbi: a MintNet over vectors as a conditional density estimator."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mintnet_triton.adapters import library
from mintnet_triton.flow import MintNet

if TYPE_CHECKING:
    from torch.nn import Module as ConditionalDensityEstimator
else:
    ConditionalDensityEstimator = library(
        "sbi.neural_nets.estimators.base", "sbi"
    ).ConditionalDensityEstimator


class MintEstimator(ConditionalDensityEstimator):
    """``p(input | condition)``: a flow over standardised vectors, given an embedded condition.

    Args:
        flow: over images (D, 1, 1), with a context.
        embedding_net: condition (B, ...) -> context (B, flow.context).
        mean, std: of the inputs (D,), for standardising.
        condition_shape: of a condition, without the batch.

    Shapes: S is the number of samples, B that of conditions; an input is (D,).
    """

    net: MintNet
    mean: Tensor
    std: Tensor
    _check_input_shape: Any  # these are sbi's
    _check_condition_shape: Any
    _broadcast_and_align: Any

    def __init__(
        self,
        flow: MintNet,
        embedding_net: nn.Module,
        mean: Tensor,
        std: Tensor,
        condition_shape: torch.Size,
    ) -> None:
        super().__init__(flow, mean.shape, condition_shape)
        self._embedding_net = embedding_net
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @property
    def embedding_net(self) -> nn.Module:
        return self._embedding_net

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """Log-densities (S, B) of inputs (S, B, D) or (B, D) at conditions (B, ...) or (S, B, ...).

        Raises:
            ValueError, RuntimeError: shapes that do not fit, as sbi's own estimators.
            NonFiniteError: an input or an embedded condition is not finite.
        """
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        input, condition, _ = self._broadcast_and_align(input, condition)
        values = ((input - self.mean) / self.std).flatten(0, 1)[..., None, None]
        context = self._embedding_net(condition.flatten(0, 1))
        log_prob: Tensor = self.net.log_prob(values, context) - self.std.log().sum()
        return log_prob.view(input.shape[:2])

    def loss(self, input: Tensor, condition: Tensor) -> Tensor:
        """Negative log-densities (B,) of inputs (B, D) at conditions (B, ...)."""
        return -self.log_prob(input.unsqueeze(0), condition)[0]

    def sample(self, sample_shape: torch.Size, condition: Tensor) -> Tensor:
        """Samples ``(*sample_shape, B, D)`` at conditions (B, ...), without gradients.

        Raises:
            NotConvergedError: the inverse of some sample did not converge.
        """
        with torch.no_grad():
            return self.sample_and_log_prob(sample_shape, condition)[0]

    def sample_and_log_prob(
        self, sample_shape: torch.Size, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Samples ``(*sample_shape, B, D)``, and their log-densities ``(*sample_shape, B)``."""
        self._check_condition_shape(condition)
        shape = (*sample_shape, len(condition))
        embedded = self._embedding_net(condition)
        context = embedded.expand(*sample_shape, *embedded.shape)
        context = context.reshape(math.prod(shape), embedded.shape[1])
        values, log_prob = self.net.sample_and_log_prob(len(context), context=context)
        samples = values.reshape(*shape, len(self.mean)) * self.std + self.mean
        return samples, (log_prob - self.std.log().sum()).view(shape)


def mint_estimator(
    theta: Tensor,
    x: Tensor,
    pairs: int = 4,
    hidden: int = 16,
    embedding_net: nn.Module | None = None,
) -> MintEstimator:
    """An estimator of p(theta | x), untrained: ``NPE(density_estimator=mint_estimator)``.

    With ``functools.partial`` for other arguments. Parameters and data are standardised, one by
    one.

    Args:
        theta: a batch of parameters (B, D), at least two.
        x: a batch of data (B, ...).
        pairs: of Mint layers; between them, the D parameters are each other's context.
        hidden: hidden units for each of the D parameters.
        embedding_net: standardised x (B, ...) -> features (B, ...), trained with the rest; None
            for x as it is.

    Raises:
        ValueError: theta is no batch of vectors, or of fewer than two.
        TypeError, ValueError: pairs or hidden outside its range.
    """
    utils = library("sbi.utils.sbiutils", "sbi")
    if theta.ndim != 2 or len(theta) < 2:
        raise ValueError(f"theta must be (batch, D) with two rows at least, got {theta.shape}")
    mean, std = utils.z_standardization(theta)
    embedding = nn.Sequential(
        utils.standardizing_net(x), embedding_net or nn.Identity(), nn.Flatten()
    )
    with torch.no_grad():
        features = embedding(x[:2]).shape[1]
    flow = MintNet(theta.shape[1], 1, pairs, hidden, squeezes=0, kernel_size=1, context=features)
    return MintEstimator(flow.to(theta), embedding, mean, std, x.shape[1:])

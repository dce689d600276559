"""Pyro: a flow as a transform module of a base distribution."""

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.distributions import constraints

from mintnet_triton.adapters import check_model, event_shapes, library, torch_distributions
from mintnet_triton.solvers import Solver

if TYPE_CHECKING:
    from torch.nn import Module as ConditionalTransformModule
    from torch.nn import Module as TransformModule
else:
    TransformModule = library("pyro.distributions.torch_transform", "pyro").TransformModule
    ConditionalTransformModule = library(
        "pyro.distributions.conditional", "pyro"
    ).ConditionalTransformModule


class MintTransform(torch_distributions.MintTransform, TransformModule):
    """From base to data: ``TransformedDistribution(base, [MintTransform(flow)])``.

    All that :class:`.torch_distributions.MintTransform` is, and a module: ``pyro.module`` registers
    the flow's parameters.
    """


class ConditionalMintTransform(ConditionalTransformModule):
    """The same for a flow with a context, of ``ConditionalTransformedDistribution``.

    Args:
        model: a layer or a network that takes a context.
        cache_size: 0, or 1 to keep the last log-determinant of each transform.
        solver: of the inverse; ``Auto()`` if None.

    Raises:
        TypeError, ValueError: model is no invertible map for samples of one shape, or takes no
            context.
    """

    def __init__(self, model: nn.Module, cache_size: int = 0, solver: Solver | None = None) -> None:
        super().__init__()
        event, latent = event_shapes(model)
        if getattr(check_model(model), "context", None) is None:
            raise ValueError(f"model must take a context, and this {type(model).__name__} does not")
        self.model, self.cache_size, self.solver = model, cache_size, solver
        self.domain = constraints.independent(constraints.real, len(latent))
        self.codomain = constraints.independent(constraints.real, len(event))

    def condition(self, context: Tensor) -> MintTransform:
        """The transform for a context (..., channels), or maps (..., channels, H, W)."""
        return MintTransform(self.model, self.cache_size, self.solver, context)

"""zuko: a flow as a lazy transform, from data to noise."""

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.distributions import Transform

from mintnet_triton.adapters import event_shapes, given, library
from mintnet_triton.adapters.torch_distributions import MintTransform as NoiseToData
from mintnet_triton.solvers import Solver

if TYPE_CHECKING:
    from torch.nn import Module as LazyTransform
else:
    LazyTransform = library("zuko.lazy", "zuko").LazyTransform


class MintTransform(LazyTransform):
    """``zuko.lazy.Flow([MintTransform(flow), ...], base)``, among lazy transforms of zuko's.

    Called with a context, it returns a transform that keeps its last log-determinant, so that
    neither ``call_and_ladj`` nor that of its ``inv`` takes a second pass.

    Args:
        model: a layer or a network.
        solver: of the inverse; ``Auto()`` if None.

    Raises:
        TypeError, ValueError: model is no invertible map for samples of one shape.
    """

    def __init__(self, model: nn.Module, solver: Solver | None = None) -> None:
        super().__init__()
        event_shapes(model)
        self.model, self.solver = model, solver

    def forward(self, c: Tensor | None = None) -> Transform:
        """The transform x (..., C, H, W) -> z, for a context c where the model takes one."""
        return NoiseToData(self.model, 1, self.solver, given(self.model, c).get("context")).inv

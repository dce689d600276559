"""nflows: a flow as a transform, from data to noise."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mintnet_triton.adapters import check_model, given, library
from mintnet_triton.solvers import Solver

if TYPE_CHECKING:
    from torch.nn import Module as Transform
else:
    Transform = library("nflows.transforms", "nflows").Transform


class MintTransform(Transform):
    """``nflows.flows.Flow(MintTransform(flow), StandardNormal(flow.latent_shape))``.

    Args:
        model: a layer or a network.
        solver: of the inverse; ``Auto()`` if None.

    Raises:
        TypeError: model is no invertible map.
    """

    def __init__(self, model: nn.Module, solver: Solver | None = None) -> None:
        super().__init__()
        check_model(model)
        self.model, self.solver = model, solver

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, ...) -> noise, and its log|det| (B,); a context where the model takes one."""
        noise, log_det = self.model(inputs, **given(self.model, context))
        return noise, log_det

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise (B, ...) -> data, and its log|det| (B,); a context where the model takes one.

        Raises:
            NotConvergedError: the inverse of some sample did not converge.
        """
        inner = check_model(self.model)
        return inner.inverse(inputs, self.solver, **given(inner, context))

"""normflows: a flow as one of its own, from latent to data."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mintnet_triton.adapters import check_model, given, library
from mintnet_triton.solvers import Solver

if TYPE_CHECKING:
    from torch.nn import Module as Flow
else:
    Flow = library("normflows.flows", "normflows").Flow


class MintFlow(Flow):
    """``normflows.NormalizingFlow(q0, [..., MintFlow(flow)])``, or the conditional one.

    ``forward`` goes from latent to data, as everywhere in normflows. Its ``NormalizingFlow`` adds
    log-determinants up in the default dtype, whatever theirs is: for float64, set that to float64.

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

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, ...) -> x, and log|det dx/dz| (B,); a context where the model takes one.

        Raises:
            NotConvergedError: the inverse of some sample did not converge.
        """
        inner = check_model(self.model)
        return inner.inverse(z, self.solver, **given(inner, context))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, ...) -> z, and log|det dz/dx| (B,); a context where the model takes one."""
        z, log_det = self.model(x, **given(self.model, context))
        return z, log_det

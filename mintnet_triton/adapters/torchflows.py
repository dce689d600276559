"""torchflows: a flow as a bijection, from data to latent."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mintnet_triton.adapters import event_shapes, library, to_data, to_latent
from mintnet_triton.solvers import Solver

if TYPE_CHECKING:
    from torch.nn import Module as Bijection
else:
    Bijection = library("torchflows.bijections.base", "torchflows").Bijection


class MintBijection(Bijection):
    """``torchflows.flows.Flow(MintBijection(flow))``, or a part of a ``BijectiveComposition``.

    torchflows has one shape for data and latents: those of a network with squeezes are laid out in
    the shape of its data, which moves values alone.

    Args:
        model: a layer or a network.
        context_shape: of a context, without the batch; None for a model that takes none.
        solver: of the inverse; ``Auto()`` if None.

    Raises:
        TypeError, ValueError: model is no invertible map for samples of one shape.
    """

    def __init__(
        self,
        model: nn.Module,
        context_shape: tuple[int, ...] | None = None,
        solver: Solver | None = None,
    ) -> None:
        event, self._latent = event_shapes(model)
        super().__init__(event, context_shape)
        self.model, self.solver = model, solver

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (..., event) -> z (..., event), and log|det dz/dx| (...), for any shape of batch."""
        z, log_det = to_latent(self.model, x, context)
        return z.reshape(x.shape), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (..., event) -> x (..., event), and log|det dx/dz| (...), for any shape of batch.

        Raises:
            NotConvergedError: the inverse of some sample did not converge.
        """
        batch = z.shape[: max(0, z.ndim - len(self._latent))]
        return to_data(self.model, z.reshape(*batch, *self._latent), self.solver, context)

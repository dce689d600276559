"""FrEIA: a flow as an invertible module, of a sequence or a graph."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mintnet_triton.adapters import check_model, event_shapes, given, library
from mintnet_triton.solvers import Solver

if TYPE_CHECKING:
    from torch.nn import Module as InvertibleModule
else:
    InvertibleModule = library("FrEIA.modules", "freia").InvertibleModule


class MintModule(InvertibleModule):
    """``inn.append(MintModule, model=flow)`` for a ``SequenceINN``; in a graph,
    ``Node(previous, MintModule, {"model": flow})``.

    Args:
        dims_in: one shape, that of a sample.
        dims_c: of the context, one shape or none.
        model: a layer or a network.
        solver: of the inverse; ``Auto()`` if None.

    Raises:
        TypeError, ValueError: model is no invertible map for samples of one shape, or the shapes
            are not those of its samples and its context.
    """

    def __init__(
        self,
        dims_in: Iterable[Sequence[int]],
        dims_c: Iterable[Sequence[int]] | None = None,
        *,
        model: nn.Module,
        solver: Solver | None = None,
    ) -> None:
        dims_in, dims_c = [tuple(shape) for shape in dims_in], [tuple(one) for one in dims_c or ()]
        super().__init__(dims_in, dims_c)
        event, latent = event_shapes(model)
        if dims_in != [event]:
            raise ValueError(f"dims_in must be [{event}], as the model's, got {dims_in}")
        channels = getattr(check_model(model), "context", None)
        fitting = [] if channels is None else [(channels,)], [(channels, *event[1:])]
        if dims_c not in fitting:
            raise ValueError(f"dims_c must be {fitting[0]}, as the model's, got {dims_c}")
        self.model, self.solver, self._latent = model, solver, latent

    def forward(
        self,
        x_or_z: Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor], Tensor]:
        """((x (B, ...),) -> (z,), and log|det dz/dx| (B,)), or with ``rev`` the other way.

        The log-determinant, of the direction taken, comes with or without ``jac``.

        Raises:
            NotConvergedError: the inverse of some sample did not converge.
        """
        (values,) = x_or_z
        contexts = list(c or ())
        own = given(self.model, contexts[0] if contexts else None)
        if rev:
            result, log_det = check_model(self.model).inverse(values, self.solver, **own)
        else:
            result, log_det = self.model(values, **own)
        return (result,), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shape of a latent, without the batch."""
        return [self._latent]

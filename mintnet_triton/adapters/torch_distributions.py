"""``torch.distributions``: a flow as a transform of a base distribution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from mintnet_triton.adapters import event_shapes, given, to_data, to_latent
from mintnet_triton.solvers import Solver


class MintTransform(Transform):
    """From latent to data: ``TransformedDistribution(base, MintTransform(flow))``.

    The base has the event shape of the latents, e.g. ``Independent(Normal(zeros, ones), 3)`` with
    zeros of ``flow.latent_shape``. Batches have any shape. A log-determinant takes a forward pass;
    with ``cache_size=1``, that of the last call of this transform or of its inverse takes none,
    until a parameter or the context changes.

    Args:
        model: a layer or a network; the optimiser gets its parameters.
        cache_size: 0, or 1 to keep the last pair (z, x) with its log-determinant.
        solver: of the inverse; ``Auto()`` if None.
        context: (..., channels), or maps (..., channels, H, W), whose leading dimensions broadcast
            to the batch; None for a model that takes none.

    Raises:
        TypeError, ValueError: model is no invertible map for samples of one shape, cache_size is
            neither 0 nor 1, or there is a context that the model does not take. A call
            raises what the model and its inverse raise.
    """

    bijective = True

    def __init__(
        self,
        model: nn.Module,
        cache_size: int = 0,
        solver: Solver | None = None,
        context: Tensor | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size)
        event, latent = event_shapes(model)
        if context is not None and not given(model, context):
            raise ValueError(f"context must be None, for this {type(model).__name__} takes none")
        self.model, self.solver, self.context = model, solver, context
        self.domain = constraints.independent(constraints.real, len(latent))
        self.codomain = constraints.independent(constraints.real, len(event))
        self._last: tuple[Any, ...] = (None, None, None, None)

    def with_cache(self, cache_size: int = 1) -> "MintTransform":
        if cache_size == self._cache_size:
            return self
        return type(self)(self.model, cache_size, self.solver, self.context)

    def _call(self, z: Tensor) -> Tensor:
        x, log_det = to_data(self.model, z, self.solver, self.context)
        self._keep(z, x, log_det)
        return x

    def _inverse(self, x: Tensor) -> Tensor:
        z, log_det = to_latent(self.model, x, self.context)
        self._keep(z, x, -log_det)
        return z

    def _keep(self, z: Tensor, x: Tensor, log_det: Tensor) -> None:
        if self._cache_size:
            self._last = z, x, log_det, self._state()

    @property
    def _cached_x_y(self) -> tuple[Any, Any]:
        """What torch keeps of the last call, unless the model has changed since, as in training."""
        pair, state = self._pair
        return pair if state == self._state() else (None, None)

    @_cached_x_y.setter
    def _cached_x_y(self, pair: tuple[Any, Any]) -> None:
        self._pair = pair, self._state()

    def _state(self) -> tuple[Any, ...]:
        """What tells whether a result would be the same, with the same graph behind it."""
        model = getattr(self, "model", None)
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        if model is not None and self.context is not None:
            tensors.append(self.context)
        # Tensors made in inference mode count no changes: no state of them is like another.
        versions = (object() if one.is_inference() else one._version for one in tensors)
        return torch.is_grad_enabled(), *zip(map(id, tensors), versions, strict=True)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| (...), at a latent x and its y among the data, as torch calls them."""
        last_latent, last_datum, log_det, state = self._last
        if last_latent is x and last_datum is y and state == self._state():
            return torch.as_tensor(log_det)
        return -to_latent(self.model, y, self.context)[1]

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        event, latent = event_shapes(self.model)
        return _exchanged(shape, latent, event)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        event, latent = event_shapes(self.model)
        return _exchanged(shape, event, latent)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is cached, which may be part of a graph."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's
        return state | {"_last": (None,) * 4, "_pair": ((None, None), ())}


def _exchanged(shape: Sequence[int], old: tuple[int, ...], new: tuple[int, ...]) -> torch.Size:
    if tuple(shape[len(shape) - len(old) :]) != old or len(shape) < len(old):
        raise ValueError(f"shape must end with {old}, got {tuple(shape)}")
    return torch.Size([*shape[: len(shape) - len(old)], *new])

"""Does a model do what it says? Triangularity, log-determinant and round trip, checked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mintnet_triton.calculus import TriangularMap
from mintnet_triton.inverse import invert
from mintnet_triton.invertible import Invertible, Reshaping, Stage, as_invertible, given_stages
from mintnet_triton.ordering import Ordering
from mintnet_triton.solvers import max_error, relative_residual

LOG_DET_TOLERANCE = 1e-9  # relative, in float64


@dataclass(frozen=True)
class LayerReport:
    """One layer, in float64, the worst over the samples."""

    name: str
    #: largest ``|entry|`` of the Jacobian that must be zero; None where it need not be triangular
    above_diagonal: float | None
    log_det_error: float  #: ``|log_det - slogdet of autograd's| / max(1, |log_det|)``

    @property
    def ok(self) -> bool:
        return self.above_diagonal in (0, None) and self.log_det_error <= LOG_DET_TOLERANCE


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found; ``print`` it, or ask ``ok``."""

    layers: tuple[LayerReport, ...]
    converged: Tensor  #: (B,), bool, of the round trip in the model's own dtype
    residual: Tensor  #: (B,)
    round_trip_error: Tensor  #: (B,), ``max |x - inverse(forward(x))|``
    log_det_mismatch: Tensor  #: (B,), ``|log_det + log_det of the inverse|``
    forward_error: Tensor  #: (B,), of ``model(x)`` against its layers in float64, relative
    tolerance: float  #: what ``forward_error`` may be: half of the digits of x

    @property
    def ok(self) -> bool:
        """Layers triangular with the right log-det, the model made of them, samples inverted."""
        right = self.converged & (self.forward_error <= self.tolerance)
        return all(layer.ok for layer in self.layers) and bool(right.all())

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers) if self.layers else 5
        lines = [f"{'layer':<{width}}  above diagonal  log-det error"]
        for layer in self.layers:
            above = "any" if layer.above_diagonal is None else f"{layer.above_diagonal:.1e}"
            lines.append(
                f"{layer.name:<{width}}  {above:>14}  {layer.log_det_error:13.1e}"
                f"{'' if layer.ok else '  WRONG'}"
            )
        lines.append(
            f"round trip: {int(self.converged.sum())} of {len(self.converged)} samples converged, "
            f"residual {_largest(self.residual):.1e}, error {_largest(self.round_trip_error):.1e}, "
            f"log-det mismatch {_largest(self.log_det_mismatch):.1e}"
        )
        lines.append(
            f"forward: error {_largest(self.forward_error):.1e} against the layers in float64, at "
            f"most {self.tolerance:.1e} allowed"
        )
        lines.append("verified" if self.ok else "NOT verified")
        return "\n".join(lines)


def verify(model: Invertible, x: Tensor, context: Tensor | None = None) -> VerifyReport:
    """Check a layer, a pair, a network or anything of the calculus at x.

    In float64, for every layer at the input that it gets: the ``slogdet`` of autograd's Jacobian
    must be the layer's log-det, and where the layer is a triangular map, the Jacobian exactly
    triangular in its order. In the model's
    own dtype: ``model(x)`` must be what these layers give, so that no hook changes it, and the
    default solver must bring it back.

    A Jacobian of D variables takes D backward passes a sample: give few samples.

    Args:
        model: what to check; it is not changed.
        x: (B, ...), inputs of the model.
        context: as the model takes it, one row a sample.

    Raises:
        TypeError, ValueError: x or context is not a finite tensor of the right shape, dtype and
            device, or context is missing or superfluous.
    """
    model = as_invertible("model", model)
    model.check("x", x, model.input_shape)
    if not len(x):
        raise ValueError("x must have at least one sample, got none")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y, log_det = model(x) if context is None else model(x, context)
    result = invert(model, y, context=context)

    stages: Iterable[tuple[str, Stage]] = given_stages(model, context)
    if isinstance(model, TriangularMap):
        stages = [("", model.given(context))]
    point = x.detach().double()
    exact_log_det = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    reports = []
    for name, stage in stages:
        exact = stage.in_dtype(torch.float64)
        if not isinstance(exact, Reshaping):
            reports.append(_verify_layer(name or type(stage).__name__, *exact.innermost(point)))
        with torch.no_grad():
            point, step_log_det = exact._forward(point)
            exact_log_det += step_log_det
    return VerifyReport(
        layers=tuple(reports),
        converged=result.converged,
        residual=result.residual,
        round_trip_error=max_error(result.x, x.detach()),
        log_det_mismatch=(log_det + result.log_det).abs(),
        forward_error=torch.maximum(
            relative_residual(y.double(), point), _relative(log_det.double(), exact_log_det)
        ),
        tolerance=torch.finfo(x.dtype).eps ** 0.5,
    )


def _relative(values: Tensor, exact: Tensor) -> Tensor:
    return (values - exact).abs() / exact.abs().clamp(min=1)


def _jacobian(layer: Stage, sample: Tensor, number: int) -> Tensor:
    """Autograd's, of a layer at a sample of that number."""
    evaluate = layer.of_samples(torch.tensor([number], device=sample.device)).evaluator()
    jacobian = torch.func.jacrev(lambda v: evaluate(v[None])[0][0], chunk_size=64)(sample)
    return cast(Tensor, jacobian.detach().reshape(sample.numel(), sample.numel()))


def _verify_layer(name: str, layer: Stage, x: Tensor) -> LayerReport:
    shape = x.shape[1:]
    orderings: list[Ordering] = []
    if isinstance(layer, TriangularMap):
        # A map that fits any order must be triangular both ways.
        both = [Ordering(triangle="lower"), Ordering(triangle="upper")]
        orderings = [layer.ordering] if layer.ordering else both
    with torch.no_grad():
        log_dets = layer._forward(x)[1]
    above: list[Tensor] = []
    errors: list[Tensor] = []
    for number, (sample, log_det) in enumerate(zip(x, log_dets, strict=True)):
        jacobian = _jacobian(layer, sample, number)
        for ordering in orderings:
            order = ordering.rank(*shape).flatten().argsort().to(x.device)
            above.append(jacobian[order][:, order].triu(1).abs().max())
        exact = torch.linalg.slogdet(jacobian)[1]
        errors.append(_relative(log_det, exact))
    # Unlike Python's, this max keeps a NaN.
    worst = float(torch.stack(above).max()) if above else None
    return LayerReport(name, worst, float(torch.stack(errors).max()))


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0

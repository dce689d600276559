"""Jacobians by autograd, in a given order of the variables."""

import torch
from torch import Tensor

import mintnet_triton as mint


def jacobian(layer: mint.Invertible, x: Tensor) -> Tensor:
    """d y / d x (n, n) at one sample x (C, H, W) or (n,)."""
    full = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x, vectorize=True)
    return torch.as_tensor(full).reshape(x.numel(), x.numel())


def in_order(matrix: Tensor, ordering: mint.Ordering, shape: torch.Size) -> Tensor:
    """Rows and columns sorted by rank: lower-triangular if the map respects the order."""
    order = ordering.rank(*shape).flatten().argsort()
    return matrix[order][:, order]


def assert_triangular_with_log_det(layer: mint.TriangularMap, x: Tensor) -> None:
    """Exactly triangular, and the log-det that autograd finds, for every sample of x."""
    with torch.no_grad():
        _, log_det = layer(x)
        _, diagonal = layer.forward_and_diagonal(x)
    for sample, computed, entries in zip(x, log_det, diagonal, strict=True):
        matrix = jacobian(layer, sample)
        for ordering in [layer.ordering] if layer.ordering else BOTH:
            above = in_order(matrix, ordering, sample.shape).triu(1)
            assert float(above.abs().max()) == 0
        exact = torch.linalg.slogdet(matrix)[1]
        assert float((computed - exact).abs()) <= 1e-10 * max(1.0, float(exact.abs()))
        torch.testing.assert_close(entries.flatten(), matrix.diagonal(), rtol=1e-10, atol=1e-13)


BOTH = [mint.Ordering(triangle="lower"), mint.Ordering(triangle="upper")]

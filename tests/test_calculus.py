import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine, Sum, TriangularMap
from mintnet_triton.ordering import Order, Triangle
from tests.jacobian import assert_triangular_with_log_det

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE = (2, 3, 4)
ORDERINGS = [
    mint.Ordering("channel", "lower"),
    mint.Ordering("channel", "upper"),
    mint.Ordering("pixel", "lower"),
    mint.Ordering("pixel", "upper"),
]


def affine(ordering: mint.Ordering, size: int, generator: torch.Generator) -> MaskedAffine:
    """A random convolution of two colours with a clearly non-zero diagonal."""
    weight = torch.randn(2, 2, size, size, generator=generator, dtype=torch.float64) / 2
    for colour in range(2):
        weight[colour, colour, size // 2, size // 2] += 1.5
    bias = torch.randn(2, generator=generator, dtype=torch.float64)
    return MaskedAffine(weight, bias, ordering)


@st.composite
def trees(draw: st.DrawFn) -> tuple[TriangularMap, Tensor]:
    """A random tree of the calculus over one ordering, and a batch of inputs."""
    ordering = draw(st.sampled_from(ORDERINGS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def build(depth: int) -> TriangularMap:
        kinds = ["affine", "elementwise", "mint", "sum", "compose"][: 5 if depth else 3]
        kind = draw(st.sampled_from(kinds))
        if kind == "affine":
            return affine(ordering, draw(st.sampled_from([1, 3, 5])), generator)
        if kind == "mint":
            layer = mint.MintLayer(2, (3, 4), 2, ordering.triangle, ordering.order).double()
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.add_(0.2 * noise)
            return layer
        if kind == "elementwise":
            return Elementwise(draw(st.sampled_from(["elu", "leaky_relu", "softplus", "tanh"])))
        if kind == "sum":
            scales = draw(st.tuples(st.floats(0.2, 2), st.floats(0.2, 2)))
            return Sum(build(depth - 1), build(depth - 1), scales)
        return Compose(build(depth - 1), build(depth - 1))

    x = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64) / 2
    return build(draw(st.integers(0, 3))), x


@settings(max_examples=60, deadline=None)
@given(trees())
def test_any_tree_is_triangular_and_knows_its_log_det(tree: tuple[TriangularMap, Tensor]) -> None:
    layer, x = tree
    _, diagonal = layer.forward_and_diagonal(x)
    # Where the map is flat to rounding, the logarithm of its slope is not to be had to 1e-10.
    if float(diagonal.detach().abs().min()) < 1e-4:
        return
    assert_triangular_with_log_det(layer, x)


@settings(max_examples=40, deadline=None)
@given(trees())
def test_any_tree_says_truly_whether_it_was_inverted(tree: tuple[TriangularMap, Tensor]) -> None:
    layer, x = tree
    z, _ = layer(x)
    result = mint.invert(layer, z, mint.FixedPoint(alpha=0.5, iterations=300))
    for sample, ok in zip(range(len(x)), result.converged.tolist(), strict=True):
        if ok:
            again, log_det = layer(result.x[sample : sample + 1])
            error = (again - z[sample]).abs().max() / z[sample].abs().max().clamp(min=1)
            assert float(error.detach()) <= 1e-12 * (1 + 1e-6)
            torch.testing.assert_close(result.log_det[sample], -log_det[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("triangle", ["lower", "upper"])
def test_dense_affine(triangle: Triangle) -> None:
    weight = torch.randn(9, 9, dtype=torch.float64) + 3 * torch.eye(9, dtype=torch.float64)
    layer = MaskedAffine(
        weight, torch.randn(9, dtype=torch.float64), mint.Ordering("channel", triangle)
    )
    x = torch.randn(4, 9, dtype=torch.float64)
    assert_triangular_with_log_det(layer, x)
    y, log_det = layer(x)
    assert layer.bias is not None
    triangular = weight.tril() if triangle == "lower" else weight.triu()
    torch.testing.assert_close(y, layer.bias + x @ triangular.T)
    back, inverse_log_det = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
def test_convolution_inverts(order: Order, triangle: Triangle) -> None:
    layer = affine(mint.Ordering(order, triangle), 3, torch.Generator().manual_seed(1))
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    y, log_det = layer(x)
    back, inverse_log_det = layer.inverse(y)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det)


@pytest.mark.parametrize("name", ["elu", "leaky_relu", "softplus", "tanh", "sigmoid", "identity"])
def test_elementwise_inverts_exactly(name: str) -> None:
    layer = Elementwise(name)
    x = torch.randn(5, 7, dtype=torch.float64)
    y, log_det = layer(x)
    result = mint.invert(layer, y)
    assert result.converged.all()
    assert result.iterations.tolist() == [0] * 5
    torch.testing.assert_close(result.x, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.log_det, -log_det, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_a_z_outside_the_range_is_reported(name: str) -> None:
    layer = Compose(Elementwise(name), affine(ORDERINGS[0], 3, torch.Generator().manual_seed(2)))
    z, _ = layer(torch.randn(2, *SHAPE, dtype=torch.float64) / 4)
    z = z.detach()
    z[1, 0, 1, 2] = 1.25
    result = mint.invert(layer, z)
    assert result.converged.tolist() == [True, False]
    assert result.failed_layer == "f2"
    with pytest.raises(mint.NotConvergedError, match="outside the range"):
        layer.inverse(z)


def test_composition_of_compositions_inverts_factor_by_factor() -> None:
    generator = torch.Generator().manual_seed(3)
    inner = Compose(Elementwise("tanh"), affine(ORDERINGS[1], 3, generator))
    layer = Compose(affine(ORDERINGS[1], 5, generator), inner)
    x = torch.randn(3, *SHAPE, dtype=torch.float64) / 4
    y, _ = layer(x)
    result = mint.invert(layer, y, mint.FixedPoint(), trace=True)
    assert result.layers == ("f1.f1", "f1.f2", "f2")
    assert result.converged.all()
    torch.testing.assert_close(result.x, x, rtol=1e-8, atol=1e-8)
    assert result.trace is not None
    assert [tuple(trace.shape) for trace in result.trace] == [(100, 3)] * 3


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("activation", ["elu", "tanh"])
def test_a_mint_layer_built_from_the_calculus(ordering: mint.Ordering, activation: str) -> None:
    """t x + sum_i W3_i h(sum_j W2_ij h(W1_j x + b1_j) + b2_ij) + b3_i, term by term."""
    colours, hidden = 2, 3
    fused = mint.MintLayer(
        colours, (3, 4), hidden, ordering.triangle, ordering.order, (3, 5, 3), activation
    ).double()
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter)
    weights = fused.effective_weights()
    w1 = weights.weight1.view(colours, hidden, colours, 3, 3)
    w2 = weights.weight2.view(colours, hidden, colours, hidden, 5, 5)
    w3 = weights.weight3.view(colours, colours, hidden, 3, 3)
    b1, b2 = weights.bias1.view(colours, hidden), weights.bias2.view(colours, hidden)
    units: list[TriangularMap] = [
        Compose(Elementwise(activation), MaskedAffine(w1[:, j], b1[:, j], ordering))
        for j in range(hidden)
    ]
    total: TriangularMap | None = None
    for i in range(hidden):
        middle: TriangularMap = Compose(MaskedAffine(w2[:, i, :, 0], b2[:, i], ordering), units[0])
        for j in range(1, hidden):
            middle = Sum(middle, Compose(MaskedAffine(w2[:, i, :, j], None, ordering), units[j]))
        bias3 = weights.bias3 if i == 0 else None
        term = Compose(
            MaskedAffine(w3[:, :, i], bias3, ordering), Compose(Elementwise(activation), middle)
        )
        total = term if total is None else Sum(total, term)
    assert total is not None
    built = Sum(Elementwise("identity"), total, scales=(weights.t.detach(), 1))
    assert built.ordering == ordering

    x = torch.randn(2, colours, 3, 4, dtype=torch.float64)
    for one, other in zip(
        (*built(x), *built.forward_and_diagonal(x)),
        (*fused(x), *fused.forward_and_diagonal(x)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_parameter() -> None:
    generator = torch.Generator().manual_seed(4)
    layer = Sum(
        Compose(Elementwise("elu"), affine(ORDERINGS[0], 3, generator)),
        affine(ORDERINGS[0], 3, generator),
        scales=(0.5, 2.0),
    )
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    y, log_det = layer(x)
    (y.sum() + log_det.sum()).backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert len(gradients) == 4
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)


@pytest.mark.parametrize("combine", [Sum, Compose])
def test_mixing_orderings_raises(combine: type[Sum] | type[Compose]) -> None:
    generator = torch.Generator().manual_seed(5)
    one = Compose(Elementwise("elu"), affine(ORDERINGS[0], 3, generator))
    for ordering in ORDERINGS[1:]:
        with pytest.raises(mint.OrderingError, match="different orderings"):
            combine(one, affine(ordering, 3, generator))


def test_a_zero_on_the_diagonal_names_the_theorem() -> None:
    weight = torch.eye(3, dtype=torch.float64)
    weight[1, 1] = 0
    layer = MaskedAffine(weight, None, mint.Ordering())
    with pytest.raises(mint.SingularJacobianError, match=r"first at index \(0, 1\).*Theorem 1"):
        layer(torch.randn(2, 3, dtype=torch.float64))
    # Part of a sum, the same map is fine (Proposition 1).
    _, log_det = Sum(layer, Elementwise("identity"))(torch.randn(2, 3, dtype=torch.float64))
    assert log_det.isfinite().all()
    # Its inverse does not exist, and says so, even where a solution does.
    for z in (torch.randn(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)):
        assert not mint.invert(layer, z).converged.any()
    nothing = Sum(Elementwise("identity"), Elementwise("identity"), scales=(1, -1))
    assert not mint.invert(nothing, torch.zeros(2, 3)).converged.any()


def test_a_composition_is_judged_as_one_map() -> None:
    """Factors within the tolerance, the whole beyond it: the steep last factor magnifies."""
    conv = affine(ORDERINGS[0], 3, torch.Generator().manual_seed(6)).float()
    identity = Elementwise("identity")
    steep = Sum(identity, identity, scales=(500, 500))
    layer = Compose(steep, Compose(Elementwise("tanh"), conv))
    x = torch.randn(4, *SHAPE) / 4
    z = layer(x)[0].detach()
    result = mint.invert(layer, z, mint.FixedPoint())
    error = (layer(result.x)[0] - z).detach().abs().flatten(1).amax(1)
    truth = error / z.abs().flatten(1).amax(1).clamp(min=1)
    assert torch.equal(result.converged, truth <= 1e-5)
    assert bool((result.residual >= truth * (1 - 1e-6)).all())


def test_compiles_whole_and_maps_over_samples() -> None:
    layer = Compose(Elementwise("tanh"), affine(ORDERINGS[0], 3, torch.Generator().manual_seed(7)))
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    y, log_det = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")(x)
    mapped = torch.func.vmap(lambda v: layer(v[None]))(x)
    torch.testing.assert_close(compiled, (y, log_det))
    torch.testing.assert_close(mapped, (y[:, None], log_det[:, None]))


def test_a_saturated_composition_is_reported_not_raised() -> None:
    identity = Elementwise("identity")
    layer = Compose(Sum(identity, identity, (0.5, 0.5)), Compose(Elementwise("tanh"), identity))
    z = torch.tensor([[0.5, 1.0], [0.5, 0.25]])
    assert mint.invert(layer, z).converged.tolist() == [False, True]


def test_entries_outside_the_triangle_do_not_matter() -> None:
    weight = torch.eye(3).masked_fill(torch.ones(3, 3).triu(1).bool(), float("nan"))
    y, _ = MaskedAffine(weight, None, mint.Ordering("pixel"))(torch.ones(1, 3))
    assert y.tolist() == [[1, 1, 1]]


def test_bad_arguments() -> None:
    ordering = mint.Ordering()
    with pytest.raises(ValueError, match="maps of different shapes cannot be combined"):
        Compose(
            MaskedAffine(torch.eye(3), None, ordering), MaskedAffine(torch.eye(4), None, ordering)
        )
    with pytest.raises(ValueError, match="the scales do not fit"):
        Sum(Elementwise("elu"), Elementwise("elu"), (torch.ones(4, 3), 1))(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, ...\), got \(3,\)"):
        Elementwise("elu")(torch.ones(3))
    with pytest.raises(ValueError, match=r"weight must have shape .* got \(3, 4\)"):
        MaskedAffine(torch.randn(3, 4), None, ordering)
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*got 4"):
        MaskedAffine(torch.randn(3, 3, 4, 4), None, ordering)
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\), got \(2,\)"):
        MaskedAffine(torch.randn(3, 3), torch.randn(2), ordering)
    with pytest.raises(TypeError, match="weight must be of a floating dtype"):
        MaskedAffine(torch.ones(3, 3, dtype=torch.int64), None, ordering)
    with pytest.raises(TypeError, match="ordering must be an Ordering, got str"):
        MaskedAffine(torch.randn(3, 3), None, "lower")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="f2 must be a TriangularMap, got Linear"):
        Sum(Elementwise("elu"), torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scales must be"):
        Sum(Elementwise("elu"), Elementwise("elu"), scales=(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation must be monotone"):
        Elementwise("silu")
    with pytest.raises(ValueError, match="dimension 1 is 4, expected 3"):
        MaskedAffine(torch.randn(3, 3), None, ordering)(torch.randn(2, 4))


def test_scales_are_exact_and_may_be_learnt() -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    identity = Elementwise("identity")
    y, _ = Sum(identity, identity, scales=(0.1, 0.2))(x)
    assert float(y[0, 0]) == pytest.approx(0.3, rel=1e-15)
    t = torch.nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
    layer = Sum(identity, Elementwise("tanh"), scales=(t, 1))
    layer(x)[1].sum().backward()
    slope = 1 - torch.tanh(x[0]) ** 2
    torch.testing.assert_close(t.grad, 1 / (t.detach() + slope))

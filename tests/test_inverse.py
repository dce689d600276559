import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from tests import golden


def recomputed_residual(layer: mint.MintLayer, x: Tensor, z: Tensor) -> Tensor:
    """max |f(x) - z| / max(1, max |z|) per sample, in float64."""
    with torch.no_grad():
        y, _ = layer.double()(x.double())
    z = z.double()
    error: Tensor = (y - z).abs().flatten(1).amax(1)
    return error / z.abs().flatten(1).amax(1).clamp(min=1)


@pytest.mark.parametrize("name", golden.LAYERS)
def test_golden_reconstructions(name: str) -> None:
    layer, values = golden.layer(name)
    x, log_det = layer.inverse(values["y"])
    golden.assert_golden(x, values["reconstruction"])
    golden.assert_golden(log_det, -values["log_det"])


@pytest.mark.parametrize("name", golden.HARD_LAYERS)
def test_hard_layers_invert_by_some_alpha_and_the_report_is_true(name: str) -> None:
    layer, values = golden.layer(name)
    z = values["y"]
    for alpha in (0.286, 0.5, 1.0):
        result = mint.invert(layer, z, mint.FixedPoint(alpha=alpha))
        truth = recomputed_residual(layer, result.x, z)
        torch.testing.assert_close(result.residual, truth, rtol=1e-6, atol=1e-14)
        assert torch.equal(result.converged, truth <= 1e-12)
    result = mint.invert(layer, z, mint.FixedPoint(alpha=0.5, iterations=300))
    assert result.converged.all()
    golden.assert_golden(result.log_det, -values["log_det"])
    to_the_end = mint.invert(layer, z, mint.FixedPoint(alpha=0.5, iterations=300, tolerance=0))
    assert float((to_the_end.x - values["x"]).abs().max()) < 1e-9


@pytest.fixture(scope="module")
def mnist5k() -> tuple[mint.MintNet, dict[str, Tensor]]:
    flow = mint.load_authors_checkpoint(golden.DATA / "mnist5k_checkpoint.pth")
    assert isinstance(flow, mint.MintNet)
    return flow, golden.arrays("mnist5k_expected.npz")


@pytest.mark.parametrize(("alpha", "layer"), [(1.0, "layers.4.0"), (0.286, "layers.5.1")])
def test_trained_network_does_not_converge_and_says_where(
    mnist5k: tuple[mint.MintNet, dict[str, Tensor]], alpha: float, layer: str
) -> None:
    flow, values = mnist5k
    z = values["prior_z"].float().view(-1, *flow.latent_shape)
    result = mint.invert(flow, z, mint.FixedPoint(alpha=alpha, iterations=100))
    assert not result.converged.all()
    assert result.failed_layer == layer
    with pytest.raises(mint.NotConvergedError, match=f"layer '{layer}'") as caught:
        result.raise_if_not_converged()
    assert caught.value.result is result
    # The layer's residual is that of its own equation.
    index = result.layers.index(layer)
    assert float(result.layer_residuals[index].max()) == float(result.residual.max())
    assert not result.layer_converged[index].all()


def test_inverse_raises_where_the_trained_network_does_not_converge(
    mnist5k: tuple[mint.MintNet, dict[str, Tensor]],
) -> None:
    flow, values = mnist5k
    z = values["prior_z"][:2].float().view(-1, *flow.latent_shape)
    with pytest.raises(mint.NotConvergedError, match=r"layers\.4\.0.*FixedPoint.*smaller alpha"):
        flow.inverse(z, mint.FixedPoint())


def test_trained_network_inverts_its_data(
    mnist5k: tuple[mint.MintNet, dict[str, Tensor]],
) -> None:
    flow, values = mnist5k
    x = values["x"][:4].float()
    with torch.no_grad():
        z, log_det = flow(x)
    golden.assert_golden(z, values["z"][:4].view_as(z), 1e-4)
    golden.assert_golden(log_det, values["log_det"][:4], 1e-5)
    result = mint.invert(flow, z, mint.FixedPoint(alpha=0.7, iterations=300))
    assert result.converged.all()
    torch.testing.assert_close(result.log_det, -log_det, rtol=1e-3, atol=0.1)


def test_samples_stop_on_their_own() -> None:
    layer, values = golden.layer(golden.HARD_LAYERS[-1])
    z = values["y"]
    together = mint.invert(layer, z, mint.FixedPoint())
    assert len(set(together.iterations.tolist())) > 1
    for index in range(len(z)):
        alone = mint.invert(layer, z[index : index + 1], mint.FixedPoint())
        assert int(alone.iterations) == int(together.iterations[index])
        torch.testing.assert_close(alone.x[0], together.x[index], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            alone.residual[0], together.residual[index], rtol=0.1, atol=1e-13
        )


def test_trace_holds_the_residual_and_the_error_after_every_iteration() -> None:
    layer, values = golden.layer("layer_c3_k4_A_channel.npz")
    z, x = values["y"], values["x"]
    solver = mint.FixedPoint(alpha=0.8, iterations=60)
    result = mint.invert(layer, z, solver, trace=True, reference=x)
    assert result.trace is not None
    assert result.error_trace is not None
    (trace,), (errors,) = result.trace, result.error_trace
    assert trace.shape == errors.shape == (60, 2)
    for count in (1, 2, 7, 60):
        short = mint.invert(layer, z, mint.FixedPoint(alpha=0.8, iterations=count))
        torch.testing.assert_close(trace[count - 1], short.residual)
        error = (short.x - x).abs().flatten(1).amax(1)
        torch.testing.assert_close(errors[count - 1], error, rtol=1e-6, atol=1e-14)
    assert torch.equal(trace[-1], result.residual)
    assert mint.invert(layer, z, solver).trace is None


def test_trace_of_a_network_has_one_tensor_a_layer() -> None:
    flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1)
    x = torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        z, _ = flow(x)
    result = mint.invert(flow, z, mint.FixedPoint(iterations=20), trace=True, reference=x)
    assert result.layers == ("layers.0.0", "layers.0.1", "layers.2.0", "layers.2.1")
    assert result.trace is not None
    assert result.error_trace is not None
    assert [tuple(trace.shape) for trace in result.trace + result.error_trace] == [(20, 3)] * 8
    assert all(float(errors[-1].max()) < 1e-4 for errors in result.error_trace)
    assert tuple(result.layer_residuals.shape) == (4, 3)
    assert torch.equal(result.residual, result.layer_residuals.amax(0))


def test_iterations_are_of_the_worst_layer_and_zero_when_the_start_is_right() -> None:
    layer = mint.MintLayer(1, 3, 2, initialisation="near_identity")
    result = mint.invert(layer, torch.randn(2, 1, 3, 3), mint.FixedPoint())
    assert result.converged.all()
    assert result.iterations.dtype == torch.int64
    assert result.iterations.tolist() == [0, 0]


def test_a_cycle_is_reported() -> None:
    """One unknown, two units: Newton's step at alpha = 1 jumps between two points forever."""
    layer = mint.MintLayer(1, 1, 1, activation="tanh").double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.t.fill_(1e-3)
        for conv, value in ((layer.conv1, 3.0), (layer.conv2, 3.0), (layer.conv3, 1.0)):
            conv.weight[0, 0, 1, 1] = value
    z = torch.tensor([0.9]).double().view(1, 1, 1, 1)
    result = mint.invert(layer, z, mint.FixedPoint())
    assert not result.converged.any()
    assert bool((result.residual > 1e-12).all() | result.residual.isnan().all())
    assert mint.invert(layer, z, mint.FixedPoint(safeguard=True)).converged.all()
    assert mint.invert(layer, z).converged.all()
    calm = mint.invert(layer, torch.zeros(1, 1, 1, 1, dtype=torch.float64), mint.FixedPoint())
    assert calm.converged.all()


def test_a_layer_that_overflows_is_reported_not_returned() -> None:
    layer = mint.MintLayer(1, 4, 2)
    with torch.no_grad():
        layer.conv1.weight.fill_(1e18)
        layer.conv2.weight.fill_(1e18)
        layer.conv3.weight.fill_(1e18)
    result = mint.invert(layer, torch.randn(2, 1, 4, 4))
    assert not result.converged.any()
    with pytest.raises(mint.NotConvergedError):
        layer.inverse(torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_never_below_float32(half: torch.dtype) -> None:
    pair = mint.MintPair(2, 4, 3)
    for parameter in pair.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.ones_(pair[0].t)
    torch.nn.init.ones_(pair[1].t)
    z = torch.randn(3, 2, 4, 4).to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = mint.invert(pair, z, mint.FixedPoint(alpha=0.7, iterations=200))
    assert result.x.dtype == result.residual.dtype == result.log_det.dtype == torch.float32
    assert result.converged.all()
    exact = mint.invert(pair, z.float(), mint.FixedPoint(alpha=0.7, iterations=200))
    assert torch.equal(exact.x, result.x)
    low = mint.invert(pair.to(half), z, mint.FixedPoint(alpha=0.7, iterations=200))
    assert low.x.dtype == torch.float32
    assert low.converged.all()
    assert next(pair.parameters()).dtype == half


def test_tolerances() -> None:
    assert mint.FixedPoint().tolerance_for(torch.float32) == 1e-5
    assert mint.FixedPoint().tolerance_for(torch.float64) == 1e-12
    assert mint.FixedPoint(tolerance=1e-3).tolerance_for(torch.float64) == 1e-3
    layer, values = golden.layer("layer_c1_k5_A_channel.npz")
    loose = mint.invert(layer, values["y"], mint.FixedPoint(tolerance=1e-2))
    assert loose.tolerance == 1e-2
    assert bool((loose.residual <= 1e-2).all() & (loose.residual > 1e-12).all())
    fixed = mint.invert(layer, values["y"], mint.FixedPoint(iterations=5, tolerance=0))
    assert fixed.iterations.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, r"alpha must be in the open interval \(0, 2\), got 0.0"),
        ({"alpha": 2.0}, ValueError, "alpha must be in the open interval.*got 2.0"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
        ({"alpha": -1.0}, ValueError, "alpha must be"),
        ({"alpha": float("nan")}, ValueError, "alpha must be"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"iterations": 1.5}, TypeError, "iterations must be an integer"),
        ({"tolerance": -1e-5}, ValueError, "tolerance must be finite and at least 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be finite"),
    ],
)
def test_bad_solvers(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mint.FixedPoint(**arguments)


def test_bad_calls() -> None:
    layer = mint.MintLayer(1, 3, 2)
    z = torch.randn(2, 1, 3, 3)
    with pytest.raises(TypeError, match="module must be an Invertible, got Linear"):
        mint.invert(torch.nn.Linear(2, 2), z)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="solver must be a Solver, got str"):
        mint.invert(layer, z, "newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference has 1 samples, z has 2"):
        mint.invert(layer, z, trace=True, reference=z[:1])
    with pytest.raises(ValueError, match="reference is for the trace: give trace=True"):
        mint.invert(layer, z, reference=z)
    bad = z.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(mint.NonFiniteError, match="reference holds 1 NaN"):
        mint.invert(layer, z, trace=True, reference=bad)


def test_a_report_carries_no_gradient_and_inversion_changes_no_parameter() -> None:
    layer = mint.MintLayer(1, 3, 2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    z = torch.randn(2, 1, 3, 3, requires_grad=True)
    result = mint.invert(layer, z)
    assert not result.x.requires_grad
    assert not result.log_det.requires_grad
    with torch.no_grad():
        x, log_det = layer.inverse(z)
    assert not x.requires_grad
    assert not log_det.requires_grad
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [(1,), (1, 1), (1, 1, 1)])
def test_a_sample_of_one_pixel(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """One bias stands for all sums there, and is not to be added to; the inverse has gradients."""
    layer = mint.MintLayer(2, size, 4, kernel_size=1, initialisation="classifier", dtype=dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(1, 2, *size, dtype=dtype)
    z = layer(x)[0].detach().requires_grad_()
    back, log_det = layer.inverse(z)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(back.detach(), x, rtol=tolerance, atol=tolerance)
    (by_z,) = torch.autograd.grad(log_det.sum(), z, retain_graph=True)
    rows = [torch.autograd.grad(one, z, retain_graph=True)[0].flatten() for one in back.flatten()]
    twin = mint.MintLayer(2, size, 4, kernel_size=1).double()
    twin.load_state_dict(before)
    exact = x.double().requires_grad_()
    y, forward_log_det = twin(exact)
    jacobian = torch.stack(
        [torch.autograd.grad(one, exact, retain_graph=True)[0].flatten() for one in y.flatten()]
    )
    (by_x,) = torch.autograd.grad(forward_log_det.sum(), exact)
    inverse = torch.linalg.inv(jacobian)
    wanted = {"rows": inverse, "log_det": -by_x.flatten() @ inverse}
    found = {"rows": torch.stack(rows).double(), "log_det": by_z.flatten().double()}
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_the_start_is_z_over_t() -> None:
    layer = mint.MintLayer(1, 3, 2).double()
    with torch.no_grad():
        for conv in (layer.conv1, layer.conv2, layer.conv3):
            conv.weight.zero_()
        layer.get_parameter("conv3.bias").zero_()
        layer.t.fill_(-4.0)
    z = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    result = mint.invert(layer, z, mint.FixedPoint())
    assert result.iterations.tolist() == [0, 0]
    torch.testing.assert_close(result.x, z / 4)


def test_small_latents_have_an_absolute_residual() -> None:
    layer, _ = golden.layer("layer_c1_k5_A_channel.npz")
    z = torch.full((1, 1, 8, 8), 0.01, dtype=torch.float64)
    result = mint.invert(layer, z, mint.FixedPoint(iterations=2))
    error = (layer(result.x)[0] - z).detach().abs().max()
    torch.testing.assert_close(result.residual[0], error)


def test_iterations_of_a_pair_are_those_of_its_slower_layer() -> None:
    slow, values = golden.layer("layer_c1_k5_A_channel.npz")
    fast, _ = golden.layer("layer_c1_k5_B_channel.npz")
    pair = mint.MintPair(1, 8, 5).double()
    pair[0].load_state_dict(slow.state_dict())
    pair[1].load_state_dict(fast.state_dict())
    z = pair(values["x"])[0].detach()
    upper = mint.invert(fast, z)
    lower = mint.invert(slow, upper.x)
    result = mint.invert(pair, z)
    assert torch.equal(result.iterations, torch.maximum(lower.iterations, upper.iterations))
    assert lower.iterations.min() > 0
    assert upper.iterations.min() > 0
    torch.testing.assert_close(result.log_det, lower.log_det + upper.log_det)


def test_the_error_pickles_with_its_result() -> None:
    result = mint.invert(
        mint.MintPair(1, 3, 2), torch.randn(2, 1, 3, 3), mint.FixedPoint(tolerance=0, iterations=1)
    )
    error = pickle.loads(pickle.dumps(mint.NotConvergedError(result)))
    assert str(error) == str(mint.NotConvergedError(result))
    assert torch.equal(error.result.x, result.x)

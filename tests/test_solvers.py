"""Solvers against the golden layers, a trained network, and each other."""

import copy

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine, Sum
from mintnet_triton.kernels.activation import LEAKY_SLOPE, find_activation
from tests import adversarial, golden
from tests.test_fronts import random_layer, stiff


@pytest.fixture(scope="module")
def mnist5k() -> tuple[mint.MintNet, dict[str, Tensor]]:
    flow = mint.load_authors_checkpoint(golden.DATA / "mnist5k_checkpoint.pth")
    assert isinstance(flow, mint.MintNet)
    return flow, golden.arrays("mnist5k_expected.npz")


def true_residuals(flow: mint.MintNet, z: Tensor, result: mint.InversionResult) -> Tensor:
    """Relative residual of the network as a whole in float64, (B,)."""
    with torch.no_grad():
        again, _ = copy.deepcopy(flow).double()(result.x.double())
    z = z.double()
    error: Tensor = (again - z).abs()
    return error.flatten(1).amax(1) / z.abs().flatten(1).amax(1).clamp(min=1)


@pytest.mark.parametrize("solver", [mint.Auto(), mint.Wavefront()], ids=str)
@pytest.mark.parametrize("name", golden.HARD_LAYERS)
def test_hard_layers(name: str, solver: mint.Solver) -> None:
    layer, values = golden.layer(name)
    result = mint.invert(layer, values["y"], solver, certify=True)
    assert result.converged.all()
    assert result.layer_wavefront.all()
    assert float(result.residual.max()) <= 1e-12
    golden.assert_golden(result.log_det, -values["log_det"])
    error = (result.x - values["x"]).abs().flatten(1).amax(1)
    assert float(error.max()) < 1e-9
    single = layer.float()
    z = values["y"].float()
    result = mint.invert(single, z, solver, certify=True)
    assert result.converged.all()
    assert float(result.residual.max()) <= 5e-6
    exact = mint.invert(copy.deepcopy(single).double(), z.double()).x
    assert result.error_bound is not None
    assert bool(((result.x - exact).abs().flatten(1).amax(1) <= result.error_bound).all())
    assert bool((result.error_bound <= 1e-6 * result.x.abs().flatten(1).amax(1)).all())


@pytest.mark.parametrize("solver", [None, mint.Wavefront()], ids=str)
def test_trained_network_inverts_every_prior_sample(
    mnist5k: tuple[mint.MintNet, dict[str, Tensor]], solver: mint.Solver | None
) -> None:
    flow, values = mnist5k
    z = values["prior_z"].view(-1, *flow.latent_shape)
    result = mint.invert(flow, z.float(), solver)
    assert result.converged.all()
    assert float(result.layer_residuals.max()) <= 5e-6
    assert float(true_residuals(flow, z.float(), result).max()) <= 1e-4
    golden.assert_golden(result.x, values["prior_x"].view_as(result.x), 1e-4)
    golden.assert_golden(result.log_det, -values["prior_log_det"], 1e-4)


def test_trained_network_in_float64_with_a_bound_of_the_error(
    mnist5k: tuple[mint.MintNet, dict[str, Tensor]],
) -> None:
    flow, values = mnist5k
    z = values["prior_z"][:3].view(-1, *flow.latent_shape)
    result = mint.invert(copy.deepcopy(flow).double(), z, certify=True)
    assert result.converged.all()
    assert float(result.layer_residuals.max()) <= 1e-12
    x = values["prior_x"][:3].view_as(result.x)
    # The golden x has a residual of 1e-11 of its own.
    assert float((result.x - x).abs().max()) < 1e-8
    assert result.error_bound is not None
    assert float(result.error_bound.max()) < 1e-9
    # A z that is off is another z: the bound is for the exact inverse of the one given.
    shifted = mint.invert(copy.deepcopy(flow).double(), z + 1e-9)
    assert bool(((shifted.x - result.x).abs().flatten(1).amax(1) > result.error_bound).all())


def test_the_safeguard_inverts_where_plain_iterations_cycle(
    mnist5k: tuple[mint.MintNet, dict[str, Tensor]],
) -> None:
    flow, values = mnist5k
    layer = flow.layers[4][0]  # type: ignore[index]
    assert isinstance(layer, mint.MintLayer)
    z = values["prior_z"][:4].view(-1, *flow.latent_shape)
    with torch.no_grad():
        x = values["prior_x"][:4].view(-1, *flow.image_shape).float()
        for index in range(4):
            x, _ = flow.layers[index](x)
        z, _ = layer(x)
    assert not mint.invert(layer, z, mint.FixedPoint()).converged.all()
    careful = mint.invert(layer, z, mint.FixedPoint(safeguard=True))
    assert careful.converged.all()
    assert not careful.layer_wavefront.any()
    exact = mint.invert(layer, z)
    assert exact.layer_wavefront.all()
    torch.testing.assert_close(careful.x, exact.x, rtol=1e-2, atol=1e-1)  # residuals allow it


@pytest.mark.parametrize("activation", ["tanh", "elu"])
@pytest.mark.parametrize("value", [3.0, 30.0])
def test_the_safeguard_solves_a_stiff_equation(value: float, activation: str) -> None:
    layer = stiff(value, 1e-3, activation)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64).view(-1, 1, 1, 1)
    with torch.no_grad():
        z, _ = layer(x)
    assert mint.invert(layer, z, mint.FixedPoint(safeguard=True, iterations=200)).converged.all()


class Hasty(mint.Auto):
    """What Auto does on a GPU: Algorithm 1, then the wavefront for what is left."""

    def _exact_at_once(self, z: Tensor) -> bool:
        return False


def test_auto_hands_what_does_not_contract_to_the_wavefront() -> None:
    torch.manual_seed(1)
    layer = stiff(3.0, 1e-3).float()
    x = torch.linspace(-3, 3, 61).view(-1, 1, 1, 1)
    with torch.no_grad():
        z, _ = layer(x)
    plain = mint.invert(layer, z, mint.FixedPoint(iterations=mint.Auto.ITERATIONS), trace=True)
    assert 0 < int(plain.converged.sum()) < len(z)
    result = mint.invert(layer, z, Hasty(), trace=True, reference=x)
    assert result.converged.all()
    (finished,) = result.layer_wavefront
    assert torch.equal(finished, ~plain.converged)
    assert torch.equal(result.x[~finished], plain.x[~finished])
    assert bool((result.iterations >= plain.iterations).all())
    assert result.trace is not None
    assert result.error_trace is not None
    (trace,), (errors,) = result.trace, result.error_trace
    assert trace.shape == errors.shape == (mint.Auto.ITERATIONS + 1, len(z))
    assert torch.equal(trace[-1, finished], result.residual[finished])
    log_det = mint.invert(layer, z[finished]).log_det
    torch.testing.assert_close(result.log_det[finished], log_det, rtol=1e-3, atol=1e-3)


def test_auto_believes_no_residual_of_low_precision() -> None:
    """Terms that cancel: in float32 their rounding is larger than the tolerance."""
    layer = mint.MintLayer(1, (3, 3), 8)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.conv3.weight.normal_(std=1e4)
        layer.conv2.weight.normal_(std=0.1)
    z = torch.randn(64, 1, 3, 3)
    hasty = mint.invert(layer, z, Hasty())
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        truth = (exact(hasty.x.double())[0] - z).abs().flatten(1).amax(1)
    truth = truth / z.abs().flatten(1).amax(1).clamp(min=1)
    torch.testing.assert_close(hasty.residual, truth.float(), rtol=1e-4, atol=1e-9)
    assert torch.equal(hasty.converged, truth <= 1e-5)


def test_certificate_of_an_unfinished_inversion() -> None:
    layer = random_layer(2, (4, 4), 3).float()
    x = torch.randn(6, 2, 4, 4)
    with torch.no_grad():
        z, _ = layer(x)
    exact = mint.invert(copy.deepcopy(layer).double(), z.double()).x
    for iterations in (1, 4, 8, 16):
        result = mint.invert(layer, z, mint.FixedPoint(0.7, iterations), certify=True)
        error = (result.x - exact).abs().flatten(1).amax(1)
        assert result.error_bound is not None
        assert bool((error <= result.error_bound).all())
    assert result.error_bound is not None
    assert bool((result.error_bound <= 3 * error + 1e-9).all())
    assert mint.invert(layer, z).error_bound is None


def test_certificate_of_the_calculus() -> None:
    lower = mint.Ordering("channel", "lower")
    conv = MaskedAffine(0.3 * torch.randn(2, 2, 3, 3), torch.randn(2), lower)
    residual = Sum(Elementwise("identity"), Compose(Elementwise("tanh"), conv), (2.0, 0.1))
    z = torch.randn(3, 2, 4, 4)
    result = mint.invert(residual, z, certify=True)
    exact = mint.invert(copy.deepcopy(residual).double(), z.double()).x
    assert result.converged.all()
    assert not result.layer_wavefront.any()
    assert result.error_bound is not None
    error = (result.x - exact).abs().flatten(1).amax(1)
    assert bool((error <= result.error_bound).all())
    assert float(result.error_bound.max()) < 1e-4


def test_activations_of_one_s_own() -> None:
    leaky = find_activation("leaky_relu")
    unbounded = mint.Activation("mine", leaky.function, leaky.derivative, leaky.slope)
    layer = mint.MintLayer(1, (3, 3), 2, activation=unbounded)
    z = torch.randn(2, 1, 3, 3)
    assert mint.invert(layer, z).converged.all()  # by Algorithm 1
    with pytest.raises(ValueError, match="activation 'mine' has no steepest slope, which"):
        mint.invert(layer, z, mint.Wavefront())
    bounded = mint.Activation("mine", leaky.function, leaky.derivative, leaky.slope, steepest=1.0)
    layer.activation = bounded
    result = mint.invert(layer, z, mint.Wavefront())
    assert result.converged.all()
    assert LEAKY_SLOPE < 1
    layer.activation = leaky
    torch.testing.assert_close(result.x, mint.invert(layer, z).x)


def test_the_wavefront_refuses_what_is_no_mint_layer_and_solves_closed_forms() -> None:
    identity = Elementwise("identity")
    with pytest.raises(TypeError, match="Wavefront inverts Mint layers, and Sum is none; Auto and"):
        mint.invert(Sum(identity, identity), torch.randn(2, 3), mint.Wavefront())
    z = torch.rand(2, 3) / 2
    result = mint.invert(Elementwise("tanh"), z, mint.Wavefront(), trace=True)
    assert result.converged.all()
    assert result.trace is not None
    assert [tuple(trace.shape) for trace in result.trace] == [(1, 2)]


@pytest.mark.parametrize("solver", [mint.Auto, mint.Wavefront])
def test_bad_tolerances(solver: type[mint.Auto] | type[mint.Wavefront]) -> None:
    with pytest.raises(ValueError, match="tolerance must be finite and at least 0, got -1"):
        solver(tolerance=-1)
    layer = random_layer(1, (3, 3), 2).float()
    z = torch.randn(2, 1, 3, 3)
    assert mint.invert(layer, z, solver(tolerance=1e-3)).tolerance == 1e-3
    assert not mint.invert(layer, z, solver(tolerance=0)).converged.any()


def test_an_empty_batch() -> None:
    flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1)
    result = mint.invert(flow, torch.randn(0, *flow.latent_shape), certify=True)
    assert result.x.shape == (0, 1, 4, 4)
    assert result.residual.shape == result.converged.shape == (0,)
    assert flow.sample(0).shape == (0, 1, 4, 4)


def test_without_numba_results_are_the_same() -> None:
    layer = random_layer(3, (4, 4), 3).float()
    z = torch.randn(3, 3, 4, 4)
    expected = mint.invert(layer, z)
    with mint.use_backend("torch"):
        result = mint.invert(layer, z)
    torch.testing.assert_close(result.x, expected.x, rtol=1e-6, atol=1e-6)
    assert result.layer_wavefront.all()


@pytest.mark.parametrize(
    "part", [0, 1, *(pytest.param(part, marks=pytest.mark.full) for part in range(2, 10))]
)
def test_no_answer_is_false_for_adversarial_layers(part: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counts = [adversarial.judge(adversarial.make(seed)) for seed in range(part, 1000, 10)]
    finally:
        torch.set_num_threads(threads)
    samples = sum(count["samples"] for count in counts)
    # These inversions are hard, and yet most converge, and most are known to be right.
    assert sum(count["converged"] for count in counts) > 0.6 * samples
    assert sum(count["tight"] for count in counts) > 0.75 * samples

import math
import pickle
from typing import Any

import pytest
import torch

import mintnet_triton as mint
from mintnet_triton.presets import load_preset
from tests import golden


def small_flow(**changes: Any) -> mint.MintNet:
    arguments: dict[str, Any] = {
        "channels": 1,
        "image_size": 4,
        "pairs": 3,
        "hidden": 5,
        "squeezes": 1,
        **changes,
    }
    flow = mint.MintNet(**arguments).double()
    for name, parameter in flow.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith(".t") else 0.0, std=0.2)
    return flow


def lower_layers(flow: mint.MintNet) -> list[mint.MintLayer]:
    return [layer for layer in flow.modules() if isinstance(layer, mint.MintLayer)][::2]


@pytest.mark.parametrize("name", ["flow_c1_s8.npz", "flow_c3_s8.npz"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_values(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    values = golden.network_file(name, tmp_path / "checkpoint.pth")
    flow = mint.load_authors_checkpoint(tmp_path / "checkpoint.pth").to(dtype)
    assert isinstance(flow, mint.MintNet)
    z, log_det = flow(values["x"].to(dtype))
    golden.assert_golden(z, values["z"], 1e-10 if dtype == torch.float64 else 1e-4)
    golden.assert_golden(log_det, values["log_det"], 1e-10 if dtype == torch.float64 else 1e-5)
    x, inverse_log_det = flow.inverse(z)
    golden.assert_golden(x, values["reconstruction"], 1e-10 if dtype == torch.float64 else 1e-3)
    golden.assert_golden(
        inverse_log_det, -values["log_det"], 1e-9 if dtype == torch.float64 else 1e-4
    )


def test_trained_network(tmp_path: Any) -> None:
    flow = mint.load_authors_checkpoint(golden.DATA / "mnist5k_checkpoint.pth").double()
    values = golden.arrays("mnist5k_expected.npz")
    z, log_det = flow(values["x"])
    golden.assert_golden(z, values["z"])
    golden.assert_golden(log_det, values["log_det"])
    z, log_det = flow(values["prior_x"])
    golden.assert_golden(z, values["prior_z"])
    golden.assert_golden(log_det, values["prior_log_det"])


def test_log_det_is_that_of_the_whole_jacobian() -> None:
    flow = small_flow()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda v: flow(v)[0].flatten(), x)
    exact = torch.linalg.slogdet(torch.as_tensor(full).reshape(16, 16))[1]
    torch.testing.assert_close(flow(x)[1][0].detach(), exact, rtol=1e-10, atol=1e-10)


def test_log_prob_is_that_of_the_change_of_variables() -> None:
    flow = small_flow()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    z, log_det = flow(x)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    expected = normal.log_prob(z).flatten(1).sum(1) + log_det
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_log_prob_integrates_to_one() -> None:
    flow = small_flow(image_size=(1, 2), pairs=1, squeezes=0)
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)
    with torch.no_grad():
        mass = flow.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(mass) == pytest.approx(1, abs=1e-3)


def test_samples_come_from_the_latents() -> None:
    flow = small_flow()
    x = flow.sample(5, torch.Generator().manual_seed(3))
    again = flow.sample(5, torch.Generator().manual_seed(3))
    assert torch.equal(x, again)
    assert x.shape == (5, 1, 4, 4)
    with torch.no_grad():
        z, _ = flow(x)
    noise = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(z, noise, rtol=1e-9, atol=1e-9)
    cool = flow.sample(5, torch.Generator().manual_seed(3), temperature=0.5)
    with torch.no_grad():
        torch.testing.assert_close(flow(cool)[0], 0.5 * noise, rtol=1e-9, atol=1e-9)
    assert flow.sample(0).shape == (0, 1, 4, 4)


def test_sample_and_log_prob_agree_with_log_prob() -> None:
    flow = small_flow()
    for temperature in (1.0, 0.7):
        x, log_prob = flow.sample_and_log_prob(6, temperature=temperature)
        torch.testing.assert_close(log_prob, flow.log_prob(x).detach(), rtol=1e-8, atol=1e-8)


def test_shapes_and_dtypes() -> None:
    flow = mint.MintNet(3, (8, 4), pairs=3, hidden=16, squeezes=2)
    z, log_det = flow(torch.randn(2, 3, 8, 4))
    assert z.shape == (2, *flow.latent_shape) == (2, 48, 2, 1)
    assert log_det.dtype == flow.log_prob(torch.randn(2, 3, 8, 4)).dtype == torch.float32
    assert [type(layer).__name__ for layer in flow.layers] == [
        "MintPair",
        "Squeeze",
        "MintPair",
        "Squeeze",
        "MintPair",
    ]
    assert [layer.hidden for layer in lower_layers(flow)] == [16, 4, 1]


@pytest.mark.parametrize(
    ("name", "latent", "positions", "hidden"),
    [
        ("mnist", (16, 7, 7), [6, 13], [45, 11, 2]),
        ("cifar10", (48, 8, 8), [7, 15], [85, 21, 5]),
        ("imagenet32", (48, 8, 8), [7, 15], [85, 21, 5]),
    ],
)
def test_presets_are_the_papers(
    name: str, latent: tuple[int, ...], positions: list[int], hidden: list[int]
) -> None:
    with torch.device("meta"):
        flow = mint.MintNet.from_preset(name)
    assert flow.latent_shape == latent
    squeezes = [i for i, layer in enumerate(flow.layers) if isinstance(layer, mint.Squeeze)]
    assert squeezes == positions
    widths = [layer.hidden for layer in lower_layers(flow)]
    assert sorted(set(widths), reverse=True) == hidden
    assert len(widths) == (20 if name == "mnist" else 21)


def test_a_plus_has_what_differs_from_the_plain_preset() -> None:
    def changed(section: str) -> dict[str, Any]:
        plain, plus = (load_preset(name, section) for name in ("digits", "digits+"))
        assert plain.keys() <= plus.keys()
        return {name: value for name, value in plus.items() if value != plain.get(name)}

    assert changed("data") == {"logit_lambda": 1e-6}
    assert changed("density_training") == {"weight_decay": 1e-4}
    beyond = {"level_spline": 17, "position_bias": 4, "hidden": 31}
    assert changed("density") == beyond
    flow = mint.MintNet.from_preset("digits+")
    assert flow.arguments == {**mint.MintNet.from_preset("digits").arguments, **beyond}
    for name in ("mnist", "mnist5k", "fashion", "cifar10", "imagenet32"):
        data = load_preset(f"{name}+", "data")
        assert data["logit_lambda"] == 1e-6  # or the bumps of the spline lack their outer sides
        with torch.device("meta"):
            flow = mint.MintNet.from_preset(f"{name}+")
        assert flow.arguments["level_spline"] == data["levels"]


def test_presets_can_be_changed_and_unknown_ones_raise() -> None:
    flow = mint.MintNet.from_preset("mnist", pairs=3, hidden=16)
    assert len(flow.layers) == 5
    names = (
        r"'cifar10', 'cifar10\+', 'digits', 'digits\+', 'fashion', 'fashion\+', 'imagenet32', "
        r"'imagenet32\+', 'mnist', 'mnist\+', 'mnist5k', 'mnist5k\+', 'patches'"
    )
    with pytest.raises(ValueError, match=rf"presets \[{names}\], got 'svhn'"):
        mint.MintNet.from_preset("svhn")
    with pytest.raises(ValueError, match="has no classifier section"):
        mint.MintClassifier.from_preset("imagenet32")


def test_zero_init_start() -> None:
    flow = mint.MintNet(1, 4, pairs=4, hidden=8, squeezes=0, zero_init_start=1)
    biases = [layer.effective_weights().bias2.abs().sum() for layer in lower_layers(flow)]
    assert [bool(bias == 0) for bias in biases] == [False, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pairs": 0}, ValueError, "pairs must be at least 1, got 0"),
        ({"pairs": 2, "squeezes": 2}, ValueError, "pairs must be more than squeezes=2, got 2"),
        ({"squeezes": -1}, ValueError, "squeezes must be at least 0, got -1"),
        ({"hidden": 3}, ValueError, "hidden must be at least 4.*got 3"),
        ({"hidden": 0}, ValueError, "hidden must be at least 1"),
        ({"image_size": 7}, ValueError, "image_size must divide by 2 for squeezes=1, got 7 x 7"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"channels": "3"}, TypeError, "channels must be an integer, got '3'"),
        ({"kernel_size": 2}, ValueError, "kernel_size must be odd"),
        ({"activation": "silu"}, ValueError, "activation must be monotone"),
        ({"order": "row"}, ValueError, "order must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_flow(**arguments)


def test_bad_calls() -> None:
    flow = small_flow()
    with pytest.raises(
        ValueError, match=r"z must have shape \(batch, 4, 2, 2\), got \(2, 1, 4, 4\)"
    ):
        flow.inverse(torch.randn(2, 1, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="temperature must be finite and at least 0, got -1"):
        flow.sample(1, temperature=-1)
    with pytest.raises(ValueError, match="n must be at least 0, got -2"):
        flow.sample(-2)
    with pytest.raises(TypeError, match=r"x is torch\.float32"):
        flow.log_prob(torch.randn(2, 1, 4, 4))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    x[0, 0, 3, 3] = math.inf
    with pytest.raises(mint.NonFiniteError, match=r"0 NaN and 1 infinite values.*\(0, 0, 3, 3\)"):
        flow(x)


def test_compiles_whole_and_pickles() -> None:
    flow = small_flow()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    expected = flow(x)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for other in (compiled, pickle.loads(pickle.dumps(flow))):
        for one, two in zip(other(x), expected, strict=True):
            torch.testing.assert_close(one, two)


def test_a_nan_inside_the_network_is_not_blamed_on_the_input() -> None:
    flow = small_flow()
    with torch.no_grad():
        flow.get_parameter("layers.0.0.conv1.bias")[0] = math.nan
    with pytest.raises(mint.NonFiniteError, match=r"inside the network, entering 'layers\.0'"):
        flow(torch.randn(2, 1, 4, 4, dtype=torch.float64))


def test_a_solver_can_be_given_wherever_the_inverse_is_taken() -> None:
    flow = small_flow()
    hasty = mint.FixedPoint(iterations=1)
    for call in (flow.sample, flow.sample_and_log_prob):
        with pytest.raises(mint.NotConvergedError, match=r"With FixedPoint, .*\.result") as caught:
            call(2, solver=hasty)
        assert repr(caught.value.result).startswith("InversionResult(0 of 2 samples converged")
        call(2, solver=mint.FixedPoint(alpha=0.7, iterations=300))
    z = flow(torch.randn(1, 1, 4, 4, dtype=torch.float64))[0].detach()
    with pytest.raises(mint.NotConvergedError):
        flow.inverse(z, solver=hasty)

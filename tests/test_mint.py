import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mintnet_triton as mint
from bench.contest.naive import NaiveMintLayer
from mintnet_triton.kernels.reference import centres_of
from mintnet_triton.ordering import Order, Triangle
from tests import golden
from tests.jacobian import assert_triangular_with_log_det

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = ["elu", "leaky_relu", "softplus", "tanh", "sigmoid"]


def random_layer(*arguments: Any, **keywords: Any) -> mint.MintLayer:
    """A float64 layer with weights large enough to matter."""
    layer = mint.MintLayer(*arguments, **keywords).double()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name == "t" else 0.0, std=0.5)
    return layer


@pytest.mark.parametrize("name", golden.LAYERS + golden.HARD_LAYERS)
@pytest.mark.parametrize("kind", [mint.MintLayer, NaiveMintLayer])
def test_golden_values(name: str, kind: type[mint.MintLayer]) -> None:
    layer, values = golden.layer(name, kind)
    y, log_det = layer(values["x"])
    golden.assert_golden(y, values["y"])
    golden.assert_golden(log_det, values["log_det"])


@pytest.mark.parametrize("name", golden.LAYERS + golden.HARD_LAYERS)
def test_golden_values_in_float32(name: str) -> None:
    layer, values = golden.layer(name)
    y, log_det = layer.float()(values["x"].float())
    golden.assert_golden(y, values["y"], 1e-4)
    golden.assert_golden(log_det, values["log_det"], 1e-5)


@pytest.mark.parametrize("order", ["channel", "pixel"])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize(
    ("channels", "size", "hidden", "kernel_size", "activation"),
    [
        (1, (4, 5), 3, 3, "elu"),
        (3, (3, 4), 2, 3, "leaky_relu"),
        (2, (5, 3), 4, 5, "softplus"),
        (3, (3, 3), 2, (1, 3, 5), "tanh"),
        (4, (2, 3), 1, (5, 1, 3), "sigmoid"),
        (5, (1, 4), 2, 1, "elu"),
        (1, (1, 1), 1, 7, "elu"),
    ],
)
def test_triangular_with_the_log_det_of_autograd(
    order: Order,
    triangle: Triangle,
    channels: int,
    size: tuple[int, int],
    hidden: int,
    kernel_size: Any,
    activation: str,
) -> None:
    layer = random_layer(channels, size, hidden, triangle, order, kernel_size, activation)
    assert_triangular_with_log_det(layer, torch.randn(2, channels, *size, dtype=torch.float64))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_output_and_log_det(activation: str) -> None:
    layer = random_layer(2, (3, 2), 2, activation=activation)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Any:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_gradients_agree_with_the_literal_reading() -> None:
    layer = random_layer(3, (4, 5), 4)
    naive = NaiveMintLayer(3, (4, 5), 4).double()
    naive.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    upstream = (torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64))
    ours = torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)
    theirs = torch.autograd.grad(naive(x), [x, *naive.parameters()], upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("order", ["channel", "pixel"])
def test_sign_condition_for_every_pair_of_units(triangle: Triangle, order: Order) -> None:
    layer = random_layer(3, 4, 5, triangle, order)
    _, raw, _ = centres_of(*(conv.weight for conv in (layer.conv1, layer.conv2, layer.conv3)))
    weights = layer.effective_weights()
    products = weights.centre3[:, :, None] * weights.centre2 * weights.centre1[:, None, :]
    assert bool((products > 0).all())
    torch.testing.assert_close(weights.centre2.abs(), raw.abs())
    # The centre weights are those that the convolution uses.
    middle = weights.weight2[5:10, 5:10, 1, 1]  # of the second colour
    assert torch.equal(middle, weights.centre2[1])


def test_sign_of_zero_is_zero() -> None:
    layer = random_layer(1, 3, 2)
    with torch.no_grad():
        layer.conv1.weight[0, 0, 1, 1] = 0
    weights = layer.effective_weights()
    assert weights.centre2[0, :, 0].tolist() == [0, 0]
    assert bool((weights.centre2[0, :, 1] != 0).all())


def test_t_is_kept_positive() -> None:
    layer = random_layer(1, 2, 2)
    with torch.no_grad():
        layer.t.copy_(torch.tensor([[[-2.0, 0.0], [1e-20, 3.0]]]))
    t = layer.effective_weights().t
    assert t.tolist() == [[[2.0, 1e-12], [1e-12, 3.0]]]
    _, diagonal = layer.forward_and_diagonal(torch.randn(1, 1, 2, 2, dtype=torch.float64))
    assert bool((diagonal >= t).all())


@torch.no_grad()
def test_initial_values_are_the_papers() -> None:
    layer = mint.MintLayer(3, 32, 85)
    assert layer.conv2.bias is not None
    fan = 255 * 9
    assert float(layer.conv2.weight.std()) == pytest.approx(0.005 / fan**0.5, rel=0.02)
    assert float(layer.conv2.bias.abs().max()) <= 1 / fan**0.5
    assert float(layer.conv2.bias.abs().max()) > 0.9 / fan**0.5
    assert bool((layer.t == 1).all())
    near = mint.MintLayer(3, 8, 16, initialisation="near_identity")
    assert near.conv2.bias is not None
    assert float(near.conv2.weight.std()) == pytest.approx(1e-5, rel=0.1)
    assert float(near.conv2.bias.abs().sum()) == 0


class LargestTensor(TorchDispatchMode):
    """Watch how large the results of operations become."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("kind", "large"), [(mint.MintLayer, False), (NaiveMintLayer, True)])
def test_nothing_of_size_k_times_k_times_image(kind: type[mint.MintLayer], large: bool) -> None:
    channels, side, hidden, batch = 2, 16, 12, 3
    layer = kind(channels, side, hidden)
    x = torch.randn(batch, channels, side, side, requires_grad=True)
    with LargestTensor() as largest:
        y, log_det = layer(x)
        (y.sum() + log_det.sum()).backward()
    hidden_layer = batch * channels * hidden * side**2
    weight = (channels * hidden) ** 2 * 9
    # Twice, for lines of pixels have zeros at their ends, and a group of samples may not be full.
    assert (largest.numel > 2 * max(hidden_layer, weight)) == large


def test_half_precision_and_autocast_keep_the_log_det_in_float32() -> None:
    exact = random_layer(3, 6, 8)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    y64, log_det64 = exact(x)
    assert log_det64.dtype == torch.float64
    single = copy.deepcopy(exact).float()
    cases: list[tuple[mint.MintLayer, torch.dtype, bool]] = [
        (single, torch.float32, False),
        (single, torch.float32, True),
        (copy.deepcopy(exact).bfloat16(), torch.bfloat16, False),
    ]
    for layer, dtype, autocast in cases:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, log_det = layer(x.to(dtype))
        assert log_det.dtype == torch.float32
        assert y.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 and not autocast else 0.05
        torch.testing.assert_close(y.double(), y64, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_det.double(), log_det64, rtol=tolerance, atol=10 * tolerance)


def test_layouts_and_empty_batches() -> None:
    layer = random_layer(3, (5, 4), 4)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y, log_det = layer(x)
    for other in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], -1)[..., 0],
    ):
        again = layer(other)
        torch.testing.assert_close(again[0], y, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(again[1], log_det, rtol=1e-13, atol=1e-13)
    y, log_det = layer(x[:0])
    assert (y.shape, log_det.shape) == ((0, 3, 5, 4), (0,))
    back, _ = layer.inverse(y)
    assert back.shape == (0, 3, 5, 4)


def test_log_det_is_a_fresh_tensor() -> None:
    layer = random_layer(1, 3, 2)
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    _, first = layer(x)
    kept = first.clone()
    first.detach().zero_()
    assert torch.equal(layer(x)[1], kept)


def test_transform_is_the_map_alone() -> None:
    layer = random_layer(3, 4, 3)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(layer.transform(x), layer(x)[0])


def test_per_sample_gradients_by_vmap() -> None:
    layer = random_layer(1, 3, 2)
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    state = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(state: dict[str, Tensor], sample: Tensor) -> Tensor:
        y, log_det = torch.func.functional_call(layer, state, (sample[None],))
        return torch.as_tensor(y.square().sum() - log_det.sum())

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    for index, sample in enumerate(x):
        alone = torch.func.grad(loss)(state, sample)
        for name in state:
            torch.testing.assert_close(together[name][index], alone[name])


def test_pair_has_no_blind_spot() -> None:
    pair = mint.MintPair(2, (3, 4), 3).double()
    for parameter in pair.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda v: pair(v[None])[0][0], x)
    assert bool((torch.as_tensor(full) != 0).all())
    _, log_det = pair(x[None])
    exact = torch.linalg.slogdet(torch.as_tensor(full).reshape(24, 24))[1]
    torch.testing.assert_close(log_det[0].detach(), exact, rtol=1e-8, atol=1e-8)
    lower, upper = pair
    assert isinstance(lower, mint.MintLayer)
    assert isinstance(upper, mint.MintLayer)
    assert (lower.ordering, upper.ordering) == (mint.Ordering(), mint.Ordering(triangle="upper"))


def test_squeeze_orders_channels_by_row_column_colour() -> None:
    squeeze = mint.Squeeze()
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).view(2, 3, 4, 6)
    y, log_det = squeeze(x)
    assert y.shape == (2, 12, 2, 3)
    for dy, dx, c in [(0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 2)]:
        assert torch.equal(y[:, (dy * 2 + dx) * 3 + c], x[:, c, dy::2, dx::2])
    assert log_det.tolist() == [0, 0]
    back, inverse_log_det = squeeze.inverse(y)
    assert torch.equal(back, x)
    assert inverse_log_det.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"even height and width, got \(1, 3, 3, 4\)"):
        squeeze(torch.randn(1, 3, 3, 4))
    with pytest.raises(ValueError, match=r"multiple of 4 channels, got \(1, 6, 2, 2\)"):
        squeeze.inverse(torch.randn(1, 6, 2, 2))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.randn(3, 4, 5), ValueError, r"x must have 4 dimensions, shape \(batch, 3, 4, 5\)"),
        (torch.randn(2, 1, 4, 5), ValueError, "dimension 1 is 1, expected 3"),
        (torch.randn(2, 3, 5, 4), ValueError, "dimension 2 is 5, expected 4"),
        (torch.randn(2, 3, 4, 5).double(), TypeError, "x is torch.float64, .* torch.float32"),
        (torch.ones(2, 3, 4, 5, dtype=torch.uint8), TypeError, "floating dtype, got torch.uint8"),
        (torch.randn(2, 3, 4, 5, device="meta"), ValueError, "x is on meta, .* parameters on cpu"),
        ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "forward_and_diagonal", "inverse", "transform"])
def test_bad_inputs(bad: Any, error: type[Exception], message: str, call: str) -> None:
    layer = mint.MintLayer(3, (4, 5), 2)
    if call == "inverse":
        message = message.replace("x must", "z must").replace("x is", "z is")
    with pytest.raises(error, match=message):
        getattr(layer, call)(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", ["forward", "forward_and_diagonal", "inverse", "transform"])
def test_non_finite_inputs_are_located(value: float, call: str) -> None:
    layer = mint.MintLayer(3, (4, 5), 2)
    x = torch.randn(2, 3, 4, 5)
    x[1, 2, 0, 3] = value
    with pytest.raises(mint.NonFiniteError, match=r"the first at index \(1, 2, 0, 3\)"):
        getattr(layer, call)(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        ({"size": 4.5}, TypeError, "size must be an integer, got 4.5"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an integer, got 3.0"),
        ({"hidden": 2.5}, TypeError, "hidden must be an integer, got 2.5"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd.*got 4"),
        ({"kernel_size": (3, 3)}, ValueError, "an integer or three of them"),
        ({"kernel_size": -1}, ValueError, "kernel_size must be at least 1"),
        ({"size": (4, 4, 4, 4)}, ValueError, r"size must be an integer or \(height, width\)"),
        ({"triangle": "A"}, ValueError, "triangle must be 'lower' or 'upper'"),
        ({"order": "rgb"}, ValueError, "order must be 'channel' or 'pixel'"),
        ({"activation": "gelu"}, ValueError, "activation must be monotone"),
        ({"initialisation": "zeros"}, ValueError, "initialisation must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"channels": 3, "size": 4, "hidden": 2}
    with pytest.raises(error, match=message):
        mint.MintLayer(**{**good, **arguments})


def test_dense_convolution_of_the_effective_weights_is_the_layer() -> None:
    """The formula of the layer, written out on the effective weights."""
    layer = random_layer(3, 5, 2, activation="softplus")
    w = layer.effective_weights()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    h1 = F.softplus(F.conv2d(x, w.weight1, w.bias1, padding=1), threshold=40)
    h2 = F.softplus(F.conv2d(h1, w.weight2, w.bias2, padding=1), threshold=40)
    expected = F.conv2d(h2, w.weight3, w.bias3, padding=1) + w.t * x
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_tiny_t_survives_half_precision() -> None:
    layer = mint.MintLayer(1, 2, 2, initialisation="near_identity").half()
    with torch.no_grad():
        layer.t.zero_()
    _, log_det = layer(torch.randn(2, 1, 2, 2).half())
    assert log_det.isfinite().all()


def test_float64_under_autocast_is_refused() -> None:
    layer = mint.MintLayer(1, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="float64"):
        layer(torch.randn(1, 1, 2, 2).double())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_frozen_weights(backend: str) -> None:
    flow = mint.MintNet(1, 4, pairs=2, hidden=4, squeezes=1).to(DEVICE)
    x = torch.randn(2, 1, 4, 4, device=DEVICE)
    with mint.use_backend(backend), torch.no_grad():
        z, log_det = flow(x)
        with mint.frozen(flow):
            torch.testing.assert_close(flow(x), (z, log_det))
            for parameter in flow.parameters():
                parameter.mul_(2)
            torch.testing.assert_close(flow(x), (z, log_det))
            torch.testing.assert_close(flow.inverse(z)[0], x, rtol=0, atol=1e-4)
            with mint.frozen(flow):
                assert not torch.allclose(flow(x)[0], z)
            assert torch.equal(flow(x)[0], z)
            flow.double()
            torch.testing.assert_close(flow(x.double())[0].float(), z)
        assert not torch.allclose(flow(x.double())[0].float(), z)
    with mint.frozen(flow):
        assert not flow(x.double())[0].requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_recomputing_changes_no_gradient(backend: str) -> None:
    layer = mint.MintLayer(2, (3, 2), 3, recompute=True).to(DEVICE)
    x = torch.randn(2, 2, 3, 2, device=DEVICE)
    gradients = []
    with mint.use_backend(backend):
        for layer.recompute in (True, False):
            y, log_det = layer(x)
            gradients.append(
                torch.autograd.grad(y.square().sum() + log_det.sum(), list(layer.parameters()))
            )
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)

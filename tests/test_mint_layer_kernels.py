"""The kernels of the Mint layer, and their gradients, against the torch path in float64."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from bench.contest.cases import CIFAR10, MNIST, Scale, relative_rms
from bench.count.counting import count_launches
from mintnet_triton.kernels import FrozenWeights, mint_forward
from mintnet_triton.kernels.activation import NAMES
from mintnet_triton.kernels.canvas import Canvas
from mintnet_triton.kernels.gpu import launching, masked_conv, mint_layer
from mintnet_triton.kernels.gpu.canvas import TAIL
from mintnet_triton.kernels.reference import Structure
from tests import golden, grid
from tests.test_masked_conv_kernels import ORDERINGS, mask


def affordable(case: grid.Case) -> bool:
    """At most 255 channels, and few products: the interpreter is slow."""
    kernels = case.get("kernels", 1)
    kernel = kernels if isinstance(kernels, int) else kernels[1]
    channels = case.get("colours", 1) * case.get("units", 1)
    most = 30_000 if case.get("numbers") == "float64" else 70_000
    return channels <= 255 and (grid.FULL or channels**2 * kernel**2 <= most)


def costly(case: grid.Case) -> bool:
    """Of so many channels as :func:`test_several_tiles` has, with fewer taps and pixels."""
    return bool(case["colours"] * case["units"] > 80)


def random_layer(
    colours: int,
    units: int,
    ordering: Any = ("channel", "lower"),
    kernels: Any = 3,
    activation: str = "elu",
    size: tuple[int, ...] = (3, 4),
    numbers: str = "float64",
) -> mint.MintLayer:
    """A layer whose hidden layers are about 1, and no gradient negligible.

    At 0 the slopes of ELU and leaky ReLU jump, or theirs: rounding must not carry a hidden unit
    across. So where numbers are rounded coarsely, biases keep the units away from it.
    """
    order, triangle = ordering
    layer = mint.MintLayer(colours, size, units, triangle, order, kernels, activation)
    coarse = activation in ("elu", "leaky_relu") and numbers not in ("float64", "float32")
    with torch.no_grad():
        for conv in (layer.conv1, layer.conv2, layer.conv3):
            fan = max(1, conv.weight[0].numel() // 2)
            limit = (0.5 if coarse else 1) * (3 / fan) ** 0.5
            torch.nn.init.uniform_(conv.weight, -limit, limit)
            assert conv.bias is not None
            torch.nn.init.normal_(conv.bias, std=0.5)
            if coarse:
                conv.bias.copy_(2 * conv.bias.sign())
        torch.nn.init.normal_(layer.t, mean=1, std=0.1)
    return layer.to(grid.DEVICE, grid.dtype_of(numbers))


def random(*shape: int, numbers: str = "float64") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(grid.DEVICE, grid.dtype_of(numbers))


def forward(layer: mint.MintLayer, x: Tensor, recompute: bool = False) -> tuple[Tensor, ...]:
    """As a layer does: the kernels take its parameters as they are, masked nowhere."""
    ordering = layer.conv1.ordering
    structure = (layer.activation, ordering.order, ordering.triangle)
    return mint_forward(x, layer._weights_for(x), *structure, recompute)


def run(
    layer: mint.MintLayer, x: Tensor, upstream: Any, backend: str = "triton", **options: Any
) -> dict[str, Tensor]:
    """All results and gradients of a layer, by name."""
    x = x.detach().requires_grad_()
    with mint.use_backend(backend):
        outputs = forward(layer, x, **options)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        gradients = torch.autograd.grad(outputs, [x, *parameters], upstream)
    results = dict(zip(("y", "diagonal", "log_det"), outputs, strict=True))
    return results | dict(zip(("gradient by x", *names), gradients, strict=True))


def exactly(layer: mint.MintLayer, x: Tensor, upstream: Any) -> dict[str, Tensor]:
    """What :func:`run` gives in float64, in torch, of the same rounded numbers."""
    wide = [tensor.double() for tensor in upstream]
    return run(copy.deepcopy(layer).double(), x.double(), wide, "torch")


def random_upstream(x: Tensor, layout: str = "contiguous") -> list[Tensor]:
    """Gradients by y, the diagonal and log_det."""
    by_y = grid.laid_out(torch.randn_like(x), layout)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    by_diagonal = grid.laid_out(torch.randn_like(x, dtype=wide), layout)
    return [by_y, by_diagonal, torch.randn(len(x), dtype=wide, device=x.device)]


def assert_all_near(
    computed: dict[str, Tensor], expected: Any, tolerance: float, peer: Any = None
) -> None:
    """Compare with float64; a peer, the same in torch, says what rounding costs by itself."""
    for name, value in computed.items():
        cost = 0.0 if peer is None else 1.5 * relative_rms(peer[name], expected[name])
        grid.assert_near(name, value, expected[name], max(tolerance, cost))


@grid.over(
    affordable,
    main=["colours", "units", "kernels", "ordering", "numbers"],
    costly=costly,
    colours=[1, 3, 4, 12],
    units=[1, 5, 16, 45, 85],
    kernels=[1, 3, 5, (1, 3, 5), (5, 1, 3)],
    ordering=ORDERINGS,
    activation=NAMES,
    numbers=["float64", "float32", "tf32", "float16"],
    size=[(1, 1), (3, 5), (7, 4), (1, 9)],
    batch=[1, 3],
    layout=grid.LAYOUTS,
    upstream=grid.LAYOUTS,
)
def test_layer_and_its_gradients(case: grid.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = case["numbers"]
    names = ("colours", "units", "ordering", "kernels", "activation", "size", "numbers")
    layer = random_layer(*(case[name] for name in names))
    x = random(case["batch"], case["colours"], *case["size"], numbers=numbers)
    x = grid.laid_out(x, case["layout"])
    upstream = random_upstream(x, case["upstream"])
    with grid.guarded(monkeypatch), grid.precision_of(numbers):
        computed = run(layer, x, upstream)
    assert computed["y"].dtype == x.dtype
    assert computed["diagonal"].dtype == computed["log_det"].dtype == upstream[1].dtype
    peer = run(layer, x, upstream, "torch") if numbers == "float16" else None
    assert_all_near(computed, exactly(layer, x, upstream), grid.TOLERANCES[numbers], peer)


@pytest.mark.parametrize(
    ("colours", "units", "kernels", "size", "ordering", "numbers"),
    [
        (2, 2, 3, (9, 11), ORDERINGS[1], "float64"),  # several tiles to an image, some across two
        (2, 2, 3, (9, 11), ORDERINGS[1], "tf32"),
        (70, 1, (3, 1, 1), (1, 2), ORDERINGS[1], "float32"),  # several tiles of colours
        (40, 1, (1, 3, 1), (1, 2), ORDERINGS[1], "float16"),
        (3, 40, (1, 1, 3), (1, 2), ORDERINGS[1], "float16"),  # of hidden units
        pytest.param(3, 85, (1, 1, 3), (1, 2), ORDERINGS[1], "float16", marks=pytest.mark.full),
        (2, 40, (3, 1, 3), (1, 2), ORDERINGS[2], "float64"),  # where columns see all colours
        (2, 40, (3, 1, 3), (2, 1), ORDERINGS[3], "float64"),
        (17, 4, (3, 1, 3), (1, 2), ORDERINGS[3], "float64"),
    ],
)
def test_several_tiles(
    colours: int,
    units: int,
    kernels: Any,
    size: Any,
    ordering: Any,
    numbers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = random_layer(colours, units, ordering, kernels, size=size, numbers=numbers)
    x = random(2, colours, *size, numbers=numbers)
    upstream = random_upstream(x)
    with grid.guarded(monkeypatch), grid.precision_of(numbers):
        computed = run(layer, x, upstream)
    assert_all_near(computed, exactly(layer, x, upstream), grid.TOLERANCES[numbers])


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_what_the_mask_hides_of_a_parameter_is_not_used(ordering: Any) -> None:
    layer = random_layer(2, 3, ordering, (3, 1, 5))
    x = random(2, 2, 3, 4)
    upstream = random_upstream(x)
    expected = run(layer, x, upstream)
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 4:
            outputs, inputs, kernel, _ = parameter.shape
            hidden = ~mask(2, inputs // 2, outputs // 2, kernel, ordering)
            assert not bool(expected[name][hidden].any())
            with torch.no_grad():
                parameter[hidden] = float("nan")
    computed = run(layer, x, upstream)
    for name, value in expected.items():
        assert torch.equal(computed[name], value), name


@pytest.mark.parametrize("ordering", ORDERINGS[:2])
def test_signs_and_zeros_of_parameters(ordering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A centre without a sign is 0, and has no gradient through it; t is positive, and bounded."""
    layer = random_layer(2, 4, ordering, (1, 3, 3))
    with torch.no_grad():
        layer.conv1.weight[::2, :, 0, 0] = 0
        layer.conv2.weight[1, :, 1, 1] = layer.conv2.weight[:, 2, 1, 1] = 0
        layer.conv3.weight[:, 3, 1, 1] = -0.0
        layer.t[0].neg_()
        layer.t.view(-1)[:3] = layer.t.new_tensor([0.0, 1e-13, -1e-300])
    x = random(2, 2, 3, 4)
    # Where t is nothing, the diagonal may be next to it.
    upstream = random_upstream(x)
    upstream[2].zero_()
    with grid.guarded(monkeypatch):
        computed = run(layer, x, upstream)
    assert_all_near(computed, exactly(layer, x, upstream), 1e-12)
    assert not bool(computed["t"].view(-1)[:3].any())


def test_effective_weights_give_what_raw_ones_do() -> None:
    layer = random_layer(3, 5, kernels=(3, 1, 3))
    x = random(2, 3, 3, 4)
    structure = (layer.activation, "channel", "lower")
    with torch.no_grad(), mint.use_backend("triton"):
        raw = mint_forward(x, layer.raw_weights(), *structure)
        effective = mint_forward(x, layer.effective_weights(), *structure)
        frozen = mint_forward(x, FrozenWeights(layer.effective_weights()), *structure)
    for one, two, three in zip(raw, effective, frozen, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("missing", [("conv1",), ("conv2", "conv3"), ("conv1", "conv2", "conv3")])
def test_layers_without_biases(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(2, 3, kernels=(1, 3, 1))
    for name in missing:
        getattr(layer, name).register_parameter("bias", None)
    x = random(2, 2, 3, 4)
    upstream = random_upstream(x)
    with grid.guarded(monkeypatch):
        computed = run(layer, x, upstream)
    assert_all_near(computed, exactly(layer, x, upstream), 1e-12)


@pytest.mark.parametrize("given", list(product([False, True], repeat=3))[1:], ids=str)
def test_gradients_from_some_of_the_results(
    given: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """y, the diagonal, log_det; by x and all parameters, by x alone, by one weight alone."""
    layer = random_layer(2, 3, kernels=(1, 3, 3), size=(2, 3))
    x = random(3, 2, 2, 3)
    upstream = [one for one, wanted in zip(random_upstream(x), given, strict=True) if wanted]

    def gradients(backend: str) -> list[Tensor]:
        found: list[Tensor] = []
        point = x.clone().requires_grad_()
        with mint.use_backend(backend), grid.guarded(monkeypatch):
            every = forward(layer, point)
            outputs = [one for one, wanted in zip(every, given, strict=True) if wanted]
            weight = layer.conv1.weight
            for inputs in ([point, *layer.parameters()], [point], [weight]):
                found += torch.autograd.grad(
                    outputs, inputs, upstream, retain_graph=True, materialize_grads=True
                )
        return found

    for number, (one, other) in enumerate(
        zip(gradients("triton"), gradients("torch"), strict=True)
    ):
        grid.assert_near(str(number), one, other, 1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", NAMES)
def test_bfloat16(activation: str) -> None:
    layer = random_layer(3, 16, activation=activation, numbers="bfloat16")
    x = random(2, 3, 3, 4, numbers="bfloat16")
    upstream = random_upstream(x)
    assert_all_near(run(layer, x, upstream), exactly(layer, x, upstream), 2e-2)


@pytest.mark.parametrize(
    ("colours", "units", "numbers", "ordering"),
    grid.thinned(
        (
            (colours, units, numbers, ordering)
            for colours, units, numbers in ((2, 5, "float64"), (3, 16, "tf32"), (3, 5, "float16"))
            for ordering in ORDERINGS[::3]
        ),
        kept=[
            (2, 5, "float64", ORDERINGS[0]),
            (3, 16, "tf32", ORDERINGS[3]),
            (3, 5, "float16", ORDERINGS[0]),
        ],
    ),
)
def test_runs_are_equal_to_the_bit(colours: int, units: int, numbers: str, ordering: Any) -> None:
    """Two runs, and one that computes the hidden layers again."""
    layer = random_layer(colours, units, ordering, (3, 1, 3), numbers=numbers)
    x = random(2, colours, 3, 4, numbers=numbers)
    upstream = random_upstream(x)
    with grid.precision_of(numbers):
        first = run(layer, x, upstream)
        again = run(layer, x, upstream)
        recomputed = run(layer, x, upstream, recompute=True)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, recomputed[name]), name


def test_recomputing_keeps_x_alone() -> None:
    layer = random_layer(3, 16)
    saved: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    x = random(2, 3, 3, 4)
    canvas = torch.Size((Canvas(3, 4, 1).positions(2) + TAIL, 48))
    # By hidden layers, and by x and the diagonal, which have one shape.
    for recompute, hidden, images in ((False, 2, 2), (True, 0, 1)):
        saved.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, mint.use_backend("triton"):
            forward(layer, x, recompute)
        assert saved.count(canvas) == hidden
        assert saved.count(x.shape) == images


@pytest.mark.parametrize(
    ("size", "numbers"),
    [(1e-4, "float32"), (2e-3, "float32"), (2e-3, "float16"), (50.0, "float32")],
)
def test_products_of_three_weights_fit_float16(size: float, numbers: str) -> None:
    layer = random_layer(1, 16, activation="softplus", numbers=numbers).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.fill_(size if parameter.ndim == 4 else 0)
    x = torch.zeros(1, 1, 3, 4, device=grid.DEVICE, dtype=layer.t.dtype, requires_grad=True)

    def results(layer: mint.MintLayer, x: Tensor) -> tuple[Tensor, ...]:
        _, diagonal, log_det = forward(layer, x)
        return diagonal, log_det, *torch.autograd.grad(log_det.sum(), x)

    # t is nothing, so that these products are the diagonal, and the gradient comes through them.
    with mint.use_backend("triton"), torch.autocast(grid.DEVICE, torch.float16):
        computed = results(layer, x)
    expected = results(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    for name, one, other in zip(("diagonal", "log_det", "by x"), computed, expected, strict=True):
        grid.assert_near(name, one, other, grid.TOLERANCES["float16"])


@pytest.mark.parametrize(
    ("activation", "numbers"),
    grid.thinned(
        product(["sigmoid", "elu"], ["float64", "float16"]),
        kept=[("sigmoid", "float64"), ("elu", "float16")],
    ),
)
@pytest.mark.parametrize(
    ("colours", "units", "kernels", "size"),
    [
        (1, 1, 1, (3, 4)), (3, 5, 3, (3, 4)), (4, 5, (1, 3, 5), (3, 4)), (3, 11, (3, 1, 1), (1, 1)),
        (18, 1, 3, (2, 1)), (2, 2, (1, 1, 5), (9, 8)),
    ],
)  # fmt: skip
def test_canvases_are_zero_outside_the_images(
    colours: int, units: int, kernels: Any, size: Any, numbers: str, activation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Hidden layers, and the gradients by them: in padding channels, between and around images."""
    layer = random_layer(
        colours, units, kernels=kernels, activation=activation, size=size, numbers=numbers
    )
    x = random(3, colours, *size, numbers=numbers)
    canvases: list[Tensor] = []
    launch = launching.launch

    def note(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        launch(kernel, grid, *arguments, **constants)
        if kernel.__name__ == "hidden_kernel":
            canvases.append(arguments[0].clone())

    with monkeypatch.context() as patch:
        patch.setattr(launching, "launch", note)
        with grid.guarded(monkeypatch):
            run(layer, x, random_upstream(x))
    assert len(canvases) == 4  # h1, h2, by a2, by a1
    hidden = colours * units
    canvas = Canvas(size[0], size[1], max(layer.raw_weights().kernels) // 2)
    for one in canvases:
        assert one.shape[1] % 16 == 0
        assert len(one) == canvas.positions(3) + TAIL
        rest = one.clone()
        for sample, row, column in product(range(3), *map(range, size)):
            place = canvas.place(sample, row, column)
            assert bool(one[place, :hidden].any())
            rest[place, :hidden] = 0
        assert not bool(rest.any())


@pytest.mark.parametrize("numbers", ["float32", "float16"])
@pytest.mark.parametrize("scale", [*CIFAR10, *MNIST], ids=str)
def test_a_training_step_is_fourteen_launches(
    scale: Scale, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most, of Triton or torch, forward and backward: for each has a cost of its own."""
    monkeypatch.setattr("mintnet_triton.checks.check_finite", lambda *_: None)  # as on a GPU
    layer = random_layer(scale.channels, scale.hidden, size=(2, 2), numbers="float32")
    x = random(2, scale.channels, 2, 2, numbers="float32").requires_grad_()
    upstream = (torch.ones_like(x), x.new_ones(2))

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        with torch.autocast(grid.DEVICE, torch.float16, enabled=numbers == "float16"):
            outputs = layer(x)
        torch.autograd.backward(outputs, upstream)

    with mint.use_backend("triton"):
        figures = count_launches(step)
    launches = {name: count for name, count in figures.items() if "launches" in name}
    assert sum(launches.values()) <= 14, launches


def test_an_empty_batch() -> None:
    layer = random_layer(3, 2)
    x = random(0, 3, 3, 4)
    results = run(layer, x, random_upstream(x))
    assert results["y"].shape == results["gradient by x"].shape == (0, 3, 3, 4)
    assert results["log_det"].shape == (0,)
    assert not any(bool(results[name].any()) for name, _ in layer.named_parameters())


def test_gradients_by_differences() -> None:
    layer = random_layer(2, 2, kernels=(1, 3, 1), activation="tanh", size=(1, 2))
    x = random(1, 2, 1, 2)
    inputs = {"x": x, **dict(layer.named_parameters())}
    sizes = [value.numel() for value in inputs.values()]

    class Forward(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return forward(self.layer, x)

    def call(flat: Tensor) -> Tensor:
        parts = zip(inputs.items(), flat.split(sizes), strict=True)
        state = {f"layer.{name}": part.view(value.shape) for (name, value), part in parts}
        outputs = torch.func.functional_call(Forward(), state, (state.pop("layer.x"),))
        return torch.cat([output.flatten() for output in outputs])

    # All inputs and all outputs at once: by one difference along a random direction.
    flat = torch.cat([value.detach().flatten() for value in inputs.values()]).requires_grad_()
    with mint.use_backend("triton"):
        assert torch.autograd.gradcheck(call, flat, fast_mode=True)


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_are_differentiable_once(power: int) -> None:
    layer = random_layer(1, 2)
    x = random(1, 1, 3, 4).requires_grad_()
    with mint.use_backend("triton"):
        y, log_det = layer(x)
        convolved = masked_conv.masked_conv2d(x, random(2, 1, 3, 3), None, 1, "channel", "lower")
    for output in (y, log_det, convolved):
        (by_x,) = torch.autograd.grad(output.pow(power).sum(), x, create_graph=True)
        with pytest.raises(mint.BackendError, match="second derivatives"):
            (y.sum() + by_x.square().sum()).backward()


@pytest.mark.parametrize(("colours", "units"), [(2, 3), (16, 1)])
def test_operators_are_well_defined(colours: int, units: int) -> None:
    layer = random_layer(colours, units, kernels=(1, 3, 1), size=(2, 3), numbers="float32")
    layer.conv2.register_parameter("bias", None)
    x = random(2, colours, 2, 3, numbers="float32")
    structure, dtype = list(Structure("channel", "lower", "elu")), torch.float32
    raw = layer.raw_weights()
    weights = [None if one is None else one.detach() for one in raw]
    pack = (weights, dtype, "ieee", structure)
    packed = mint_layer.pack_op(*pack)
    of_layer = (*packed, weights[1], weights[3], weights[5], [1, 3, 1], structure)
    y, diagonal, log_det, h1, h2 = mint_layer.layer_op(x, *of_layer)
    upstream = (y, diagonal, log_det, weights, structure)
    conv = (weights[0], weights[1], colours, structure[:2], dtype)
    last = torch.channels_last
    for operator, arguments in (
        (masked_conv.conv_op, (x, *conv, False)),
        (masked_conv.conv_op, (x.to(memory_format=last), conv[0], None, *conv[2:], False)),
        (masked_conv.conv_op, (x.repeat(1, units, 1, 1), conv[0], None, *conv[2:], True)),
        (masked_conv.weight_gradient_op, (y, x, colours, 1, structure[:2], dtype)),
        (mint_layer.pack_op, pack),
        (mint_layer.layer_op, (x, *of_layer)),
        (mint_layer.layer_op, (x.to(memory_format=last), *of_layer)),
        (mint_layer.backward_op, (x, diagonal, h1, h2, *upstream, True)),
        (mint_layer.backward_op, (x, diagonal, h1, h2, None, *upstream[1:], False)),
    ):
        torch.library.opcheck(operator, arguments)


def flow(squeezes: int = 1) -> mint.MintNet:
    """A small network of one or two scales."""
    net = mint.MintNet(1, 4, pairs=squeezes + 1, hidden=8, squeezes=squeezes).double()
    for module in net.modules():
        if isinstance(module, mint.MintLayer):
            other = random_layer(module.channels, module.hidden, size=module.size)
            module.load_state_dict(other.state_dict())
    return net.to(grid.DEVICE)


def gradients_of(module: torch.nn.Module, outputs: Any, x: Tensor, upstream: Any) -> Any:
    return torch.autograd.grad(outputs, [x, *module.parameters()], upstream)


def test_a_network_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = flow(), random(2, 1, 4, 4).requires_grad_()
    upstream = (random(2, 4, 2, 2), random(2))
    with mint.use_backend("triton"), grid.guarded(monkeypatch):
        outputs = net(x)
        computed = (*outputs, *gradients_of(net, outputs, x, upstream))
    outputs = net(x)
    expected = (*outputs, *gradients_of(net, outputs, x, upstream))
    for index, (one, other) in enumerate(zip(computed, expected, strict=True)):
        grid.assert_near(str(index), one, other, 1e-11)


def test_a_classifier_agrees_with_torch() -> None:
    model = mint.MintClassifier(3, 4, classes=3, pairs=2, squeezes=1, width=4).double()
    model.to(grid.DEVICE)
    x, upstream = random(3, 3, 4, 4).requires_grad_(), random(3, 3)
    with mint.use_backend("triton"):
        computed = model(x)
        by_kernels = gradients_of(model, computed, x, upstream)
    expected = model(x)
    by_torch = gradients_of(model, expected, x, upstream)
    grid.assert_near("log-probabilities", computed, expected, 1e-11)
    for (name, _), one, other in zip(
        [("x", x), *model.named_parameters()], by_kernels, by_torch, strict=True
    ):
        # Biases before a BatchNorm have no effect: their gradients are rounding alone.
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", golden.LAYERS)
def test_golden_values(name: str) -> None:
    layer, values = golden.layer(name)
    layer.to(grid.DEVICE)
    with mint.use_backend("triton"):
        y, log_det = layer(values["x"].to(grid.DEVICE))
    golden.assert_golden(y.cpu(), values["y"])
    golden.assert_golden(log_det.cpu(), values["log_det"])


@pytest.mark.parametrize("numbers", ["float32", "float16"])
def test_autocast(numbers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden layers are half; y has the dtype of x, diagonal and log_det are float32."""
    layer = random_layer(3, 16, numbers="float16").float()
    x = random(2, 3, 3, 4, numbers="float16").to(grid.dtype_of(numbers))
    upstream = random_upstream(x)
    hidden: list[torch.dtype] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape == (Canvas(3, 4, 1).positions(2) + TAIL, 48):
            hidden.append(tensor.dtype)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.autocast(grid.DEVICE, torch.float16), grid.guarded(monkeypatch), hooks:
        computed = run(layer, x, upstream)
    assert hidden == [torch.float16] * 2
    assert computed["y"].dtype == computed["gradient by x"].dtype == x.dtype
    assert computed["diagonal"].dtype == computed["log_det"].dtype == torch.float32
    assert all(computed[name].dtype == torch.float32 for name, _ in layer.named_parameters())
    assert_all_near(computed, exactly(layer, x, upstream), grid.TOLERANCES["float16"])


def results(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    outputs = module(x)
    upstream = [torch.linspace(-1, 1, one.numel()).to(one).view_as(one) for one in outputs]
    return (*outputs, *gradients_of(module, outputs, x, upstream))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "kind", ["layer", "network", pytest.param("recompute", marks=pytest.mark.full)]
)
def test_compiled_equals_eager(kind: str) -> None:
    module: torch.nn.Module = flow(0) if kind == "network" else random_layer(2, 3, size=(2, 3))
    if isinstance(module, mint.MintLayer):
        module.recompute = kind == "recompute"
    x = random(2, 1, 4, 4) if kind == "network" else random(2, 2, 2, 3)
    with mint.use_backend("triton"):
        eager = results(module, x)
        compiled = results(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


PARAMETERS = ("conv1.weight", "conv1.bias", "conv2.bias", "conv3.bias", "t")


@pytest.mark.parametrize(
    ("name", "activation"),
    grid.thinned(
        product(PARAMETERS, NAMES),
        kept=[*product(PARAMETERS, ["elu"]), *product(["conv1.bias"], NAMES)],
    ),
)
def test_nan_is_not_lost(name: str, activation: str) -> None:
    layer = random_layer(1, 2, kernels=(1, 3, 1), activation=activation)
    with torch.no_grad():
        dict(layer.named_parameters())[name].view(-1)[0] = float("nan")
    x = random(2, 1, 3, 4)
    upstream = random_upstream(x)
    computed, expected = (run(layer, x, upstream, backend) for backend in ("triton", "torch"))
    # The gradients by torch also hold NaN where a zero of the mask has met one.
    seen = {f"{conv}.weight": getattr(layer, conv).mask for conv in ("conv1", "conv2", "conv3")}
    for one in ("y", "diagonal", "log_det") if name == "t" else expected:
        lost = expected[one].isnan() & ~computed[one].isnan()
        assert not bool((lost & seen.get(one, True)).any()), one
    with mint.use_backend("triton"):
        result = mint.invert(layer, x, mint.FixedPoint(iterations=1))
    assert not bool(result.converged.any())


def test_parameters_may_have_any_strides() -> None:
    layer = random_layer(2, 3, size=(3, 4))
    x = random(2, 2, 3, 4)
    upstream = random_upstream(x)
    expected = run(layer, x, upstream)
    for conv in (layer.conv1, layer.conv2, layer.conv3):
        assert conv.bias is not None
        conv.bias = torch.nn.Parameter(conv.bias.detach().repeat_interleave(2)[::2])
        conv.weight = torch.nn.Parameter(conv.weight.detach().mT.contiguous().mT)
    layer.t = torch.nn.Parameter(layer.t.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert not layer.t.is_contiguous()
    computed = run(layer, x, upstream)
    for name, value in expected.items():
        assert torch.equal(computed[name], value), name


def test_an_inversion_never_takes_tensorfloat(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(1, 2, size=(2, 2), numbers="float32")
    x = random(1, 1, 2, 2, numbers="float32")
    taken = []
    launch = launching.launch

    def record(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        taken.append(constants.get("PRECISION", "tf32" if constants.get("TF32") else "ieee"))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(launching, "launch", record)
    solver = mint.FixedPoint(iterations=2)
    with mint.use_backend("triton"), grid.precision_of("tf32"):
        z, _ = layer(x)
        assert set(taken) == {"tf32"}
        taken.clear()
        mint.invert(layer, z.detach(), solver)
        mint.invert(layer, z.detach(), solver, trace=True, reference=x)
        assert set(taken) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "high"


def test_frozen_weights_give_gradients_by_the_input_and_are_not_copied() -> None:
    layer = random_layer(1, 2)
    x = random(2, 1, 3, 4).requires_grad_()
    with mint.use_backend("triton"):
        (expected,) = torch.autograd.grad(layer(x)[1].sum(), x)
        with mint.frozen(layer):
            twin = copy.deepcopy(layer)
            with torch.enable_grad():
                (computed,) = torch.autograd.grad(layer(x)[1].sum(), x)
        assert torch.equal(computed, expected)
        assert twin(x)[0].requires_grad
        torch.nn.init.zeros_(twin.conv3.weight)
        assert not torch.equal(twin(x)[0], layer(x)[0])


def test_what_a_graph_packs_is_kept_by_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        weights = FrozenWeights(random_layer(1, 2).effective_weights())
    of_layer = (torch.float64, "ieee", Structure("channel", "lower", "elu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        of_graph = weights.packed(*of_layer)
    kept = weights.packed(*of_layer)
    assert kept is not of_graph
    assert weights.packed(*of_layer) is kept
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert weights.packed(*of_layer) is kept

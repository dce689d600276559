import math

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.calculus import Compose, Elementwise, MaskedAffine
from mintnet_triton.solvers import Evaluator


def noisy(module: mint.Invertible) -> mint.Invertible:
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(
    "model",
    [
        mint.MintLayer(2, (3, 4), 3, "upper", "pixel"),
        mint.MintPair(2, (3, 4), 3),
        mint.MintNet(2, (4, 4), pairs=2, hidden=4, squeezes=1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_sound_models_pass(model: mint.Invertible) -> None:
    before = {name: value.clone() for name, value in noisy(model).state_dict().items()}
    shape = [size or 4 for size in model.input_shape or ()]
    report = mint.verify(model, torch.randn(2, *shape))
    assert report.ok, str(report)
    assert str(report).endswith("verified")
    assert "2 of 2 samples converged" in str(report)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_calculus_passes() -> None:
    weight = torch.eye(2)[..., None, None] * torch.eye(3)[1] * torch.eye(3)[1][:, None]
    affine = MaskedAffine(2 * weight, torch.zeros(2), mint.Ordering("pixel"))
    report = mint.verify(Compose(Elementwise("tanh"), affine), torch.randn(2, 2, 3, 3) / 4)
    assert report.ok
    assert len(report.layers) == 1
    assert mint.verify(Elementwise("elu"), torch.randn(2, 5) / 2).ok


class Leaky(mint.MintLayer):
    """Planted fault: the output also sees a variable that comes after it."""

    def evaluator(self) -> Evaluator:
        sound = super().evaluator()

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            y, diagonal = sound(x)
            return y + 1e-6 * x.roll(-1, 3), diagonal

        return evaluate


class WrongDiagonal(mint.MintLayer):
    """Planted fault: one part in a million of the diagonal is amiss."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super()._forward(x)
        return y, log_det + x[0].numel() * math.log1p(1e-6)


class NotANumber(mint.MintLayer):
    """Planted fault: the diagonal is no number."""

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super()._forward(x)
        return y, log_det * float("nan")


@pytest.mark.parametrize("kind", [Leaky, WrongDiagonal, NotANumber])
def test_planted_faults_are_found(kind: type[mint.MintLayer]) -> None:
    report = mint.verify(kind(2, 3, 2), torch.randn(1, 2, 3, 3))
    assert not report.ok
    assert "WRONG" in str(report)
    assert str(report).endswith("NOT verified")


def test_a_round_trip_that_fails_is_found() -> None:
    """So steep that no float32 x gives the z, which is small."""
    layer = mint.MintLayer(1, 1, 1, activation="tanh")
    x = torch.tensor([0.2, 0.0]).view(2, 1, 1, 1)
    with torch.no_grad():
        for conv, value in ((layer.conv1, 3.0), (layer.conv2, 3.0), (layer.conv3, 1e6)):
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = value
        assert layer.conv3.bias is not None
        layer.conv3.bias -= layer(x[:1])[0].flatten()
    report = mint.verify(layer, x)
    assert all(entry.ok for entry in report.layers)
    assert not report.ok
    assert not report.converged.all()


class Mixing(Elementwise):
    """Planted fault: claims to fit any order, and is triangular in one direction only."""

    def evaluator(self) -> Evaluator:
        return lambda x: (
            x + 0.5 * x.roll(1, 1) * (torch.arange(x.shape[1]) > 0),
            torch.ones_like(x),
        )


def test_maps_without_an_order_must_be_diagonal() -> None:
    report = mint.verify(Mixing("identity"), torch.randn(1, 4))
    assert report.layers[0].above_diagonal == 0.5
    assert not report.layers[0].ok


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="x must have at least one sample"):
        mint.verify(mint.MintLayer(1, 2, 2), torch.randn(0, 1, 2, 2))
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        mint.verify(torch.nn.Linear(2, 2), torch.randn(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        mint.verify(mint.MintLayer(1, 2, 2), torch.randn(2, 2))

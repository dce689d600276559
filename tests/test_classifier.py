from typing import Any

import pytest
import torch

import mintnet_triton as mint
from tests import golden


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_values(legacy: bool, dtype: torch.dtype, tmp_path: Any) -> None:
    path = tmp_path / "checkpoint.pth"
    values = golden.network_file("classifier_c3_s8.npz", path, entries=4, legacy=legacy)
    classifier = mint.load_authors_checkpoint(path)
    assert isinstance(classifier, mint.MintClassifier)
    assert not classifier.training
    log_probs = classifier.to(dtype)(values["x"].to(dtype))
    golden.assert_golden(log_probs, values["log_probs"], 1e-10 if dtype == torch.float64 else 1e-4)


def test_returns_log_probabilities_and_trains() -> None:
    classifier = mint.MintClassifier(1, 8, classes=4, pairs=3, squeezes=2)
    images = torch.randn(6, 1, 8, 8)
    log_probs = classifier(images)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(6))
    torch.nn.functional.nll_loss(log_probs, torch.arange(6) % 4).backward()
    missing = [name for name, p in classifier.named_parameters() if p.grad is None]
    assert missing == []


@torch.no_grad()
def test_initial_values_are_the_papers() -> None:
    classifier = mint.MintClassifier(1, 8, pairs=1, squeezes=0, hidden=4)
    conv = classifier.layers[0][1].conv2  # type: ignore[index]
    bound = 1 / (64 * 9) ** 0.5
    assert 0.95 * bound < float(conv.weight.abs().max()) <= bound


@pytest.mark.parametrize(("name", "channels", "side"), [("mnist", 1, 28), ("cifar10", 3, 32)])
def test_presets(name: str, channels: int, side: int) -> None:
    with torch.device("meta"):
        classifier = mint.MintClassifier.from_preset(name)
    assert classifier.input_shape == (channels, side, side)
    assert len(classifier.layers) == 21
    assert classifier.fc.in_features == 256


def test_bad_arguments_and_inputs() -> None:
    with pytest.raises(ValueError, match="channels must be at most width=16, got 17"):
        mint.MintClassifier(17)
    with pytest.raises(ValueError, match="image_size must divide by 4"):
        mint.MintClassifier(1, 10)
    with pytest.raises(ValueError, match="classes must be at least 1"):
        mint.MintClassifier(1, 8, classes=0)
    classifier = mint.MintClassifier(None, 8, pairs=1, squeezes=0)
    assert classifier(torch.randn(2, 5, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="images have 17 channels, more than 16"):
        classifier(torch.randn(2, 17, 8, 8))
    with pytest.raises(ValueError, match="images must have 4 dimensions"):
        classifier(torch.randn(5, 8, 8))

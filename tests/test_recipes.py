"""The command line from end to end, on small models, and the figures."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import mintnet_triton as mint
from mintnet_triton.__main__ import main
from mintnet_triton.recipes import commands, demo, figures
from mintnet_triton.recipes.data import load_images
from mintnet_triton.recipes.evaluation import evaluate
from mintnet_triton.recipes.objectives import Density
from mintnet_triton.recipes.recipe import Experiment, read_experiment
from mintnet_triton.recipes.runs import RunFolder
from tests.hub import write_parquet

SMALL = ["--set", "pairs=1", "--set", "hidden=4", "--set", "squeezes=0", "--set", "steps=3"]


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


def test_reconstructions_and_an_interpolation() -> None:
    flow = mint.MintNet(1, 8, pairs=2, hidden=4, squeezes=1)
    preprocess = mint.ImagePreprocess(17, 0.01)
    images = torch.randint(0, 17, (4, 1, 8, 8))
    x, _ = preprocess(images)
    rows = figures.reconstructions(flow, x, preprocess, 0.5, [1, 60])
    assert list(rows) == ["images", "after 1 iteration, α = 0.5", "after 60 iterations, α = 0.5"]
    assert torch.equal(rows["images"], images)
    assert not torch.equal(rows["after 1 iteration, α = 0.5"], images)
    assert torch.equal(rows["after 60 iterations, α = 0.5"], images)

    between = figures.interpolation(flow, x, steps=5)
    corners = between[[0, 4, 20, 24]]
    torch.testing.assert_close(corners, x, rtol=1e-4, atol=1e-4)
    z, half = flow(x)[0], math.cos(math.pi / 4)
    middle = flow.inverse((half * half * z.sum(0, keepdim=True)).detach())[0]
    torch.testing.assert_close(between[[12]], middle, rtol=1e-4, atol=1e-4)
    # From top to bottom, and from left to right.
    half_way = flow.inverse((half * (z[[0, 0]] + z[[2, 1]])).detach())[0]
    torch.testing.assert_close(between[[10, 2]], half_way, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="corners must be 4 images, got 3"):
        figures.interpolation(flow, x[:3])


def test_a_grid_shows_every_image() -> None:
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    axis = figures.image_grid(images, levels=6, columns=3).axes[0]
    (shown,) = axis.get_images()
    pixels = torch.as_tensor(np.asarray(shown.get_array())) * 5
    assert pixels.shape == (8, 12)
    inner = pixels[1::4, 1::4].round().long()
    assert inner.tolist() == [[0, 1, 2], [3, 4, 5]]  # the last place is empty, white
    assert figures.image_grid(images[:0], levels=6).axes


def test_the_learning_curve_has_all_points() -> None:
    rows = [{"step": 1, "accuracy": 0.1}, {"step": 2, "validation_accuracy": 0.3}]
    lines = figures.learning_curve(rows, "accuracy").axes[0].get_lines()
    assert [(line.get_label(), np.asarray(line.get_xydata()).tolist()) for line in lines] == [
        ("training", [[1.0, 0.1]]),
        ("held out", [[2.0, 0.3]]),
    ]


def test_a_density_from_training_to_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command says what to do next; that is done next."""
    out = tmp_path / "run"
    train = ["train", "density", "--preset", "digits", "--out", str(out), *SMALL]
    assert main([*train, "--max-minutes", "1e-9"]) == 0
    printed = capsys.readouterr().out
    assert "stopped after 1 steps" in printed
    again = re.search(r"go on with it:  python -m mintnet_triton (.*)", printed)
    assert again is not None
    arguments = shlex.split(again[1].replace("--max-minutes 1e-9", ""))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "trained for 3 steps" in printed
    assert re.search(
        r"^[\d.e+]+ images per second.*; the whole recipe takes", printed, re.MULTILINE
    )
    assert RunFolder(out).rows()[-1]["step"] == 3

    flow = mint.load(out / "model.safetensors")
    assert isinstance(flow, mint.MintNet)
    bits = evaluate(flow, load_images("digits").test, Density(17, 0.01), draws=5).summary()
    judge = re.search(r"judge it: +python -m mintnet_triton (.*)", printed)
    assert judge is not None
    assert main([*shlex.split(judge[1]), "--inversions", "3"]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["test"]["images"] == 360
    assert report["test"]["draws"] == 5
    assert report["test"]["bits_per_dim"] == pytest.approx(bits["bits_per_dim"], rel=1e-9)
    assert report["inversion"]["converged"] == 3
    printed = capsys.readouterr().out
    assert (out / "evaluation.md").read_text() in printed

    draw = re.search(r"draw it: python -m mintnet_triton (.*)", printed)
    assert draw is not None
    assert main(shlex.split(draw[1])) == 0
    names = ("samples", "reconstruction_error", "reconstructions", "interpolation")
    for name in (*names, "learning_curve"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sample", str(out), "--number", "5", "--seed", "2"]) == 0
    assert "5 of 5 samples converged" in capsys.readouterr().out
    samples = np.load(out / "samples.npy")
    latents = torch.randn(5, *flow.latent_shape, generator=torch.Generator().manual_seed(2))
    x = flow.inverse(latents)[0]
    expected = mint.ImagePreprocess(17, 0.01).to_images(x.detach())
    assert np.array_equal(samples, expected.numpy())


def test_a_classifier_and_its_moving_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path)
    changes = ["--set", "average=0.5", "--set", "validation=100"]
    assert main(["train", "classify", "--preset", "digits", "--out", out, *SMALL, *changes]) == 0
    assert main(["evaluate", out, "--checkpoint", "best"]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(report) == {"data", "checkpoint", "step", "parameters", "test"}
    run = commands.load_run(tmp_path, "best")
    assert not run.model.training
    state = RunFolder(tmp_path).load("best")
    averaged = state["average"]["module.fc.bias"]
    assert torch.equal(run.model.state_dict()["fc.bias"], averaged)
    assert not torch.equal(averaged, state["model"]["fc.bias"])
    accuracy = evaluate(run.model, load_images("digits").test, run.objective).summary()["accuracy"]
    assert report["test"]["accuracy"] == accuracy
    assert main(["figures", out]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["learning_curve.png"]
    capsys.readouterr()
    assert main(["sample", out]) == 1
    assert "of a classifier, which has no samples" in capsys.readouterr().err


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "test"),
    [("cifar10", "test"), ("cifar10+", "test"), ("imagenet32", "validation")],
)
def test_the_papers_presets_run_on_files_of_the_hub(
    name: str, test: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar10 = name.startswith("cifar10")
    column = "img" if cifar10 else "image"
    write_parquet(tmp_path / "data", column, (32, 32, 3), {"train": 16, test: 5})
    out, data = str(tmp_path / "run"), ["--data-dir", str(tmp_path / "data")]
    changes = [*SMALL, "--set", "batch_size=4"]
    assert main(["train", "density", "--preset", name, "--out", out, *data, *changes]) == 0
    assert shlex.join(["evaluate", out, *data]) in capsys.readouterr().out
    assert main(["evaluate", out, *data, "--draws", "1", "--inversions", "0"]) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["test"]["images"] == 5
    assert report["test"]["not_finite"] == 0
    description = RunFolder(tmp_path / "run").description()
    assert description["recipe"]["flip"] is cifar10
    # A stream is resumed where it stood, without having counted it.
    (RunFolder(tmp_path / "run").checkpoints()[-1]).unlink()
    assert description["data"]["training_images"] == (16 if cifar10 else None)
    arguments = ["train", "density", "--preset", name, "--out", out, *data, *changes]
    before = RunFolder(tmp_path / "run").load("best")["model"]
    assert main([*arguments, "--resume"]) == 0
    after = RunFolder(tmp_path / "run").load()["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "svhn", "--data", "digits"], "name must be one of the presets"),
        (["--preset", "svhn"], "no data are called as preset 'svhn'"),
        (
            ["--preset", "mnist", "--data", "digits"],
            r"for images of \(1, 28, 28\).*has \(1, 8, 8\)",
        ),
        (["--preset", "digits", "--set", "rate=1"], "nothing is called 'rate'"),
        (["--preset", "digits", "--set", "hidden=0"], "hidden must be at least 1, got 0"),
        (["--preset", "digits", "--set", "batch_size=2000"], "batch_size must be at most"),
        (["--preset", "digits", "--set", "levels=256"], "and digits has .* and 17"),
    ],
)
def test_wrong_commands_say_why(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "density", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_no_run_and_no_room_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "sample", "figures"):
        assert main([command, str(tmp_path)]) == 1
        assert f"{tmp_path} holds no run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "run")
    assert main(["train", "density", "--preset", "digits", "--out", out, *SMALL]) == 1
    assert f"cannot write to {out}" in capsys.readouterr().err


def test_the_demo_writes_all_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def small(name: str, task: str) -> Experiment:
        changes: dict[str, Any] = {"pairs": 1, "hidden": 4, "squeezes": 0, "steps": 3}
        return read_experiment(name, task, changes)

    monkeypatch.setattr(demo, "read_experiment", small)
    out = tmp_path / "new" / "folder"
    (out / "run").mkdir(parents=True)
    (out / "run" / "checkpoint-000000009.pt").write_text("of an earlier demo")
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
    bits = evaluate(flow, load_images("digits").test, Density(17, 0.01)).summary()
    assert bits["bits_per_dim"] == pytest.approx(report["test_bits_per_dim"])


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

"""The training loop against formulas written out here, and how it ends when things go wrong."""

import dataclasses
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("tqdm")

import mintnet_triton as mint
from mintnet_triton.recipes import training
from mintnet_triton.recipes.batches import generator, training_batches
from mintnet_triton.recipes.data import ImageData, ImageSet
from mintnet_triton.recipes.objectives import Classification, Density
from mintnet_triton.recipes.recipe import Recipe, parse_change, read_experiment
from mintnet_triton.recipes.runs import RunFolder
from mintnet_triton.recipes.state import TrainingState
from mintnet_triton.recipes.training import DivergedError, TrainingResult, train
from tests import golden
from tests.recording import Looking, Recorded, pretend
from tests.tiny_run import random_data

DENSITY = Density(levels=17, logit_lambda=0.01)


def tiny_flow() -> mint.MintNet:
    torch.manual_seed(1)
    return mint.MintNet(1, 4, pairs=1, hidden=2, squeezes=0)


def run(
    folder: Path, model: nn.Module | None = None, data: ImageData | None = None, **changes: Any
) -> TrainingResult:
    options = {
        name: changes.pop(name)
        for name in ("max_minutes", "clock", "resume", "checkpoint_every", "keep", "tensorboard")
        if name in changes
    }
    recipe = Recipe(**{"steps": 6, "batch_size": 4, "learning_rate": 1e-2, **changes})
    model, data = model or tiny_flow(), data or random_data()
    return train(model, data, DENSITY, recipe, folder, {"model": "tiny"}, **options)


# --- the update, written out -------------------------------------------------------------------


def order_of(channels: int, side: int, upper: bool) -> Tensor:
    """Mask (C, C, k, k) of a convolution in channel order, from the definition."""
    middle = side // 2
    mask = torch.zeros(channels, channels, side, side)
    for out in range(channels):
        for colour in range(channels):
            for row in range(side):
                for column in range(side):
                    own = (row, column) <= (middle, middle)
                    mask[out, colour, row, column] = colour < out or (colour == out and own)
    return mask.flip(0, 1, 2, 3) if upper else mask


class PlainLayer:
    """``t x + W3 h(W2 h(W1 x))`` in the authors' layout (unit k of colour c is k C + c)."""

    def __init__(self, state: dict[str, Tensor], upper: bool) -> None:
        self.p = {name: value.clone().requires_grad_() for name, value in state.items()}
        self.colours = state["weight1"].shape[1]
        self.hidden = len(state["weight1"]) // self.colours
        self.mask = order_of(self.colours, 3, upper).double()

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        k, c = self.hidden, self.colours
        w1 = self.p["weight1"] * self.mask.repeat(k, 1, 1, 1)
        w2 = self.p["weight2"] * self.mask.repeat(k, k, 1, 1)
        w3 = self.p["weight3"] * self.mask.repeat(1, k, 1, 1)
        corrected = w2.clone()
        for colour in range(c):
            own = torch.arange(k) * c + colour
            signs = w3[colour, own, 1, 1].sign().unsqueeze(1) * w1[own, colour, 1, 1].sign()
            rows, columns = torch.meshgrid(own, own, indexing="ij")
            corrected[rows, columns, 1, 1] = signs.detach() * w2[rows, columns, 1, 1].abs()
        return w1, corrected, w3

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and log|det| from autograd's own diagonal."""
        w1, w2, w3 = self.weights()
        scale = self.p["t"].abs().clamp(min=1e-12)

        def value(v: Tensor) -> Tensor:
            h = F.elu(F.conv2d(v, w1, self.p["bias1"], padding=1))
            h = F.elu(F.conv2d(h, w2, self.p["bias2"], padding=1))
            return F.conv2d(h, w3, self.p["bias3"], padding=1) + scale * v

        y = value(x)
        log_dets = []
        for sample in x:
            size = sample.numel()
            jacobian = torch.autograd.functional.jacobian(
                lambda v, shape=sample.shape: value(v.view(1, *shape)).flatten(),
                sample.flatten(),
                create_graph=True,
            )
            log_dets.append(torch.as_tensor(jacobian).reshape(size, size).diagonal().log().sum())
        return y, torch.stack(log_dets)


def squeezed(x: Tensor) -> Tensor:
    """Channels in the order (dy, dx, c)."""
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def test_ten_steps_from_the_authors_values(tmp_path: Path) -> None:
    """Adam with AMSGrad on a golden flow, against autograd on the formulas, in float64."""
    values = golden.network_file("flow_c1_s8.npz", tmp_path / "authors.pth")
    flow = mint.load_authors_checkpoint(tmp_path / "authors.pth").double()
    data = random_data(8, (1, 8, 8))
    recipe = Recipe(steps=10, batch_size=2, flip=True)
    train(flow, data, DENSITY, recipe, tmp_path / "run", {})
    rows = RunFolder(tmp_path / "run").rows()

    blocks: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, value in values.items():
        if key.startswith("param.layers."):
            _, _, block, triangle, name = key.split(".")
            if not name.startswith(("mask", "center")):
                state = blocks.setdefault(int(block), {}).setdefault(int(triangle), {})
                state[name] = value.double()
    layers = {
        block: [PlainLayer(pair[0], upper=False), PlainLayer(pair[1], upper=True)]
        for block, pair in blocks.items()
    }

    def loss(values: Tensor) -> Any:
        p = 0.01 + 0.98 * values / 17
        x = torch.logit(p)
        log_density = (math.log(0.98 / 17) - p.log() - (1 - p).log()).flatten(1).sum(1)
        for block in range(max(layers) + 1):
            if block not in layers:
                x = squeezed(x)
                continue
            for layer in layers[block]:
                x, log_det = layer(x)
                log_density = log_density + log_det
        normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        log_density = log_density + normal.log_prob(x).flatten(1).sum(1)
        return -(log_density / (math.log(2) * 64)).mean()

    parameters = [p for pair in layers.values() for layer in pair for p in layer.p.values()]
    first, second, largest = ([torch.zeros_like(p) for p in parameters] for _ in range(3))
    batches = training_batches(data.train, 2, seed=0, flip=True)
    losses = []
    for step in range(1, 11):
        batch = next(batches)
        noise = [torch.from_numpy(rng.random((1, 8, 8), np.float32)) for rng in batch.generators]
        value = loss((batch.images + torch.stack(noise)).double())
        losses.append(value.item())
        rate = 1e-3 * (1 + math.cos(math.pi * (step - 1) / 10)) / 2
        gradients = torch.autograd.grad(value, parameters)
        for p, g, m, v, top in zip(parameters, gradients, first, second, largest, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            top.copy_(torch.maximum(top, v))
            scale = (top / (1 - 0.999**step)).sqrt() + 1e-4
            p.data.sub_(rate * m / (1 - 0.9**step) / scale)
    assert rows[-1]["loss"] == pytest.approx(sum(losses) / 10, abs=1e-10)

    for number, pair in layers.items():
        for index, plain in enumerate(pair):
            layer = mint.layer_from_authors(
                {name: value.detach() for name, value in plain.p.items()},
                "upper" if index else "lower",
            )
            trained = flow.get_submodule(f"layers.{number}.{index}").state_dict()
            for name, expected in layer.state_dict().items():
                golden.assert_golden(trained[name], expected, 1e-9)


def test_logits_are_those_of_the_preprocessing() -> None:
    """Though nobody looks at values on their way."""
    for levels, like in ((17, torch.zeros(())), (2**20, torch.zeros((), dtype=torch.float64))):
        objective = Density(levels, 0.01)
        images = torch.randint(0, levels, (3, 2, 4, 4))
        rngs = [generator(0, "training", 0, index) for index in range(3)]
        values = objective.inputs(images, rngs)
        assert torch.equal(values.floor(), images)
        for ours, theirs in zip(
            objective.logits(values, like),
            objective.preprocess().transform(
                values.to(torch.promote_types(values.dtype, like.dtype))
            ),
            strict=True,
        ):
            assert torch.equal(ours, theirs.to(like.dtype))
    for wrong in (17, -1):
        message = f"within 0 and 16 for levels=17, got values from {wrong} to {wrong}"
        with pytest.raises(ValueError, match=message):
            DENSITY.inputs(torch.full((1, 1, 2, 2), wrong), rngs[:1])


# --- schedule, clipping, averages ---------------------------------------------------------------


class Scaling(nn.Module):
    """The least that the loop takes for a flow: z = a x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))
        self.b = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self.a.abs().log() * x[0].numel()
        return (self.a * x + self.b).flatten(1), log_det.expand(len(x))


def rates(folder: Path, **recipe: Any) -> list[float]:
    """The learning rate of every step."""
    run(folder, Scaling(), learning_rate=0.1, batch_size=8, **recipe)
    return [row["learning_rate"] for row in RunFolder(folder).rows()]


def test_schedules_move_in_the_unit_of_the_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    cosine = [0.1 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates(tmp_path / "a", steps=4) == pytest.approx(cosine)
    # 24 images are three batches of eight.
    in_epochs = rates(tmp_path / "b", steps=None, epochs=4)
    assert in_epochs == pytest.approx([rate for rate in cosine for _ in range(3)])
    decay = {"schedule": "milestones", "milestones": (1, 3), "gamma": 0.5}
    halved = [0.1, 0.05, 0.05, 0.025]
    assert rates(tmp_path / "c", steps=4, **decay) == pytest.approx(halved)
    by_epoch = rates(tmp_path / "d", steps=None, epochs=4, **decay)
    assert by_epoch == pytest.approx([rate for rate in halved for _ in range(3)])


def test_gradients_are_clipped_by_their_norm(tmp_path: Path) -> None:
    model = Scaling()
    run(tmp_path, model, steps=1, clip=1e-3, learning_rate=0.1)
    norm = RunFolder(tmp_path).rows()[0]["gradient_norm"]
    assert norm > 1e-2
    # One step of Adam from zero moments: g / (|g| + eps).
    twin, clipped = Scaling(), []
    (batch,) = [next(training_batches(random_data().train, 4, seed=0))]
    scores = DENSITY.scores(twin, DENSITY.inputs(batch.images, batch.generators), batch.labels)
    for gradient in torch.autograd.grad(scores.loss.mean(), [twin.a, twin.b]):
        clipped.append(gradient * 1e-3 / norm)
    expected = [0.1 * g / (g.abs() + 1e-4) for g in clipped]
    moved = [twin.a - model.a, twin.b - model.b]
    torch.testing.assert_close(
        torch.stack(moved).detach(), torch.stack(expected), rtol=1e-3, atol=0
    )


def test_the_moving_average_is_one_and_is_what_is_judged(tmp_path: Path) -> None:
    weights = []
    for steps in (1, 2, 3):
        model = Scaling()
        run(tmp_path / str(steps), model, steps=steps, schedule="milestones")
        weights.append(model.a.detach().clone())
    result = run(tmp_path / "average", Scaling(), steps=3, schedule="milestones", average=0.75)
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.75 * expected + 0.25 * weight
    state = RunFolder(result.checkpoint.parent).load()
    torch.testing.assert_close(state["average"]["module.a"], expected)
    torch.testing.assert_close(state["model"]["a"], weights[-1])


def test_validation_is_on_images_held_out_and_chooses_the_best(tmp_path: Path) -> None:
    data = random_data()
    run(tmp_path, data=data, steps=8, validation=6, checkpoint_every=2, keep=2, learning_rate=0.2)
    folder = RunFolder(tmp_path)
    assert [path.name for path in folder.checkpoints()] == [
        "checkpoint-000000006.pt",
        "checkpoint-000000008.pt",
    ]
    scores = {
        row["step"]: row["validation_loss"] for row in folder.rows() if "validation_loss" in row
    }
    assert list(scores) == [2, 4, 6, 8]
    best = folder.load("best")
    assert best["best"] == min(scores.values()) == scores[best["step"]]
    flow = tiny_flow()
    flow.load_state_dict(best["model"])
    held = data.hold_out(6)[1]
    rngs = [generator(0, "evaluation", 0, index) for index in range(6)]
    with torch.no_grad():
        inputs = DENSITY.inputs(held.images, rngs)
        bits = DENSITY.scores(flow, inputs, held.labels).loss.mean()
    assert float(bits) == pytest.approx(scores[best["step"]], rel=1e-6)


def test_options_that_save_memory_or_time(tmp_path: Path) -> None:
    states = []
    choices: dict[str, dict[str, Any]] = {
        "plain": {},
        "recompute": {"recompute": True},
        "low": {"autocast": True},
    }
    for name, options in choices.items():
        flow, lowered = tiny_flow(), set[bool]()
        flow.register_forward_hook(
            lambda *_, lowered=lowered: lowered.add(torch.is_autocast_enabled("cpu"))
        )
        run(tmp_path / name, flow, **options)
        assert True in lowered if "autocast" in options else lowered == {False}
        states.append(torch.cat([p.detach().flatten() for p in flow.parameters()]))
        # Only where it was asked for, and everywhere there.
        layers = [m for m in flow.modules() if isinstance(m, mint.MintLayer)]
        assert {layer.recompute for layer in layers} == {"recompute" in options}
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(states[0], states[2], rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="recompute must be false: no part of Scaling knows it"):
        run(tmp_path / "none", Scaling(), recompute=True)


def test_a_classifier_learns(tmp_path: Path) -> None:
    """Three classes of different brightness."""
    data = random_data(48, levels=5)
    split = data.train
    assert isinstance(split, ImageSet)
    split.images.add_((split.labels * 6).byte().view(-1, 1, 1, 1))
    torch.manual_seed(0)
    model = mint.MintClassifier(1, 4, classes=3, pairs=1, squeezes=0, width=4)
    objective = Classification(levels=17)
    recipe = Recipe(epochs=20, batch_size=16, learning_rate=2e-2, weight_decay=1e-4)
    train(model, data, objective, recipe, tmp_path, {}, checkpoint_every=3)
    rows = RunFolder(tmp_path).rows()
    assert rows[0]["accuracy"] < 0.6
    assert rows[-1]["accuracy"] > 0.8
    assert not math.isclose(rows[-1]["loss"], rows[-1]["accuracy"])


# --- ends ---------------------------------------------------------------------------------------


class Failing(Scaling):
    """Goes wrong from its fourth call on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        z, log_det = super().forward(x)
        if self.calls < 4:
            return z, log_det
        if self.how == "gradient":  # that of a root at 0 is infinite, its value is not
            return z, log_det + (self.a - self.a.detach()).abs().sqrt()
        if self.how == "error" or (self.how == "loss, then error" and self.calls > 5):
            raise mint.NonFiniteError("x holds 1 NaN")
        return z, log_det * (-1e9 if self.how == "large" else math.nan)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("loss", "the loss is nan"),
        ("error", "x holds 1 NaN"),
        ("gradient", "the norm of the gradient is (nan|inf)"),
        ("large", r"the loss is \d"),
    ],
)
def test_divergence_stops_at_the_last_good_checkpoint(
    how: str, message: str, tmp_path: Path
) -> None:
    model = Failing(how)
    model.a.data.fill_(1.1)  # not 1, whose logarithm is 0
    with pytest.raises(DivergedError, match=f"diverged at step 3: {message}") as caught:
        run(tmp_path, model, checkpoint_every=2)
    folder = RunFolder(tmp_path)
    assert str(folder.checkpoints()[-1]) in str(caught.value)
    state = folder.load()
    assert state["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("loss", "the loss on held-out images is nan"),
        ("error", "on held-out images, x holds 1 NaN"),
        ("weight", "a weight is not finite"),
    ],
)
def test_a_model_that_fails_at_a_checkpoint_is_not_kept(
    how: str, message: str, tmp_path: Path
) -> None:
    class FailingLater(Failing):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls = 0 if self.training or how == "weight" else 3
            return super().forward(x)

    model = FailingLater(how)
    if how == "weight":
        model.register_parameter("unused", nn.Parameter(torch.tensor(math.nan)))
    with pytest.raises(DivergedError, match=message):
        run(tmp_path, model, checkpoint_every=2, validation=4)
    assert RunFolder(tmp_path).load()["step"] == 0


def test_a_flow_that_is_trained_too_fast_diverges(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"at step \d+: .*Try a learning rate below"):
        run(tmp_path, steps=50, learning_rate=1e12)


@pytest.mark.parametrize(
    ("how", "calls"),
    # An error is one at once; else the log brings it up.
    [("loss", training.LOG_EVERY), ("gradient", training.LOG_EVERY), ("error", 4),
     ("loss, then error", 6)],
)  # fmt: skip
def test_a_step_that_diverges_is_told_of_later_and_changes_nothing(
    how: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[TrainingState] = []
    start = TrainingState.start

    def started(*arguments: Any) -> TrainingState:
        states.append(start(*arguments))
        return states[-1]

    monkeypatch.setattr(TrainingState, "start", started)
    same: dict[str, Any] = {"schedule": "milestones", "average": 0.75, "clip": 1.0}
    good, failing = Failing("loss"), Failing(how)
    for model in (good, failing):
        model.a.data.fill_(1.1)
    run(tmp_path / "good", good, steps=3, **same)
    with pytest.raises(DivergedError, match="diverged at step 3: "):
        run(tmp_path / "failing", failing, steps=80, **same)
    assert failing.calls == calls
    ours, theirs = (state.state_dict() for state in states)
    for part in ("model", "average"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
    for index, moments in ours["optimiser"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(theirs["optimiser"]["state"][index][name], value)


def test_the_host_looks_where_it_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looking(owner: type, name: str) -> None:
        """Let it, and count."""
        method = getattr(owner, name)

        def allowed(self: Any, *arguments: Any) -> Any:
            with _disable_current_modes():
                looks.append(name)
                return method(self, *arguments)

        monkeypatch.setattr(owner, name, allowed)

    looks: list[str] = []
    monkeypatch.setattr(training, "LOG_EVERY", 4)
    looking(training._Loop, "begin")
    looking(training._Loop, "_checkpoint")
    for owner, name in ((ImageSet, "fetch"), (Density, "inputs")):  # on the CPU
        looking(owner, name)
    looking(mint.TrainingStep, "look")
    with Looking():
        run(tmp_path, Scaling(), steps=12, checkpoint_every=6, average=0.9, clip=1.0)
    assert looks.count("look") == 4  # at 4, 6, 8, 12
    assert looks.count("_checkpoint") == 2
    assert looks.count("inputs") == 12


@pytest.mark.parametrize("schedule", ["cosine", "milestones"])
def test_a_captured_run_is_the_run(
    schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {"steps": 12, "schedule": schedule, "milestones": (5, 9)}
    recipe |= {"average": 0.75, "clip": 1.0}
    run(tmp_path / "plain", Scaling(), checkpoint_every=6, **recipe)
    monkeypatch.setattr(training, "TrainingStep", pretend(monkeypatch))
    run(tmp_path / "captured", Scaling(), checkpoint_every=6, **recipe)
    run(tmp_path / "parts", Scaling(), checkpoint_every=6, **recipe)
    RunFolder(tmp_path / "parts").checkpoints()[-1].unlink()
    run(tmp_path / "parts", Scaling(), checkpoint_every=6, resume=True, **recipe)
    assert [step.replays for step in Recorded.made] == [9, 9, 3]
    plain, *others = (RunFolder(tmp_path / name).load() for name in ("plain", "captured", "parts"))
    for other in others:
        for part in ("model", "average"):
            assert all(torch.equal(other[part][k], value) for k, value in plain[part].items())
        for index, moments in plain["optimiser"]["state"].items():
            theirs = other["optimiser"]["state"][index]
            assert all(torch.equal(theirs[name], value) for name, value in moments.items())
    rows = [
        [{**row, "seconds": 0, "images_per_second": 0} for row in RunFolder(tmp_path / name).rows()]
        for name in ("plain", "captured", "parts")
    ]
    assert rows[0] == rows[1] == rows[2]
    run(tmp_path / "without", Scaling(), graph=False, **recipe)
    assert not Recorded.made[-1].capturing


def test_how_steps_are_made_tells_no_run_from_another(tmp_path: Path) -> None:
    whole, parts = Scaling(), Scaling()
    run(tmp_path / "whole", whole)
    run(tmp_path / "parts", parts, max_minutes=1e-9, graph=False)
    folder = RunFolder(tmp_path / "parts")
    assert "graph" not in folder.description()["recipe"]
    # As earlier versions left it.
    state = folder.load()
    for group in state["optimiser"]["param_groups"]:
        group["fused"] = None
    folder.save(state, best=False)
    assert run(tmp_path / "parts", parts, resume=True).finished
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, two)


def test_time_runs_out_between_steps(tmp_path: Path) -> None:
    whole, parts = tiny_flow(), tiny_flow()
    run(tmp_path / "whole", whole)
    result = run(tmp_path / "parts", parts, max_minutes=1e-9)
    assert (result.steps, result.finished) == (1, False)
    assert result.checkpoint.name == "checkpoint-000000001.pt"
    result = run(tmp_path / "parts", parts, resume=True)
    assert (result.steps, result.finished) == (6, True)
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, two)
    for wrong in ({"max_minutes": 0.0}, {"checkpoint_every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            run(tmp_path / "wrong", **wrong)


@pytest.mark.parametrize(
    ("length", "steps"), [({"steps": 50}, 50), ({"steps": None, "epochs": 7}, 42)]
)
def test_a_run_says_how_fast_it_was_and_how_long_the_whole_takes(
    length: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    ticks = iter(
        [0.0, 0.0, *map(float, range(100, 1000, 2))]
    )  # seconds: the first step takes longer

    def clock() -> float:
        return next(ticks)

    # Two readings a step: of the time that is left, and of the step's end.
    result = run(tmp_path, clock=clock, max_minutes=2.0, batch_size=4, **length)
    assert 1 < result.steps < 20
    assert result.images_per_second == 4 / 4
    assert result.whole_seconds == 4 * steps
    assert result.peak_memory is None or result.peak_memory > 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_a_step(number: signal.Signals, tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    class Signalling(Scaling):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            os.kill(os.getpid(), number)
            return super().forward(x)

    result = run(tmp_path, Signalling())
    assert not result.finished
    assert result.steps in (1, 2)
    assert RunFolder(tmp_path).load()["step"] == result.steps
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_tensorboard_gets_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"bits_per_dim" in events.read_bytes()


@pytest.mark.gpu
def test_training_on_a_gpu_is_that_on_a_cpu(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        run(tmp_path / device, tiny_flow().to(device), checkpoint_every=1)
    on_cpu, on_gpu = (RunFolder(tmp_path / device).rows() for device in ("cpu", "cuda"))
    for ours, theirs in zip(on_cpu, on_gpu, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
    RunFolder(tmp_path / "cuda").checkpoints()[-1].unlink()
    assert run(tmp_path / "cuda", tiny_flow().to("cuda"), resume=True).finished


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_captured_run_on_a_gpu_is_the_run(
    autocast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[mint.TrainingStep] = []

    def step(*arguments: Any, **options: Any) -> mint.TrainingStep:
        made.append(mint.TrainingStep(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(training, "TrainingStep", step)
    for graph in (False, True):
        run(
            tmp_path / str(graph), tiny_flow().to("cuda"), steps=20, checkpoint_every=5,
            autocast=autocast, average=0.9, clip=1.0, graph=graph,
        )  # fmt: skip
        assert (made[-1]._graph is not None) == graph
    for ours, theirs in zip(
        *(RunFolder(tmp_path / str(graph)).rows() for graph in (False, True)), strict=True
    ):
        for name in ("loss", "gradient_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-2 if autocast else 1e-3)


@pytest.mark.gpu
def test_divergence_on_a_gpu_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step \d+: .*Try a learning rate below"):
        run(tmp_path, tiny_flow().to("cuda"), steps=80, learning_rate=1e12)


# --- recipes ------------------------------------------------------------------------------------


def test_presets_hold_the_papers_recipes() -> None:
    for preset, length, flip in (
        ("mnist", {"epochs": 600}, False),
        ("cifar10", {"epochs": 300}, True),
        ("imagenet32", {"steps": 350_000}, False),
    ):
        recipe = read_experiment(preset, "density").recipe
        expected = Recipe(**length, batch_size=32, learning_rate=1e-3, flip=flip)  # type: ignore[arg-type]
        if preset == "mnist":
            decay = {"schedule": "milestones", "milestones": (250, 350, 450), "gamma": 0.1}
            expected = dataclasses.replace(expected, **decay)  # type: ignore[arg-type]
        assert recipe == expected
        assert (recipe.betas, recipe.eps, recipe.amsgrad) == ((0.9, 0.999), 1e-4, True)
    for preset, crop, flip in (("mnist", 2, False), ("cifar10", 4, True)):
        recipe = read_experiment(preset, "classify").recipe
        assert recipe == Recipe(epochs=200, batch_size=128, weight_decay=1e-4, crop=crop, flip=flip)


def test_values_of_a_preset_can_be_changed() -> None:
    texts = ["steps=7", "hidden=4", "schedule=milestones", "betas=[0.8, 0.9]", "logit_lambda=1e-3"]
    experiment = read_experiment("mnist", "density", dict(map(parse_change, texts)))
    assert (experiment.recipe.steps, experiment.recipe.epochs) == (7, None)
    assert experiment.model["hidden"] == 4
    assert experiment.recipe.schedule == "milestones"
    assert experiment.recipe.betas == (0.8, 0.9)
    assert experiment.data["logit_lambda"] == 1e-3
    with pytest.raises(ValueError, match=r"nothing is called 'rate'; there are .*learning_rate"):
        read_experiment("mnist", "density", {"rate": 1})
    with pytest.raises(ValueError, match="nothing is called 'width'"):
        read_experiment("mnist", "density", {"width": 4})
    with pytest.raises(ValueError, match="expected name=value, got 'steps'"):
        parse_change("steps")
    with pytest.raises(ValueError, match="task must be 'density' or 'classify', got 'play'"):
        read_experiment("mnist", "play")
    with pytest.raises(ValueError, match="'imagenet32' has no classifier section"):
        read_experiment("imagenet32", "classify")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 3}, ValueError, "one of epochs and steps must be given, got 3 and 6"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"learning_rate": -1}, ValueError, "learning_rate must be above 0, got -1"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got 'fast'"),
        ({"clip": 0.0}, ValueError, "clip must be above 0, got 0.0"),
        ({"average": 1.0}, ValueError, "average must be at least 0 and below 1, got 1.0"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers, got"),
        ({"milestones": (2.5,)}, TypeError, "milestones must be an integer, got 2.5"),
        ({"flip": 1}, TypeError, "flip must be true or false, got 1"),
        ({"graph": "yes"}, TypeError, "graph must be true or false, got 'yes'"),
        ({"schedule": "step"}, ValueError, "'cosine' or 'milestones', got 'step'"),
    ],
)
def test_recipes_out_of_range(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Recipe(**{"steps": 6, **changes})

"""A step against a loop written out here, what is not finite, and its graph, as far as CPUs go."""

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import mintnet_triton as mint
from mintnet_triton.recipes.objectives import Classification, Density
from mintnet_triton.step import WARM_UP, NonFiniteStepError, TrainingStep
from tests.recording import Looking, Recorded, pretend

STEPS = WARM_UP + 5


class Net(nn.Module):
    """Something of everything: statistics, randomness, and a parameter that nothing is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.3)
        self.linear = nn.Linear(3 * 16, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.drop(F.elu(self.norm(self.conv(x)))).flatten(1))
        return y


def batches(count: int = STEPS, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 2, 4, 4, generator=source),
            torch.randint(0, 4, (size,), generator=source),
        )
        for _ in range(count)
    ]


class Training:
    """A network with all that goes with it: a schedule, clipping, an average, and a second value.

    Args:
        kind: of step.
        spoil: what becomes of a loss, if it is its turn.
        dtype: of the network.
    """

    def __init__(
        self,
        kind: type[TrainingStep] = TrainingStep,
        spoil: Callable[[Tensor, Tensor], Tensor] = lambda loss, _: loss,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(2)
        self.net, self.spoil = Net().to(dtype), spoil
        place = self.net.unused.device
        self.turn = torch.tensor(False, device=place)  # a graph runs no Python, but reads this
        self.average = copy.deepcopy(self.net.linear.weight.detach())
        self.optimiser = Adam(self.net.parameters(), lr=0.05, eps=1e-4, amsgrad=True, fused=True)
        self.schedule = CosineAnnealingLR(self.optimiser, 20)
        options = {"clip": 0.5, "after": self.follow, **options}
        self.step = kind(self.net, self.loss, self.optimiser, **options)

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.net(x)
        loss = self.spoil(F.cross_entropy(scores, labels), self.turn)
        right = (scores.argmax(1) == labels).double().mean()
        return loss, torch.stack([loss.detach().double(), right])

    def follow(self, made: Tensor) -> None:
        weight = (0.25 * made).to(self.average.dtype)
        self.average.lerp_(self.net.linear.weight.detach(), weight)

    def run(self, data: list[tuple[Tensor, Tensor]]) -> "Training":
        for x, labels in data:
            self.step(x, labels)
            self.schedule.step()
        return self

    def state(self) -> dict[str, Tensor]:
        """All that a step may change, but what the step itself takes down."""
        moments = self.optimiser.state_dict()["state"]
        return {
            **{name: value.clone() for name, value in self.net.state_dict().items()},
            **{f"{i}.{name}": v.clone() for i, of in moments.items() for name, v in of.items()},
            "average": self.average.clone(),
        }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_steps_are_those_of_a_plain_loop() -> None:
    training = Training(dtype=torch.float64)
    net, average = copy.deepcopy(training.net), training.average.clone()
    optimiser = Adam(net.parameters(), lr=0.05, eps=1e-4, amsgrad=True, foreach=False)
    schedule = CosineAnnealingLR(optimiser, 20)
    data = [(x.double(), labels) for x, labels in batches()]
    torch.manual_seed(7)
    losses, rights, norms = [], [], []
    for x, labels in data:
        scores = net(x)
        loss = F.cross_entropy(scores, labels)
        optimiser.zero_grad()
        loss.backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for gradient in gradients:
            gradient.mul_(min(1.0, 0.5 / (float(norm) + 1e-6)))
        optimiser.step()
        schedule.step()
        average = 0.75 * average + 0.25 * net.linear.weight.detach()
        losses.append(loss.item())
        rights.append(float((scores.argmax(1) == labels).double().mean()))
        norms.append(float(norm))
    torch.manual_seed(7)
    training.run(data)
    for name, expected in net.state_dict().items():
        torch.testing.assert_close(training.net.state_dict()[name], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(training.average, average, rtol=0, atol=1e-12)
    seen = training.step.look()
    assert seen.steps == STEPS
    assert seen.values == pytest.approx([sum(v) / STEPS for v in (losses, rights)], abs=1e-12)
    assert seen.gradient_norm == pytest.approx(sum(norms) / STEPS, abs=1e-12)
    assert training.step.look().steps == 0
    # As it was, for schedulers and files.
    (group,) = training.optimiser.param_groups
    assert group["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * STEPS / 20)) / 2)
    assert (group["capturable"], hasattr(training.optimiser, "found_inf")) == (False, False)


def waits(loss: Tensor, _: Tensor) -> Tensor:
    return loss if loss.item() < 1e9 else loss * 0


def test_no_step_looks_at_a_value() -> None:
    training = Training()
    with Looking():
        training.run(batches())
    curious = Training(spoil=waits)
    with Looking(), pytest.raises(RuntimeError, match="_local_scalar_dense"):
        curious.run(batches(1))


def if_turn(turn: Tensor, yes: float, no: float) -> Tensor:
    return torch.where(turn, torch.full_like(turn, yes, dtype=torch.float32), no)


def steep(loss: Tensor, turn: Tensor) -> Tensor:
    """The slope of a root at 0 is infinite, its value is not."""
    return loss + (loss - loss.detach() + if_turn(turn, 0, 1)).sqrt()


BAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "NaN": (lambda loss, turn: loss * if_turn(turn, math.nan, 1), "the loss is nan"),
    "infinity": (lambda loss, turn: loss - if_turn(turn, math.inf, 0), "the loss is -inf"),
    "a constant": (lambda loss, turn: loss + if_turn(turn, math.nan, 0), "the loss is nan"),
    "large": (lambda loss, turn: loss * if_turn(turn, 1e4, 1), r"the loss is \d"),
    "gradient": (steep, "the norm of the gradient is (nan|inf)"),
}


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("at", [0, WARM_UP + 1])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(
    how: str, at: int, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = pretend(monkeypatch) if recorded else TrainingStep
    spoil, problem = BAD[how]
    training = Training(kind, spoil, limit=100.0)
    data = batches()
    training.run(data[:at])
    before = training.state()
    training.turn.fill_(True)
    training.run(data[at : at + 1])
    training.turn.fill_(False)
    training.run(data[at + 1 :])  # nor do those that follow, until somebody looks
    after = training.state()
    if at == 0:  # moments are made at the first step
        assert not any(value.any() for name, value in after.items() if name not in before)
        after = {name: after[name] for name in before}
    assert_same(after, before)
    with pytest.raises(NonFiniteStepError, match=f"at step {at}, {problem}") as caught:
        training.step.look()
    assert isinstance(caught.value, mint.NonFiniteError)
    assert caught.value.step == at
    training.run(data[:2])
    assert not torch.equal(training.state()["linear.weight"], before["linear.weight"])
    assert training.step.look().steps == 2


# --- its graph ----------------------------------------------------------------------------------


def test_a_captured_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its learning rates, its dropout, its statistics, and batches of other shapes between."""
    plain = Training()
    captured = Training(pretend(monkeypatch))
    other = batches(2, size=3)
    data = [*batches(), other[0], *batches(2), other[1], *batches(1)]
    states = []
    for training in (plain, captured):
        torch.manual_seed(7)
        training.run(data)
        states.append(training.state())
    assert_same(*states)
    assert plain.step.look() == captured.step.look()
    assert isinstance(captured.step, Recorded)
    assert captured.step.replays == len(data) - WARM_UP - len(other)
    assert captured.step.settled
    # Its inputs are its own: the batches are not written to.
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(batches(), data, strict=False))


def fails(loss: Tensor, _: Tensor) -> Tensor:
    """Nothing in a plain step tells that it cannot be captured."""
    if any(isinstance(mode, Looking) and mode.error for mode in _modes()):
        torch.rand(3)
        raise RuntimeError("operation not permitted when stream is capturing")
    return loss


def _modes() -> list[Any]:
    return list(torch.utils._python_dispatch._get_current_dispatch_mode_stack())


@pytest.mark.parametrize(
    ("spoil", "hook", "why"),
    [
        (waits, False, r"something waits for the device, at .*test_step\.py:\d+"),
        (fails, False, "operation not permitted when stream is capturing"),
        (waits, True, r"something waits for the device"),
        (lambda loss, _: loss, True, "there is a hook on linear, which has to be called"),
    ],
)
def test_what_cannot_be_captured_goes_on(
    spoil: Callable[[Tensor, Tensor], Tensor], hook: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, calls = [], list[None]()
    for kind in (TrainingStep, pretend(monkeypatch)):
        training = Training(kind, spoil)
        if hook:
            training.net.linear.register_forward_hook(lambda *_: calls.append(None))
        torch.manual_seed(7)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            training.run(batches())
        states.append(training.state())
    assert_same(*states)
    assert len(told) == 1  # those of the plain one are those of another block
    text = "the training step is not captured in a CUDA graph, and made one launch after the other"
    assert re.match(f"{text}: {why}", str(told[0].message))
    assert isinstance(training.step, Recorded)
    assert (training.step.replays, training.step.settled) == (0, True)
    assert len(calls) == 2 * STEPS * hook


def test_a_graph_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(pretend(monkeypatch), graph=False).run(batches())
    assert isinstance(training.step, Recorded)
    assert training.step.replays == 0


def test_losses_of_ours_look_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of the input, which look elsewhere."""
    with torch.device("meta"):
        flow = mint.MintNet(1, 8, pairs=1, hidden=4, squeezes=0)
        x, images = torch.empty(2, 1, 8, 8), torch.empty(2, 1, 8, 8, dtype=torch.uint8)
    optimiser = Adam(flow.parameters(), fused=True)
    monkeypatch.setattr(optimiser, "step", lambda: None)

    def log_prob(x: Tensor) -> Tensor:
        return -flow.log_prob(x).mean()

    def bits_per_dim(images: Tensor) -> Tensor:
        return mint.bits_per_dim(flow, images).mean()

    for loss, values in ((log_prob, x), (bits_per_dim, images)):
        with pytest.raises(RuntimeError, match="meta"):
            loss(values)
        TrainingStep(flow, loss, optimiser)(values)


@pytest.mark.parametrize("task", ["density", "classify"])
def test_a_step_off_the_cpu_looks_at_nothing(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With networks of ours, on a device whose tensors have no values at all."""
    model: nn.Module
    objective: Density | Classification
    with torch.device("meta"):
        images = torch.empty(4, 1, 8, 8)
        labels = torch.empty(4, dtype=torch.int64)
        if task == "density":
            model, objective = mint.MintNet(1, 8, pairs=2, hidden=8, squeezes=1), Density(17)
        else:
            model = mint.MintClassifier(1, 8, classes=3, pairs=1, squeezes=0, width=4)
            objective = Classification(17)
    optimiser = Adam(model.parameters(), fused=True)
    monkeypatch.setattr(optimiser, "step", lambda: None)  # torch's own, which knows no such device

    def loss(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        scores = objective.scores(model, *inputs)
        mean = scores.loss.mean()
        return mean, torch.stack([mean.detach(), scores.metric.mean()])

    step = TrainingStep(model, loss, optimiser, clip=1.0)
    step(images, labels)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(NotImplementedError, match="meta"):
        step.look()


# --- what it takes ------------------------------------------------------------------------------


def test_arguments_out_of_range() -> None:
    net = nn.Linear(2, 2)
    other: Any = SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"optimiser must be torch\.optim\.Adam or AdamW, got SGD"):
        TrainingStep(net, lambda x: net(x).sum(), other)
    with pytest.raises(ValueError, match=r"must be made with fused=True.*got fused=None"):
        TrainingStep(net, lambda x: net(x).sum(), Adam(net.parameters()))
    optimiser = AdamW(net.parameters(), fused=True)
    with pytest.raises(ValueError, match=r"clip must be above 0, got 0\.0"):
        TrainingStep(net, lambda x: net(x).sum(), optimiser, clip=0.0)
    much: Any = "much"
    with pytest.raises(TypeError, match="clip must be a number, got 'much'"):
        TrainingStep(net, lambda x: net(x).sum(), optimiser, clip=much)


def test_a_loss_alone_and_several_rates() -> None:
    """As the docstring has it, by AdamW."""
    flow = mint.MintNet(1, 4, pairs=1, hidden=2, squeezes=0)
    names, parameters = zip(*flow.named_parameters(), strict=True)
    assert len(names) > 2
    groups = [
        {"params": parameters[:1], "lr": 0.0, "weight_decay": 0.0},
        {"params": parameters[1:], "lr": 1e-2},
    ]
    before = [p.detach().clone() for p in parameters]

    def loss(x: Tensor) -> Tensor:
        z, log_det = flow(x)
        mean: Tensor = (z.square().flatten(1).sum(1) / 2 - log_det).mean()
        return mean

    step = TrainingStep(flow, loss, AdamW(groups, fused=True))
    x = torch.randn(5, 1, 4, 4)
    first = loss(x).item()
    for _ in range(20):
        step(x)
    seen = step.look()
    assert seen.steps == 20
    assert loss(x).item() < seen.values[0] < first
    moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    assert moved == [False, *[True] * (len(moved) - 1)]


# --- on a GPU -----------------------------------------------------------------------------------

#: of tests; torch warns of its own switches
GPU = (pytest.mark.gpu, pytest.mark.usefixtures("on_gpu"), pytest.mark.filterwarnings("default"))


def with_gpu(test: Any) -> Any:
    for mark in GPU:
        test = mark(test)
    return test


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are made there, and what is drawn is drawn there."""
    monkeypatch.setattr(Net, "__init__", _made_on_gpu(Net.__init__))


def _made_on_gpu(make: Callable[[Any], None]) -> Callable[[Any], None]:
    def init(self: Net) -> None:
        make(self)
        self.cuda()

    return init


@with_gpu
def test_a_graph_on_a_gpu_is_the_step_and_waits_for_nothing() -> None:
    states = []
    for graph in (False, True):
        training = Training(graph=graph)
        torch.manual_seed(7)
        training.run(batches())
        assert (training.step._graph is not None) == graph
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.run(batches(3))
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert training.step.look().steps == STEPS + 3
        states.append(training.state())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)


@with_gpu
@pytest.mark.parametrize("how", ["waits", "synchronises"])
def test_on_a_gpu_what_cannot_be_captured_goes_on(how: str) -> None:
    def synchronises(loss: Tensor, _: Tensor) -> Tensor:
        torch.cuda.synchronize()  # torch does not say that it waits
        return loss

    states = []
    for graph in (False, True):
        training = Training(spoil=waits if how == "waits" else synchronises, graph=graph)
        torch.manual_seed(7)
        if graph:
            with pytest.warns(UserWarning, match="not captured in a CUDA graph"):
                training.run(batches())
        else:
            training.run(batches())
        states.append(training.state())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)


@with_gpu
@pytest.mark.parametrize("how", BAD)
def test_on_a_gpu_a_replayed_step_that_is_not_finite_changes_nothing(how: str) -> None:
    training = Training(spoil=BAD[how][0], limit=100.0).run(batches())
    before = training.state()
    training.turn.fill_(True)
    training.run(batches(2))
    assert_same(training.state(), before)
    with pytest.raises(NonFiniteStepError, match=f"at step {STEPS}, {BAD[how][1]}"):
        training.step.look()

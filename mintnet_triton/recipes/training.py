"""The training loop: one for flows and classifiers, one process or several, begun or resumed.

Given the same data, recipe and model, a run ends with the same weights whether or not it was
interrupted: bit by bit on a CPU (with the same number of threads), and to rounding on a GPU or with
another number of processes.

The host waits for the device where it logs, and nowhere else: whether a step diverged is decided on
the device, after which nothing moves until the host hears of it.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from mintnet_triton.checks import NonFiniteError, check_integer, check_number
from mintnet_triton.invertible import Invertible
from mintnet_triton.kernels.backend import compiling_heard
from mintnet_triton.recipes.batches import (
    Batch,
    evaluation_batches,
    generator,
    training_batches,
)
from mintnet_triton.recipes.data import ImageData, ImageSet
from mintnet_triton.recipes.objectives import Classification, Density, Objective, metric_of
from mintnet_triton.recipes.processes import Processes, resident_memory
from mintnet_triton.recipes.recipe import Recipe
from mintnet_triton.recipes.runs import RunError, RunFolder
from mintnet_triton.recipes.sharding import local
from mintnet_triton.recipes.state import TrainingState
from mintnet_triton.step import NonFiniteStepError, Progress, TrainingStep

#: a loss of so many bits per dimension, or nats, is taken for divergence
DIVERGED = 100.0

#: images that what starts from data sees
START_IMAGES = 256

#: steps from one row of the log to the next, when the host waits; a checkpoint brings one, too
LOG_EVERY = 50


class DivergedError(ArithmeticError):
    """Training met a loss or a gradient that is not finite, or a loss beyond all bounds.

    That step moved nothing that is trained, and no step after it did.
    """


@dataclass(frozen=True)
class TrainingResult:
    """How a call of :func:`train` ended."""

    steps: int  #: trained so far, earlier calls included
    finished: bool  #: False if time or a signal ended it before the recipe's length
    checkpoint: Path  #: of the last step
    #: of all processes, in this call, without the first step, or those until one is captured in a
    #: graph, where there are more; None: no step
    images_per_second: float | None
    peak_memory: float | None  #: MiB of this process: allocated on a GPU, resident on a CPU
    whole_seconds: float | None  #: of the recipe at this rate; None for epochs of a stream, too


def train(
    model: nn.Module,
    data: ImageData,
    objective: Objective,
    recipe: Recipe,
    folder: Path,
    description: Mapping[str, Any],
    *,
    max_minutes: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    resume: bool = False,
    checkpoint_every: int = 500,
    keep: int = 3,
    tensorboard: bool = False,
    sharded: bool = False,
) -> TrainingResult:
    """Train a model in place, with a progress bar, and leave checkpoints and a log in a folder.

    Ends early, with a checkpoint, after ``max_minutes``, or after SIGINT or SIGTERM: the schedule
    then stands where it is, and goes on from there when the run is resumed. Every process of
    ``torch.distributed`` calls this alike; the first one writes.

    Args:
        model: as :mod:`.objectives` has it, on the device to train on.
        data: what to train on; the test split is not looked at.
        objective: what to train for.
        recipe: how. The model's initial values are the caller's.
        folder: of the run.
        description: of JSON's types: what else tells this run from others. It is written to
            ``run.json`` beside recipe, objective and data, and a run is resumed only if all agree.
        max_minutes: for this call; one step is made at least.
        clock: tells the seconds of which those minutes are made, and the log's.
        resume: go on from the last checkpoint in the folder, if there is one.
        checkpoint_every: steps from one checkpoint to the next.
        keep: checkpoints to keep. The best is kept besides: by the loss on the held-out images, or,
            with none, by the mean training loss since the checkpoint before. The loss of a flow
            with a dequantiser is the variational bound, and the log calls it ``bits_bound``.
        tensorboard: also write the log for TensorBoard.
        sharded: divide weights, moments and averages among the processes (FSDP2), instead of
            copying them to each (DDP).

    Raises:
        DivergedError: names the step, at most 50 steps after it, and the last good checkpoint; the
            weights are those before that step.
        RunError: the folder cannot be written to, holds another run, or is being trained in; or
            another process is gone.
        CheckpointError: the checkpoint to go on from is damaged.
        ValueError, TypeError: an argument outside its range; labels that a classifier cannot use.
    """
    checkpoint_every = check_integer("checkpoint_every", checkpoint_every, least=1)
    if max_minutes is not None and not check_number("max_minutes", max_minutes) > 0:
        raise ValueError(f"max_minutes must be above 0, got {max_minutes}")
    loop = _Loop(
        model, data, objective, recipe, RunFolder(folder, keep), description, clock, sharded
    )
    with ExitStack() as stack:
        stack.enter_context(loop.losses_named())
        loop.processes.by_the_first(lambda: stack.enter_context(loop.folder.locked()))
        loop.begin(resume)
        if tensorboard and loop.writes:
            loop.board = stack.enter_context(_board(folder / "tensorboard", loop.state.step))
        interrupted = stack.enter_context(_interruptions())
        deadline = math.inf if max_minutes is None else clock() + 60 * max_minutes

        def must_stop() -> bool:
            return interrupted.is_set() or clock() > deadline

        return loop.run(checkpoint_every, must_stop)


@torch.no_grad()
def start_from_data(
    model: nn.Module, data: ImageData, objective: Objective, recipe: Recipe
) -> None:
    """Start those parameters of a flow that start from data, on images of the first epoch.

    The same in all processes, whatever their number; held-out images take no part.

    Args:
        model: on the device to train on; anything else than a flow stays as it is.
        data, objective, recipe: as :func:`train` takes them.
    """
    if not isinstance(model, Invertible) or not isinstance(objective, Density):
        return
    if not any(stage.starts_from_data for _, stage in model.stages()):
        return  # and no stream is read for nothing
    if recipe.validation:
        data, _ = data.hold_out(recipe.validation)
    samples = [
        data.train.fetch(handle)
        for handle in islice(data.train.order((recipe.seed, 0)), START_IMAGES)
    ]
    images = torch.stack([sample.image for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    rngs = [generator(recipe.seed, "training", 0, sample.index) for sample in samples]
    like = next(model.parameters())
    inputs = objective.inputs(images, rngs).to(like.device)
    context = objective.context(labels.to(like.device), like)
    model.initialise(objective.logits(inputs, like)[0], context)


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        objective: Objective,
        recipe: Recipe,
        folder: RunFolder,
        description: Mapping[str, Any],
        clock: Callable[[], float],
        sharded: bool,
    ) -> None:
        self.clock, self.sharded = clock, sharded
        self.held_out: ImageSet | None = None
        if isinstance(objective, Classification) or objective.classes is not None:
            data.check_labels()
        if recipe.validation:
            data, self.held_out = data.hold_out(recipe.validation)
        self.data, self.objective, self.recipe, self.folder = data, objective, recipe, folder
        self.metric = metric_of(objective, model)
        self.description = {
            **description,
            "objective": {"task": objective.task, **_said(objective)},
            "data": {"name": data.name, "training_images": data.train.count()},
            # A graph is how steps are made, and not what they do.
            "recipe": {k: v for k, v in asdict(recipe).items() if k != "graph"},
        }
        self.processes = Processes.current()
        if sharded and self.processes.count == 1:
            raise ValueError("sharded must be false where there is one process: start torchrun")
        if sharded and recipe.validation % self.processes.count:
            # Whatever runs a sharded model has to run it in all processes equally often.
            raise ValueError(
                f"validation must divide by the {self.processes.count} processes of a sharded "
                f"run, got {recipe.validation}"
            )
        self.writes = self.processes.first
        self.board: Any = None
        parameters = list(model.parameters())
        self.device = parameters[0].device
        if recipe.recompute:
            _recompute(model)
        self.state = TrainingState.start(model, recipe, sharded)
        self.parallel = model
        if self.processes.count > 1 and not sharded:
            self.parallel = nn.parallel.DistributedDataParallel(model)
        self.update = TrainingStep(
            model,
            self._loss,
            self.state.optimiser,
            clip=recipe.clip,
            after=self._update_average,
            limit=DIVERGED,
            graph=recipe.graph,
        )
        # Weights, three moments of Adam with AMSGrad, and the moving average.
        numbers = 4 + (recipe.average is not None)
        self.checkpoint_bytes = numbers * sum(p.numel() * p.element_size() for p in parameters)

    def begin(self, resume: bool) -> None:
        """Take up the last checkpoint, or make the first."""
        if self.processes.by_the_first(lambda: resume and bool(self.folder.checkpoints())):
            self.folder.check_same(self.description)
            state = self.folder.load()
            with self.folder.fitting():
                self.state.load_state_dict(state)
            self.processes.by_the_first(lambda: self.folder.cut_log(self.state.step))
        else:
            self.processes.by_the_first(
                lambda: self.folder.start(self.description, self.checkpoint_bytes)
            )
            self._save(best=False)

    def _save(self, best: bool) -> None:
        content = self.state.state_dict(keep=self.writes)
        self.processes.by_the_first(lambda: self.folder.save(content, best))

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        """Say it when a process waits in vain for another one.

        Raises:
            RunError: names the checkpoint to go on from.
        """
        try:
            yield
        except RuntimeError as error:
            # Gloo has no type of its own for this.
            lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
            if self.processes.count == 1 or isinstance(error, RunError) or not lost:
                raise
            raise RunError(
                f"process {self.processes.rank} lost another one at step {self.state.step}: "
                f"{str(error).splitlines()[0]} The last good checkpoint is "
                f"{self._last_checkpoint()}: --resume goes on from there, with any number of "
                "processes that the batch divides by"
            ) from error

    def run(self, checkpoint_every: int, must_stop: Callable[[], bool]) -> TrainingResult:
        state, recipe = self.state, self.recipe
        self.began_at = state.step
        began = self.clock() - state.seconds
        start, warm = (state.step, state.seconds), None
        logged, rates = state.seconds, list[float]()  # since the last row of the log
        losses = list[float]()  # since the last checkpoint
        checkpoint = self._last_checkpoint()
        self.parallel.train()
        with (
            self._progress() as bar,
            compiling_heard(lambda: bar.set_description("compiling kernels, once")),
        ):
            for batch in self._batches():
                if state.finished(recipe):
                    break
                rates.append(float(state.schedule.get_last_lr()[0]))
                stop = self._step(batch, must_stop())
                bar.set_description("training", refresh=False)
                bar.update(recipe.batch_size)
                due = state.step % checkpoint_every == 0 or stop or state.finished(recipe)
                done = self._look() if due or state.step % LOG_EVERY == 0 else None
                state.seconds = self.clock() - began
                if warm is None or not self.update.settled:
                    warm = (state.step, state.seconds)
                if done is not None:
                    metric, (loss, mean) = self.metric, done.values
                    bar.set_postfix({metric: f"{mean:.3f}"}, refresh=False)
                    images = done.steps * recipe.batch_size
                    self._log(
                        {
                            "step": state.step,
                            "epoch": state.epoch,
                            "seconds": state.seconds,
                            "images_per_second": images / (state.seconds - logged),
                            "loss": loss,
                            metric: mean,
                            "gradient_norm": done.gradient_norm,
                            "learning_rate": sum(rates) / len(rates),
                        }
                    )
                    losses += [loss] * done.steps
                    logged, rates = state.seconds, []
                if due:
                    checkpoint = self._checkpoint(sum(losses) / len(losses))
                    losses = []
                if stop:
                    break
        step, seconds = start if warm is None or state.step == warm[0] else warm
        rate = all_seconds = None
        if state.step > step:
            rate = recipe.batch_size * (state.step - step) / (state.seconds - seconds)
            steps = self._all_steps()
            all_seconds = None if steps is None else steps * recipe.batch_size / rate
        peak = _peak_memory(self.device)
        return TrainingResult(
            state.step, state.finished(recipe), checkpoint, rate, peak, all_seconds
        )

    def _batches(self) -> Iterator[Batch]:
        return training_batches(
            self.data.train,
            self.recipe.batch_size,
            self.recipe.seed,
            self.state.epoch,
            self.state.image,
            flip=self.recipe.flip,
            crop=self.recipe.crop,
            replaced=self.recipe.replaced,
            levels=self.data.levels,
            rank=self.processes.rank,
            processes=self.processes.count,
        )

    def _step(self, batch: Batch, must_stop: bool) -> bool:
        """One update; whether any process has to stop."""
        state = self.state
        inputs = self.objective.inputs(batch.images, batch.generators)
        try:
            self.update(inputs, batch.labels)
        except NonFiniteError as error:  # a forward pass looks, on a CPU
            self._look()  # for what was wrong before
            raise self._diverged(str(error)) from error
        state.step += 1
        state.epoch, state.image = batch.next_epoch, batch.next_image
        if batch.ends_epoch or self.recipe.steps is not None:
            state.schedule.step()
        return self.processes.any(must_stop)

    def _loss(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """This process's loss, and the means of loss and metric over all processes."""
        scores, problem = None, ""
        try:
            # A graph would keep what autocast caches.
            with torch.autocast(
                self.device.type,
                dtype=torch.bfloat16,
                enabled=self.recipe.autocast,
                cache_enabled=False,
            ):
                scores = self.objective.scores(self.parallel, inputs, labels)
        except NonFiniteError as error:
            if self.sharded:  # the other processes wait for this one's part of the next layer
                raise
            problem = str(error)
        # Before the backward pass, in which each process needs all others.
        if self.processes.any(scores is None) or scores is None:
            raise NonFiniteError(problem or "another process met values that are not finite")
        loss = scores.loss.mean()
        means = torch.stack([loss.detach(), scores.metric.mean()]).double()
        return loss, self.processes.total(means) / self.processes.count

    @torch.no_grad()
    def _update_average(self, made: Tensor) -> None:
        """The moving average after a step, if it was made; after the first, it is the weights."""
        average, model = self.state.average, self.state.model
        if average is None:
            return
        assert self.recipe.average is not None
        first = (average.n_averaged == 0).double()
        weight = (first + (1 - first) * (1 - self.recipe.average)) * made
        weights = {p.dtype: weight.to(p.dtype) for p in model.parameters()}
        for ours, new in zip(average.module.parameters(), model.parameters(), strict=True):
            local(ours).lerp_(local(new), weights[new.dtype])
        for buffer, source in zip(average.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(source)
        average.n_averaged += made

    def _look(self) -> Progress:
        """What the steps since the last look have brought; the device is waited for.

        Raises:
            DivergedError: one of them diverged.
        """
        try:
            return self.update.look()
        except NonFiniteStepError as error:
            raise self._diverged(error.problem, self.began_at + error.step) from error

    def _diverged(self, problem: str, step: int | None = None) -> DivergedError:
        left = self._last_checkpoint()
        best = f"; the best is {self.folder.best}" if self.folder.best.is_file() else ""
        return DivergedError(
            f"training diverged at step {self.state.step if step is None else step}: {problem}. "
            f"The last good checkpoint is {left}{best}. Try a learning rate below "
            f"{self.recipe.learning_rate}, or clip."
        )

    def _checkpoint(self, training_loss: float) -> Path:
        state = self.state
        if not state.finite():
            raise self._diverged("a weight is not finite")
        score = training_loss
        if self.held_out is not None:
            try:
                score, metric = self._validate(self.held_out)
            except NonFiniteError as error:
                raise self._diverged(f"on held-out images, {error}") from error
            if not math.isfinite(score):
                raise self._diverged(f"the loss on held-out images is {score}")
            self._log(
                {
                    "step": state.step,
                    "validation_loss": score,
                    f"validation_{self.metric}": metric,
                }
            )
        best = score < state.best
        state.best = min(score, state.best)
        self._save(best)
        return self._last_checkpoint()

    @torch.no_grad()
    def _validate(self, held_out: ImageSet) -> tuple[float, float]:
        """Mean loss and metric on the held-out images, one draw of the noise."""
        model = self.state.evaluated()
        training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for images, labels, indices in evaluation_batches(
            held_out, 256, rank=self.processes.rank, processes=self.processes.count
        ):
            rngs = [generator(self.recipe.seed, "evaluation", 0, index) for index in indices]
            inputs = self.objective.inputs(images, rngs).to(self.device)
            scores = self.objective.scores(model, inputs, labels.to(self.device))
            sums += torch.stack(
                [scores.loss.sum(), scores.metric.sum(), sums.new_tensor(len(images))]
            )
        model.train(training)
        loss, metric, count = self.processes.total(sums).tolist()
        return loss / count, metric / count

    def _log(self, row: Mapping[str, Any]) -> None:
        if self.writes:
            self.folder.log(row)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    def _last_checkpoint(self) -> Path:
        checkpoints = self.folder.checkpoints()
        return checkpoints[-1] if checkpoints else self.folder.path

    def _all_steps(self) -> int | None:
        """The recipe's length; None for epochs of a stream."""
        images, epochs = self.data.train.count(), self.recipe.epochs
        if epochs is None:
            return self.recipe.steps
        return None if images is None else epochs * (images // self.recipe.batch_size)

    def _progress(self) -> Any:
        """A bar that counts images."""
        steps, batch = self._all_steps(), self.recipe.batch_size
        return tqdm(
            total=None if steps is None else steps * batch,
            initial=self.state.step * batch,
            desc="training",
            unit="image",
            unit_scale=True,
            mininterval=0.5,
            disable=not self.writes,
        )


def _said(objective: Objective) -> dict[str, Any]:
    """What there is to say of an objective; nothing of classes where there are none."""
    return {name: value for name, value in asdict(objective).items() if value is not None}


def _peak_memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_memory("VmHWM")


def _recompute(model: nn.Module) -> None:
    able = [module for module in model.modules() if hasattr(module, "recompute")]
    if not able:
        raise ValueError(f"recompute must be false: no part of {type(model).__name__} knows it")
    for module in able:
        module.recompute = True  # type: ignore[assignment]


@contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """An event that is set by SIGINT or SIGTERM, so that a step is never torn."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: event.set()) for number in signals]
    try:
        yield event
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


@contextmanager
def _board(folder: Path, step: int) -> Iterator[Any]:
    """A writer for TensorBoard that forgets what came after the step."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step + 1) as writer:
        yield writer

"""A training step that waits for nothing on the device, replayed as a CUDA graph where it can be.

Whether a step is finite is decided on the device, which leaves all as it was before one that is
not. The host looks when it likes, and is told then. So nothing stands between the launches of one
step and those of the next, and on a GPU they become one: the step is captured after a few.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Adam

from mintnet_triton.checks import NonFiniteError, check_number, unread

#: steps that are made one launch after the other before one is captured
WARM_UP = 3


class NonFiniteStepError(NonFiniteError):
    """A step met a loss or a gradient that is not finite, and changed nothing.

    Args:
        step: its number; the first step is 0.
        problem: what was not finite.
    """

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(f"at step {step}, {problem}")
        self.step, self.problem = step, problem


class Progress(NamedTuple):
    """What the steps since the last look have brought."""

    steps: int  #: how many
    values: list[float]  #: means of what the loss function reports; none where there was no step
    gradient_norm: float  #: mean of the norms of the gradients, before clipping


class TrainingStep:
    """One update of a model by Adam, which never makes the host wait for the device.

    On a GPU, the first steps are made as anywhere; then one is captured in a CUDA graph, which is
    replayed from there on. Learning rates are read at every step. All other values that are not
    tensors stay what they were when it was captured, and so do the tensors: after loading a state
    into the optimiser, or replacing a parameter or a buffer, make a new one of these. Python code
    of the model and of the loss is not run again, hooks for one.

    Where a step cannot be captured, a warning says why, and steps go on one launch after the other,
    with the same results: with several processes, with hooks on the model, or where something waits
    for the device. A batch of another shape than the first one is never replayed. Input checks of
    this library that would look at values on a GPU are left out.

    Randomness on a GPU has to come from torch's default generator, which graphs know of.

    A step whose loss, or norm of the gradient, is not finite changes nothing: neither parameters,
    buffers that are saved, nor the state of the optimiser. From there on nothing moves until
    :meth:`look` has told.

    Args:
        model: whose parameters the optimiser has.
        loss: of the inputs of a step: what is minimised, a tensor (), or a pair of it and of a
            tensor (k,) of what is to be reported and judged, without gradients and the loss first.
        optimiser: ``torch.optim.Adam`` or ``AdamW`` with ``fused=True``, which can be told on the
            device to leave all as it is; a scheduler may change its learning rate.
        clip: the largest norm of the gradient; None: any.
        after: is called at the end of every step with whether it was made, a bool tensor (), for
            what follows the parameters: it has to change nothing where that is False.
        limit: a loss above it is taken for one that is not finite.
        graph: whether to capture.

    Raises:
        TypeError: optimiser is no Adam, or clip no number.
        ValueError: optimiser is not fused, or clip not above 0.

    Example::

        def loss(images):
            return mint.bits_per_dim(flow, images).mean()

        optimiser = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)
        step = mint.TrainingStep(flow, loss, optimiser)
        for number, images in enumerate(batches, start=1):
            step(images)  # on the CPU or on the device of the flow
            if number % 50 == 0:
                print(step.look().values)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor | tuple[Tensor, Tensor]],
        optimiser: Adam,
        *,
        clip: float | None = None,
        after: Callable[[Tensor], None] | None = None,
        limit: float = math.inf,
        graph: bool = True,
    ) -> None:
        if not isinstance(optimiser, Adam):
            raise TypeError(
                f"optimiser must be torch.optim.Adam or AdamW, got {type(optimiser).__name__}"
            )
        if not all(group["fused"] for group in optimiser.param_groups):
            raise ValueError(
                "optimiser must be made with fused=True, or it could not be kept from a step on "
                f"the device, got fused={optimiser.defaults['fused']}"
            )
        if clip is not None and not check_number("clip", clip) > 0:
            raise ValueError(f"clip must be above 0, got {clip}")
        self.model, self.loss, self.optimiser = model, loss, optimiser
        self.clip, self.after, self.limit = clip, after, limit
        self._parameters = [p for group in optimiser.param_groups for p in group["params"]]
        kept = model.state_dict()
        self._buffers = [buffer for name, buffer in model.named_buffers() if name in kept]
        self.device = self._parameters[0].device
        self._on_gpu = self.device.type == "cuda"
        # The kernels on a GPU read float32; on a CPU, nothing is to be lost.
        dtype = torch.float32 if self._on_gpu else torch.float64
        self._rates = [
            torch.zeros((), dtype=dtype, device=self.device) for _ in optimiser.param_groups
        ]
        self._count, self._first_bad = self._numbers(0.0), self._numbers(-1.0)
        # Until it is known how much is reported.
        self._at_bad = self._sums = torch.empty(0, dtype=torch.float64, device=self.device)
        self._steps = 0  # since the last look
        self.capturing = graph and self._on_gpu  #: whether a step is, or will be, captured
        self._inputs: tuple[Tensor, ...] | None = None
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(self.device) if self.capturing else None
        if self.capturing and _processes() > 1:
            self._give_up("several processes share it")

    @property
    def settled(self) -> bool:
        """Whether all further steps are made as the last one was."""
        return not self.capturing or self._graph is not None

    def __call__(self, *inputs: Tensor) -> None:
        """Make a step, or have it made: nothing is waited for.

        Args:
            inputs: what the loss function takes; to a GPU they are brought.
        """
        for rate, group in zip(self._rates, self.optimiser.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self._on_gpu:
            self._run(inputs)
        else:
            self._make(inputs)
        self._steps += 1

    def look(self) -> Progress:
        """What the steps since the last look have brought; waits for them.

        Raises:
            NonFiniteStepError: one of them was not finite. Further steps move the model again.
        """
        steps, self._steps = self._steps, 0
        # All in one, for it is a copy that is waited for.
        bad, *facts = torch.cat([self._first_bad.view(1), self._at_bad, self._sums]).tolist()
        self._sums.zero_()
        at_bad, sums = facts[: len(self._at_bad)], facts[len(self._at_bad) :]
        if bad >= 0:
            self._first_bad.fill_(-1.0)
            loss, norm = at_bad[0], at_bad[-1]
            fine = math.isfinite(loss) and loss <= self.limit
            problem = f"the norm of the gradient is {norm}" if fine else f"the loss is {loss}"
            raise NonFiniteStepError(int(bad), problem)
        *values, norm = [total / steps for total in sums] if steps else [math.nan]
        return Progress(steps, values, norm)

    # --- a step -----------------------------------------------------------------------------------

    def _make(self, inputs: tuple[Tensor, ...], captured: bool = False) -> None:
        """Forwards, backwards, and the update, unless it is not to be made."""
        self.optimiser.zero_grad()  # gradients are None, so that a graph writes them, and adds not
        before = [buffer.clone() for buffer in self._buffers]
        with unread():  # what is not finite is found below
            result = self.loss(*inputs)
        loss, values = result if isinstance(result, tuple) else (result, result.detach().view(1))
        loss.backward()
        with torch.no_grad():
            total = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            if self.clip is not None:
                clip_grads_with_norm_(self._parameters, self.clip, total)
            # That of shards is known to each process in part.
            norm = total.full_tensor() if hasattr(total, "full_tensor") else total
            made = self._judge(torch.cat([values.double(), norm.double().view(1)]))
            with self._told(made, captured):
                self.optimiser.step()
            for buffer, old in zip(self._buffers, before, strict=True):
                buffer.copy_(torch.where(made, buffer, old))
            if self.after is not None:
                self.after(made)

    def _judge(self, seen: Tensor) -> Tensor:
        """Take down what is seen of a step; whether the update is to be made, a bool tensor ()."""
        if self._sums.numel() == 0:
            self._at_bad, self._sums = torch.zeros_like(seen), torch.zeros_like(seen)
        fine = seen[0].isfinite() & (seen[0] <= self.limit) & seen[-1].isfinite()
        so_far = self._first_bad < 0
        first = so_far & ~fine
        self._first_bad.copy_(torch.where(first, self._count, self._first_bad))
        self._at_bad.copy_(torch.where(first, seen, self._at_bad))
        self._sums += seen
        self._count += 1
        return so_far & fine

    @contextmanager
    def _told(self, made: Tensor, captured: bool) -> Iterator[None]:
        """The optimiser, told on the device how fast to learn, and whether to.

        The latter in the way of ``torch.amp.GradScaler``, the former for one step only, so that
        schedulers and checkpoints see plain numbers.
        """
        groups = self.optimiser.param_groups
        plain = [{name: group[name] for name in ("lr", "capturable")} for group in groups]
        told: Any = self.optimiser
        told.grad_scale, told.found_inf = None, (~made).float()
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=captured)
        try:
            yield
        finally:
            del told.grad_scale, told.found_inf
            for group, values in zip(groups, plain, strict=True):
                group.update(values)

    # --- its graph --------------------------------------------------------------------------------

    def _run(self, inputs: tuple[Tensor, ...]) -> None:
        """A step on a GPU, in whatever way it is its turn."""
        with torch.cuda.device(self.device):
            inputs = self._brought(inputs)
            if not self.capturing or inputs is not self._inputs:
                self._make(inputs)
            elif self._graph is not None:
                self._graph.replay()
            elif self._warm < WARM_UP:
                self._warm_up()
            else:
                self._capture()

    @torch.no_grad()
    def _brought(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs on the device: those that a graph reads, if they are of that shape."""
        # From pinned memory, or the copy would wait for the device.
        pinned = [x.pin_memory() if x.device.type == "cpu" else x for x in inputs]
        if self._inputs is None:
            self._inputs = tuple(torch.empty_like(x, device=self.device) for x in inputs)
        ours, theirs = ([(x.shape, x.dtype) for x in group] for group in (self._inputs, inputs))
        if ours != theirs:
            return tuple(x.to(self.device, non_blocking=True) for x in pinned)
        for place, x in zip(self._inputs, pinned, strict=True):
            place.copy_(x, non_blocking=True)
        return self._inputs

    def _warm_up(self) -> None:
        """A step where one will be captured, and a look at whether it waits for the device."""
        assert self._inputs is not None
        assert self._stream is not None
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), _waiting() as waits:
            self._make(self._inputs)
        here.wait_stream(self._stream)
        self._warm += 1
        if waits and self._warm > 1:  # the first step compiles
            self._give_up(f"something waits for the device, at {waits[0]}")

    def _capture(self) -> None:
        """Capture a step and make it."""
        assert self._inputs is not None
        hooked = _hooked(self.model)
        if hooked is not None:
            self._give_up(f"there is a hook on {hooked}, which has to be called at every step")
            self._make(self._inputs)
            return
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.device.index]
        unharmed = generator.clone_state()
        try:
            # A capture that fails leaves its stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, stream=self._stream),
            ):
                self._make(self._inputs, captured=True)
        except RuntimeError as error:
            generator.graphsafe_set_state(unharmed)  # nor does its generator know that it has ended
            self._give_up(str(error.__context__ or error))
            self._make(self._inputs)
        else:
            self._graph = graph
            graph.replay()

    def _give_up(self, why: str) -> None:
        self.capturing = False
        if not (_processes() > 1 and distributed.get_rank() > 0):
            warnings.warn(
                f"the training step is not captured in a CUDA graph, and made one launch after the "
                f"other: {why}",
                stacklevel=2,
            )

    def _numbers(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)


def _processes() -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def _hooked(model: nn.Module) -> str | None:
    """The name of a module or parameter with a hook, if there is one."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        if any(getattr(module, kind) for kind in kinds):
            return name or type(module).__name__
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return name
    return None


@contextmanager
def _waiting() -> Iterator[list[str]]:
    """Where the host waits for the device in the block, as far as torch notices."""
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in told:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            places.append(f"{warning.filename}:{warning.lineno}")
        elif "Synchronization debug mode" not in text:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )

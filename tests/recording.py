"""CUDA graphs on a CPU, for tests: operators are recorded, and called again on the same tensors.

As on a GPU, what is recorded is not done before it is replayed; it reads and writes the very memory
that it did, with the very numbers that are no tensors; Python is not run again; and whoever wants
to know a value is refused while it is recorded.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mintnet_triton.step import TrainingStep

aten = torch.ops.aten

#: operators by which the host gets to know a value
LOOKS = (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero)


class Looking(TorchDispatchMode):
    """In the block, whoever wants to know a value is told off: by an error, or by a warning."""

    def __init__(self, error: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as torch leaves it
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in LOOKS:
            if self.error:
                raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
            warnings.warn("called a synchronizing CUDA operation", stacklevel=4)
        return func(*args, **(kwargs or {}))


class Graph(Looking):
    """A CUDA graph, as far as there is one on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                memory = x.untyped_storage()
                if memory.data_ptr() not in self.before:
                    self.before[memory.data_ptr()] = (memory, memory.clone())
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @contextmanager
    def capture(self) -> Iterator[None]:
        drawn = torch.get_rng_state()
        try:
            with self:
                yield
            torch.set_rng_state(drawn)  # which a capture that fails leaves in disorder
        finally:
            for memory, old in self.before.values():
                memory.copy_(old)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for place, value in zip(tree_leaves(result), again, strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Recorded(TrainingStep):
    """A step that takes the CPU for a GPU."""

    made: "list[Recorded]"

    def __init__(self, *arguments: Any, graph: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._on_gpu, self.capturing, self._stream = True, graph, torch.cuda.Stream()
        Recorded.made.append(self)

    @property
    def replays(self) -> int:
        return self._graph.replays if isinstance(self._graph, Graph) else 0


def pretend(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """Let ``torch.cuda`` record on the CPU; a class of steps that use it, which lists all made."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    modes: list[Looking] = []

    def set_mode(mode: int | str) -> None:
        while modes:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as torch leaves it
        if mode == "warn":
            modes.append(Looking(error=False))
            modes[-1].__enter__()  # type: ignore[no-untyped-call]  # as torch leaves it

    generator = SimpleNamespace(
        clone_state=torch.get_rng_state, graphsafe_set_state=torch.set_rng_state
    )
    for name, value in {
        "Stream": lambda *_: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": set_mode,
        "default_generators": {None: generator},
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: graph.capture(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    return Recorded

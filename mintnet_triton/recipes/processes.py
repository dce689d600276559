"""The processes that train together: joining and leaving them, and what they tell each other."""

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from mintnet_triton.recipes.runs import RunError


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """The device of this process, joined with the others if ``torchrun`` started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device(device)
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    # What the processes themselves tell each other, they tell without their GPUs.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield place
    except BaseException as error:
        _forget_frames(error)
        raise
    finally:
        distributed.destroy_process_group()


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, a ``DistributedDataParallel`` above all.

    If it is that which takes the process group down, it does so holding the interpreter's lock, for
    which the group's threads may be waiting: the process would never end.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def leave(code: int) -> NoReturn:
    """End this process; one of several ends without taking the interpreter down.

    The mesh of a sharded model stays in caches of torch, and with it gloo's threads. One that still
    has to let go of a tensor, for which it needs the interpreter, would abort the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together, as ``torch.distributed`` has it."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process; no GPU is waited for."""
        return flag if self.count == 1 else self.total(torch.tensor(int(flag))).item() > 0

    def by_the_first(self, act: Callable[[], Any]) -> Any:
        """Let the first process act on a folder; all return what it found, or stop where it does.

        Args:
            act: returns what can be pickled.

        Raises:
            RunError: the first process's, in all of them.
        """
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [act()]
            except RunError as error:
                outcome = [error]
        if self.count > 1:
            distributed.broadcast_object_list(outcome)
        if isinstance(outcome[0], RunError):
            raise outcome[0]
        return outcome[0]


def resident_memory(name: str) -> float | None:
    """MiB of this process in pages: "VmRSS" now, "VmHWM" at most; None where nobody tells."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return kib[0] / 2**10 if kib else None

"""The folder of a run: what is trained, checkpoints that survive anything, and the log.

- ``run.json``: the description, by which a run is resumed and evaluated.
- ``checkpoint-<step>.pt``: the last few; ``best.pt``: a copy of the best so far.
- ``log.jsonl``: one row every so many steps.
- ``lock``: held while a process trains in the folder.

A file appears whole or not at all: it is written under another name, forced to the disk, and
renamed. So whenever a run ends, and however, what was there before is still there.
"""

import fcntl
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mintnet_triton.checkpoint import CheckpointError
from mintnet_triton.checks import check_integer


class RunError(RuntimeError):
    """A folder holds another run than the one asked for, or none, or cannot be written to."""


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there whole, and on the disk, once this returns.

    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # a full disk needs the room
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming, too
    finally:
        os.close(folder)


class RunFolder:
    """Reads and writes a run.

    Args:
        path: of the folder.
        keep: checkpoints to keep besides the best.
    """

    def __init__(self, path: Path, keep: int = 3) -> None:
        self.path, self.keep = path, check_integer("keep", keep, least=1)
        self.best = path / "best.pt"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes from training in it.

        However this process ends, the lock ends with it.

        Raises:
            RunError: another process trains in it, or it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("w")
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process trains in {self.path}: wait, or stop it"
                ) from error
            except OSError as error:  # some file systems of clusters have no locks
                warnings.warn(f"{self.path} cannot be locked: {error}", stacklevel=2)
            yield

    def start(self, description: Mapping[str, Any], checkpoint_bytes: int) -> None:
        """Begin a new run in the folder, and see that there is room.

        Args:
            description: what is trained, of JSON's types.
            checkpoint_bytes: size of a checkpoint, about.

        Raises:
            RunError: there is a run in it, it cannot be written to, or the disk is too full.
        """
        if self.checkpoints():
            raise RunError(
                f"{self.path} holds a run at step {self._step(self.checkpoints()[-1])}: give "
                "--resume to go on with it, or another --out"
            )
        try:
            write_atomically(
                self.path / "run.json", (json.dumps(description, indent=2) + "\n").encode()
            )
            write_atomically(self.path / "log.jsonl", b"")
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error}") from error
        needed = (self.keep + 2) * checkpoint_bytes  # one more is written before one is removed
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunError(
                f"the disk of {self.path} has {free / 2**20:.0f} MiB free, and {self.keep} "
                f"checkpoints and the best need {needed / 2**20:.0f} MiB"
            )

    def description(self) -> dict[str, Any]:
        """What :meth:`start` was given.

        Raises:
            RunError: the folder holds no run, or its description is damaged.
        """
        path = self.path / "run.json"
        if not path.is_file():
            raise RunError(f"{self.path} holds no run: there is no {path.name}")
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}") from error
        if not isinstance(description, dict) or not description:
            raise RunError(f"{path} does not describe a run")
        return description

    def check_same(self, description: Mapping[str, Any]) -> None:
        """See that a run to be resumed is the one that is asked for.

        Raises:
            RunError: it is not; names what differs.
        """
        theirs = _flat(self.description())
        ours = _flat(json.loads(json.dumps(description)))
        differences = [
            f"{name} is {theirs.get(name)!r} in the run, {ours.get(name)!r} is asked for"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
        if differences:
            raise RunError(
                f"cannot resume {self.path}, for it is another run: {'; '.join(differences)}. "
                "Resume it with the arguments that it was started with, or give another --out."
            )

    def checkpoints(self) -> list[Path]:
        """Paths of the checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoint-*.pt"))

    def save(self, state: Mapping[str, Any], best: bool) -> Path:
        """Write a checkpoint, and remove the oldest beyond those to keep.

        Args:
            state: what ``torch.save`` takes, with the number of the "step".
            best: whether to keep it as the best so far.

        Raises:
            RunError: it cannot be written; names the checkpoint that is left.
        """
        path = self.path / f"checkpoint-{state['step']:09d}.pt"
        buffer = io.BytesIO()  # torch's own writer reports a full disk in too many ways
        torch.save(dict(state), buffer)
        try:
            # The best goes first: a run that dies in between comes by here again.
            if best:
                write_atomically(self.best, buffer.getbuffer())
            write_atomically(path, buffer.getbuffer())
            for old in self.checkpoints()[: -self.keep]:
                old.unlink()
        except OSError as error:
            left = self.checkpoints()
            raise RunError(
                f"cannot write {path}: {error}. "
                + (f"{left[-1]} is whole: make room, and --resume" if left else "There is no other")
            ) from error
        return path

    def load(self, which: str = "last") -> dict[str, Any]:
        """A checkpoint, on the CPU; :meth:`path_of` tells which file.

        Args:
            which: "last", "best", or the name of a checkpoint in the folder.

        Raises:
            RunError: there is none.
            CheckpointError: it is damaged, or no checkpoint of a run.
        """
        path = self.path_of(which)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what damaged bytes make the reader raise has no common type
            raise CheckpointError(
                f"{path}: not a whole checkpoint ({type(error).__name__}); remove it to resume "
                "from the one before"
            ) from error
        if not isinstance(state, dict) or not {"step", "model"} <= state.keys():
            raise CheckpointError(f"{path}: not a checkpoint of a run")
        return state

    def path_of(self, which: str) -> Path:
        """Where the checkpoint is that :meth:`load` reads.

        Raises:
            RunError: there is none.
        """
        checkpoints = self.checkpoints()
        path = checkpoints[-1] if which == "last" and checkpoints else self.path / which
        path = self.best if which == "best" else path
        if not path.is_file():
            raise RunError(
                f"{self.path} has no checkpoint {which!r}, only "
                f"{[checkpoint.name for checkpoint in checkpoints]}"
            )
        return path

    @contextmanager
    def fitting(self, which: str = "last") -> Iterator[None]:
        """Within the block, a checkpoint is put into what it was made for.

        Raises:
            CheckpointError: something is missing in it, or does not fit.
        """
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path_of(which)}: does not fit the run: {error!r}"
            ) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row, with the number of the "step".

        Raises:
            RunError: it cannot be written.
        """
        try:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write to the log in {self.path}: {error}") from error

    def rows(self) -> list[dict[str, Any]]:
        """The log; a row that was cut off as it was written is left out."""
        path = self.path / "log.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def cut_log(self, step: int) -> None:
        """Forget the rows after a step, which will come again.

        Raises:
            RunError: it cannot be written.
        """
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        try:
            write_atomically(self.path / "log.jsonl", "".join(kept).encode())
        except OSError as error:
            raise RunError(f"cannot write to the log in {self.path}: {error}") from error

    @staticmethod
    def _step(checkpoint: Path) -> int:
        return int(checkpoint.stem.removeprefix("checkpoint-"))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat

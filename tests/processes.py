"""Modules run as ``python -m`` would, in processes forked from one that has imported them already.

Python and torch take seconds to start. So one process, which has a single thread, imports what
such modules need, and every other one is a copy of it.
"""

import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest.mock import patch

#: seconds after which a process hangs, however busy the machine is
PATIENCE = 600

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.tiny_run",
        "mintnet_triton.recipes.commands",
        "mintnet_triton.kernels.cpu.mint_layer",
        "sklearn.datasets",
        "sklearn.model_selection",
    ]
)


class Process:
    """One that has been started; what it prints goes to files.

    Args:
        module: what ``python -m`` would run.
        arguments: of its command line.
        environment: variables that it has beside those of this process.
        folder: for the files, an empty one.
    """

    def __init__(
        self, module: str, arguments: list[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.files = (folder / "printed", folder / "errors")
        for file in self.files:
            file.touch()
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):
            forkserver.ensure_running()
        started = {**os.environ, **environment}
        self.process = FORKS.Process(target=_run, args=(module, arguments, started, self.files))
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end: the exit code, or minus the signal, what it printed, its errors."""
        self.process.join(PATIENCE)
        code = self.process.exitcode
        printed, errors = (file.read_text(encoding="utf-8") for file in self.files)
        assert code is not None, f"it hangs:\n{printed}\n{errors}"
        return code, printed, errors

    def kill(self) -> int:
        """By SIGKILL, if it runs; returns the exit code, or minus the signal."""
        self.process.kill()
        return self.finish()[0]


def _run(
    module: str, arguments: list[str], environment: Mapping[str, str], files: tuple[Path, Path]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        stream.flush()
        os.dup2(os.open(file, os.O_WRONLY), stream.fileno())
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

"""Work shared among torch's own threads on a CPU.

Threads of our own would have to compete with torch's, which wait actively for some milliseconds
after every operation. They are OpenMP's, so OpenMP is asked for them, in the library that torch
itself has loaded; where that cannot be had, or in a process that was forked, there are threads of
our own.
"""

import ctypes
import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Part = TypeVar("Part")

_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _openmp() -> Callable[..., None] | None:
    """``GOMP_parallel(member, data, threads, flags)`` of the OpenMP that torch runs with."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda member, threads: parallel(_MEMBER(member), None, threads, 0)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mintnet-triton")


_forked = False


def _after_fork() -> None:
    """Threads do not survive a fork, and OpenMP waits for its own forever."""
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def share(parts: Iterable[Part], work: Callable[[Part], None]) -> None:
    """Do the work for every part, in as many threads as torch may use; errors are raised here."""
    parts = list(parts)
    threads = min(torch.get_num_threads(), len(parts))
    left, errors = iter(parts), list[BaseException]()

    def member(*_: Any) -> None:
        try:
            for part in left:  # all threads take from one iterator
                work(part)
        except BaseException as error:
            errors.append(error)

    if threads < 2:
        member()
    elif not _forked and (parallel := _openmp()):
        parallel(member, threads)
    else:
        for _ in _pool(threads).map(member, itertools.repeat(None, threads)):
            pass
    if errors:
        raise errors[0]

"""Tests in a process of their own, without Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and the process of the tests has chosen
it where there is no GPU.
"""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, wraps
from importlib import import_module
from multiprocessing import get_context
from typing import Any, ParamSpec
from unittest.mock import patch

import torch

P = ParamSpec("P")


def compiled(test: Callable[P, None]) -> Callable[P, None]:
    """A test that runs where kernels are compiled; its arguments are to be pickled."""

    @wraps(test)
    def there(*args: P.args, **kwargs: P.kwargs) -> None:
        _process().submit(_run, test.__module__, test.__name__, args, kwargs).result()

    return there


@cache
def _process() -> ProcessPoolExecutor:
    process = ProcessPoolExecutor(1, get_context("spawn"))
    with patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        process.submit(_prepare).result()  # it begins now
    return process


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")


def _run(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    getattr(import_module(module), name).__wrapped__(*args, **kwargs)

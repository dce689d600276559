"""How functions are compiled by numba, for the processor that they run on.

numba keeps what it has compiled in a folder, and knows it by the file of the function alone: what a
compiled function takes from another file has to come as an argument.
"""

from collections.abc import Callable
from typing import Any

import numba
from numba.core import types

Decorator = Callable[[Callable[..., Any]], Any]


def _kept(compiler: Callable[..., Decorator], *arguments: Any, **options: Any) -> Decorator:
    """A decorator that compiles, and keeps what it has compiled where there is a place for it."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return compiler(*arguments, cache=True, **options)(function)
        except RuntimeError:  # no folder can be written to
            return compiler(*arguments, **options)(function)

    return compile_


compiled = _kept(numba.njit, nogil=True, fastmath={"contract"})
#: sums in any order
summing = _kept(numba.njit, nogil=True, fastmath={"contract", "reassoc"})


def called_through_pointer(arguments: int) -> Decorator:
    """A decorator for a function of so many int64: compiled once, and not into every caller."""
    return _kept(numba.cfunc, types.void(*[types.int64] * arguments))

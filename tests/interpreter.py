"""Triton's interpreter, made quicker for the tests, much of whose time it takes."""

import inspect
from functools import cache
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in inspect.getmembers(package) if core.is_builtin(one)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, one in _builtins(package):
        if getattr(package, name) is one:
            interpreter._patch_attr(package, name, one, builder, scope)


def quicken() -> None:
    """Let it find Triton's own functions once, not at every call inside a kernel."""
    interpreter._patch_builtin = _patch_builtin

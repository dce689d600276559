"""How functions are compiled by numba, for the processor that they run on, and kept on disk.

What is kept saves time and nothing else: where it cannot be read or written, everything is compiled
anew, with a warning.
"""

import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc
from numba.core.serialize import dumps

from mintnet_triton.kernels.backend import tell_of_compiling

Decorator = Callable[[Callable[..., Any]], Any]

_THIS_FILE = sha256(Path(__file__).read_bytes()).digest()
_warned = False


def _warn(folder: str | None, error: Exception) -> None:
    """Once a process: there is a file for each of many functions."""
    global _warned
    if _warned:
        return
    _warned = True
    where = f" in {folder}" if folder else ""
    warnings.warn(
        f"the cache of compiled kernels{where} cannot be used, so they are compiled anew: "
        f"{type(error).__name__}: {error}. NUMBA_CACHE_DIR chooses another folder",
        RuntimeWarning,
        stacklevel=2,
    )


class _WholeFile(IndexDataCacheFile):
    """Files whose contents are known to be whole, and of the key under which they are found.

    Machine code with some bytes wrong would take the process down; and of two processes that write
    at once, one may leave its code under the other's key.
    """

    def save(self, key: Any, data: Any) -> None:
        packed = dumps((key, data))
        super().save(key, (sha256(packed).digest(), packed))

    def load(self, key: Any) -> Any:
        found = super().load(key)
        if found is None:
            return None
        digest, packed = found
        if sha256(packed).digest() != digest:
            raise ValueError(f"{self._index_name} names a file that is damaged")
        owner, data = pickle.loads(packed)
        return data if owner == key else None


class _Cache(FunctionCache):
    """What numba keeps of a function, if it can; and a word before it compiles.

    It is known by the file of the function alone (and this one): what a compiled function takes
    from another file has to come as an argument.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        implementation = self._impl
        stamp = implementation.locator.get_source_stamp(), _THIS_FILE
        self._cache_file = _WholeFile(self.cache_path, implementation.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = None
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # unpickling what is damaged may raise anything
            _warn(self.cache_path, error)
            with suppress(OSError):
                self.flush()
        if found is None:
            tell_of_compiling(self._py_func.__module__, self.cache_path)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # of the disk, or of pickling what numba has made
            _warn(self.cache_path, error)


class _NoCache(NullCache):
    """Where no folder can be written to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._module = function.__module__

    def load_overload(self, sig: Any, target_context: Any) -> None:
        tell_of_compiling(self._module, None)


def _cache_of(function: Callable[..., Any]) -> _Cache | _NoCache:
    try:
        return _Cache(function)
    except (RuntimeError, OSError) as error:
        _warn(None, error)
        return _NoCache(function)


def _jit(**options: Any) -> Decorator:
    def compile_(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        dispatcher._cache = _cache_of(function)
        return dispatcher

    return compile_


compiled = _jit(fastmath={"contract"})
#: sums in any order
summing = _jit(fastmath={"contract", "reassoc"})


def called_through_pointer(arguments: int) -> Decorator:
    """A decorator for a function of so many int64: compiled once, and not into every caller."""
    signature = types.void(*[types.int64] * arguments)

    def compile_(function: Callable[..., Any]) -> Any:
        kinds = (signature.args, signature.return_type)
        callback: Any = CFunc(function, kinds, locals={}, options={})
        callback._cache = _cache_of(function)
        callback.compile()
        return callback

    return compile_

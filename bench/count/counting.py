"""What a piece of work does, counted: exact, without noise, and without a clock.

On a CPU, what torch's dispatcher is asked for, forward and backward. What an operator does inside,
its own buffers too, is not seen: this package's own operators declare their multiply-adds by
:func:`torch.utils.flop_counter.register_flop_formula`, or are refused. Nor are other Python threads
seen, so torch is told to use one.

Of the Triton kernels, and of the layer that numba compiles for CPUs, the launches, which are noted
but not run; beside the former, what a GPU would launch for torch's own operators.
"""

import gc
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mintnet_triton.kernels.cpu import mint_layer as cpu_mint_layer
from mintnet_triton.kernels.gpu import configs, launching

#: a count by its name; of everything, less is better
Figures = dict[str, int]

Work = Callable[[], object]

aten = torch.ops.aten

#: operators that give memory without writing to it
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}

#: operators that write to their first argument without reading it
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}

#: matrix products that torch has no formula for: multiply-adds, from arguments and result
PRODUCTS: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    aten.dot: lambda arguments, _: arguments[0].numel(),
    aten.vdot: lambda arguments, _: arguments[0].numel(),
    aten.mv: lambda arguments, _: arguments[0].numel(),
    aten.addmv: lambda arguments, _: arguments[1].numel(),
    aten.addr: lambda _, result: result.numel(),
    aten.addbmm: lambda arguments, _: arguments[1].numel() * arguments[2].shape[2],
}


class Counter(TorchDispatchMode):
    """Counts what torch's operators do in this thread within the ``with`` block.

    ``figures`` holds

    - multiply-adds: of matrix products and convolutions, taps beyond the border of an image too;
    - calls: of operators, views too;
    - bytes: read and written by all operators; an element that is read over and over by
      broadcasting counts once for each operator, and views move nothing;
    - allocations, allocated bytes: of tensors' memory;
    - peak bytes: the most that lived at once of what was allocated within the block.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        names = (
            "multiply-adds", "calls", "bytes", "allocations", "allocated bytes", "peak bytes",
        )  # fmt: skip
        self.figures: Figures = dict.fromkeys(names, 0)
        self._living = 0
        #: storages allocated within the block, by the address of their records
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.figures["calls"] += 1
        self.figures["multiply-adds"] += _multiply_adds(func, args, kwargs, result)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Count what is read, written and allocated."""
        declared = func._schema.arguments
        given = dict(zip((one.name for one in declared), args, strict=False)) | kwargs
        tensors = {one.name: _tensors(given.get(one.name)) for one in declared}
        written = [one.name for one in declared if one.alias_info and one.alias_info.is_write]
        unread = {one.name for one in declared if one.is_out}
        if func.overloadpacket in OVERWRITING:
            unread.add(declared[0].name)
        before = {tensor.untyped_storage()._cdata for found in tensors.values() for tensor in found}
        fresh = [one for one in _tensors(result) if one.untyped_storage()._cdata not in before]
        for tensor in fresh:
            self._allocate(tensor.untyped_storage())
        if func.overloadpacket in EMPTY or not (fresh or written):  # the latter is a view
            return
        reads = [one for name, found in tensors.items() if name not in unread for one in found]
        writes = fresh + [one for name in written for one in tensors[name]]
        self.figures["bytes"] += sum(map(_extent, reads + writes))

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:  # of a result with several tensors in it
            return
        # It lives as long as the memory does, whatever views of it come and go.
        self._storages[key] = weakref.ref(storage, partial(self._free, key, size))
        self.figures["allocations"] += 1
        self.figures["allocated bytes"] += size
        self._living += size
        self.figures["peak bytes"] = max(self.figures["peak bytes"], self._living)

    def _free(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self._living -= size


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _extent(tensor: Tensor) -> int:
    """Bytes of the elements that differ in their place."""
    if tensor.numel() == 0:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, step in pairs if step) * tensor.element_size()


def _multiply_adds(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = func.overloadpacket
    if func.namespace == "aten":  # one that works in place, like addmm_, is counted as its twin
        packet = getattr(aten, packet.__name__.removesuffix("_"), packet)
    if packet in flop_registry:
        flops: int = flop_registry[packet](*args, **kwargs, out_val=result)
        return flops // 2
    if packet in PRODUCTS:
        return PRODUCTS[packet](args, result)
    if func.namespace == "mintnet_triton":
        raise ValueError(
            f"operator {func} hides what it multiplies: give it a formula by "
            "torch.utils.flop_counter.register_flop_formula"
        )
    return 0


def count_operators(work: Work) -> Figures:
    """What :class:`Counter` counts of some work, the second time that it is done.

    The first time prepares what later calls need no more; under the counter, for Python too looks
    operators up at their first call. Memory that only the garbage collector can free is not freed
    meanwhile, so that the peak does not depend on when it runs.

    Raises:
        ValueError: an operator of this package has no formula for its multiply-adds.
    """
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    try:
        gc.disable()
        for _ in range(2):
            counter = Counter()
            with counter:
                work()
        return counter.figures
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


@contextmanager
def tiles_of(arch: str, operand: str) -> Iterator[None]:
    """Within the block, kernels are launched with the tables of an architecture.

    Args:
        operand: one of :data:`configs.OPERANDS`; of float32, it is the precision.
    """
    with (
        patch.object(configs, "architecture", lambda device: arch),
        patch.object(configs, "_tuned", dict),
        patch.object(
            launching, "default_precision", lambda: "tf32" if operand == "tf32" else "ieee"
        ),
    ):
        yield


class Launches(TorchDispatchMode):
    """Counts torch's operators that a GPU would launch something for, within this package's too.

    That is all but views and those that give memory without writing to it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mintnet_triton":
            key = "CUDA" if any(tensor.is_cuda for tensor in _tensors(args)) else "CPU"
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with self:  # which torch takes away from the operator
                return func.redispatch(keys, *args, **kwargs)
        aliases = [one.alias_info for one in func._schema.returns]
        is_view = all(alias is not None and not alias.is_write for alias in aliases)
        self.count += not (is_view or func.overloadpacket in EMPTY)
        return func(*args, **kwargs)


def count_launches(work: Work) -> Figures:
    """The launches of some work, and what the kernels declare of them, without running any.

    For each kernel: launches; the multiply-adds that the mask leaves (exact) and that its tiles do
    (scheduled); the bytes of its tensors. A kernel that declares nothing has launches alone, as
    torch's own operators have.
    """
    figures: defaultdict[str, int] = defaultdict(int)

    def note_launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        """In place of ``kernel[grid]``."""

        def launch(*arguments: Any, **constants: Any) -> None:
            name = kernel.fn.__name__.removesuffix("_kernel")
            figures[f"{name} launches"] += 1
            # Triton's interpreter keeps it elsewhere than its compiler.
            holder = kernel.__dict__ | kernel.__dict__.get("kwargs", {})
            declared = holder.get("launch_metadata")
            if declared is not None:
                values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
                figures[f"{name} exact"] += declared.exact(values)
                figures[f"{name} scheduled"] += declared.scheduled(grid, values)
                figures[f"{name} bytes"] += declared(grid, None, values)["bytes"]

        return launch

    launches = Launches()
    with patch.object(triton.runtime.jit.KernelInterface, "__getitem__", note_launch), launches:
        work()
    return {**figures, "torch launches": launches.count}


def count_compiled(work: Work) -> Figures:
    """What :func:`count_operators` counts of layers as numba compiles them, without running them.

    Beside it, ``compiled``: the multiply-adds of the tiles and taps that the compiled functions are
    given. The operators declare as many; but frozen weights go past torch's dispatcher, and there
    this is the only count of them.

    Tiles, and the lines of a canvas, are those of a machine with AVX-512, whatever this one has, so
    that the figures are the same everywhere. Not run, they need not suit this machine's vectors.
    """
    compiled = 0

    def note_forward(_: object, groups: Sequence[int], *arguments: Any) -> None:
        nonlocal compiled
        _, _, convs, _, _, centres, _, _, _, diagonal, lines = arguments
        plans = [*convs, *[centres] * bool(diagonal.size)]
        compiled += cpu_mint_layer.products(plans, lines, len(groups))

    def note_backward(_: object, groups: Sequence[int], *arguments: Any) -> None:
        nonlocal compiled
        convs, centres, plans, _, _, _, by_weights, lines = arguments[4:]
        plans = [*convs, *centres, *(plans if by_weights[0].size else ())]
        compiled += cpu_mint_layer.products(plans, lines, len(groups))

    def anew() -> None:
        nonlocal compiled
        compiled = 0
        work()

    with patch.multiple(
        cpu_mint_layer, forward_groups=note_forward, backward_groups=note_backward,
        VECTOR=16, MOST=14, OUTPUTS=5,
    ):  # fmt: skip
        figures = count_operators(anew)
    return figures | {"compiled": compiled}

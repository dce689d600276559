"""Executes the PTX that Triton compiles for a GPU, on a CPU: proof of the kernels without one.

    from mintnet_triton import use_backend
    from tests.ptx import executed

    with executed("sm_90") as launches, use_backend("triton"):  # or "sm_80"
        y = layer(x)  # on a CPU; every kernel is compiled, and its PTX executed on the tensors

Within the block, ``launching.launch`` compiles the kernel and executes it, whatever the kernel. A
:class:`KernelError` is raised where it does what it may not, with the line of the PTX and of the
source. This needs a process without Triton's interpreter (no TRITON_INTERPRET). For what may be
varied see :func:`executed`: when asynchronous work is done, the order of warps and blocks, which
blocks are executed, the PTX itself.

What is checked: bounds and alignment of global and shared memory; shared memory read before it is
written; races of warps between barriers, and of blocks, in whatever order they have run; what
``cp.async`` and ``wgmma`` have under way, which nobody else may touch; missing fences. What is not
known here, TMA and what belongs to it (mbarrier, bulk copies) and sm_100's tcgen05, is a fault that
names the instruction. The approximate functions (``ex2`` and the like) are exact here.

To read: :mod:`.program` (PTX), :mod:`.arithmetic`, :mod:`.shared` and :mod:`.memory` (who has
touched what), :mod:`.threads` (which threads run where), :mod:`.instructions`, :mod:`.transfers`
and :mod:`.matrix` (what each does), :mod:`.measure` (counts), :mod:`.launches`.
"""

from tests.ptx.launches import executed
from tests.ptx.measure import Report
from tests.ptx.threads import KernelError, Manner

__all__ = ["KernelError", "Manner", "Report", "executed"]

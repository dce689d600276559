"""Tiles chosen by the clock instead of by the tables of ``kernels/gpu/configs.py``."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mintnet_triton.checks import check_positive
from mintnet_triton.kernels import BackendError, use_backend
from mintnet_triton.mint import MintLayer
from mintnet_triton.views import twin

Timer = Callable[[Callable[[], object]], float]


def tune(
    module: nn.Module, batch: int = 128, timer: Timer | None = None
) -> dict[str, tuple[int, ...]]:
    """Find the fastest tiles for the Mint layers inside ``module``, by training steps on its GPU.

    Every shape (C, K) is measured once, for its dtype (or autocast's, if it is on), and for the
    precision of float32 that ``torch.set_float32_matmul_precision`` asks for. What is found is kept
    in a file, ``tiles.json`` in ``$MINTNET_TRITON_CACHE`` or ``~/.cache/mintnet_triton``, and used
    from then on by every process, at any batch size; delete the file to go back to the tables. The
    last bits of results may change, for sums are split otherwise. A minute or two a shape, mostly
    of compiling.

    Args:
        module: a layer, a network, or any module with Mint layers inside.
        batch: samples in a step that is timed.
        timer: runs a function several times and returns the time of one run;
            ``triton.testing.do_bench_cudagraph`` by default, for a small step takes longer to
            launch than to compute, whatever its tiles.

    Returns:
        For every shape the tile found: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages).

    Raises:
        BackendError: the layers are not where the kernels can run, or no tile fits.
        ValueError, TypeError: batch is not a positive integer, or ``module`` not a module.
    """
    (batch,) = check_positive(batch=batch)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    layers = {
        (layer.channels, layer.hidden): layer
        for layer in module.modules()
        if isinstance(layer, MintLayer)
    }
    with use_backend("triton"), torch.enable_grad():
        return dict(_tune_layer(layer, batch, timer) for layer in layers.values())


def _tune_layer(layer: MintLayer, batch: int, timer: Timer | None) -> tuple[str, tuple[int, ...]]:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph

    from mintnet_triton.kernels._library import compute_dtype
    from mintnet_triton.kernels.gpu import configs, launching

    if layer.context is not None:  # which changes nothing of its convolutions
        layer = twin(layer)
        layer.context, layer._modules = None, {**layer._modules, "context_network": None}
    weight = layer.conv2.weight
    x = torch.randn(batch, layer.channels, *layer.size, dtype=weight.dtype, device=weight.device)
    _step(layer, x)
    operand = configs.operand(compute_dtype(weight), launching.default_precision())
    arch = configs.architecture(weight.device)
    times: dict[configs.Tile, float] = {}
    of_table = configs.table(arch)[operand][0]
    for tile in dict.fromkeys([of_table, *configs.CANDIDATES[operand]]):
        with configs.using(arch, operand, layer.channels, layer.hidden, tile):
            try:
                times[tile] = (timer or do_bench_cudagraph)(lambda: _step(layer, x))
            except OutOfResources:  # more shared memory or registers than there are
                continue
    if not times:
        raise BackendError("no tile fits the memory of this GPU")
    best = min(times, key=times.__getitem__)
    return configs.remember(arch, operand, layer.channels, layer.hidden, best), best


def _step(layer: MintLayer, x: Tensor) -> None:
    y, log_det = layer(x)
    torch.autograd.grad((y, log_det), list(layer.parameters()), (x, torch.ones_like(log_det)))

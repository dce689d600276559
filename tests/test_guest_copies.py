"""Copies, pickles and threads: each is its own, and what cannot be copied is left alone."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mintnet_triton as mint
from mintnet_triton import kernels
from mintnet_triton.kernels import backend as backend_module
from tests.guest import (
    INVERTIBLE,
    KINDS,
    TORCHS_OWN,
    Doubled,
    assert_same,
    gradients,
    inputs,
    make,
    make_layer,
)


@TORCHS_OWN
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_compiled_and_frozen_modules_are_their_own(kind: str, how: str) -> None:
    module, x = make(kind), inputs()
    module.compile(backend="eager")
    module(x)
    with mint.frozen(module):
        if how == "deepcopy":
            twin = copy.deepcopy(module)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(module))
        else:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
    assert_same(twin(x), module(x))
    expected = make(kind)
    twin.load_state_dict(expected.state_dict())
    assert_same(twin(x), expected(x))


@pytest.mark.parametrize("name", ["t", "conv2.weight", "conv1.bias"])
def test_copies_of_parametrized_layers_are_not_frozen(name: str) -> None:
    """torch copies such a layer without asking it for its state."""
    layer, x = make_layer(), inputs()
    owner, _, tensor = name.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(owner), tensor, Doubled())
    with mint.frozen(layer):
        twin = copy.deepcopy(layer)
    assert twin._frozen is None
    assert_same(twin(x), layer(x))
    assert gradients(twin, twin(x)).keys() == dict(twin.named_parameters()).keys()


def test_blocks_of_two_threads_may_overlap() -> None:
    """Each ends for itself, in whatever order, and leaves nothing behind."""
    layer, x = make_layer(), inputs()
    precision = torch.get_float32_matmul_precision()
    makers: list[Callable[[], Any]] = [
        lambda: mint.frozen(layer),
        lambda: mint.use_backend("torch"),
        kernels.full_float32,
    ]
    torch.set_float32_matmul_precision("high")
    try:
        for make_block in makers:
            entered, left = threading.Event(), threading.Event()

            def first(make_block: Callable[[], Any], entered: Any, left: Any) -> None:
                with make_block():
                    entered.wait(60)
                left.set()

            def second(make_block: Callable[[], Any], entered: Any, left: Any) -> None:
                with make_block():
                    entered.set()
                    left.wait(60)

            threads = [
                threading.Thread(target=target, args=(make_block, entered, left))
                for target in (first, second)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert backend_module._choices == ["auto"]
    before = layer(x)
    with torch.no_grad():
        layer.t.add_(1)
    assert not torch.equal(layer(x)[0], before[0])
    with mint.frozen(layer):
        layer.double()
        with mint.frozen(layer):
            layer(x.double())
        layer(x.double())


class Watcher:
    """A hook with a state that cannot be copied."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __call__(self, module: nn.Module, given: Any, results: Any) -> None:
        with self.lock:
            pass


@pytest.mark.parametrize("kind", INVERTIBLE)
def test_what_cannot_be_copied_is_left_alone(kind: str, backend: str) -> None:
    module, x = make(kind), inputs()
    assert isinstance(module, mint.Invertible)
    module.lock = threading.Lock()  # type: ignore[assignment]
    module.loss = module(x)[1].sum()
    module.register_forward_hook(Watcher(threading.Lock()))
    z = module(x)[0].detach()
    result = mint.invert(module, z, certify=True)
    assert bool(result.converged.all())
    assert_same(result.x, x, rtol=1e-4, atol=1e-4)
    assert mint.verify(module, x[:1]).ok
    if isinstance(module, mint.MintNet):
        assert module.sample(2).shape == (2, 2, 4, 4)

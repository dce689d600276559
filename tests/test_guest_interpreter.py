"""The same in Triton's kernels, by their interpreter."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import mintnet_triton as mint
from tests.guest import (
    assert_same,
    gradients,
    inputs,
    make,
)


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where no GPU is")
@pytest.mark.parametrize("kind", ["layer", "conv"])
def test_the_same_in_kernels(kind: str) -> None:
    module, x = make(kind), inputs(batch=2).requires_grad_()
    expected = module(x)
    by_parameters = gradients(module, expected)
    with mint.use_backend("triton"):
        found = gradients(module, checkpoint(module, x, use_reentrant=False))
        assert_same(tuple(found.values()), tuple(by_parameters.values()), rtol=1e-4, atol=1e-4)
        gradients(module, module(inputs(batch=0)))
        twin = copy.deepcopy(module)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        results = module(x.detach().contiguous(memory_format=torch.channels_last))
        assert_same(results, expected, rtol=1e-4, atol=1e-4)
        if isinstance(twin, mint.MintLayer):
            prune.random_unstructured(twin.conv2, "weight", 0.3)
            results = twin(x)
            with mint.use_backend("torch"):
                assert_same(results, twin(x), rtol=1e-4, atol=1e-4)
            z = results[0].detach()
            assert_same(twin.inverse(z)[0], x.detach(), rtol=1e-4, atol=1e-4)
            twin.conv1.register_forward_hook(lambda *_: None)
            with pytest.raises(mint.BackendError, match="hooks look at its convolutions"):
                twin(x)

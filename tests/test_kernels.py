import importlib
import sys

import pytest
import torch

import mintnet_triton as mint
from mintnet_triton.kernels import backend, masked_conv2d


def test_kernels_refuse_the_top_level_name() -> None:
    assert "kernels" not in sys.modules
    with pytest.raises(ImportError, match=r"import mintnet_triton\.kernels"):
        importlib.import_module("kernels")


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = mint.MintLayer(1, 2, 2), torch.randn(1, 1, 2, 2)
    for name in ("auto", "torch"):
        with mint.use_backend(name):
            layer(x)
    with pytest.raises(ValueError, match="got 'cuda'"), mint.use_backend("cuda"):
        pass
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with mint.use_backend("triton"), pytest.raises(mint.BackendError, match="input is on cpu"):
        layer(x)
    monkeypatch.setattr(backend, "INTERPRETED", True)
    custom = mint.Activation("tanh", lambda a: a, torch.ones_like, torch.ones_like)
    false_tanh = mint.MintLayer(1, 2, 2, activation=custom)
    with mint.use_backend("triton"), pytest.raises(mint.BackendError, match="'tanh' is not one"):
        false_tanh(x)
    custom = mint.Activation("mine", lambda a: a, torch.ones_like, torch.ones_like)
    other = mint.MintLayer(1, 2, 2, activation=custom)
    with mint.use_backend("triton"), pytest.raises(mint.BackendError, match="'mine' is not one"):
        other(x)
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    with pytest.raises(mint.BackendError, match="not installed"), mint.use_backend("triton"):
        pass


def test_more_pixels_than_kernels_can_count_are_refused() -> None:
    side = 2**8
    x = torch.zeros(1)
    backend.check_pixels(x.expand(backend.MOST_PIXELS // side**2, 3, side, side))
    more = x.expand(1, 3, 1, backend.MOST_PIXELS + 1)
    message = rf"x has 1 x 1 x {more.shape[3]} pixels, .* at most {backend.MOST_PIXELS};"
    with mint.use_backend("triton"), pytest.raises(mint.BackendError, match=message):
        masked_conv2d(more, torch.zeros(3, 3, 3, 3), None, 3, "channel", "lower")

import importlib
import sys

import pytest

import mintnet_triton as mint


def test_kernels_refuse_the_top_level_name() -> None:
    assert "kernels" not in sys.modules
    with pytest.raises(ImportError, match=r"import mintnet_triton\.kernels"):
        importlib.import_module("kernels")


def test_backends() -> None:
    for name in ("auto", "torch"):
        with mint.use_backend(name):
            pass
    with pytest.raises(mint.BackendError, match="no Triton kernels"), mint.use_backend("triton"):
        pass
    with pytest.raises(ValueError, match="got 'cuda'"), mint.use_backend("cuda"):
        pass

"""Graphs that torch exports, in plain operators, and compiles around an inverse."""

import io
import subprocess
import sys

import pytest
import torch

from tests.guest import (
    KINDS,
    Calling,
    assert_rounded,
    assert_same,
    inputs,
    make,
    make_flow,
)


@pytest.mark.parametrize(
    ("kind", "strict"), [*((kind, False) for kind in (*KINDS, "conv", "log_prob")), ("layer", True)]
)
def test_export_with_a_batch_of_any_size(kind: str, strict: bool) -> None:
    """In plain operators of torch, so that it runs where this package is not."""
    flow = make_flow()
    module = Calling(flow, flow.log_prob) if kind == "log_prob" else make(kind)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(module, (inputs(),), dynamic_shapes=({0: batch},), strict=strict)
    assert not any("mintnet" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 3, 6):
        x = inputs(batch=size)
        assert_rounded(loaded(x), module(x))


def test_export_in_a_fresh_process() -> None:
    """Where nothing has been imported before that cannot be while a graph is traced."""
    program = """
import sys, torch, mintnet_triton as mint
flow, x = mint.MintNet(2, 4, 2, 4, squeezes=1), torch.randn(3, 2, 4, 4)
batch = torch.export.Dim("batch")
exported = torch.export.export(flow, (x,), dynamic_shapes=({0: batch},)).module()
assert "numba" not in sys.modules
torch.testing.assert_close(exported(x[:2]), flow(x[:2]))
compiled = torch.compile(mint.MintLayer(2, 4, 4), backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), compiled._orig_mod(x))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_an_inverse_is_not_exported_but_compiled_around() -> None:
    flow = make_flow()
    z = torch.randn(2, *flow.latent_shape)

    with pytest.raises(NotImplementedError, match=r"z has no values while a graph is exported"):
        torch.export.export(Calling(flow, flow.inverse), (z,), strict=False)
    compiled = torch.compile(lambda z: flow.inverse(2 * z), backend="eager")
    assert_same(compiled(z), flow.inverse(2 * z))

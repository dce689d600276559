"""Flows as invertible modules of FrEIA."""

import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():  # Python warns of an escape in a docstring of FrEIA 0.2
    warnings.filterwarnings("ignore", ".*invalid escape sequence")
    pytest.importorskip("FrEIA")
    from FrEIA.framework import GraphINN, InputNode, Node, OutputNode, SequenceINN
    from FrEIA.modules import AllInOneBlock, IRevNetDownsampling, IRevNetUpsampling

import mintnet_triton as mint
from mintnet_triton.adapters.freia import MintModule
from tests.adapters.flows import (
    SHAPE,
    assert_trains,
    digits,
    exact_log_det,
    make_conditional_flow,
    make_flow,
    samples,
)


def test_jacobians_of_the_direction_taken() -> None:
    model = make_flow()
    module = MintModule([SHAPE], model=model)
    assert module.output_dims([SHAPE]) == [(8, 2, 1)]
    x = samples(3)
    (z,), log_det = module([x])
    torch.testing.assert_close(z, model(x)[0])
    expected = exact_log_det(lambda v: model(v[None])[0][0], x)
    torch.testing.assert_close(log_det, expected)
    (again,), back = module([z], rev=True)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(back, -expected)
    torch.testing.assert_close(module((x,), jac=False)[0], (z,))


def test_gradients_in_a_graph() -> None:
    """Two flows that see halves apart, in a graph of two inputs and outputs."""
    first, second = make_flow(), make_flow()
    inputs = [InputNode(*SHAPE, name=name) for name in "ab"]
    nodes = [
        Node(one, MintModule, {"model": model})
        for one, model in zip(inputs, (first, second), strict=True)
    ]
    graph = GraphINN([*inputs, *nodes, *(OutputNode(node) for node in nodes)])
    x = [samples(3), samples(3)]
    z, log_det = graph(x)
    (z1, log_det1), (z2, log_det2) = first(x[0]), second(x[1])
    torch.testing.assert_close(tuple(z), (z1, z2))
    torch.testing.assert_close(log_det, log_det1 + log_det2)
    again, back = graph(z, rev=True)
    torch.testing.assert_close(list(again), x)
    torch.testing.assert_close(back, -log_det)
    upstream = [samples(3, shape=()), *(samples(3, shape=first.latent_shape) for _ in range(2))]
    parameters = list(graph.parameters())
    assert len(parameters) == len([*first.parameters(), *second.parameters()])
    found = torch.autograd.grad([log_det, *z], parameters, upstream)
    wanted = torch.autograd.grad([log_det1 + log_det2, z1, z2], parameters, upstream)
    torch.testing.assert_close(found, wanted)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def test_a_mixed_sequence_trains_and_inverts() -> None:
    inn = SequenceINN(1, 8, 8)
    inn.append(MintModule, model=mint.MintPair(1, 8, 4))
    inn.append(IRevNetDownsampling)
    inn.append(AllInOneBlock, subnet_constructor=conv)
    inn.append(MintModule, model=mint.MintLayer(4, 4, 4))

    def loss() -> torch.Tensor:
        z, log_det = inn(digits())
        return torch.as_tensor((0.5 * z.square().flatten(1).sum(1) - log_det).mean())

    assert_trains(loss, inn.parameters())
    z, log_det = inn(digits())
    assert z.shape == (len(digits()), 4, 4, 4)
    again, back = inn(z, rev=True)
    torch.testing.assert_close(again, digits(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back, -log_det, rtol=1e-3, atol=1e-3)
    exact = exact_log_det(lambda v: inn(v[None])[0][0], digits()[0])
    torch.testing.assert_close(log_det[0], exact, rtol=1e-3, atol=1e-3)


def test_a_conditional_sequence() -> None:
    model = make_conditional_flow()
    inn = SequenceINN(*SHAPE)
    inn.append(MintModule, model=make_flow())
    inn.append(IRevNetUpsampling)
    inn.append(MintModule, cond=0, cond_shape=(3,), model=model)
    inn.double()
    x, context = samples(4), samples(4, shape=(3,))
    z, log_det = inn(x, [context])
    again, back = inn(z, [context], rev=True)
    torch.testing.assert_close((again, back), (x, -log_det))
    torch.testing.assert_close(inn(x[1:2], [context[1:2]])[0], z[1:2])
    assert not torch.allclose(inn(x, [context.flip(0)])[0], z)
    with pytest.raises(ValueError, match=r"dims_c must be \[\(3,\)\].* got \[\(4,\)\]"):
        MintModule([SHAPE], [(4,)], model=model)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be an Invertible, got Linear"):
        MintModule([SHAPE], model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"dims_in must be \[\(2, 4, 2\)\].* got \[\(2, 4, 4\)\]"):
        MintModule([(2, 4, 4)], model=make_flow())
    poor = MintModule([SHAPE], model=make_flow(), solver=mint.FixedPoint(0.1, 1, tolerance=1e-12))
    with pytest.raises(mint.NotConvergedError):
        poor([samples(2, shape=(8, 2, 1))], rev=True)

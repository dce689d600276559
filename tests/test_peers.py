import copy
import math
import runpy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import peers
from bench.peers import PEERS, PeerFlow, ResNet, Shape, count_parameters

for needed in ("zuko", "normflows", "FrEIA", "torchflows"):
    pytest.importorskip(needed)

EXACT = [name for name, peer in PEERS.items() if peer.log_det == "exact"]
#: whose outputs or variables' own networks are more than a small MintNet has in all
LARGE = ("nsf", "nsf_coupling", "naf", "multiscale_real_nvp")
#: more columns than rows, so that no transposition goes unseen
SHAPE: Shape = (1, 4, 8)


@pytest.fixture(autouse=True)
def _numpy_seed() -> None:
    np.random.seed(0)


def far_from_identity(name: str, shape: Shape = SHAPE, parameters: int = 20_000) -> PeerFlow:
    """A peer in float64, its ActNorms set by a batch, then every weight moved."""
    flow = PEERS[name].build(shape, parameters).double()
    flow(torch.randn(16, *shape, dtype=torch.float64))
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return flow.eval()


def exact_log_det(flow: PeerFlow, x: Tensor) -> Tensor:
    """log |det d z / d x| at one sample x (C, H, W), by autograd."""
    matrix = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x)
    log_det: Tensor = torch.linalg.slogdet(torch.as_tensor(matrix).reshape(2 * (x.numel(),)))[1]
    return log_det


@pytest.mark.parametrize("name", EXACT)
def test_log_det_is_that_of_the_jacobian(name: str) -> None:
    flow = far_from_identity(name)
    x = 2 * torch.randn(2, *SHAPE, dtype=torch.float64)
    _, log_det = flow(x)
    expected = torch.stack([exact_log_det(flow, sample) for sample in x])
    assert float(expected.abs().min()) > 0.1
    torch.testing.assert_close(log_det, expected, rtol=1e-9, atol=1e-9)


def assert_unbiased(estimates: Tensor, exact: Tensor) -> None:
    """Within five standard errors, which have to be small beside the number itself."""
    error = estimates.std() / math.sqrt(len(estimates))
    assert 0 < float(error) < 0.04 * float(exact.abs())
    assert float((estimates.mean() - exact).abs()) < 5 * float(error)


def test_log_det_of_ffjord() -> None:
    # Of few variables, for a trace of many is small beside the scatter of its estimates.
    flow = far_from_identity("ffjord", (1, 1, 2))
    x = 2 * torch.randn(1, 1, 1, 2, dtype=torch.float64)
    with torch.no_grad():
        estimates = flow(x.repeat(5000, 1, 1, 1))[1]
    transform = flow.flow.transform
    transform.atol = transform.rtol = 1e-8
    exact = exact_log_det(flow, x[0])
    assert_unbiased(estimates, exact)
    transform.exact = True
    torch.testing.assert_close(flow(x)[1][0].detach(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("training", "count"), [(False, 10), (True, 60)])
def test_log_det_of_the_residual_flow(training: bool, count: int) -> None:
    flow = far_from_identity("residual")
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if name.endswith(".weight"):  # nearly the identity, so that all powers have a trace
                nn.init.dirac_(parameter).add_(0.02 * torch.randn_like(parameter))
    flow.eval()
    x = 2 * torch.randn(1, *SHAPE, dtype=torch.float64)
    exact = exact_log_det(flow, x[0])
    flow.train(training)
    with torch.no_grad():
        # All samples of a batch share the length of the series.
        calls = [flow(x.repeat(50, 1, 1, 1))[1].mean() for _ in range(count)]
    assert_unbiased(torch.stack(calls), exact)


def test_the_residual_flow_contracts_only_while_its_norms_are_up_to_date() -> None:
    flow = far_from_identity("residual").train()
    for parameter in flow.parameters():
        nn.init.normal_(parameter)
    z = torch.randn(4, 32, dtype=torch.float64)
    with pytest.raises(peers.FixedPointError, match="off by"):
        flow.decode(z)
    flow.eval()
    torch.testing.assert_close(flow(flow.decode(z))[0], z, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", PEERS)
def test_log_prob_is_that_of_the_change_of_variables(name: str) -> None:
    flow = far_from_identity(name)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.manual_seed(1)
    np.random.seed(1)
    z, log_det = flow(x)
    assert z.shape == (3, 32)
    torch.manual_seed(1)
    np.random.seed(1)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    torch.testing.assert_close(flow.log_prob(x), normal.log_prob(z).sum(1) + log_det)


@pytest.mark.parametrize("name", ["nsf", "nsf_coupling"])
def test_splines_end_in_lines(name: str) -> None:
    flow = far_from_identity(name)
    x = 50 + torch.rand(3, *SHAPE, dtype=torch.float64)
    standardise = flow.flow().transform.transforms[0]
    torch.testing.assert_close(flow(x), standardise.call_and_ladj(x.flatten(1)))


@pytest.mark.parametrize("name", ["maf", "nsf", "naf"])
def test_masked_networks_see_all_that_precedes(name: str) -> None:
    transform = far_from_identity(name).flow.transform.transforms[1]
    assert 2 < int(transform.order.max()) + 1 <= transform.passes <= 32
    network = transform.hyper
    for layer in network:
        if isinstance(layer, nn.Linear):
            layer.weight.data.abs_()
            layer.bias.data.fill_(1.0)  # no unit is off
    x = torch.rand(32, dtype=torch.float64)
    seen = torch.as_tensor(torch.autograd.functional.jacobian(network, x)) != 0
    precedes = transform.order > transform.order[:, None]
    assert torch.equal(seen, precedes.T.repeat_interleave(transform.total, 0))


def test_naf_inverts_or_refuses() -> None:
    flow = far_from_identity("naf")
    x = 0.1 * torch.randn(4, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(flow.decode(flow(x)[0]), x, rtol=0, atol=1e-4)
    # Before it is trained, bisection would have to look beyond its bounds.
    with pytest.raises(peers.FixedPointError, match="off by"):
        flow.sample(5)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "naf"])
def test_samples_come_from_the_latents(name: str) -> None:
    flow = far_from_identity(name)
    x = flow.sample(5, torch.Generator().manual_seed(3))
    assert x.shape == (5, *SHAPE)
    assert not x.requires_grad
    noise = torch.randn(5, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        z, _ = flow(x)
    tolerance = {"ffjord": 1e-3, "residual": 1e-2}.get(name, 1e-8)
    torch.testing.assert_close(z, noise, rtol=0, atol=tolerance)
    assert float((x.flatten(1) - noise).abs().max()) > 0.1


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(
    ("shape", "parameters"), [((1, 8, 8), 86_292), ((1, 28, 28), 805_272), ((3, 32, 32), 2_000_000)]
)
def test_parameters_are_within_a_tenth(name: str, shape: Shape, parameters: int) -> None:
    # zuko takes seconds to find the masks of so many variables, and of their splines.
    if name in ("maf", "naf") and shape[1] == 32:
        shape = (3, 16, 16)
    if name == "nsf" and shape[1] > 8:
        shape = (shape[0], 12, 12)
    flow = PEERS[name].build(shape, parameters)
    count = sum(p.numel() for p in flow.parameters() if p.requires_grad)
    assert 0.9 * parameters <= count <= 1.1 * parameters
    assert {p.dtype for p in flow.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", [pytest.param("nsf", marks=pytest.mark.full), *LARGE[1:]])
def test_a_budget_below_the_outputs_is_refused(name: str) -> None:
    """That of the mnist5k preset."""
    with pytest.raises(peers.BudgetError, match="has no width for 30858 parameters"):
        PEERS[name].build((1, 28, 28), 30_858)


@pytest.mark.parametrize("name", PEERS)
def test_training_lowers_the_loss_of_every_weight(name: str) -> None:
    # torchflows makes every image one of 32 x 32 pixels first: few networks are enough.
    shape = SHAPE if name == "multiscale_real_nvp" else (1, 8, 8)
    flow = PEERS[name].build(shape, 86_292 if name in LARGE and shape != SHAPE else 20_000)
    before = copy.deepcopy(flow.state_dict())
    x = 2 + torch.randn(32, *shape).cumsum(3)
    optimiser = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = -flow.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) / 3 < losses[0] - 1
    after = flow.state_dict()
    for key, parameter in flow.named_parameters():
        assert torch.isfinite(parameter).all()
        # How long a power series is, normflows keeps among its parameters, but draws no gradient;
        # torchflows has empty ones.
        if parameter.requires_grad and not key.endswith((".geom_p", ".lamb", ".global_theta_flat")):
            assert not torch.equal(before[key], after[key]), key
    if name != "naf":
        assert torch.isfinite(flow.eval().sample(3)).all()


def test_bad_arguments() -> None:
    glow = PEERS["glow"]
    with pytest.raises(peers.BudgetError, match=r"Glow over .*\(1, 8, 8\).* 100 .*nearest has"):
        glow.build((1, 8, 8), 100)
    with pytest.raises(ValueError, match=r"shape must divide by 4, got \(1, 6, 8\)"):
        glow.build((1, 6, 8), 20_000)
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\), got \(8, 8\)"):
        glow.build((8, 8), 20_000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each size of shape must be at least 1, got 0"):
        glow.build((0, 8, 8), 20_000)
    with pytest.raises(TypeError, match="parameters must be an integer, got 20000"):
        glow.build((1, 8, 8), 2e4)  # type: ignore[arg-type]
    flow = PEERS["nice"].build((1, 8, 8), 20_000)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 8, 8\)"):
        flow.log_prob(torch.randn(2, 1, 8, 4))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        flow.sample(0)
    with torch.no_grad():
        next(flow.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="samples holds"):
        flow.sample(2)


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = PEERS[name].library
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(peers.MissingLibraryError, match=f"pip install {package}"):
        PEERS[name].build((1, 8, 8), 20_000)


def test_the_registry_needs_no_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for peer in PEERS.values():
        monkeypatch.setitem(sys.modules, peer.library, None)
    runpy.run_path(peers.__file__, run_name="__main__")
    rows = capsys.readouterr().out.strip().splitlines()[2:]
    for row, peer in zip(rows, PEERS.values(), strict=True):
        assert [part.strip() for part in row.strip("|").split("|")][:2] == [peer.name, peer.library]


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_resnet_has_the_parameters_of_its_paper(depth: int, millions: float) -> None:
    """Table 6 of He et al. 2016."""
    assert round(count_parameters(ResNet(depth=depth)) / 1e6, 2) == millions


def test_resnet() -> None:
    network = ResNet(channels=1, classes=7)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 38
    sizes: list[Any] = []
    network.blocks.register_forward_hook(lambda module, given, made: sizes.append(made.shape))
    log_probs = network(torch.randn(3, 1, 28, 28))
    assert sizes == [(3, 64, 7, 7)]
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2, got 18"):
        ResNet(depth=18)
